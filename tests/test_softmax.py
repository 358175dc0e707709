"""softmax: values and gradients against NumPy float64, in every configuration, and its limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.kernels.softmax import INNER, LAST, LONGEST
from gpunn.reference.softmax import softmax_backward, softmax_forward
from kit import as_numpy, check_gradients, each_dtype, launched, layouts

FUNCTIONS = {
    "softmax": (GF.softmax, torch.softmax), "log_softmax": (GF.log_softmax, torch.log_softmax)
}  # fmt: skip
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def assert_right(
    name: str, x: torch.Tensor, dim: int, dy: torch.Tensor | None = None
) -> gpunn.Trace:
    """Value and gradient, no worse than twice torch's own error."""
    ours, theirs = FUNCTIONS[name]
    dy = torch.randn_like(x) if dy is None else dy
    results: list[tuple[torch.Tensor, ...]] = []
    with gpunn.trace() as trace:
        for function in (ours, theirs):
            leaf = x.detach().requires_grad_()
            y = function(leaf, dim)
            results.append((y, *torch.autograd.grad(y, leaf, dy)))
    assert len(launched(trace, "softmax_forward", "softmax_backward")) == 2
    s, logarithm = as_numpy(x), name == "log_softmax"
    exact = softmax_forward(s, dim, logarithm), softmax_backward(as_numpy(dy), s, dim, logarithm)
    for mine, truth, torchs in zip(results[0], exact, results[1], strict=True):
        assert_accurate(mine, truth, torchs)
    return trace


# On both sides of every tile's width; many rows a program, and rows that leave one half empty.
LENGTHS = sorted({n + d for n in (16, 128, 1024, 2048) for d in (0, 1)} | {2, 15, 100, 4097, 9000})


@each_dtype
@each_function
@pytest.mark.parametrize("length", LENGTHS)
def test_along_the_last_dimension(length: int, name: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(max(2, 150 // length), length, device=device).to(dtype)
    (record, _) = assert_right(name, x, -1).launches
    assert record.launch in LAST


@each_dtype
@each_function
@pytest.mark.parametrize("length", [LONGEST, LONGEST + 1])
def test_rows_that_are_read_once_and_twice(
    length: int, name: str, dtype: torch.dtype, device: str
) -> None:
    assert_right(name, torch.randn(2, length, device=device).to(dtype), -1)


@each_dtype
@each_function
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5, 9), 0), ((2, 17, 70), 1), ((2, 3, 4, 5), -3), ((1, 130, 3), 1), ((65, 2, 64), 0)],
)
def test_along_other_dimensions(
    shape: tuple[int, ...], dim: int, name: str, dtype: torch.dtype, device: str
) -> None:
    """Of 130 columns, more than a tile has: read twice."""
    trace = assert_right(name, torch.randn(shape, device=device).to(dtype), dim)
    assert trace.launches[0].launch in INNER


@each_dtype
@each_function
def test_layouts_of_input_and_gradient(name: str, dtype: torch.dtype, device: str) -> None:
    x, dy = (torch.randn(4, 3, 5, 6, device=device).to(dtype) for _ in range(2))
    for _, laid_out in layouts(x):
        assert_right(name, laid_out, 1, dy)
    for kind, laid_out in layouts(dy):
        if "one element" not in kind:  # whose gradient is 0
            assert_right(name, x, 1, laid_out)


@each_dtype
@each_function
def test_rows_far_from_zero(name: str, dtype: torch.dtype, device: str) -> None:
    size = 1e4 if dtype != torch.float16 else 1e3
    assert_right(name, (torch.randn(4, 50, device=device) + size).to(dtype), -1)


@each_dtype
@pytest.mark.parametrize("kind", ["added", "added, broadcast", "booleans"])
@pytest.mark.parametrize("logarithm", [False, True])
def test_scale_and_mask(kind: str, logarithm: bool, dtype: torch.dtype, device: str) -> None:
    """In one pass; the mask's gradient is summed where it is repeated."""
    x, dy = (torch.randn(3, 4, 50, device=device).to(dtype) for _ in range(2))
    mask = torch.randn((3, 4, 50) if kind == "added" else (4, 1), device=device).to(dtype)
    if kind == "added, broadcast":
        mask = torch.randn(4, 50, device=device).to(dtype)
    if kind == "booleans":
        mask = torch.rand(4, 50, device=device) < 0.6
    function = GF.log_softmax if logarithm else GF.softmax
    theirs = torch.log_softmax if logarithm else torch.softmax

    def composed(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        s = 0.3 * x
        s = s.masked_fill(~mask, -math.inf) if kind == "booleans" else s + mask
        return theirs(s, -1)

    results: list[list[torch.Tensor]] = []
    for call in (lambda x, m: function(x, -1, scale=0.3, mask=m), composed, composed):
        exact = len(results) == 2
        leaf = (x.double() if exact else x).detach().requires_grad_()
        bias = mask if kind == "booleans" else (mask.double() if exact else mask).detach()
        wanted = [leaf] if kind == "booleans" else [leaf, bias.requires_grad_()]
        y = call(leaf, bias)
        upstream = dy.double() if exact else dy
        if kind == "booleans":
            upstream = upstream.masked_fill(~mask, 0)
        gradients = torch.autograd.grad(y, wanted, upstream)
        results.append([y.masked_fill(~mask, 0) if kind == "booleans" else y, *gradients])
    for mine, torchs, truth in zip(*results, strict=True):
        assert_accurate(mine, as_numpy(truth), torchs)


def test_softmin_and_a_result_of_another_dtype(device: str) -> None:
    x = torch.randn(4, 9, device=device)
    torch.testing.assert_close(GF.softmin(x, 1), F.softmin(x, 1))
    half = x.half().requires_grad_()
    y, theirs = GF.softmax(half, 1, dtype=torch.float32), F.softmax(half, 1, dtype=torch.float32)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, theirs)
    dy = torch.randn_like(y)
    (dx,), (expected,) = torch.autograd.grad(y, half, dy), torch.autograd.grad(theirs, half, dy)
    assert dx.dtype == torch.float16
    torch.testing.assert_close(dx, expected)


