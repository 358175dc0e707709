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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpunn.checks import CHECKS as CHECKS  # with the other names that who runs them needs
from gpunn.checks.comparison import DTYPES as DTYPES
from gpunn.checks.comparison import SEED, Check, as_numpy, full_precision
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import Trace, backend, trace
from gpunn.reference.closeness import Verdict, judge

N_DRAWS = 5


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


def run_checks(
    ops: Iterable[str] | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Check these ops, all by default, in every dtype; ``on_row`` is given each row at once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for check in [check for op in ops or CHECKS for check in checks_of(op)]:
        for dtype in DTYPES:
            rows.append(run_check(check, dtype, device))
            on_row(rows[-1])
    return rows


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


def interpreted(arguments: Sequence[str], quiet: bool = False) -> int:
    """Run ``gpunn`` with these arguments in a process that interprets kernels; its exit status.

    Triton reads ``TRITON_INTERPRET`` when a kernel is defined, so this process cannot change over.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "gpunn", *arguments]
    silence = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, env=environment, stdout=silence, stderr=silence).returncode


@functools.cache
def first_fault(op: str) -> str:
    """The first check of ``op`` that does not pass here, and why; empty where all do.

    Found out once, wherever its kernels can run.
    """
    checks_of(op)
    if kernels_run_here():
        red = (row for row in run_checks([op]) if not row.ok)
        return next((f"{row.case}, {row.dtype}: {row.verdict}" for row in red), "")
    return "" if interpreted(["check", op], quiet=True) == 0 else f"see `gpunn check {op}`"
