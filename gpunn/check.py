"""``gpunn check``: every op's kernels against its NumPy reference, here and now.

The kernels run on the GPU where there is one, else through Triton's interpreter. A row of the
table is one case in one dtype, values and all gradients; its error and what is allowed are those
of the worst of them (``reference/closeness.py`` has the rule). PyTorch never stands in for a
kernel: a fallback, or no launch at all, fails the row.

To add an op, add its checks to ``CHECKS``: most need ``compare`` and its reference, no more.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import gpunn.functional as GF
from gpunn.functional.activation import TORCH
from gpunn.functional.glu import GATES
from gpunn.kernels.activation import ACTIVATIONS
from gpunn.kernels.elementwise import activation_backward, activation_forward
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import Trace, backend, trace
from gpunn.kernels.philox import draw_seed
from gpunn.reference import activation, glu, linear
from gpunn.reference.closeness import Verdict, judge
from gpunn.reference.philox import dropout_factors

Array = NDArray[np.float64]
Comparison = tuple[str, torch.Tensor, Array, torch.Tensor]
"""The name of a result, ours, the exact one, and PyTorch's in the same dtype."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEED = 20240229


@dataclass(frozen=True)
class Check:
    """One case of an op."""

    op: str
    case: str
    run: Callable[[torch.dtype, str], list[Comparison]]
    """Computes the case in a dtype on a device: the value, and each gradient."""
    kernels: tuple[str, ...] = ()
    """Kernels that must have run, where that any did is not enough."""


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


# --- what a check is made of ---


def as_numpy(tensor: torch.Tensor) -> Array:
    """The values in float64: what a reference takes."""
    return tensor.detach().double().cpu().numpy()


def drawn(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal numbers, the same ones on every device."""
    return torch.randn(tuple(shape)).to(device, dtype)


def compare(
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    exact: Callable[..., dict[str, Array]],
    inputs: Sequence[torch.Tensor],
) -> list[Comparison]:
    """The value and the gradients of an op with a random upstream gradient.

    Args:
        ours, theirs: gpunn's function and PyTorch's, of ``inputs``.
        exact: of dy and ``inputs`` in NumPy, the value and the gradient of each, by name.
        inputs: the tensors to differentiate by.
    """
    leaves = [[tensor.detach().requires_grad_() for tensor in inputs] for _ in range(2)]
    y, torch_y = ours(*leaves[0]), theirs(*leaves[1])
    dy = drawn(y.shape, y.dtype, str(y.device))
    got = [y, *torch.autograd.grad(y, leaves[0], dy)]
    baseline = [torch_y, *torch.autograd.grad(torch_y, leaves[1], dy)]
    return named(got, exact(as_numpy(dy), *map(as_numpy, inputs)), baseline)


def named(
    got: Sequence[torch.Tensor], truth: dict[str, Array], baseline: Sequence[torch.Tensor]
) -> list[Comparison]:
    """Results in the order of ``truth``, with its names."""
    return list(zip(truth, got, truth.values(), baseline, strict=True))


# --- the checks of each op ---


def check_activation(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One function of ``gpunn.functional``; identity, which is none, by its launchers."""
    x, parameters = 3 * drawn((5, 67), dtype, device), ACTIVATIONS[name].defaults

    def exact(dy: Array, x: Array) -> dict[str, Array]:
        return {
            "y": activation.activation_forward(x, name, *parameters),
            "dx": activation.activation_backward(dy, x, name, *parameters),
        }

    if name == "identity":
        dy = drawn(x.shape, dtype, device)
        got = [activation_forward(x, name, []), activation_backward(dy, x, name, [])]
        return named(got, exact(as_numpy(dy), as_numpy(x)), [x, dy])
    if name == "gelu_tanh":
        ours = functools.partial(GF.gelu, approximate="tanh")
    else:
        ours = getattr(GF, name)
    return compare(ours, lambda x: TORCH[name](x, *parameters), exact, [x])


# Every gated linear unit: the function, and the activation that is its gate.
GATED: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    **{name: (getattr(GF, name), gate) for name, gate in GATES.items()},
    "geglu, tanh": (functools.partial(GF.geglu, approximate="tanh"), "gelu_tanh"),
}


