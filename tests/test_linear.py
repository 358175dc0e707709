"""linear: values and gradients against NumPy float64, on the kernels, in every configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.functional.activation import TORCH
from gpunn.kernels import product
from gpunn.kernels.activation import ACTIVATIONS
from gpunn.kernels.launch import Device
from gpunn.kernels.product import MatmulLaunch
from gpunn.reference.linear import linear_backward, linear_forward
from kit import LAYOUTS, as_numpy, each_dtype, launched

OPERATORS = ("linear_forward", "linear_input_gradient", "linear_weight_gradient")


def operands(
    n_rows: int, n_cols: int, n_inner: int, dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """x, weight, bias, residual and an upstream gradient, all random."""
    shapes = [(n_rows, n_inner), (n_cols, n_inner), (n_cols,), (n_rows, n_cols), (n_rows, n_cols)]
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def assert_right(
    given: Sequence[torch.Tensor | None], dy: torch.Tensor, activation: str = "identity"
) -> gpunn.Trace:
    """Value and all gradients against the reference, no worse than twice torch's own error.

    ``given`` is x, weight, bias and residual.
    """
    parameters = list(ACTIVATIONS[activation].defaults)

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        y = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [y, *torch.autograd.grad(y, wanted, dy)]

    def theirs(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        y = TORCH[activation](F.linear(x, weight, bias), *parameters)
        return y if residual is None else y + residual

    with gpunn.trace() as trace:
        got = run(lambda x, w, b, r: GF.linear(x, w, b, activation=activation, residual=r))
    launched(trace, *OPERATORS)
    arrays = [None if t is None else as_numpy(t) for t in given]
    x, weight, bias, residual = arrays
    y = linear_forward(x, weight, bias, residual, activation, parameters)
    gradients = linear_backward(as_numpy(dy), x, weight, bias, activation, parameters)
    truths = [y, *(g for g, t in zip(gradients, given, strict=True) if t is not None)]
    for mine, truth, baseline in zip(got, truths, run(theirs), strict=True):
        assert_accurate(mine, truth, baseline)
    return trace


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_as_epilogue(activation: str, dtype: torch.dtype, device: str) -> None:
    x, weight, bias, _, dy = operands(20, 24, 16, dtype, device)
    assert_right((x, weight, bias, None), dy, activation)


@each_dtype
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_residual_and_bias(
    activation: str, with_bias: bool, dtype: torch.dtype, device: str
) -> None:
    x, weight, bias, residual, dy = operands(20, 24, 16, dtype, device)
    assert_right((x, weight, bias if with_bias else None, residual), dy, activation)


SHAPES = {
    "one element": (1, 1, 1),
    "inner dimension of one": (5, 7, 1),
    "one row, as in decoding": (1, 33, 40),
    "one column": (33, 1, 40),
    "odd everywhere, rows not aligned to 16 bytes": (37, 53, 29),
    "several tiles with ragged edges, and tiles taken in groups": (150, 270, 70),
    "one more than a tile": (65, 129, 65),
    "few tiles and a long inner dimension: split into parts": (9, 12, 700),
}


@each_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    x, weight, bias, residual, dy = operands(*shape, dtype, device)
    assert_right((x, weight, bias, residual), dy, "relu")


@pytest.mark.parametrize("shape", [(0, 4, 8), (4, 0, 8), (4, 8, 0), (0, 0, 0)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_empty(shape: tuple[int, int, int], activation: str | None, device: str) -> None:
    x, weight, bias, residual, dy = operands(*shape, torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    y = GF.linear(*leaves[:3], activation=activation, residual=residual)
    expected = TORCH[activation or "identity"](F.linear(*leaves[:3])) + residual
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y, leaves, dy)
    theirs = torch.autograd.grad(expected, leaves, dy)
    torch.testing.assert_close(ours, theirs)


def test_more_than_two_dimensions_and_one(device: str) -> None:
    x, weight, bias, _, _ = operands(24, 5, 8, torch.float32, device)
    for shape in ((24,), (2, 12), (2, 3, 4), (2, 1, 3, 4)):
        y = GF.linear(x.reshape(*shape, 8), weight, bias, activation="tanh")
        torch.testing.assert_close(y, torch.tanh(F.linear(x, weight, bias)).reshape(*shape, 5))
    torch.testing.assert_close(GF.linear(x[0], weight, bias), F.linear(x[0], weight, bias))


@pytest.mark.parametrize("which", ["x", "weight", "residual", "dy"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "channels_last"])
def test_layouts(layout: str, which: str, device: str) -> None:
    tensors = operands(40, 48, 32, torch.float32, device)
    at = ("x", "weight", "bias", "residual", "dy").index(which)
    tensors[at] = LAYOUTS[layout][2](tensors[at])
    assert_right(tensors[:4], tensors[4], "gelu")


def test_sum_backward_sends_an_expanded_gradient(device: str) -> None:
    """A peer took the gradient of ``y.sum()``, whose strides are all 0, to be contiguous."""
    x, weight, bias, _, _ = operands(19, 23, 17, torch.float32, device)
    x.requires_grad_()
    (ours,) = torch.autograd.grad(GF.linear(x, weight, bias, activation="silu").sum(), x)
    (theirs,) = torch.autograd.grad(F.silu(F.linear(x, weight, bias)).sum(), x)
    torch.testing.assert_close(ours, theirs)


TILES = (
    *((tile, torch.bfloat16) for tile in product.DESCRIPTOR_TILES_16_BIT),
    *((tile, torch.bfloat16) for tile in product.POINTER_TILES_16_BIT),
    *((tile, torch.float32) for tile in (*product.TILES_TF32, *product.TILES_IEEE)),
)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("tile", "dtype"), TILES)
def test_every_launch_configuration(
    tile: MatmulLaunch,
    dtype: torch.dtype,
    parts: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = replace(tile, split_inner=parts)
    monkeypatch.setattr(product, "choose_launch", lambda problem: launch)
    x, weight, bias, residual, dy = operands(70, 72, 136, dtype, device)
    trace = assert_right((x, weight, bias, residual), dy, "gelu")
    assert {r.launch for r in trace.launches if r.kernel == "matmul_kernel"} == {launch}


def test_who_is_read_by_descriptor(device: str) -> None:
    """TMA wants 16-byte aligned rows, one dimension contiguous, and rows that do not overlap."""
    hopper = Device(90, 132)
    matrix = torch.zeros(32, 64, dtype=torch.bfloat16, device=device)
    overlapping = matrix.view(-1).unfold(0, 64, 16)
    cases = {
        "inner": [matrix, matrix[:, :40], matrix[::2]],
        "rows": [matrix.T, matrix[:, :40].T],
        "pointer": [
            matrix[:, 1:],
            matrix[:, ::2],
            matrix[:, :63].contiguous(),
            matrix[:1].expand(32, 64),
            matrix[:, :0],
            overlapping,
        ],
    }
    for layout, matrices in cases.items():
        assert [product.layout_of(m, hopper) for m in matrices] == [layout] * len(matrices)
    assert product.layout_of(matrix, Device(80, 108)) == "pointer"


def test_tiles_fit_the_chip() -> None:
    """A consumer Blackwell has 99 KiB of shared memory for a block, not 227."""
    problem = product.Product(
        8192, 8192, 1024, torch.bfloat16, "ieee", True, False, Device(120, 170, 101376)
    )
    launch = product.choose_launch(problem)
    assert product.fits(launch, problem)
    assert not product.fits(product.DESCRIPTOR_TILES_16_BIT[0], problem)


def test_more_rows_than_are_counted_are_torchs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("gpunn.functional.linear"), "MOST_ROWS", 5)
    x, weight = torch.randn(2, 3, 4, device=device), torch.randn(5, 4, device=device)
    with gpunn.trace() as trace, gpunn.backend("auto"):
        y = GF.linear(x, weight, activation="relu")
        GF.linear(x[0], weight, activation="relu")
    torch.testing.assert_close(y, F.linear(x, weight).relu())
    reason = "no kernel for more rows than 32 bits count"
    assert [fallback.reason for fallback in trace.fallbacks].count(reason) == 1
    assert trace.launches


def test_the_choice_of_tiles() -> None:
    """Large tiles for large products; parts for few tiles; never the widest tile with dropout."""
    hopper = Device(90, 132)

    def choose(n_rows: int, n_cols: int, n_inner: int, dropout: bool = False) -> MatmulLaunch:
        problem = product.Product(
            n_rows, n_cols, n_inner, torch.bfloat16, "ieee", True, dropout, hopper
        )
        return product.choose_launch(problem)

    wide = product.DESCRIPTOR_TILES_16_BIT[0]
    assert choose(8192, 8192, 1024) == wide
    assert choose(8192, 8192, 1024, dropout=True) != wide
    assert choose(16, 4096, 4096).split_inner == 2
    assert choose(64, 64, 65536).split_inner == product.MOST_PARTS
    assert choose(64, 64, 64).split_inner == 1
