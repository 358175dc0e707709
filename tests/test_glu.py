"""Gated linear units: every gate, dtype, dimension and layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import gpunn
import gpunn.functional as GF
import gpunn.nn
from closeness import assert_accurate
from gpunn.checks.glu import GATED
from gpunn.functional.activation import TORCH
from gpunn.kernels.glu import LAUNCHES, GluLaunch, choose_launch
from gpunn.reference.glu import glu_backward, glu_forward
from kit import as_numpy, check_gradients, each_dtype, launched, layouts

BLOCK = GluLaunch().block_cols
Function = Callable[..., torch.Tensor]
each_gate = pytest.mark.parametrize("name", GATED)


def value_and_gradient(
    function: Function, x: torch.Tensor, dy: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = function(x, dim)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y, dx


def torchs(name: str) -> Function:
    """The same from PyTorch's ops, and its own glu where it is that."""

    def composed(x: torch.Tensor, dim: int) -> torch.Tensor:
        a, b = x.chunk(2, dim)
        return a * TORCH[GATED[name][1]](b)

    return torch.nn.functional.glu if name == "glu" else composed


def halved(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    dim %= len(shape)
    return (*shape[:dim], shape[dim] // 2, *shape[dim + 1 :])


def assert_both_accurate(
    name: str, x: torch.Tensor, dy: torch.Tensor, dim: int, what: str = ""
) -> None:
    """Value and gradient at x are right, and our kernels computed them."""
    function, gate = GATED[name]
    with gpunn.trace() as trace:
        y, dx = value_and_gradient(function, x, dy, dim)
    launched(trace, "glu_forward", "glu_backward")
    torch_y, torch_dx = value_and_gradient(torchs(name), x, dy, dim)
    assert_accurate(y, glu_forward(as_numpy(x), dim, gate), torch_y, f"y {what}")
    exact_dx = glu_backward(as_numpy(dy), as_numpy(x), dim, gate)
    assert_accurate(dx, exact_dx, torch_dx, f"dx {what}")


def drawn(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2 * torch.randn(shape)).to(device, dtype)


@each_dtype
@each_gate
def test_value_and_gradient(name: str, dtype: torch.dtype, device: str) -> None:
    x, dy = drawn((5, 46), device, dtype), drawn((5, 23), device, dtype)
    assert_both_accurate(name, x, dy, -1)


@each_dtype
@each_gate
def test_large_gates(name: str, dtype: torch.dtype, device: str) -> None:
    gates = torch.linspace(-100, 100, 101)
    x = torch.cat([torch.randn(101), gates]).to(device, dtype)
    assert_both_accurate(name, x, drawn((101,), device, dtype), 0)


@pytest.mark.parametrize("name", ["glu", "swiglu"], ids=["gate's output", "gate's input"])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        pytest.param((2,), 0, id="halves of one element"),
        pytest.param((4, 6, 10), 0, id="first dimension"),
        pytest.param((3, 6, 5), 1, id="middle dimension"),
        pytest.param((3, 6, 5), -2, id="dimension from the end"),
        pytest.param((3, 2 * (BLOCK - 1)), -1, id="the last element of a block is masked"),
        pytest.param((2, 2 * BLOCK), -1, id="no element of a block is masked"),
        pytest.param((2, 2 * (BLOCK + 1)), -1, id="a second program of a row has one element"),
    ],
)
def test_sizes_and_dimensions(name: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    x = 1 + drawn(shape, device).abs()
    assert_both_accurate(name, x, 1 + drawn(halved(shape, dim), device).abs(), dim)


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch.block_cols} columns")
@pytest.mark.parametrize("missing", [0, 1])
def test_every_tile(launch: GluLaunch, missing: int, device: str) -> None:
    """Two programs down; the last row, and the last column, inside of a tile or at its edge."""
    half, n_rows = launch.block_cols - missing, 2 * launch.block_rows - missing
    assert choose_launch(half) == launch
    x, dy = 1 + drawn((n_rows, 2 * half), device).abs(), drawn((n_rows, half), device)
    assert_both_accurate("swiglu", x, dy, -1)


@pytest.mark.parametrize("dim", range(4))
def test_channels_last_in_channels_last_out(dim: int, device: str) -> None:
    x = drawn((2, 6, 4, 8), device).to(memory_format=torch.channels_last)
    dy = drawn(halved(x.shape, dim), device)
    y, dx = value_and_gradient(GF.glu, x, dy, dim)
    assert y.stride() == torch.nn.functional.glu(x, dim).stride()
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert_both_accurate("glu", x, dy, dim)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 4, 0)], ids=str)
def test_no_elements(shape: tuple[int, ...], device: str) -> None:
    x = torch.empty(shape, device=device)
    dy = torch.empty(halved(shape, 1), device=device)
    y, dx = value_and_gradient(GF.swiglu, x, dy, 1)
    assert y.shape == dy.shape
    assert dx.shape == x.shape


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_layouts(dim: int, device: str) -> None:
    """Every layout of the input, and every layout of the gradient."""
    shape = (2, 2, 3, 4)
    base, base_dy = drawn(shape, device), drawn(halved(shape, dim), device)
    base.view(-1)[0] = base_dy.view(-1)[0] = 1.25  # what the expanded layouts repeat
    for layout, x in layouts(base):
        assert_both_accurate("swiglu", x, base_dy, dim, f"x {layout}")
    for layout, dy in layouts(base_dy):
        assert_both_accurate("swiglu", base, dy, dim, f"dy {layout}")


