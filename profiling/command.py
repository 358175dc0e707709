"""``gpunn profile``: what kernels cost by their machine code, and how fast they are on a GPU."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from gpunn.kernels.cuda import CudaKernel
from gpunn.kernels.launch import Call, Launch
from gpunn.kernels.nvrtc import NoCompilerError
from gpunn.profiling.bench import bench, described, why_not_here
from gpunn.profiling.case import Case
from gpunn.profiling.cases import CASES
from gpunn.profiling.preparation import prepare
from gpunn.profiling.results import (
    SHORT,
    TIME_RAN_OUT,
    Results,
    Roof,
    Row,
    number,
    speed_table,
    table,
    write_json,
)
from gpunn.profiling.static_report import MULTIPROCESSORS, Report, chip, report

STATIC_SHARE = 0.3
"""Of the time, for the static report where there is a GPU to measure on."""
PREPARATION_SHARE = 0.5
"""Of what is then left, at most, for checking and compiling."""
MOST_WORKERS = 4


@dataclass
class StaticRow:
    """One kernel in one configuration, as compiled for one chip."""

    op: str
    kernel: str
    launch: str
    capability: int
    used_by: list[str] = field(default_factory=list)
    """The cases that launch it."""
    report: Report | None = None
    error: str | None = None
    excused: bool = False
    """Whether the error is none of the kernel's: time ran out, or there is no compiler."""

    def remarks(self) -> str:
        """What is wrong with it; empty where nothing is."""
        if self.report is None:
            return self.error or "not compiled"
        wrong = {
            f"spills {self.report.spilled_bytes} bytes": self.report.spilled_bytes > 0,
            f"{self.report.stack_bytes} bytes of stack": self.report.stack_bytes > 0,
            "a block does not fit": not self.report.fits,
            "WGMMA serialised": self.report.serialised_wgmma,
            "WGMMA in flight with a register operand": self.report.register_operand_in_pipeline,
        }
        return ", ".join(remark for remark, holds in wrong.items() if holds)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``gpunn profile``."""
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(CASES)}")
    parser.add_argument("--all", action="store_true", help="every op")
    parser.add_argument("--seconds", type=float, default=300, help="time for all of it (300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all numbers")
    parser.add_argument(
        "--capability",
        type=int,
        nargs="+",
        choices=sorted(MULTIPROCESSORS),
        help="compute capabilities to compile for (default: the GPU's own, else 90)",
    )
    parser.add_argument("--no-static", action="store_true", help="leave out the static report")
    parser.add_argument("--no-speed", action="store_true", help="leave out the benchmark")


def run(arguments: argparse.Namespace) -> int:
    """Print the static report and the benchmark; 0 if every kernel compiled and ran."""
    started = time.perf_counter()
    ops: list[str] = list(CASES) if arguments.all else list(dict.fromkeys(arguments.ops))
    unknown = [op for op in ops if op not in CASES]
    if unknown or not ops:
        given = f"no such op: {', '.join(unknown)}" if unknown else "no op was given"
        print(f"gpunn profile: {given}; there are {', '.join(CASES)}, and --all", file=sys.stderr)
        return 2
    reason = "--no-speed" if arguments.no_speed else why_not_here()
    static_rows: list[StaticRow] = []
    if not arguments.no_static:
        seconds = arguments.seconds * (STATIC_SHARE if reason is None else 1)
        static_rows = compile_cases(ops, arguments.capability or [_own_capability()], seconds)
        print(static_table(static_rows), flush=True)

    def keep(results: Results) -> None:
        if arguments.json:
            static = [row.as_dict() for row in static_rows]
            content = {"static": static, **results.as_dict(), "why speed was not measured": reason}
            write_json(arguments.json, content)

    results = Results()
    if reason is None:

        def left() -> float:
            return float(arguments.seconds - (time.perf_counter() - started))

        green = prepare(ops, left() * PREPARATION_SHARE, _progress)
        results = bench(ops, left(), _progress, keep, green)
        print(f"\n{_roof_line(results.roof)}\n\n{speed_table(results.rows)}")
    elif not arguments.no_speed:
        print(f"\nspeed: not measured: {reason}")
    keep(results)
    return int(any(map(_failed, static_rows)) or any(map(_failed, results.rows)))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _failed(row: StaticRow | Row) -> bool:
    """Whether a number is missing for a fault of our kernels, not of a peer or the clock."""
    if isinstance(row, StaticRow):
        return row.error is not None and not row.excused
    ours = (row.errors.get(who) for who in ("case", "kernels", "auto"))
    return any(error not in (None, TIME_RAN_OUT) for error in ours)


def _roof_line(roof: Roof | None) -> str:
    name = torch.cuda.get_device_name()
    if roof is None:
        return name
    rates = [f"{rate / 1e12:.1f} TFLOP/s {kind}" for kind, rate in roof.flops.items()]
    return (
        f"{name}, measured: {', '.join(rates)}, {roof.bandwidth / 1e12:.2f} TB/s read and written"
    )


def _own_capability() -> int:
    """The GPU's compute capability, or the known one next below it; 90 without a GPU."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return max((c for c in MULTIPROCESSORS if c <= 10 * major + minor), default=90)


@dataclass(frozen=True)
class Job:
    """One launch to compile, in words that another process understands."""

    op: str
    case: int
    launch: int
    capability: int


