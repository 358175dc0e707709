"""layer_norm and rms_norm: values and gradients against NumPy float64, and what is fused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.kernels import layer_norm as kernels
from gpunn.kernels.launch import cdiv, device_of
from gpunn.kernels.layer_norm import LONG, LONGEST, LONGEST_BACKWARD, LONGEST_SUMMED, ROWS
from gpunn.kernels.philox import draw_seed
from gpunn.reference.dropout import kept_elements
from gpunn.reference.layer_norm import row_norm_backward, row_norm_forward
from kit import as_numpy, check_gradients, each_dtype, launched, layouts

OPERATORS = ("row_norm_forward", "row_norm_backward")
each_norm = pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])


def call(name: str, module: Any, x: torch.Tensor, weight: Any, bias: Any, **arguments: Any) -> Any:
    """F's or GF's function on the last dimension; rms_norm has no bias."""
    if name == "rms_norm":
        return module.rms_norm(x, x.shape[-1:], weight, 1e-5, **arguments)
    return module.layer_norm(x, x.shape[-1:], weight, bias, 1e-5, **arguments)


def assert_right(
    name: str,
    x: torch.Tensor,
    dy: torch.Tensor | None = None,
    *,
    affine: bool = True,
    residual: torch.Tensor | None = None,
    parameters: torch.dtype | None = None,
) -> gpunn.Trace:
    """Value and gradients, no worse than twice torch's own error."""
    n, device = x.shape[-1], x.device
    weight: Any = None
    bias: Any = None
    if affine:
        weight = torch.randn(n, device=device).to(parameters or x.dtype)
        bias = (
            torch.randn(n, device=device).to(parameters or x.dtype)
            if name == "layer_norm"
            else None
        )
    dy = torch.randn_like(x) if dy is None else dy
    results: list[list[torch.Tensor]] = []
    with gpunn.trace() as trace:
        for ours in (True, False):
            leaves: list[Any] = [
                None if t is None else t.detach().requires_grad_()
                for t in (x, weight, bias, residual)
            ]
            if ours:
                y = call(name, GF, leaves[0], *leaves[1:3], residual=leaves[3])
            else:
                s = leaves[0] if residual is None else leaves[0] + leaves[3]
                y = call(name, F, s, *leaves[1:3])
            wanted = [leaf for leaf in leaves if leaf is not None]
            results.append([y, *torch.autograd.grad(y, wanted, dy)])
    launched(trace, *OPERATORS)
    s = x if residual is None else x + residual  # rounded, as both round it
    flat, centred = as_numpy(s).reshape(-1, n), name == "layer_norm"
    w, b = (None if t is None else as_numpy(t) for t in (weight, bias))
    exact = row_norm_forward(flat, w, b, 1e-5, centred)
    ds, dweight, dbias = row_norm_backward(as_numpy(dy).reshape(-1, n), flat, w, 1e-5, centred)
    truths = [exact.reshape(x.shape), ds.reshape(x.shape)]
    truths += [] if weight is None else [dweight]
    truths += [] if bias is None else [dbias]
    truths += [] if residual is None else [ds.reshape(x.shape)]
    for mine, truth, torchs in zip(results[0], truths, results[1], strict=True):
        assert_accurate(mine, truth, torchs)
    return trace


# On both sides of every tile's width, and of the width up to which sums are held beside a row.
LENGTHS = sorted({n + d for n in (16, 64, 1024, LONGEST_SUMMED) for d in (0, 1)} | {3, 100})