@each_gate
@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_once_and_twice(name: str, dim: int) -> None:
    x = torch.tensor([[-2.1, 0.7], [1.3, -0.4]])
    check_gradients(lambda x: GATED[name][0](x, dim), x)


@each_gate
def test_infinities_and_nans(name: str, device: str) -> None:
    """As PyTorch's; where it has NaN although there is a limit, the limit is right too."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3e38, -3e38, 1.5])
    x = torch.cartesian_prod(special, special).to(device)
    dy = torch.full((49, 1), 0.75, device=device)
    got = value_and_gradient(GATED[name][0], x, dy, 1)
    expected = value_and_gradient(torchs(name), x, dy, 1)
    for ours, theirs in zip(got, expected, strict=True):
        known = ~theirs.isnan()
        torch.testing.assert_close(ours[known], theirs[known])
    assert got[0][:7].isnan().all()
    assert got[0][::7].isnan().all()


@each_gate
def test_backward_twice_and_nothing_is_overwritten(name: str, device: str) -> None:
    x, dy = drawn((3, 8), device), drawn((3, 4), device)
    x.requires_grad_()
    before = x.detach().clone(), dy.clone()
    y = GATED[name][0](x)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(first, second)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])


@each_gate
def test_an_odd_dimension_is_refused(name: str, device: str) -> None:
    x = torch.ones(4, 5, device=device)
    with pytest.raises(RuntimeError):
        torch.nn.functional.glu(x, 1)
    with pytest.raises(RuntimeError, match=r"input: .*dimension 1.*must be even.*5 .*\(4, 5\)"):
        GATED[name][0](x, 1)


@pytest.mark.parametrize("dim", [2, -3])
def test_a_dimension_that_is_none_is_refused(dim: int, device: str) -> None:
    x = torch.ones(4, 6, device=device)
    with pytest.raises(IndexError):
        torch.nn.functional.glu(x, dim)
    with pytest.raises(IndexError, match=f"dim: .* from -2 to 1, got {dim}"):
        GF.glu(x, dim)


def test_no_dimensions_are_refused_as_torch_refuses(device: str) -> None:
    x = torch.tensor(1.0, device=device)
    with pytest.raises(RuntimeError):
        torch.nn.functional.glu(x)
    with pytest.raises(RuntimeError, match=r"input: glu .*at least one dimension"):
        GF.glu(x)


def test_an_unknown_approximation_is_refused(device: str) -> None:
    with pytest.raises(RuntimeError, match=r"approximate: .*'none' or 'tanh', got 'erf'"):
        GF.geglu(torch.ones(2, device=device), approximate="erf")
    with pytest.raises(RuntimeError, match=r"approximate: .*'none' or 'tanh', got 'erf'"):
        gpunn.nn.GEGLU(approximate="erf")
    with pytest.raises(TypeError, match="input: reglu expects a tensor, got list"):
        GF.reglu([1.0, 2.0])  # type: ignore[arg-type]


@each_gate
def test_torch_gives_the_same_and_the_trace_says_so(name: str, device: str) -> None:
    x = drawn((3, 8), device)
    with gpunn.backend("torch"), gpunn.trace() as trace:
        theirs = GATED[name][0](x)
    assert [record.reason for record in trace.fallbacks] == ["backend('torch')"]
    assert not trace.launches
    torch.testing.assert_close(GATED[name][0](x), theirs)


@each_gate
@each_dtype
def test_autocast_as_torch(name: str, dtype: torch.dtype, device: str) -> None:
    x = drawn((2, 8), device, dtype)
    with torch.autocast(device, torch.bfloat16):
        assert GATED[name][0](x).dtype == torchs(name)(x, -1).dtype


def test_compiles_without_a_graph_break(device: str) -> None:
    def function(x: torch.Tensor, dim: int) -> torch.Tensor:
        return GF.glu(GF.swiglu(x, dim), dim)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, dy = drawn((3, 8), device), drawn((3, 2), device)
    with gpunn.trace() as trace:
        got = value_and_gradient(compiled, x, dy, 1)
    launched(trace, "glu_forward", "glu_backward")
    assert all(map(torch.equal, got, value_and_gradient(function, x, dy, 1)))