@each_function
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_as_torchs(name: str, value: float, device: str) -> None:
    ours, theirs = FUNCTIONS[name]
    for shape, dim in (((3, 9), 1), ((9, 3), 0), ((3, LONGEST + 5), 1)):
        x = torch.randn(shape, device=device)
        x[1, 1] = value
        torch.testing.assert_close(ours(x, dim), theirs(x, dim), equal_nan=True)
    x = torch.full((2, 9), -math.inf, device=device)
    torch.testing.assert_close(ours(x, 1), theirs(x, 1), equal_nan=True)


@each_function
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (), (1,), (3, 1)])
def test_empty_and_single(name: str, shape: tuple[int, ...], device: str) -> None:
    ours, theirs = FUNCTIONS[name]
    x = torch.randn(shape, device=device).requires_grad_()
    y, expected = ours(x, -1), theirs(x, -1)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("function", [GF.softmax, GF.log_softmax, GF.softmin])
def test_gradcheck(function: Callable[..., torch.Tensor]) -> None:
    check_gradients(lambda x: function(x, 1, scale=0.7), torch.randn(2, 5, 3))
    check_gradients(lambda x, m: function(x, -1, mask=m), torch.randn(2, 5), torch.randn(5))


def test_backward_twice_and_bit_identical(device: str) -> None:
    x = torch.randn(3, LONGEST + 9, device=device).requires_grad_()
    y, dy = GF.softmax(x, -1), torch.randn(3, LONGEST + 9, device=device)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, dy)
    (anew,) = torch.autograd.grad(GF.softmax(x, -1), x, dy)
    assert torch.equal(first, again)
    assert torch.equal(first, anew)


def test_autocast(device: str) -> None:
    x = torch.randn(4, 9, device=device).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        y, theirs = GF.softmax(x, 1), F.softmax(x, 1)
    assert y.dtype == theirs.dtype
    torch.testing.assert_close(y, theirs)


def test_compiles(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, m: GF.log_softmax(x, 1, mask=m), fullgraph=True, backend="aot_eager"
    )
    for rows in (3, 5):
        x = torch.randn(rows, 9, device=device).requires_grad_()
        mask = torch.randn(9, device=device)
        y, expected = compiled(x, mask), torch.log_softmax(x + mask, 1)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        gradients = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5), (5,)])
def test_without_a_dimension_it_is_torchs_guess(shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, device=device)
    torch.testing.assert_close(GF.softmax(x), F.softmax(x))


def test_layers(device: str) -> None:
    x, mask = torch.randn(2, 3, 4, 5, device=device), torch.rand(4, 5, device=device) < 0.7
    torch.testing.assert_close(gpunn.nn.Softmax2d()(x), torch.nn.Softmax2d()(x))
    layer = gpunn.nn.Softmax(-2, scale=0.5)
    torch.testing.assert_close(layer(x, mask), GF.softmax(x, -2, scale=0.5, mask=mask))
    with pytest.raises(ValueError, match="input: Softmax2d expects 3 or 4"):
        gpunn.nn.Softmax2d()(x[0, 0])


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((torch.randn(3), 1), {}, IndexError, "dim"),
        ((torch.ones(3).int(), 0), {}, RuntimeError, "input: softmax expects floating"),
        ((torch.randn(3), 0), {"mask": [True]}, TypeError, "mask"),
        ((torch.randn(3), 0), {"mask": torch.ones(3).int()}, RuntimeError, "mask: softmax expects"),
        ((torch.randn(3), 0), {"mask": torch.ones(2, 3)}, RuntimeError, "mask: softmax expects a"),
        (([1.0], 0), {}, TypeError, "input"),
    ],
)
def test_refuses(
    arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GF.softmax(*arguments, **keywords)