def compile_job(job: Job) -> Report:
    """The static report of one launch; to be called without TRITON_INTERPRET."""
    case = CASES[job.op][job.case]
    return report(case.launches(chip(job.capability))[job.launch], job.capability)


def _specialisation(argument: Any) -> Any:
    """What of a kernel's argument the compiled code depends on."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, tuple(argument.block_shape)
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return type(argument)


def _identity(call: Call) -> tuple[Any, ...]:
    """Equal for launches that are compiled to the same code."""
    constants = [(name, getattr(v, "__name__", v)) for name, v in sorted(call.keywords.items())]
    # CUDA C++ depends on its template arguments alone, which are among the keywords.
    arguments = () if isinstance(call.kernel, CudaKernel) else call.arguments
    return call.kernel.__name__, str(constants), *map(_specialisation, arguments)


def described_launch(launch: Launch) -> str:
    """Block sizes as a product, what else is not the default, warps and stages."""
    blocks, others, stages = [], [], []
    for entry in fields(launch):
        value = getattr(launch, entry.name)
        if entry.name.startswith("block"):
            blocks.append(str(value))
        elif entry.name == "num_stages":
            stages.append(f"{value} stages")
        elif entry.name != "num_warps" and value != entry.default:
            others.append(f"{entry.name}={value}")
    parts = ["×".join(blocks), *others, f"{launch.num_warps} warps", *stages]
    return ", ".join(part for part in parts if part)


def _jobs(ops: Sequence[str], capabilities: Sequence[int]) -> dict[Job, StaticRow]:
    """Every launch of the ops' cases, each once for code that is the same."""
    jobs: dict[Job, StaticRow] = {}
    for capability in capabilities:
        for op in ops:
            seen: dict[tuple[Any, ...], StaticRow] = {}
            for index, case in enumerate(CASES[op]):
                for position, call in enumerate(case.launches(chip(capability))):
                    identity = _identity(call)
                    if identity not in seen:
                        launch = described_launch(call.launch)
                        row = StaticRow(op, call.kernel.__name__, launch, capability)
                        seen[identity] = jobs[Job(op, index, position, capability)] = row
                    if (label := _label(case)) not in seen[identity].used_by:
                        seen[identity].used_by.append(label)
    return jobs


def _label(case: Case) -> str:
    unusual = "" if case.precision == "bfloat16" else f", {SHORT.get(case.precision, 'TF32')}"
    return f"{case.name}, {case.shapes}{unusual}"


@contextmanager
def _without_interpreter() -> Iterator[None]:
    """No TRITON_INTERPRET in the environment that new processes inherit."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def compile_cases(
    ops: Sequence[str], capabilities: Sequence[int], seconds: float
) -> list[StaticRow]:
    """Compile what the ops' cases launch, in other processes, within about so many seconds."""
    deadline = time.perf_counter() + seconds
    jobs = _jobs(ops, capabilities)
    n_workers = max(1, min(MOST_WORKERS, os.cpu_count() or 1, len(jobs)))
    with (
        _without_interpreter(),
        ProcessPoolExecutor(n_workers, mp_context=get_context("spawn")) as pool,
    ):
        futures = {job: pool.submit(compile_job, job) for job in jobs}
        for job, future in futures.items():
            _collect(jobs[job], future, deadline)
        pool.shutdown(cancel_futures=True)
    return list(jobs.values())


def _collect(row: StaticRow, future: Future[Report], deadline: float) -> None:
    try:
        row.report = future.result(max(0.0, deadline - time.perf_counter()))
    except OutOfTime:
        row.error, row.excused = TIME_RAN_OUT, True
        future.cancel()
    except NoCompilerError as error:
        row.error, row.excused = str(error), True
    except Exception as error:  # noqa: BLE001 (whatever it is, the table says it)
        row.error = described(error)


STATIC_HEADER = (
    *("op", "kernel", "launch", "regs", "spilled", "shared KB", "occupancy", "WGMMA", "MMA"),
    *("128-bit", "narrower", "all", "used by", "remarks"),
)


def static_table(rows: Sequence[StaticRow]) -> str:
    """The static report as text, a block a chip."""
    blocks = []
    for capability in dict.fromkeys(row.capability for row in rows):
        lines = [_static_cells(row) for row in rows if row.capability == capability]
        title = f"compiled for sm_{capability}; WGMMA to all: instructions in the code"
        blocks.append(f"{title}\n{table(STATIC_HEADER, lines)}")
    return "\n\n".join(blocks)


def _static_cells(row: StaticRow) -> list[str]:
    """A row of the table."""
    found: list[str] = ["-"] * 9
    if row.report is not None:
        r = row.report
        counts = (r.wgmma, r.mma, r.wide_accesses, r.narrow_accesses, r.instructions)
        found = [
            *(str(r.registers), str(r.spilled_bytes), number(r.shared_memory / 1024, "{:.0f}")),
            *(number(100 * r.occupancy, "{:.0f}%"), *(number(n, "{:d}") for n in counts)),
        ]
    more = f" and {len(row.used_by) - 1} more" if len(row.used_by) > 1 else ""
    return [row.op, row.kernel, row.launch, *found, row.used_by[0] + more, row.remarks()]


def main() -> int:
    """``python -m gpunn.profiling.command``: the command without the rest of ``gpunn``."""
    parser = argparse.ArgumentParser(prog="gpunn profile", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
