"""Pooling against torch's own numbers, bit for bit, on drawn shapes, arguments and layouts.

What is compared is what torch computes on contiguous tensors, since its own results depend on the
layout: the adaptive average of channels_last divides by the product of a window's lengths where
there is a full vector of channels, and by one length after the other elsewhere. A gradient in
float16 or bfloat16 is compared with that of float32 on the same values, rounded once: torch's on
a CPU is rounded at every addition. A mean (an adaptive average of one output) is summed by torch
in another order; it is held to the float64 reference, as everything in ``test_pooling.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.checks.comparison import DTYPES
from gpunn.checks.pooling import exact
from gpunn.kernels.host import ORDERS, thread_order
from gpunn.kernels.interpreter import INTERPRETING
from kit import LAYOUTS, as_numpy, launched
from test_pooling import one_thread

N_CHUNKS, N_REFUSALS = 40, 400
# On a GPU almost every drawn problem is kernels to compile.
N_EACH = 30 if INTERPRETING else 4
NAMES = [
    f"{kind}{n}d"
    for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "max_unpool")
    for n in (1, 2)
]
# NaN and infinities among the values; integers, for their ties; or neither.
VALUES = ("normal", "normal", "integers", "special")
SPECIAL = np.array([np.nan, np.inf, -np.inf, -np.inf, 1.0, -1.0])
CHANNELS = (1, 2, 3, 5, 8, 16)  # with and without a full vector of them
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Problem:
    """A call of a function; the tensor is contiguous, and to be given in a layout."""

    name: str
    x: torch.Tensor
    arguments: dict[str, Any]
    layout: str = "contiguous"
    dy_layout: str = "contiguous"

    def __str__(self) -> str:
        given = {k: v for k, v in self.arguments.items() if k != "indices"}
        layouts = f"x {self.layout}, dy {self.dy_layout}"
        return f"{self.name} of {tuple(self.x.shape)} {self.x.dtype}, {layouts}, {given}"

    @property
    def n(self) -> int:
        """The dimensions of a window."""
        return int(self.name[-2])

    @property
    def is_mean(self) -> bool:
        """Whether torch sums in an order of its own."""
        adapts = self.name.startswith("adaptive_avg")
        return adapts and bool(np.prod(self.arguments["output_size"]) == 1)

    def of(self, module: Any, x: torch.Tensor, **more: Any) -> Any:
        """The result of the function that ``module`` has, for x."""
        with one_thread():
            return getattr(module, self.name)(x, **self.arguments, **more)


class Draw:
    """Problems from a seed."""

    def __init__(self, *seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def integer(self, least: int, most: int) -> int:
        return int(self.random.integers(least, most + 1))

    def integers(self, least: int, most: int, n: int) -> list[int]:
        return [self.integer(least, most) for _ in range(n)]

    def one_of(self, values: Any) -> Any:
        return values[self.integer(0, len(values) - 1)]

    def written(self, values: list[int]) -> Any:
        """Now and then as a number, where there is but one; else as a tuple or a list."""
        if len(set(values)) == 1 and self.integer(0, 1):
            return values[0]
        return self.one_of((tuple, list))(values)

    def values(self, shape: tuple[int, ...], kind: str) -> NDArray[np.float64]:
        if kind == "integers":
            return self.random.integers(-2, 3, shape).astype(np.float64)
        drawn = np.asarray(self.random.standard_normal(shape))
        if kind == "special":
            where = self.random.random(shape) < self.one_of((0.1, 0.9))
            drawn = np.where(where, self.random.choice(SPECIAL, shape), drawn)
        return drawn

    def window(self, n: int) -> dict[str, Any]:
        """Kernel size, stride and padding, as they may be written and left out."""
        kernel = self.integers(1, 5, n) if self.integer(0, 2) else [self.integer(1, 5)] * n
        given = {"kernel_size": self.written(kernel)}
        if self.integer(0, 3):
            given["stride"] = self.written(self.integers(1, 4, n))
        if self.integer(0, 1):
            given["padding"] = self.written([self.integer(0, k // 2) for k in kernel])
        return given

    def arguments(self, name: str, n: int, shape: tuple[int, ...]) -> dict[str, Any]:
        if name.startswith("adaptive"):
            return {"output_size": self.written(self.integers(1, 8, n))}
        given = self.window(n)
        if name.startswith("max_unpool"):
            return given | self.unpooling(given, n, shape)
        given["ceil_mode"] = bool(self.integer(0, 1))
        if name.startswith("avg"):
            given["count_include_pad"] = bool(self.integer(0, 1))
            if n == 2 and self.integer(0, 3) == 0:
                given["divisor_override"] = self.one_of((1, 3, 7, -2))
        elif self.integer(0, 2) == 0:
            # not over the whole input: torch's gradient is then written out of bounds
            given["dilation"] = self.written([self.integer(1, min(3, s)) for s in shape[-n:]])
        return given

    def unpooling(self, given: dict[str, Any], n: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """An output size, often one that need not be given, and indices, some of them equal."""

        def each(name: str, default: Any) -> list[int]:
            value = given.get(name, default)
            return [value] * n if isinstance(value, int) else list(value)

        strides = each("stride", given["kernel_size"])
        axes = zip(shape[-n:], each("kernel_size", 0), strides, each("padding", 0), strict=True)
        size = tuple((s - 1) * step + k - 2 * pad for s, k, step, pad in axes)
        more: dict[str, Any] = {}
        if self.integer(0, 1):
            size = tuple(
                s + self.integer(1 - step, step - 1) for s, step in zip(size, strides, strict=True)
            )
            more["output_size"] = self.one_of((size, list(size), (7, 7, *size)))
        indices = self.random.integers(0, max(int(np.prod(size)), 1), shape)
        return more | {"indices": torch.from_numpy(indices)}

    def candidate(self, name: str, dtype: torch.dtype) -> Problem:
        n = int(name[-2])
        shape = (self.integer(1, 2), self.one_of(CHANNELS), *self.integers(1, 12, n))
        shape = shape if self.integer(0, 4) else shape[1:]
        problem = Problem(name, torch.empty(shape), self.arguments(name, n, shape))
        fitting = [
            layout
            for layout, (least, most, _) in LAYOUTS.items()
            if least <= len(shape) <= most and "expanded" not in layout
        ]
        problem.layout, problem.dy_layout = self.one_of(fitting), self.one_of(fitting)
        kind = "normal" if problem.is_mean else self.one_of(VALUES)
        problem.x = torch.from_numpy(self.values(shape, kind)).to(dtype)
        return problem

    def problem(self, name: str, dtype: torch.dtype) -> Problem:
        """One that torch takes, and that leads to something."""
        while True:
            problem = self.candidate(name, dtype)
            result = outcome(problem, F)
            if isinstance(result, torch.Tensor) and result.numel():
                return problem


def outcome(problem: Problem, module: Any) -> Any:
    """What comes of the call, be it an error."""
    try:
        return results(problem.of(module, problem.x))[0]
    except Exception as error:  # noqa: BLE001  (torch raises errors of many classes)
        return error


def laid_out(tensor: torch.Tensor, layout: str, device: str) -> torch.Tensor:
    return LAYOUTS[layout][2](tensor.to(device))


def assert_identical(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The same bits, but for those of a NaN."""
    assert got.dtype == expected.dtype, what
    assert got.shape == expected.shape, what
    bits = BITS[got.element_size()]
    got, expected = got.detach().cpu().contiguous(), expected.detach().contiguous()
    different = (got.view(bits) != expected.view(bits)) & ~(got.isnan() & expected.isnan())
    assert not different.any(), f"{what}: {int(different.sum())} differ:\n{got}\n{expected}"


