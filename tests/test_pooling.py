"""Pooling: each function against its float64 reference, in every dtype, layout and mode.

``test_pooling_drawn.py`` holds them to torch's own numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gpunn
import gpunn.functional as GF
import gpunn.nn
from closeness import assert_accurate
from gpunn.checks.comparison import any_algorithm, on_cpu
from gpunn.checks.pooling import CASES, exact
from gpunn.functional.dispatch import AGAIN
from kit import as_numpy, check_gradients, each_dtype, launched, layouts

LECTURE = torch.tensor([[1.0, 2, 2, 4], [2, 5, 1, 8], [3, 0, 4, 4], [6, 1, 7, 6]])

MAXIMA = [name for name in CASES if name.startswith("max")]
each_case = pytest.mark.parametrize("case", CASES)


def functions(case: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """gpunn's function of a case and torch's, both with its arguments."""
    name, _, arguments = CASES[case]

    def with_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, **more: function(x, **arguments, **more)

    return with_arguments(getattr(GF, name)), with_arguments(getattr(F, name))


def launches_of(name: str) -> tuple[str, str]:
    """The launchers that compute a function and its gradient."""
    kind = "max_pool" if "max_pool" in name else "avg_pool"
    return f"{kind}_forward", f"{kind}_backward"


def value_and_gradient(
    function: Callable[..., Any], x: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y, dx


def assert_both_accurate(case: str, x: torch.Tensor, dy: torch.Tensor, what: str = "") -> None:
    """Value and gradient at x are right, and our kernels computed them."""
    name, _, arguments = CASES[case]
    ours, theirs = functions(case)
    with gpunn.trace() as trace:
        y, dx = value_and_gradient(ours, x, dy)
    launched(trace, *launches_of(name))
    with any_algorithm():
        torch_y, torch_dx = value_and_gradient(on_cpu(theirs), x, dy)
    exact_y, exact_dx, _ = exact(name, arguments, as_numpy(x), as_numpy(dy))
    assert_accurate(y, exact_y, torch_y, f"y {what}")
    assert_accurate(dx, exact_dx, torch_dx, f"dx {what}")


def drawn(
    case: str, device: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """An input of the case, and an upstream gradient for it."""
    _, shape, _ = CASES[case]
    x = torch.randn(shape).to(device, dtype)
    return x, torch.randn(functions(case)[1](x).shape).to(device, dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's max_unpool depends on its threads, and refuses to run where that is forbidden."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with any_algorithm():
            yield
    finally:
        torch.set_num_threads(n_threads)


# --- values and gradients ---


def test_the_lectures_example(device: str) -> None:
    x = LECTURE.to(device)[None, None]
    y, indices = GF.max_pool2d(x, 2, 2, return_indices=True)
    assert y.tolist() == [[[[5, 8], [6, 7]]]]
    assert indices.tolist() == [[[[5, 7], [12, 14]]]]
    assert gpunn.nn.MaxPool2d(2, 2)(x).tolist() == [[[[5, 8], [6, 7]]]]
    assert GF.avg_pool2d(x, 2, 2).tolist() == [[[[2.5, 3.75], [2.5, 5.25]]]]
    assert GF.max_unpool2d(y, indices, 2).flatten().nonzero().flatten().tolist() == [5, 7, 12, 14]


@each_dtype
@each_case
def test_value_and_gradient(case: str, dtype: torch.dtype, device: str) -> None:
    assert_both_accurate(case, *drawn(case, device, dtype))


@pytest.mark.parametrize("case", MAXIMA)
def test_indices(case: str, device: str) -> None:
    """Where two are equal, the first; and the shape and dtype of torch's."""
    name, shape, arguments = CASES[case]
    x = torch.randint(-2, 3, shape).float().to(device)
    ours, theirs = functions(case)
    y, indices = ours(x, return_indices=True)
    torch_y, torch_indices = theirs(x, return_indices=True)
    assert torch.equal(y, torch_y)
    assert torch.equal(indices, torch_indices)
    _, _, places = exact(name, arguments, as_numpy(x), as_numpy(y))
    assert places is not None
    assert np.array_equal(indices.cpu(), places)
    assert indices.dtype == torch.int64
    leaf = x.requires_grad_()
    y, indices = ours(leaf, return_indices=True)
    assert y.requires_grad
    assert not indices.requires_grad
    assert torch.equal(indices, torch_indices)
    dy = torch.randn_like(y)
    expected = exact(name, arguments, as_numpy(x), as_numpy(dy))[1]
    assert np.allclose(as_numpy(torch.autograd.grad(y, leaf, dy)[0]), expected, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    ["max, windows overlap", "avg, windows overlap, ceil", "max, adaptive", "avg, adaptive"],
)
def test_layouts(case: str, device: str) -> None:
    """Every layout of the input, and every layout of the gradient."""
    base, base_dy = drawn(case, device)
    base.view(-1)[0] = base_dy.view(-1)[0] = 1.25  # what the expanded layouts repeat
    for layout, x in layouts(base):
        assert_both_accurate(case, x, base_dy, f"x {layout}")
    for layout, dy in layouts(base_dy):
        assert_both_accurate(case, base, dy, f"dy {layout}")


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        pytest.param((5, 9, 6, 5), (3, 2, 1), id="several planes a block"),
        pytest.param((64, 67, 6, 5), (3, 2, 1), id="several planes a block of a GPU"),
        pytest.param((1, 2, 71, 63), (3, 2, 1), id="a plane in bands that share rows"),
        pytest.param((1, 2, 70, 62), (2, 2, 0), id="a plane in bands that share none"),
        pytest.param((1, 2, 64, 60), (1, 3, 0), id="bands with rows between that nothing needs"),
        pytest.param((1, 1, 131, 40), (4, 1, 2), id="as many rows out as in"),
        pytest.param((1, 2, 71, 63), (4, 3, 2, 5), id="the second window starts above the first"),
        pytest.param((1, 1, 3, 4100), (3, 2, 1), id="a row that no tile holds"),
        pytest.param((1, 1, 3, 4100), (3, 5), id="a row that no tile holds, adaptive"),
        pytest.param((1, 2, 90, 50), (7, 9), id="bands of an adaptive pooling"),
        pytest.param((1, 2, 13, 9), (40, 41), id="bands of an adaptive pooling to more"),
        pytest.param((1, 1, 13, 9), (90, 81), id="bands of an adaptive pooling to yet more"),
    ],
)
def test_how_the_work_is_shared(
    kind: str, shape: tuple[int, ...], window: tuple[int, ...], device: str
) -> None:
    """Many planes a block, or rows of one; two numbers of ``window`` are an adaptive output."""
    name, rest = f"{kind}_pool2d", window
    if len(window) == 2:
        name, rest = f"adaptive_{kind}_pool2d", (window,)  # type: ignore[assignment]
    elif kind == "avg":
        rest = window[:3]
    x = torch.randn(shape)
    dy = torch.randn_like(getattr(F, name)(x, *rest))
    ours = value_and_gradient(lambda x: getattr(GF, name)(x, *rest), x.to(device), dy.to(device))
    # On a CPU: a GPU adds up an adaptive gradient in the order that chance has it.
    theirs = value_and_gradient(lambda x: getattr(F, name)(x, *rest), x, dy)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.cpu(), expected)