def check_glu(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One gated linear unit, along a dimension in the middle."""
    function, gate = GATED[name]

    def theirs(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, 1)
        return a * TORCH[gate](b)

    def exact(dy: Array, x: Array) -> dict[str, Array]:
        return {"y": glu.glu_forward(x, 1, gate), "dx": glu.glu_backward(dy, x, 1, gate)}

    return compare(lambda x: function(x, 1), theirs, exact, [2 * drawn((3, 10, 23), dtype, device)])


def check_linear(
    sizes: tuple[int, int, int],
    name: str,
    extras: Sequence[str],
    dtype: torch.dtype,
    device: str,
) -> list[Comparison]:
    """linear of (rows, outputs, inputs) with an activation, and ``extras`` of what it can fuse."""
    n_rows, n_cols, n_inner = sizes
    shapes: dict[str, tuple[int, ...]] = {"x": (n_rows, n_inner), "weight": (n_cols, n_inner)}
    shapes |= {"bias": (n_cols,)} if "bias" in extras else {}
    shapes |= {"residual": (n_rows, n_cols)} if "residual" in extras else {}
    inputs = {n: drawn(shape, dtype, device) for n, shape in shapes.items()}
    inputs["weight"] = inputs["weight"] / n_inner**0.5
    parameters, dropout_p, factors = ACTIVATIONS[name].defaults, 0.0, None
    if "dropout" in extras:
        dropout_p = 0.25
        torch.manual_seed(SEED)
        seed = int(draw_seed(torch.device(device)).item())
        factors = dropout_factors(seed, (n_rows, n_cols), dropout_p)

    def ours(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = dict(zip(list(shapes)[2:], rest, strict=True))
        torch.manual_seed(SEED)  # so that it draws the seed that the factors were made of
        return GF.linear(x, weight, **given, activation=name, dropout_p=dropout_p)

    def theirs(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        given = dict(zip(list(shapes)[2:], rest, strict=True))
        y = torch.nn.functional.linear(x, weight, given.get("bias"))
        y = TORCH[name](y, *parameters)
        y = y if factors is None else y * torch.from_numpy(factors).to(y)
        return y + given["residual"] if "residual" in given else y

    def exact(dy: Array, x: Array, weight: Array, *rest: Array) -> dict[str, Array]:
        given = dict(zip(list(shapes)[2:], rest, strict=True))
        bias, residual = given.get("bias"), given.get("residual")
        fused: dict[str, Any] = {"activation": name, "parameters": parameters, "factors": factors}
        y = linear.linear_forward(x, weight, bias, residual, **fused)
        gradients = linear.linear_backward(dy, x, weight, bias, **fused)._asdict()
        return {"y": y, **{f"d{input}": gradients[f"d{input}"] for input in shapes}}

    return compare(ours, theirs, exact, list(inputs.values()))


def _activations() -> list[Check]:
    return [Check("activation", n, functools.partial(check_activation, n)) for n in ACTIVATIONS]


def _glus() -> list[Check]:
    return [Check("glu", name, functools.partial(check_glu, name)) for name in GATED]


def _linears() -> list[Check]:
    cases: list[tuple[str, tuple[int, int, int], str, tuple[str, ...], tuple[str, ...]]] = [
        ("plain", (32, 48, 64), "identity", (), ()),
        ("bias, gelu", (32, 48, 64), "gelu", ("bias",), ("epilogue_backward_kernel",)),
        ("bias, relu, dropout", (32, 48, 64), "relu", ("bias", "dropout"), ()),
        ("silu, residual", (32, 48, 64), "silu", ("residual",), ()),
        ("all of them", (33, 50, 72), "tanh", ("bias", "residual", "dropout"), ()),
        ("odd sizes", (37, 51, 29), "elu", ("bias",), ()),
        ("one of each", (1, 1, 1), "softplus", ("bias",), ()),
        ("split inner dimension", (8, 16, 1040), "gelu", ("bias",), ("epilogue_kernel",)),
    ]
    return [
        Check("linear", case, functools.partial(check_linear, sizes, name, extras), kernels)
        for case, sizes, name, extras, kernels in cases
    ]


CHECKS: dict[str, list[Check]] = {
    "activation": _activations(),
    "glu": _glus(),
    "linear": _linears(),
}


# --- running them ---


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
    with torch.random.fork_rng(), backend("kernels"), trace() as record:
        torch.manual_seed(SEED)
        try:
            comparisons = check.run(dtype, device)
        except Exception as error:  # noqa: BLE001  (whatever a kernel raises is a failed check)
            reason = f"FAIL: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return Row(check.op, check.case, name, np.nan, np.nan, reason)
    eps = torch.finfo(dtype).eps
    verdicts = {
        what: judge(as_numpy(got), exact, as_numpy(baseline), eps)
        for what, got, exact, baseline in comparisons
    }
    worst = max(verdicts, key=lambda what: _badness(verdicts[what]))
    reason = _missing(check, record) or _wrong(worst, verdicts[worst]) or "ok"
    return Row(check.op, check.case, name, verdicts[worst].error, verdicts[worst].allowed, reason)


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
def is_green(op: str) -> bool:
    """Whether every check of ``op`` passes, wherever its kernels can run. Found out once."""
    checks_of(op)
    if kernels_run_here():
        return all(row.ok for row in run_checks([op]))
    return interpreted(["check", op], quiet=True) == 0