@each_dtype
@each_norm
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int, name: str, dtype: torch.dtype, device: str) -> None:
    """More tiles of short rows than programs: each adds up those of several."""
    n_rows = 1300 if length == 16 else max(3, 200 // length)
    trace = assert_right(name, torch.randn(n_rows, length, device=device).to(dtype))
    assert all(record.launch in ROWS for record in trace.launches if record.grid and
               record.kernel != "column_sums_kernel")  # fmt: skip


@each_norm
def test_rows_of_which_a_program_adds_up_more_than_a_tile(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "COLUMNS", replace(kernels.COLUMNS, block_rows=1))
    n_rows = 8 * device_of(torch.empty(0, device=device)).n_multiprocessors
    trace = assert_right(name, torch.randn(n_rows, LONGEST_SUMMED + 1, device=device))
    (sums,) = (record for record in trace.launches if record.kernel == "column_sums_kernel")
    assert sums.grid[0] < n_rows * cdiv(LONGEST_SUMMED + 1, kernels.COLUMNS.block_cols)


@each_dtype
@each_norm
@pytest.mark.parametrize("length", [LONGEST_BACKWARD, LONGEST, LONGEST + LONG.block_cols + 1])
def test_rows_that_are_read_once_and_twice(
    length: int, name: str, dtype: torch.dtype, device: str
) -> None:
    assert_right(name, torch.randn(2, length, device=device).to(dtype))


@each_dtype
@each_norm
@pytest.mark.parametrize("length", [50, LONGEST + 7])
def test_rows_far_from_zero(length: int, name: str, dtype: torch.dtype, device: str) -> None:
    """Their variance is not a difference of squares."""
    size = {torch.float32: 1e4, torch.float16: 100.0, torch.bfloat16: 30.0}[dtype]
    assert_right(name, (torch.randn(3, length, device=device) + size).to(dtype))


@each_dtype
@each_norm
@pytest.mark.parametrize("length", [37, LONGEST + 1])
def test_residual(length: int, name: str, dtype: torch.dtype, device: str) -> None:
    x, residual = (torch.randn(3, length, device=device).to(dtype) for _ in range(2))
    assert_right(name, x, residual=residual)


@each_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_in_float32(name: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, 37, device=device).to(dtype)
    weight, bias = (torch.randn(37, device=device) for _ in range(2))
    y = call(name, GF, x, weight, bias)
    assert y.dtype == dtype
    expected = call(name, F, x.float(), weight, bias)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


@each_dtype
@each_norm
def test_without_parameters(name: str, dtype: torch.dtype, device: str) -> None:
    assert_right(name, torch.randn(2, 3, 40, device=device).to(dtype), affine=False)


@each_dtype
@each_norm
def test_layouts_of_input_and_gradient(name: str, dtype: torch.dtype, device: str) -> None:
    x, dy = (torch.randn(4, 6, 9, device=device).to(dtype) for _ in range(2))
    for _, laid_out in layouts(x):
        if laid_out.flatten().unique().numel() > 1:
            assert_right(name, laid_out, dy)
    for _, laid_out in layouts(dy):
        assert_right(name, x, laid_out)


@each_norm
def test_dropout_is_that_of_dropout_and_the_sum_is_given(name: str, device: str) -> None:
    x, residual = (torch.randn(3, 5, 8, device=device).requires_grad_() for _ in range(2))
    weight = torch.randn(8, device=device).requires_grad_()
    torch.manual_seed(7)
    seed = int(draw_seed(torch.device(device)))
    factors = torch.from_numpy(kept_elements(seed, (3, 5, 8), 0.4)).to(device) / 0.6
    torch.manual_seed(7)
    y, s = call(name, GF, x, weight, None, residual=residual, dropout_p=0.4, return_sum=True)
    expected_s = x * factors + residual
    expected = call(name, F, expected_s, weight, None)
    torch.testing.assert_close(s, expected_s)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(y), torch.randn_like(s)
    inputs = [x, residual, weight]
    got = torch.autograd.grad([y, s], inputs, upstream, retain_graph=True)
    twice = torch.autograd.grad([y, s], inputs, upstream, create_graph=True)
    theirs = torch.autograd.grad([expected, expected_s], inputs, upstream, retain_graph=True)
    for mine, again, torchs in zip(got, twice, theirs, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again, torchs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(s.sum(), [x, residual]),
        torch.autograd.grad(expected_s.sum(), [x, residual]),
    )


@each_norm
def test_the_sum_of_nothing_is_the_input(name: str, device: str) -> None:
    x = torch.randn(3, 8, device=device)
    y, s = call(name, GF, x, None, None, return_sum=True)
    assert s is x
    torch.testing.assert_close(y, call(name, F, x, None, None))


@each_norm
def test_a_streams_gradient_is_added_in_the_norms_backward_pass(name: str, device: str) -> None:
    """Autograd adds nothing; in any layout, of y alone and of the stream alone, too."""
    for _, laid_out in layouts(torch.randn(3, 4, 8, device=device)):
        x = laid_out.requires_grad_()
        y, s = call(name, GF, x, None, None, return_sum=True)
        assert torch.equal(s, x)
        assert y.grad_fn.next_functions[0][0] is s.grad_fn.next_functions[0][0]
        expected = call(name, F, x, None, None)
        dy, ds = torch.randn_like(expected), torch.randn_like(x)
        for outputs, theirs, upstream in (
            ((y, s), (expected, x), (dy, ds)), ((y,), (expected,), (dy,)), ((s,), (x,), (ds,)),
        ):  # fmt: skip
            (torchs,) = torch.autograd.grad(theirs, x, upstream, retain_graph=True)
            for twice in (False, True):
                (mine,) = torch.autograd.grad(outputs, x, upstream, True, twice)
                torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)