@pytest.mark.parametrize("case", [case for case in CASES if len(CASES[case][1]) == 4])
def test_channels_last_in_channels_last_out(case: str, device: str) -> None:
    x, dy = drawn(case, device)
    x = x.to(memory_format=torch.channels_last)
    y, dx = value_and_gradient(functions(case)[0], x, dy)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert_both_accurate(case, x, dy)
    if case in MAXIMA:
        _, indices = functions(case)[0](x, return_indices=True)
        assert indices.is_contiguous(memory_format=torch.channels_last)


@each_case
def test_no_images_and_one_pixel(case: str, device: str) -> None:
    name, shape, _ = CASES[case]
    n = 1 if name.endswith("1d") else 2
    none = torch.empty(0, *shape[-n - 1 :], device=device)
    y, dx = value_and_gradient(functions(case)[0], none, functions(case)[1](none))
    assert y.shape == functions(case)[1](none).shape
    assert dx.shape == none.shape
    pixel, one = torch.randn(1, 1, *[1] * n, device=device), {"output_size": 1}
    arguments = one if "adaptive" in name else {"kernel_size": 1}
    y, dx = value_and_gradient(lambda x: getattr(GF, name)(x, **arguments), pixel, 3 * pixel)
    assert torch.equal(y, pixel)
    assert torch.equal(dx, 3 * pixel)