def assert_as_torchs(problem: Problem, dy: torch.Tensor, device: str) -> None:
    """Values, indices and gradient are torch's, and our kernels computed them."""
    x = laid_out(problem.x, problem.layout, device).requires_grad_()
    asked = {"return_indices": True} if problem.name.endswith(("max_pool1d", "max_pool2d")) else {}
    if "indices" in problem.arguments:
        problem.arguments["indices"] = problem.arguments["indices"].to(device)
    with gpunn.trace() as trace:
        y, *indices = results(problem.of(GF, x, **asked))
        (dx,) = torch.autograd.grad(y, x, laid_out(dy, problem.dy_layout, device))
    kind = problem.name.removeprefix("adaptive_")[:-2]
    launched(trace, f"{kind}_forward", f"{kind}_backward")
    if "indices" in problem.arguments:
        problem.arguments["indices"] = problem.arguments["indices"].cpu()
    torch_y, *torch_indices = results(problem.of(F, problem.x, **asked))
    wide = problem.x.float().requires_grad_()
    (torch_dx,) = torch.autograd.grad(results(problem.of(F, wide))[0], wide, dy.float())
    torch_dx = torch_dx.to(dy.dtype)
    if problem.is_mean:
        x64, dy64 = as_numpy(problem.x), as_numpy(dy)
        exact_y, exact_dx, _ = exact(problem.name, problem.arguments, x64, dy64)
        assert_accurate(y, exact_y, torch_y, f"y of {problem}")
        assert_accurate(dx, exact_dx, torch_dx, f"dx of {problem}")
        return
    assert_identical(y, torch_y, f"y of {problem}")
    assert_identical(dx, torch_dx, f"dx of {problem}")
    for ours, theirs in zip(indices, torch_indices, strict=True):
        assert torch.equal(ours.cpu(), theirs), f"indices of {problem}"


