"""``make gpu``'s programme, with stand-ins for the GPU, the suite and the benchmark."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpunn.profiling import gpu_run

SUITE = """
import pytest

@pytest.fixture
def broken():
    raise RuntimeError

def test_right(): pass
def test_wrong(): assert not "wrong"
@pytest.mark.parametrize("word", ["with spaces"])
def test_word(word): assert not word
def test_broken(broken): pass
@pytest.mark.skip(reason="of a reason")
def test_skipped(): pass
"""

Main = Callable[..., tuple[int, dict[str, Any], float]]


def python(code: str) -> list[str]:
    """A command that runs some Python."""
    return [sys.executable, "-c", code]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    """gpu_run.main with stand-ins; returns its exit status, its summary, and its seconds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(gpu_run, "GRACE", 1.0)
    monkeypatch.setattr(gpu_run, "OVERRUN", 2.5)
    monkeypatch.setattr(gpu_run, "WORTHWHILE", 1.0)
    monkeypatch.setattr(gpu_run, "LAST_WORDS", 1.5)

    def run(
        tests: str, benchmark: str, budget: float = 60, device: str | None = "a GPU"
    ) -> tuple[int, dict[str, Any], float]:
        monkeypatch.setattr(gpu_run, "device_name", lambda: device)
        monkeypatch.setattr(gpu_run, "tests_command", lambda: python(tests))
        monkeypatch.setattr(gpu_run, "benchmark_command", lambda seconds, path: python(benchmark))
        started = time.monotonic()
        status = gpu_run.main(["--budget", str(budget), "--out", "out", "--commit", "abc"])
        summary = json.loads(Path("out", "summary.json").read_text())
        return status, summary, time.monotonic() - started

    return run


def test_all_is_well(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0, and the table comes last and holds the benchmark's lines."""
    status, summary, _ = main(
        "print('[gw0] [100%] PASSED tests/test_a.py::test_a ')", "print('linear 1.2 × torch')"
    )
    assert status == 0
    assert summary["verdict"] == "passed"
    assert summary["counts"] == {"passed": 1}
    table = capsys.readouterr().out.split("=" * 100)[1]
    for part in ("1 passed", "linear 1.2 × torch", "a GPU", "torch ", "abc", " of 60", "passed"):
        assert part in table
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "benchmark.log",
        "summary.json",
        "tests.log",
    ]


def test_a_failed_test_fails_the_run(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name is in the table; the benchmark runs all the same."""
    tests = "print('[gw3] [ 50%] FAILED tests/test_a.py::test_a[x y] '); raise SystemExit(1)"
    status, summary, _ = main(tests, "print('measured')")
    assert status == 1
    assert summary["failures"] == ["tests/test_a.py::test_a[x y]"]
    table = capsys.readouterr().out.split("=" * 100)[1]
    assert "FAILED tests/test_a.py::test_a[x y]" in table
    assert "measured" in table


def test_a_failed_benchmark_fails_the_run(main: Main) -> None:
    """And its exit status is in the summary."""
    status, summary, _ = main("", "raise SystemExit(3)")
    assert status == 1
    assert "exit status 3" in summary["benchmark"]


def test_the_budget_is_kept(main: Main) -> None:
    """A suite and a benchmark that would take for ever are stopped; what they printed counts."""
    tests = "import time; print('[gw0] [ 1%] PASSED tests/test_a.py::test_a '); time.sleep(600)"
    status, summary, seconds = main(tests, "import time; time.sleep(600)", budget=10)
    assert status == 1
    assert seconds < 10
    assert summary["counts"] == {"passed": 1}
    assert "stopped at its limit" in summary["tests"]
    assert "stopped at its limit" in summary["benchmark"]


def test_a_benchmark_without_time_is_not_started(main: Main) -> None:
    """The table says so, and the run does not count as passed."""
    status, summary, _ = main("", "print('measured')", budget=3)
    assert status == 1
    assert "not started" in summary["benchmark"]
    assert not Path("out", "benchmark.log").exists()


def test_no_gpu(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is run, the message says why, and the status differs from a failure's."""
    status, summary, _ = main("print('ran')", "print('ran')", device=None)
    assert status == 2
    captured = capsys.readouterr()
    assert "no GPU" in captured.err
    assert "ran" not in captured.out
    assert "no GPU" in summary["verdict"]


def test_not_a_checkout(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """Without tests to run, the message says where it looked."""
    Path("tests").rmdir()
    assert main("", "")[0] == 2
    assert "no folder tests" in capsys.readouterr().err


def test_what_ignores_an_interrupt_is_killed_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The program ignores SIGINT and its child would outlive it."""
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)
    beats = tmp_path / "beats"
    child = f"""
import time
while True:
    open({str(beats)!r}, "a").write("a")
    time.sleep(0.05)
"""
    code = f"""
import signal, subprocess, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen({python(child)!r})
time.sleep(600)
"""
    step = gpu_run.run_logged(python(code), tmp_path / "log", 3)
    assert not step.succeeded
    assert step.seconds < 10
    n_beats = beats.stat().st_size
    assert n_beats > 0
    time.sleep(0.5)
    assert beats.stat().st_size == n_beats


def test_kernels_are_not_interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TRITON_INTERPRET does not reach the programs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; print(os.environ.get('TRITON_INTERPRET'))"
    assert gpu_run.run_logged(python(code), tmp_path / "log", 60).output == "None\n"


def test_counts_what_pytest_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Read from a real run of pytest-xdist: passed, failed, skipped, and a broken fixture."""
    monkeypatch.setattr(gpu_run, "N_WORKERS", 1)
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    step = gpu_run.run_logged([*gpu_run.tests_command(), str(suite)], tmp_path / "log", 120)
    counted = gpu_run.count_tests(step.output)
    assert counted.counts == {"passed": 1, "failed": 2, "error": 1, "skipped": 1}
    names = {name.split("::")[1] for name in counted.failures}
    assert names == {"test_wrong", "test_word[with spaces]", "test_broken"}
    assert not step.succeeded
