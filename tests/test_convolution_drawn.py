"""Convolution against torch on arguments, shapes and layouts that Hypothesis draws.

Values and all gradients are held to torch's in float64, by the rule of ``closeness.py``. What torch
refuses is refused, and what it takes is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import gpunn
import gpunn.functional as GF
from drawing import drawing, expected_at_most
from gpunn.checks.comparison import DTYPES, any_algorithm
from gpunn.functional.activation import TORCH
from gpunn.kernels.activation import ACTIVATIONS
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.reference.closeness import judge
from kit import LAYOUTS, as_numpy, launched, short_name

NAMES = ("conv2d", "conv2d", "conv_transpose2d", "conv1d", "conv_transpose1d")
N_CHUNKS, N_REFUSALS = 15, 30
# On a GPU almost every drawn problem is kernels to compile, seconds each.
N_EACH = 35 if INTERPRETING else 4
ACTIVATION_NAMES = (None, "relu", "gelu", "silu", "tanh", "leaky_relu")
LAUNCHERS = ("conv_forward", "conv_transpose_forward", "conv_weight_gradient")
# Groups, and channels and outputs of each: of 16 and more of both, tiles of one tap; with fewer
# channels, of all taps together; of few in groups, a kernel without a matrix product.
CHANNELS = (
    (1, 1, 1), (1, 2, 3), (1, 3, 5), (1, 2, 17), (1, 17, 2), (1, 18, 20),
    (2, 1, 1), (3, 1, 2), (2, 3, 2), (2, 16, 16),
)  # fmt: skip
# Few taps and few phases: each is some milliseconds of the interpreter's.
KERNELS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,), (2,), (3,), (4,)),
    2: ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3)),
}
STRIDES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,), (2,), (3,)),
    2: ((1, 1), (1, 1), (2, 1), (1, 2), (2, 2), (1, 3)),
}


@dataclass
class Problem:
    """A call of a function, with tensors that are contiguous until ``laid_out``."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    n_outputs: int
    arguments: dict[str, Any]
    has_bias: bool = True
    has_residual: bool = False
    activation: str | None = None
    layouts: dict[str, str] = field(default_factory=dict)
    """Of input, weight, residual and dy."""

    @property
    def n(self) -> int:
        """The dimensions that the weight slides along."""
        return int(self.name[-2])

    def tensors(self, draw: torch.Generator) -> dict[str, torch.Tensor]:
        """Input, weight and bias, of normal numbers in float64."""
        shapes = {"input": self.input, "weight": self.weight}
        if self.has_bias:
            shapes["bias"] = (self.n_outputs,)
        return {
            name: torch.randn(shape, generator=draw, dtype=torch.float64)
            for name, shape in shapes.items()
        }

    def of_torch(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """torch's composition."""
        given = dict(given)
        residual = given.pop("residual", None)
        y: torch.Tensor = getattr(F, self.name)(**given, **self.arguments)
        name = self.activation or "identity"
        y = TORCH[name](y, *ACTIVATIONS[name].defaults)
        return y if residual is None else y + residual

    def of_ours(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """gpunn's function."""
        function, fused = getattr(GF, self.name), {"activation": self.activation}
        y: torch.Tensor = function(**given, **self.arguments, **fused)
        return y


def written(draw: st.DrawFn, values: list[int]) -> Any:
    """Now and then as a number, where there is but one; else as a tuple or a list."""
    kinds = (tuple, list, *((min,) if len(set(values)) == 1 else ()))
    return draw(st.sampled_from(kinds))(values)


def each(draw: st.DrawFn, n: int, least: int, most: int) -> list[int]:
    return [draw(st.integers(least, most)) for _ in range(n)]


def paddings(
    draw: st.DrawFn, transposed: bool, size: list[int], taken: list[int], strides: list[int]
) -> list[int]:
    """Such that the kernel fits into the input, or that something is left of the result."""
    found = []
    for length, extent, stride in zip(size, taken, strides, strict=True):
        most = min(3, ((length - 1) * stride + extent - 1) // 2)
        least = 0 if transposed else max(0, -(-(extent - length) // 2))
        found.append(draw(st.integers(least, max(least, most if transposed else 3))))
    return found


@st.composite
def slides(
    draw: st.DrawFn, n: int, transposed: bool
) -> tuple[list[int], list[int], dict[str, Any]]:
    """Sizes of a kernel and of an input that it fits into, and how it slides."""
    kernel = list(draw(st.sampled_from(KERNELS[n])))
    strides = list(draw(st.sampled_from(STRIDES[n])))
    size, dilations = each(draw, n, 1, 6), each(draw, n, 1, 3)
    same = not transposed and draw(st.integers(0, 5)) == 0
    strides = [1] * n if same else strides
    arguments = {"stride": written(draw, strides), "dilation": written(draw, dilations)}
    if transposed:
        most = [max(stride, d) - 1 for stride, d in zip(strides, dilations, strict=True)]
        arguments["output_padding"] = written(draw, [draw(st.integers(0, m)) for m in most])
    taken = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    arguments["padding"] = "same"
    if not same:
        arguments["padding"] = written(draw, paddings(draw, transposed, size, taken, strides))
    return kernel, size, arguments


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A call that torch takes, with a result that is not empty."""
    name = draw(st.sampled_from(NAMES))
    n, transposed = int(name[-2]), "transpose" in name
    kernel, size, arguments = draw(slides(n, transposed))
    groups, n_channels, n_outputs = draw(st.sampled_from(CHANNELS))
    first, second = (n_channels, n_outputs) if transposed else (n_outputs, n_channels)
    batch = draw(st.sampled_from(((1,), (2,), ())))
    problem = Problem(
        name,
        input=(*batch, n_channels * groups, *size),
        weight=(first * groups, second, *kernel),
        n_outputs=n_outputs * groups,
        arguments=arguments | {"groups": groups},
        has_bias=draw(st.booleans()),
        has_residual=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATION_NAMES)),
    )
    for part in ("input", "weight", "residual", "dy"):
        dims = n + 2 if part == "weight" else len(problem.input)
        fitting = [key for key, (least, most, _) in LAYOUTS.items() if least <= dims <= most]
        problem.layouts[part] = draw(st.sampled_from(fitting))
    return problem


def laid_out(
    problem: Problem, part: str, tensor: torch.Tensor, dtype: torch.dtype, device: str
) -> torch.Tensor:
    make = LAYOUTS[problem.layouts.get(part, "contiguous")][2]
    return make(tensor.to(device, dtype)).detach()


def operands_of(
    problem: Problem, dtype: torch.dtype, device: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the function is given, and an upstream gradient, in their layouts."""
    draw = torch.Generator().manual_seed(20240229)
    given = problem.tensors(draw)
    shape = problem.of_torch(given).shape
    if problem.has_residual:
        given["residual"] = torch.randn(shape, generator=draw)
    dy = torch.randn(shape, generator=draw)
    return (
        {part: laid_out(problem, part, tensor, dtype, device) for part, tensor in given.items()},
        laid_out(problem, "dy", dy, dtype, device),
    )


def value_and_gradients(
    function: Any, given: dict[str, torch.Tensor], dy: torch.Tensor
) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    y = function(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def compare(problem: Problem, dtype: torch.dtype, device: str) -> tuple[int, int]:
    """How many results were compared, and how many of the comparisons would pass nothing at all.

    A sum of few numbers may cancel, a relu may leave nothing: such a result is held to the rule as
    well, but shows little.
    """
    given, dy = operands_of(problem, dtype, device)
    with gpunn.trace() as trace:
        got = value_and_gradients(problem.of_ours, given, dy)
    launched(trace, *LAUNCHERS)
    with any_algorithm():
        baseline = value_and_gradients(problem.of_torch, given, dy)
    doubles = {name: tensor.cpu().double() for name, tensor in given.items()}
    exact = value_and_gradients(problem.of_torch, doubles, dy.cpu().double())
    n_vacuous, eps = 0, torch.finfo(dtype).eps
    for part, expected in exact.items():
        mine, torchs = got[part], baseline[part]
        assert mine.dtype == torchs.dtype, part
        assert mine.shape == torchs.shape, part
        verdict = judge(as_numpy(mine), as_numpy(expected), as_numpy(torchs), eps)
        accurate = verdict.error <= verdict.allowed
        assert accurate, f"{part}: {verdict.error:.3e}, allowed {verdict.allowed:.3e}"
        n_vacuous += verdict.vacuous is not None
    return len(exact), n_vacuous


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of its padded copy
@pytest.mark.parametrize("chunk", range(N_CHUNKS))
def test_agrees_with_torch(chunk: int, device: str) -> None:
    seen, counts = set(), [0, 0]

    @drawing(chunk, N_EACH)
    @given(problem=problems(), dtype=st.sampled_from(DTYPES))
    def agrees(problem: Problem, dtype: torch.dtype) -> None:
        n_compared, n_vacuous = compare(problem, dtype, device)
        counts[0], counts[1] = counts[0] + n_compared, counts[1] + n_vacuous
        seen.add(f"{problem} {short_name(dtype)}")

    agrees()
    assert len(seen) >= N_EACH * 0.8
    assert counts[1] < expected_at_most(1 / 8, counts[0])


# --- refusals ---

# What an argument may be changed to; most of it is refused, by some functions or by all.
SPOILED: dict[str, list[Any]] = {
    "stride": [0, -1, (1, 1, 1), (1, 1), (1,), [], None, 1.5, "1", True, (0, 1), 2],
    "padding": [-1, (0, 0, 0), (0, 0), (1,), [], None, 1.5, "same", "valid", "full", True, 9],
    "dilation": [-2, (1, 1, 1), (2, 2), (2,), [], None, 1.5, True, 3, 20],
    "output_padding": [-1, (0, 0, 0), (0, 0), [], None, 1.5, True, 1, 2, 5],
    "groups": [0, -1, 2, 3, 5, None, 1.5, (1,)],
    "input": [
        lambda x: x[0],
        lambda x: x[None],
        lambda x: x[..., :0],
        lambda x: x[..., :1],
        lambda x: x.narrow(1, 0, x.shape[1] - 1),
        lambda x: x.repeat_interleave(2, dim=1),
        lambda x: x[:0],
        lambda x: x.double(),
    ],
    "weight": [
        lambda w: w[0],
        lambda w: w[None],
        lambda w: w[:0],
        lambda w: w[:, :0],
        lambda w: w[..., :0],
        lambda w: w[1:],
        lambda w: w.repeat_interleave(2, dim=1),
        lambda w: w.repeat_interleave(3, dim=2),
        lambda w: w.half(),
        lambda w: w.tolist(),
    ],
    "bias": [
        lambda b: b[:-1],
        lambda b: b[None],
        lambda b: b.repeat(2),
        lambda b: b[0],
        lambda b: 1.0,
    ],
}


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[Problem, str, Any]:
    """A problem that torch takes, an argument's name, and what becomes of it."""
    problem = draw(problems())
    problem.has_bias, problem.has_residual, problem.activation = True, False, None
    name = draw(st.sampled_from(sorted({*problem.arguments, "input", "weight", "bias"})))
    return problem, name, draw(st.sampled_from(SPOILED[name]))


def outcome(function: Any, given: dict[str, Any]) -> Any:
    """What comes of the call, be it an error."""
    try:
        return function(**given)
    except Exception as error:  # noqa: BLE001  (torch raises errors of many classes)
        return error


def assert_as_torchs(problem: Problem, name: str, change: Any, device: str) -> bool:
    """Whether torch refuses the changed call; ours does then, and only then."""
    draw = torch.Generator().manual_seed(20240229)
    given: dict[str, Any] = {k: v.float().to(device) for k, v in problem.tensors(draw).items()}
    given |= problem.arguments
    given[name] = change(given[name]) if callable(change) else change
    theirs, ours = (outcome(getattr(module, problem.name), given) for module in (F, GF))
    what = f"{problem.name}({name} changed to {given[name]})"
    if not isinstance(theirs, Exception):
        assert isinstance(ours, torch.Tensor), f"{what}: torch takes it; {ours!r}"
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        return False
    assert isinstance(ours, Exception), f"{what}: torch refuses it: {theirs!r}"
    assert isinstance(ours, type(theirs)), f"{what}: torch raises {theirs!r}, gpunn {ours!r}"
    return True


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of its padded copy
@pytest.mark.parametrize("chunk", range(N_CHUNKS))
def test_refuses_what_torch_refuses(chunk: int, device: str) -> None:
    """And nothing else."""
    refused = []

    @drawing(chunk, N_REFUSALS)
    @given(call=spoiled())
    def refuses(call: tuple[Problem, str, Any]) -> None:
        refused.append(assert_as_torchs(*call, device))

    refuses()
    assert sum(refused) > N_REFUSALS / 3