@each_norm
def test_constant_rows_and_rows_of_one(name: str, device: str) -> None:
    """Nothing is divided by zero."""
    for x in (torch.full((3, 9), 2.5, device=device), torch.randn(4, 1, device=device)):
        leaf = x.requires_grad_()
        y, expected = call(name, GF, leaf, None, None), call(name, F, leaf, None, None)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(y)
        (dx,), (theirs,) = (torch.autograd.grad(v, leaf, dy) for v in (y, expected))
        torch.testing.assert_close(dx, theirs, rtol=1e-3, atol=1e-3)


@each_norm
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_row(name: str, value: float, device: str) -> None:
    x = torch.randn(3, 9)
    x[1, 2] = value
    y = call(name, GF, x.to(device), None, None).cpu()
    expected = call(name, F, x, None, None)  # a GPU's rms_norm makes all of an infinite row NaN
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_default_epsilon_of_rms_norm_is_torchs(dtype: torch.dtype, device: str) -> None:
    """Of rows so small that another one would show."""
    scale = {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 1e-3)
    x = (scale * torch.randn(4, 32, device=device)).to(dtype)
    tolerance = 2 * torch.finfo(dtype).eps
    ours, theirs = GF.rms_norm(x, (32,)), torch.nn.functional.rms_norm(x, (32,))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(ours, torch.nn.functional.rms_norm(x, (32,), eps=1e-20), rtol=0.01)


@each_norm
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(name: str, shape: tuple[int, ...], device: str) -> None:
    x, weight = torch.randn(shape, device=device).requires_grad_(), torch.ones(5, device=device)
    weight.requires_grad_()
    y = call(name, GF, x, weight, None)
    assert y.shape == shape
    dx, dweight = torch.autograd.grad(y.sum(), [x, weight])
    assert dx.shape == shape
    assert not dweight.any()