@pytest.mark.parametrize("name", ["adaptive_max_pool2d", "adaptive_avg_pool2d"])
@pytest.mark.parametrize("size", [(0, 2), (2, 0)], ids=str)
def test_no_outputs(name: str, size: tuple[int, int], device: str) -> None:
    """The gradient is zero, where torch's raises; so is the gradient's."""
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    y = getattr(GF, name)(x, size)
    assert y.shape == getattr(F, name)(x, size).shape
    dy = torch.ones_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert torch.equal(dx, torch.zeros_like(x))
    assert torch.autograd.grad(dx.sum(), dy)[0].shape == y.shape


@each_dtype
@each_case
def test_infinities_and_nans(case: str, dtype: torch.dtype, device: str) -> None:
    """A NaN wins a window, the last one if there are several; in one of -inf the first tap does."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.inf, 0.5, -2.0])
    _, shape, _ = CASES[case]
    x = special[torch.randint(0, 6, shape)].to(dtype)
    x[-1] = -torch.inf
    ours, theirs = functions(case)
    dy, given = torch.ones_like(theirs(x)), x.to(device)
    torchs = value_and_gradient(theirs, x, dy)
    for got, expected in zip(value_and_gradient(ours, given, dy.to(device)), torchs, strict=True):
        torch.testing.assert_close(got.cpu(), expected, equal_nan=True)
    if case in MAXIMA:
        _, indices = ours(given, return_indices=True)
        assert torch.equal(indices.cpu(), theirs(x, return_indices=True)[1])


def test_a_window_that_misses_the_input(device: str) -> None:
    """Dilation and padding can put one there; torch's gradient is then written out of bounds."""
    x = torch.randn(1, 2, 1, 2, device=device, requires_grad=True)
    arguments = ((1, 2), 1, (0, 1), (1, 3))
    y, indices = GF.max_pool2d(x, *arguments, return_indices=True)
    expected = F.max_pool2d(x.detach().cpu(), *arguments, return_indices=True)
    assert torch.equal(y.cpu(), expected[0])
    assert torch.equal(indices.cpu(), expected[1])
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    assert not dx.any()
    dy = torch.ones_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert not torch.autograd.grad(dx.sum(), dy)[0].any()


# --- how it differentiates ---


@each_case
def test_gradients_once_and_twice(case: str) -> None:
    name, shape, arguments = CASES[case]
    n = 1 if name.endswith("1d") else 2
    small = (1, 2, *shape[-n:])
    x = torch.randperm(int(np.prod(small))).reshape(small) / 7  # maxima that no step changes
    check_gradients(lambda x: getattr(GF, name)(x, **arguments), x)


@pytest.mark.parametrize("case", ["max, windows overlap", "avg, adaptive"])
def test_a_gradient_penalty(case: str, device: str) -> None:
    """The gradient of the squared gradient, through what precedes the pooling and what follows.

    What arrives where the maxima were is gathered by PyTorch, as the trace says.
    """

    def penalty(pool: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(pool(x * x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), x)[0]

    x, _ = drawn(case, "cpu")
    ours, theirs = functions(case)
    with gpunn.trace() as trace:
        got = penalty(ours, x.to(device))
    assert {f.reason for f in trace.fallbacks} == ({AGAIN} if case in MAXIMA else set())
    launched(gpunn.Trace(trace.launches), *launches_of(CASES[case][0]))
    torch.testing.assert_close(got.cpu(), penalty(theirs, x), rtol=1e-5, atol=1e-5)


@each_case
def test_backward_twice_and_nothing_is_overwritten(case: str, device: str) -> None:
    x, dy = drawn(case, device)
    x.requires_grad_()
    before = x.detach().clone(), dy.clone()
    y = functions(case)[0](x)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(first, second)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])


class Outputs(TorchDispatchMode):
    """Notes what every launcher of max_pool_forward made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.Tensor, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if function is torch.ops.gpunn.max_pool_forward.default:
            self.made.append(result)
        return result


@pytest.mark.parametrize("case", MAXIMA)
def test_what_is_stored(case: str, device: str) -> None:
    """A byte an output (an int32 past 256 taps) for the backward; nothing where there is none."""
    x, dy = drawn(case, device)
    bytes_each = 4 if "256" in case else 1
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    function = functions(case)[0]
    with Outputs() as outputs, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(x.requires_grad_())
        with torch.no_grad():
            function(x)
            function(x, return_indices=True)
    assert [t.nbytes for t in saved] == [dy.numel() * bytes_each]
    kept = [[part.numel() for part in made[1:]] for made in outputs.made]
    assert kept == [[dy.numel(), 0], [0, 0], [0, dy.numel()]]
