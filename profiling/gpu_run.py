"""A GPU machine's programme within a time budget: the tests of kernels, then the benchmark.

``make gpu`` installs the package and calls this from the root of a checkout. The tests may take
``TESTS_SHARE`` of the time that is left, the benchmark what then remains; each is stopped at its
limit, and what it had printed by then still counts. The folder ``--out`` receives the two logs,
the benchmark's numbers and ``summary.json``; a short table is printed last.

Exit status: 0 if all is well, 1 if a test or the benchmark failed or was stopped, 2 if there is
nothing to run on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FILES = ("tests.log", "benchmark.log", "benchmark.json", "summary.json")
PACKAGES = ("torch", "triton", "numpy", "cupy-cuda12x", "cupy-cuda13x")
N_WORKERS = min(16, os.cpu_count() or 8)
SAME_EVERYWHERE = (
    "compiles", "architecture", "cuda_sources", "reference", "packaging", "host", "host_build",
    "machine_code", "interpreter", "closeness", "demo", "examples", "checkpoint",
)  # fmt: skip
"""Files of tests that run no kernel on a GPU, or none at all: they are left to CI."""
N_FAILURES_SHOWN, N_TABLE_LINES = 20, 60

# How the time is shared out, in seconds but for the first.
TESTS_SHARE = 0.6  # of what is left when the tests start
GRACE = 15.0  # for a program that was interrupted to report what it found
OVERRUN = 30.0  # the benchmark's start, its last kernel and its table, beyond its measurements
WORTHWHILE = 20.0  # the least time to measure for
LAST_WORDS = 2.0  # the table at the end
PAUSE = 0.2  # between two looks at a running program

VERDICT = re.compile(r"^\[gw\d+\] \[[^]]*\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (\S.*?)\s*$")
FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+\.py(?:::.*?)?)(?: - .*)?$")


@dataclass(frozen=True)
class Step:
    """One program that was run: how it ended, in how long, and what it printed."""

    succeeded: bool
    outcome: str
    seconds: float
    output: str


@dataclass(frozen=True)
class TestCounts:
    """What pytest said, read line by line, so that a run that was stopped counts too."""

    __test__ = False  # pytest takes a class of such a name for tests

    counts: dict[str, int]
    failures: list[str]

    def __str__(self) -> str:
        words = [f"{number} {verdict}" for verdict, number in self.counts.items()]
        return ", ".join(words) or "no test reported"


def tests_command() -> list[str]:
    """All that runs kernels on a GPU, in parallel, one line a test.

    A file's tests stay in one process as long as others have work: they share compiled kernels.
    """
    options = ["-n", str(N_WORKERS), "--dist", "worksteal", "--timeout=240", "-v", "--tb=short"]
    options.append("-rfEs")
    options += [f"--ignore=tests/test_{name}.py" for name in SAME_EVERYWHERE]
    return [sys.executable, "-m", "pytest", *options]


def benchmark_command(seconds: float, results: Path) -> list[str]:
    """Every operator's benchmark, spread over so many seconds."""
    options = ["--all", "--no-static", "--seconds", str(int(seconds)), "--json", str(results)]
    return [sys.executable, "-m", "gpunn", "profile", *options]