def results(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("chunk", range(N_CHUNKS))
def test_bit_for_bit_torchs(chunk: int, device: str) -> None:
    """Whatever the order in which the threads run, where they run one after the other."""
    draw = Draw(20240229, chunk)
    for i in range(N_EACH):
        number = chunk * N_EACH + i
        dtype = DTYPES[number // len(NAMES) % len(DTYPES)]
        problem = draw.problem(NAMES[number % len(NAMES)], dtype)
        shape = results(problem.of(F, problem.x))[0].shape
        dy = torch.from_numpy(np.asarray(draw.random.standard_normal(tuple(shape)))).to(dtype)
        with thread_order(ORDERS[number % len(ORDERS)], number):
            assert_as_torchs(problem, dy, device)


# --- refusals ---

# What an argument may be changed to; most of it is refused, by some functions or by all.
SPOILED: dict[str, list[Any]] = {
    "kernel_size": [0, -1, [], (2, 2, 2), (2, 2), (2,), 1.5, None, "2", True, 50, (1, 0)],
    "stride": [0, -1, (1, 1, 1), (1, 1), [], None, 1.5, True, (0, 1)],
    "padding": [-1, (0, 0, 0), (0, 0), [], None, 1.5, True, 1, 2, 9],
    "dilation": [0, -2, (1, 1, 1), (2, 2), [], None, 1.5, True, 3, 20],
    "ceil_mode": [1, None, "no"],
    "count_include_pad": [1, None],
    "divisor_override": [0, 1.5, True],
    "output_size": [
        -1,
        (1, -1),
        (2, 2, 2, 2, 2),
        (2, 3),
        (2,),
        [],
        None,
        1.5,
        True,
        [None, 2],
        ["2"],
    ],
    "x": [
        lambda x: x[0],
        lambda x: x[None],
        lambda x: x[:0],
        lambda x: x[:, :0],
        lambda x: x[..., :0],
        lambda x: x[..., 0, :],
    ],
    "indices": [
        lambda i: i[:1, :1],
        lambda i: i.int(),
        lambda i: i.float(),
        lambda i: i[0],
        lambda i: i + 10_000,
        lambda i: i - 10_000,
        lambda i: -1 - i,
    ],
}


def spoil(problem: Problem, draw: Draw) -> None:
    """Change one argument, whether or not the call then goes through."""
    unpools = "indices" in problem.arguments
    names = {"x", *problem.arguments, *(() if unpools else ("stride", "padding"))}
    # torch's unpooling takes any kernel size, stride and padding that lead to a size
    names -= {"kernel_size", "stride", "padding"} if unpools else set()
    name = draw.one_of(sorted(names))
    change = draw.one_of(SPOILED[name])
    if name == "x":
        problem.x = change(problem.x)
    elif name == "indices":
        problem.arguments[name] = change(problem.arguments[name])
    else:
        problem.arguments[name] = change


# What torch's own code ran into, where it does not check: the class of the error says nothing.
BY_ACCIDENT = ("Dimension out of range", "Dimension specified", "Input dimension should be")


@pytest.mark.skipif(
    not INTERPRETING, reason="on a GPU an index outside of the output ends the use of CUDA"
)
def test_refuses_what_torch_refuses() -> None:
    """And nothing else."""
    draw, refused = Draw(20240229), 0
    for i in range(N_REFUSALS):
        problem = draw.problem(NAMES[i % len(NAMES)], torch.float32)
        spoil(problem, draw)
        theirs, ours = (outcome(problem, module) for module in (F, GF))
        if not isinstance(theirs, Exception):
            assert isinstance(ours, torch.Tensor), f"{problem}: torch takes it; {ours!r}"
            torch.testing.assert_close(ours, theirs, equal_nan=True, msg=str(problem))
            continue
        refused += 1
        assert isinstance(ours, Exception), f"{problem}: torch refuses it: {theirs!r}"
        same = isinstance(ours, type(theirs)) or any(text in str(theirs) for text in BY_ACCIDENT)
        assert same, f"{problem}: torch raises {theirs!r}, gpunn {ours!r}"
    assert refused > N_REFUSALS / 2