@each_norm
def test_gradcheck(name: str) -> None:
    def function(x: torch.Tensor, residual: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return call(name, GF, x, *parameters, residual=residual)

    parameters = [torch.randn(5), torch.randn(5)] if name == "layer_norm" else [torch.randn(5)]
    if name == "rms_norm":
        check_gradients(
            lambda x, r, w: call(name, GF, x, w, None, residual=r),
            torch.randn(3, 5), torch.randn(3, 5), *parameters,
        )  # fmt: skip
    else:
        check_gradients(function, torch.randn(3, 5), torch.randn(3, 5), *parameters)


@each_norm
def test_several_dimensions(name: str, device: str) -> None:
    x, weight = torch.randn(3, 4, 5, device=device), torch.randn(4, 5, device=device)
    ours, theirs = getattr(GF, name), getattr(F, name)
    torch.testing.assert_close(ours(x, (4, 5), weight), theirs(x, (4, 5), weight))


@each_norm
def test_backward_twice_and_bit_identical(name: str, device: str) -> None:
    x, weight = torch.randn(900, 33, device=device).requires_grad_(), torch.ones(33, device=device)
    weight.requires_grad_()
    y, dy = call(name, GF, x, weight, None), torch.randn(900, 33, device=device)
    first = torch.autograd.grad(y, [x, weight], dy, retain_graph=True)
    again = torch.autograd.grad(y, [x, weight], dy)
    anew = torch.autograd.grad(call(name, GF, x, weight, None), [x, weight], dy)
    for a, b, c in zip(first, again, anew, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@each_norm
def test_autocast_and_compile(name: str, device: str) -> None:
    x, weight = (torch.randn(shape, device=device).bfloat16() for shape in ((4, 9), (9,)))
    with torch.autocast(device, torch.bfloat16):
        y, theirs = call(name, GF, x, weight, None), call(name, F, x, weight, None)
    assert y.dtype == (torch.float32 if device == "cuda" else torch.bfloat16)
    if name == "layer_norm":  # torch's rms_norm may be older than its place on that list
        assert theirs.dtype == y.dtype
    exact = row_norm_forward(as_numpy(x), as_numpy(weight), None, 1e-5, name == "layer_norm")
    assert_accurate(y, exact, theirs.to(y.dtype))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, r: call(name, GF, x, None, None, residual=r), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    for rows in (3, 5):
        a, b = (torch.randn(rows, 9, device=device).requires_grad_() for _ in range(2))
        ours, expected = compiled(a, b), call(name, F, a + b, None, None)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        dy = torch.randn_like(ours)
        for mine, torchs in zip(
            torch.autograd.grad(ours, [a, b], dy), torch.autograd.grad(expected, [a, b], dy),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)


def test_layers(device: str) -> None:
    x, residual = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 8, device=device)
    layer = gpunn.nn.LayerNorm(8, dropout_p=0.5, return_sum=True, device=device)
    y, s = layer(x, residual)
    assert (s != x + residual).any()
    y, s = layer.eval()(x, residual)
    torch.testing.assert_close(s, x + residual)
    torch.testing.assert_close(y, F.layer_norm(s, (8,), layer.weight, layer.bias))
    model = torch.nn.Sequential(layer, torch.nn.RMSNorm(8, device=device))
    gpunn.accelerate(model)
    assert type(model[1]) is gpunn.nn.RMSNorm
    assert "its fused parts" in gpunn.restore(model).kept["0"]
    with pytest.raises(ValueError, match="dropout_p"):
        gpunn.nn.RMSNorm(8, dropout_p=1.5)


X = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((X, (5,)), {}, RuntimeError, "normalized_shape"),
        ((X, ()), {}, RuntimeError, "normalized_shape"),
        ((X, (4,), torch.ones(5)), {}, RuntimeError, "weight"),
        ((X, (4,), torch.ones(4).double()), {}, RuntimeError, "weight"),
        ((X, (4,), None, torch.ones(3)), {}, RuntimeError, "bias"),
        ((X, (4,)), {"residual": torch.ones(4)}, RuntimeError, "residual"),
        ((X, (4,)), {"dropout_p": 2.0}, ValueError, "dropout_p"),
        (([1.0], (1,)), {}, TypeError, "input"),
    ],
)
def test_refuses(
    arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GF.layer_norm(*arguments, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_weight_of_rms_norm_is_of_any_dtype(dtype: torch.dtype, device: str) -> None:
    """As torch's; the result is of the input's."""
    x, weight = torch.randn(3, 20, device=device).to(dtype), torch.randn(20, device=device)
    weight = weight.bfloat16().requires_grad_()
    with gpunn.trace() as trace:
        y = GF.rms_norm(x, (20,), weight, 1e-5)
        (dweight,) = torch.autograd.grad(y.sum(), weight)
    launched(trace, "row_norm_forward", "row_norm_backward")
    wide = x.double(), weight.detach().double().requires_grad_()
    exact = F.rms_norm(wide[0], (20,), wide[1], 1e-5)
    assert (y.dtype, dweight.dtype) == (dtype, torch.bfloat16)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=2 * step, atol=2 * step)
    expected = torch.autograd.grad(exact.sum(), wide[1])[0]
    torch.testing.assert_close(dweight.double(), expected, rtol=2**-7, atol=2**-7)