def device_name() -> str | None:
    """The GPU, or None where PyTorch finds none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def commit_of(folder: Path) -> str:
    """The commit that is checked out, with a + if files were changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None or not (head := git("rev-parse", "--short", "HEAD")):
        return "unknown"
    return f"{head}+" if git("status", "--porcelain") else head


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on."""
    installed = {package.name: package.version for package in metadata.distributions()}
    found = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), "cuda": str(torch.version.cuda), **found}


def run_logged(command: Sequence[str], log: Path, limit: float) -> Step:
    """Run a program, its output going to a log and to the terminal, for at most ``limit`` seconds.

    Near the limit it is interrupted, as by Ctrl-C, so that it can report; at the limit it and all
    that it started are killed. Whatever the environment says, kernels are not interpreted.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.update(PYTHONUNBUFFERED="1", COLUMNS="120")
    started = time.monotonic()
    interrupted = False
    with log.open("wb") as sink, log.open(encoding="utf-8", errors="replace") as echo:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a process group of its own, to be killed as one
        )
        try:
            while process.poll() is None and (elapsed := time.monotonic() - started) < limit:
                if elapsed > limit - GRACE and not interrupted:
                    process.send_signal(signal.SIGINT)
                    interrupted = True
                time.sleep(PAUSE)
                print(echo.read(), end="", flush=True)
        finally:
            status = process.poll()
            _kill_group(process)
        print(echo.read(), end="", flush=True)
    output = log.read_text(encoding="utf-8", errors="replace")
    outcome = "finished" if status == 0 else f"failed with exit status {status}"
    if interrupted:
        outcome = f"stopped at its limit of {limit:.0f} s"
    succeeded = status == 0 and not interrupted
    return Step(succeeded, outcome, time.monotonic() - started, output)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and whatever it left running."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def count_tests(output: str) -> TestCounts:
    """Read the verdicts in the output of ``pytest -n … -v -rfE``."""
    counts: Counter[str] = Counter()
    failures: dict[str, None] = {}
    for line in output.splitlines():
        if verdict := VERDICT.match(line):
            counts[verdict[1].lower()] += 1
            if verdict[1] in ("FAILED", "ERROR"):
                failures[verdict[2]] = None
        elif failure := FAILURE.match(line):
            failures[failure[1]] = None
    return TestCounts(dict(counts), list(failures))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpunn.profiling.gpu_run", description=__doc__)
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--started", type=float, default=time.time(), help="when they began")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the results")
    parser.add_argument("--commit", default="", help="where the folder is not a git checkout")
    return parser.parse_args(arguments)


def _obstacle(device: str | None) -> str:
    if device is None:
        return f"PyTorch {torch.__version__} finds no GPU on this machine"
    if not Path("tests").is_dir():
        return f"{Path.cwd()} has no folder tests: run this from the root of a checkout"
    return ""


def _summary(
    options: argparse.Namespace, device: str | None, tests: Step, benchmark: Step
) -> dict[str, Any]:
    counted = count_tests(tests.output)
    passed = tests.succeeded and benchmark.succeeded
    return {
        "tests": f"{counted} in {tests.seconds:.0f} s: {tests.outcome}",
        "counts": counted.counts,
        "failures": counted.failures,
        "benchmark": f"{benchmark.seconds:.0f} s: {benchmark.outcome}",
        "device": device,
        "versions": versions(),
        "commit": options.commit or commit_of(Path.cwd()),
        "seconds": round(time.time() - options.started),
        "budget": round(options.budget),
        "verdict": "passed" if passed else "FAILED",
    }


def _table(summary: dict[str, Any], benchmark: Step) -> str:
    failures: list[str] = summary["failures"]
    lines = ["", "=" * 100, f"tests      {summary['tests']}"]
    lines += [f"           FAILED {name}" for name in failures[:N_FAILURES_SHOWN]]
    if len(failures) > N_FAILURES_SHOWN:
        lines.append(f"           and {len(failures) - N_FAILURES_SHOWN} more, in tests.log")
    lines.append(f"benchmark  {summary['benchmark']}")
    printed = [line.rstrip() for line in benchmark.output.splitlines() if line.strip()]
    lines += printed[-N_TABLE_LINES:]
    lines.append(f"device     {summary['device']}")
    lines.append("versions   " + ", ".join(f"{k} {v}" for k, v in summary["versions"].items()))
    lines.append(f"commit     {summary['commit']}")
    lines.append(f"seconds    {summary['seconds']} of {summary['budget']}")
    lines.append(f"verdict    {summary['verdict']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests and the benchmark, and say what came of them."""
    options = _options(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of an earlier run
        (out / name).unlink(missing_ok=True)
    device = device_name()
    if obstacle := _obstacle(device):
        print(f"gpu_run: {obstacle}; nothing was run", file=sys.stderr)
        (out / "summary.json").write_text(json.dumps({"device": device, "verdict": obstacle}))
        return 2

    def time_left() -> float:
        return float(options.started + options.budget - time.time())

    tests = run_logged(tests_command(), out / "tests.log", time_left() * TESTS_SHARE)
    seconds = time_left() - OVERRUN
    if seconds < WORTHWHILE:
        benchmark = Step(False, "not started: too little time was left", 0.0, "")
    else:
        command = benchmark_command(seconds, out / "benchmark.json")
        benchmark = run_logged(command, out / "benchmark.log", time_left() - LAST_WORDS)
    summary = _summary(options, device, tests, benchmark)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(_table(summary, benchmark))
    return 0 if summary["verdict"] == "passed" else 1


if __name__ == "__main__":
    raise SystemExit(main())
