"""``gpunn check``: every op's kernels against its NumPy reference, here and now.

The kernels run on the GPU where there is one, else through Triton's interpreter. A row of the
table is one case in one dtype, values and all gradients; its error and what is allowed are those
of the worst of them (``reference/closeness.py`` has the rule). PyTorch never stands in for a
kernel: a fallback, or no launch at all, fails the row.

The cases are in ``gpunn/checks``, a file an op.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch

from gpunn.checks import CHECKS as CHECKS  # with the other names that who runs them needs
from gpunn.checks.comparison import DTYPES as DTYPES
from gpunn.checks.comparison import SEED, Check, as_numpy, full_precision
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import Trace, backend, trace
from gpunn.reference.closeness import Verdict, judge

N_DRAWS = 5
MOST_PROCESSES = 16
"""Each has a context of its own on the GPU."""


@dataclass(frozen=True)
class Row:
    """The outcome of one check in one dtype."""

    op: str
    case: str
    dtype: str
    error: float
    allowed: float
    verdict: str
    """``ok``, or ``FAIL`` and why."""

    @property
    def ok(self) -> bool:
        """Whether the kernels are right."""
        return self.verdict == "ok"

    def cells(self) -> tuple[str, ...]:
        """The row of the printed table."""
        return (
            self.op, self.case, self.dtype, f"{self.error:.1e}", f"{self.allowed:.1e}", self.verdict
        )  # fmt: skip


HEADER = ("op", "case", "dtype", "error", "allowed", "verdict")


def checks_of(op: str) -> list[Check]:
    """The checks of one op.

    Raises:
        ValueError: there is no op of that name.
    """
    if op not in CHECKS:
        raise ValueError(f"op: unknown name {op!r}; allowed are {', '.join(CHECKS)}")
    return CHECKS[op]


def kernels_run_here() -> bool:
    """Whether this process can run kernels: on a GPU, or since it was started to interpret them."""
    return INTERPRETING or torch.cuda.is_available()


def device_here() -> str:
    """Where the kernels are checked."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def n_processes_here() -> int:
    """How many processes to check in: on a GPU the CPU's compilers take most of the time."""
    return min(MOST_PROCESSES, os.cpu_count() or 1) if torch.cuda.is_available() else 1


def run_checks(
    ops: Iterable[str] | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    n_processes: int = 1,
) -> list[Row]:
    """Check these ops, all by default, in every dtype; ``on_row`` is given each row at once.

    Raises:
        ValueError: there is no op of a name.
        BrokenProcessPool: a kernel brought one of several processes down.
    """
    counts = {op: len(checks_of(op)) for op in ops or CHECKS}
    tasks = [
        (op, index, dtype) for op, n in counts.items() for index in range(n) for dtype in DTYPES
    ]
    rows = []
    for row in map(_row, tasks) if n_processes == 1 else _rows_of_processes(tasks, n_processes):
        rows.append(row)
        on_row(row)
    return rows


Task = tuple[str, int, torch.dtype]


def _row(task: Task) -> Row:
    op, index, dtype = task
    return run_check(checks_of(op)[index], dtype, device_here())


def _rows_of_processes(tasks: Sequence[Task], n_processes: int) -> Iterator[Row]:
    """The rows in the tasks' order."""
    with ProcessPoolExecutor(
        n_processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(_row, tasks)


def run_check(check: Check, dtype: torch.dtype, device: str) -> Row:
    """One check in one dtype. The random generators are left as they were."""
    name = str(dtype).removeprefix("torch.")
    with torch.random.fork_rng(), full_precision(), backend("kernels"), trace() as record:
        try:
            verdicts = _verdicts(check, dtype, device)
        except Exception as error:  # noqa: BLE001  (whatever a kernel raises is a failed check)
            reason = f"FAIL: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return Row(check.op, check.case, name, np.nan, np.nan, reason)
    worst = max(verdicts, key=lambda what: _badness(verdicts[what]))
    reason = _missing(check, record) or _wrong(worst, verdicts[worst]) or "ok"
    return Row(check.op, check.case, name, verdicts[worst].error, verdicts[worst].allowed, reason)


def _verdicts(check: Check, dtype: torch.dtype, device: str) -> dict[str, Verdict]:
    """Of each result. Torch's largest error of a few numbers is luck, and so is ours.

    Where ours is larger than allowed, the means over ``N_DRAWS`` draws of the numbers decide.
    """
    eps = torch.finfo(dtype).eps

    def drawn(seed: int) -> dict[str, Verdict]:
        torch.manual_seed(seed)
        return {
            what: judge(as_numpy(got), exact, as_numpy(baseline), eps)
            for what, got, exact, baseline in check.run(dtype, device)
        }

    found = drawn(SEED)
    if excess := [what for what, v in found.items() if v.vacuous is None and not v.ok]:
        draws = [found, *(drawn(SEED + i) for i in range(1, N_DRAWS))]
        for what in excess:
            error = sum(draw[what].error for draw in draws) / N_DRAWS
            allowed = sum(draw[what].allowed for draw in draws) / N_DRAWS
            found[what] = Verdict(error, allowed, None)
    return found


def _badness(verdict: Verdict) -> float:
    return float("inf") if verdict.vacuous else verdict.error / verdict.allowed


def _missing(check: Check, record: Trace) -> str | None:
    """What shows that it was not, or not only, the kernels that ran."""
    if record.fallbacks:
        left = record.fallbacks[0]
        return f"FAIL: {left.operator} was left to PyTorch: {left.reason}"
    ran = {launch.kernel for launch in record.launches}
    if not ran:
        return "FAIL: no kernel ran"
    lacking = sorted(set(check.kernels) - ran)
    return f"FAIL: {', '.join(lacking)} did not run" if lacking else None


def _wrong(what: str, verdict: Verdict) -> str | None:
    if verdict.ok:
        return None
    return f"FAIL: {what}: {verdict.vacuous or 'the error is larger than allowed'}"


def interpreted(arguments: Sequence[str]) -> int:
    """Run ``gpunn`` with these arguments in a process that interprets kernels; its exit status.

    Triton reads ``TRITON_INTERPRET`` when a kernel is defined, so this process cannot change over.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "gpunn", *arguments]
    return subprocess.run(command, env=environment).returncode


@functools.cache
def first_fault(op: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str:
    """The first check of ``op`` that does not pass here, and why; empty where all do.

    Found out once.
    """
    rows = (run_check(check, dtype, device_here()) for check in checks_of(op) for dtype in dtypes)
    return next((f"{row.case}, {row.dtype}: {row.verdict}" for row in rows if not row.ok), "")
