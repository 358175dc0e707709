"""Pooling in every mode but plain: undone, compiled, under autocast, as modules, left to torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
import gpunn.nn
from closeness import assert_accurate
from gpunn.checks.comparison import any_algorithm
from gpunn.checks.pooling import CASES
from gpunn.kernels.host import ORDERS, Order, thread_order
from gpunn.reference.pooling import max_unpool_backward, max_unpool_forward
from kit import as_numpy, check_gradients, each_dtype, launched, layouts
from test_pooling import (
    drawn,
    each_case,
    functions,
    launches_of,
    one_thread,
    value_and_gradient,
)

Function = Callable[..., torch.Tensor]


def pooled(
    n: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The maxima of windows that overlap, some in several, and their indices."""
    x = torch.randn(2, 3, *(9, 7)[-n:]).to(device, dtype)
    pool = F.max_pool1d if n == 1 else F.max_pool2d
    y, indices = pool(x, 3, 2, 1, return_indices=True)
    return y, indices


# --- max pooling undone ---


@each_dtype
@pytest.mark.parametrize("n", [1, 2])
def test_unpooling(n: int, dtype: torch.dtype, device: str) -> None:
    x, indices = pooled(n, device, dtype)
    size = (9, 7)[-n:]
    name = f"max_unpool{n}d"
    ours = lambda x: getattr(GF, name)(x, indices, 3, 2, 1, size)  # noqa: E731
    theirs = lambda x: getattr(F, name)(x, indices.cpu(), 3, 2, 1, size)  # noqa: E731
    dy = torch.randn(2, 3, *size).to(device, dtype)
    with gpunn.trace() as trace:
        y, dx = value_and_gradient(ours, x, dy)
    launched(trace, "max_unpool_forward", "max_unpool_backward")
    with one_thread():  # and on a CPU: on a GPU, torch's takes any of several for one place
        torch_y, torch_dx = value_and_gradient(theirs, x.cpu(), dy.cpu())
    assert torch.equal(y.cpu(), torch_y)
    assert torch.equal(dx.cpu(), torch_dx)
    images = as_numpy(x).reshape(2, 3, -1, x.shape[-1])
    flat = indices.reshape(images.shape).cpu().numpy()
    exact_y = max_unpool_forward(images, flat, (size[0] if n == 2 else 1, size[-1]))
    assert_accurate(y, exact_y.reshape(y.shape), torch_y, "y")
    exact_dx = max_unpool_backward(as_numpy(dy).reshape(exact_y.shape), flat)
    assert_accurate(dx, exact_dx.reshape(dx.shape), torch_dx, "dx")


@pytest.mark.parametrize("order", ORDERS)
def test_unpooling_takes_the_last_of_several(order: Order, device: str) -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], device=device)
    indices = torch.tensor([[[5, 5], [2, 5]]], device=device)
    expected = torch.zeros(1, 4, 4, device=device)
    expected[0, 1, 1], expected[0, 0, 2] = 4, 3
    channels_last = x.expand(2, 3, 2, 2).to(memory_format=torch.channels_last)
    for values in (x[None], channels_last):
        where = indices.expand(values.shape).contiguous()
        with thread_order(order):
            y = GF.max_unpool2d(values, where, 2)
        assert torch.equal(y, expected.expand(y.shape))
        dx = torch.ops.gpunn.max_unpool_backward(y, where)
        assert dx.tolist() == torch.tensor([[4, 4], [3, 4]]).expand(values.shape).tolist()


def test_unpooling_in_every_layout(device: str) -> None:
    base, indices = pooled(2, device)
    by_layout = {
        "contiguous": indices,
        "transposed": indices.transpose(0, 3).contiguous().transpose(0, 3),
        "one row expanded": indices[:1].expand(indices.shape),
        "channels_last": indices.to(memory_format=torch.channels_last),
    }
    for layout, x in layouts(base):
        for other, places in by_layout.items():
            y = GF.max_unpool2d(x, places, 3, 2, 1, (9, 7))
            exact = max_unpool_forward(as_numpy(x), places.cpu().numpy(), (9, 7))
            assert np.array_equal(as_numpy(y), exact), f"x {layout}, indices {other}"
    for layout, dy in layouts(torch.randn(2, 3, 9, 7, device=device)):
        for other, places in by_layout.items():
            dx = torch.ops.gpunn.max_unpool_backward(dy, places)
            exact = max_unpool_backward(as_numpy(dy), places.cpu().numpy())
            assert np.array_equal(as_numpy(dx), exact), f"dy {layout}, indices {other}"


@pytest.mark.parametrize("n", [1, 2])
def test_unpooling_gradients_once_and_twice(n: int) -> None:
    """Of windows side by side: of several values for one place, torch gives each the gradient."""
    size = (6, 4)[-n:]
    pool = F.max_pool1d if n == 1 else F.max_pool2d
    x, indices = pool(torch.randn(1, 2, *size), 2, return_indices=True)
    name = f"max_unpool{n}d"
    check_gradients(lambda x: getattr(GF, name)(x, indices, 2), x)


@pytest.mark.parametrize("index", [-1, 16])
def test_an_index_outside_of_the_output_raises(index: int, device: str) -> None:
    if device == "cuda":
        pytest.skip("an assertion on the device ends the process's use of CUDA, as torch's does")
    indices = torch.tensor([[[[0, 5], [index, 3]]]])
    with one_thread(), pytest.raises(RuntimeError, match="index"):
        F.max_unpool2d(torch.ones(1, 1, 2, 2), indices, (2, 2))
    with pytest.raises(RuntimeError, match="index"):
        GF.max_unpool2d(torch.ones(1, 1, 2, 2), indices, 2)


def test_pooling_and_unpooling_as_modules(device: str) -> None:
    x = torch.randn(2, 3, 8, 8, device=device)
    pool, unpool = gpunn.nn.MaxPool2d(2, return_indices=True), gpunn.nn.MaxUnpool2d(2)
    y, indices = pool(x)
    back = unpool(y, indices, output_size=x.shape)
    assert back.shape == x.shape
    assert torch.equal(pool(back)[0], y.clamp(min=0))
    line, unline = gpunn.nn.MaxPool1d(2, return_indices=True), gpunn.nn.MaxUnpool1d(2)
    assert torch.equal(line(unline(*line(x[0])))[0], line(x[0])[0].clamp(min=0))
    assert not pool.state_dict()
    assert repr(unpool) == repr(torch.nn.MaxUnpool2d(2))


# --- compiled, under autocast, left to torch ---


@each_case
def test_compiles_without_a_graph_break(case: str, device: str) -> None:
    torch._dynamo.reset()
    function: Function = functions(case)[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, dy = drawn(case, device)
    with gpunn.trace() as trace:
        got = value_and_gradient(compiled, x, dy)
    launched(trace, *launches_of(CASES[case][0]))
    assert all(map(torch.equal, got, value_and_gradient(function, x, dy)))


def test_compiles_with_indices_and_unpooling(device: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y, indices = GF.max_pool2d(x, 2, return_indices=True)
        back: torch.Tensor = GF.max_unpool2d(2 * y, indices, 2)
        return back

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, dy = (torch.randn(2, 3, 8, 6, device=device) for _ in range(2))
    with gpunn.trace() as trace:
        got = value_and_gradient(compiled, x, dy)
    launched(trace, "max_pool_forward", "max_unpool_forward", "max_pool_backward")
    assert all(map(torch.equal, got, value_and_gradient(function, x, dy)))


@pytest.mark.parametrize("name", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_auto_leaves_reductions_of_large_planes_to_torch(name: str, device: str) -> None:
    pool, large = getattr(GF, name), torch.randn(2, 3, 33, 32, device=device)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        y = pool(large, 1)
        pool(large, (1, 2))
        pool(large[:, :, :32], 1)
    assert [f.reason for f in trace.fallbacks] == ["a reduction of 1056 elements to one: PyTorch's"]
    assert len(trace.launches) == 2
    torch.testing.assert_close(y, pool(large, 1))


@pytest.mark.parametrize("name", ["avg_pool2d", "max_pool2d"])
def test_strides_and_dilations_of_any_size(name: str, device: str) -> None:
    """As far as 32 bits go, which are torch's, too."""
    x = torch.randn(1, 2, 8, 8, device=device)
    for stride in (2**30, 2**31 - 1):
        dilation = () if name == "avg_pool2d" else (0, (stride, stride))
        kernel = 2 if name == "avg_pool2d" else 1
        results = []
        for pool in (getattr(GF, name), getattr(torch.nn.functional, name)):
            leaf = x.clone().requires_grad_()
            with any_algorithm():
                y = pool(leaf, kernel, stride, *dilation)
                results.append((y, *torch.autograd.grad(y, leaf, torch.ones_like(y))))
        assert all(map(torch.equal, *results))


def test_a_window_of_one_element_has_no_dilation(device: str) -> None:
    x = torch.randn(1, 2, 8, 8, device=device, requires_grad=True)
    y = GF.max_pool2d(x, 1, 1, 0, 2**31 - 1)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y, x, 3 * x)[0], 3 * x)


def test_saved_positions_may_lie_anyhow(device: str) -> None:
    """As after a hook that packed and unpacked them."""
    x, window = torch.randn(2, 3, 6, 6, device=device), [2, 2, 2, 2, 0, 0, 1, 1]
    y, positions, _ = torch.ops.gpunn.max_pool_forward(x, [3, 3], window, True, False)
    dy = torch.randn_like(y)
    expected = torch.ops.gpunn.max_pool_backward(dy, positions, [2, 3, 6, 6], window)
    strided = positions.transpose(2, 3).contiguous().transpose(2, 3)
    got = torch.ops.gpunn.max_pool_backward(dy, strided, [2, 3, 6, 6], window)
    assert expected.any()
    assert torch.equal(got, expected)


def test_compiles_once_for_all_sizes(device: str) -> None:
    """With dynamic shapes, the output sizes are computed in the graph."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = GF.max_pool2d(x, 3, 2, 1)
        y = y + GF.avg_pool2d(x, 3, 2, 1, ceil_mode=False)
        largest: torch.Tensor = GF.adaptive_max_pool2d(x, 1)
        return y * GF.adaptive_avg_pool2d(x, 1) + largest

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 3, 8, 6), (4, 5, 11, 9), (3, 6, 7, 15)):
            x = torch.randn(size, device=device)
            y = function(x)
            dy = torch.randn_like(y)
            got = value_and_gradient(compiled, x, dy)
            assert all(map(torch.equal, got, value_and_gradient(function, x, dy)))


@each_dtype
@each_case
def test_autocast_as_torch(case: str, dtype: torch.dtype, device: str) -> None:
    x, _ = drawn(case, device, dtype)
    ours, theirs = functions(case)
    with torch.autocast(device, torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype


@each_dtype
def test_autocast_of_unpooling_as_torch(dtype: torch.dtype, device: str) -> None:
    x, indices = pooled(2, device, dtype)
    with torch.autocast(device, torch.bfloat16), one_thread():
        expected = F.max_unpool2d(x, indices, (3, 3), (2, 2), (1, 1), (9, 7))
        assert GF.max_unpool2d(x, indices, 3, 2, 1, (9, 7)).dtype == expected.dtype


@each_case
def test_torch_gives_the_same_and_the_trace_says_so(case: str, device: str) -> None:
    x, _ = drawn(case, device)
    with gpunn.backend("torch"), gpunn.trace() as trace:
        theirs = functions(case)[0](x)
    assert [record.reason for record in trace.fallbacks] == ["backend('torch')"]
    assert not trace.launches
    torch.testing.assert_close(functions(case)[0](x), theirs)


def test_what_torch_computes_instead() -> None:
    integers = torch.arange(16).view(1, 4, 4)  # on the CPU: torch has no such kernels for CUDA
    with gpunn.backend("auto"), gpunn.trace() as trace, one_thread():
        assert GF.max_pool2d(integers, 2).tolist() == [[[5, 7], [13, 15]]]
        assert GF.avg_pool2d(integers, 2).tolist() == [[[2, 4], [10, 12]]]
        meta = torch.ones(2, 3, 4, 4, device="meta")
        y, indices = GF.max_pool2d(meta, 2, return_indices=True)
        assert GF.max_unpool2d(y, indices, 2).shape == meta.shape
        assert GF.adaptive_avg_pool2d(meta, (None, 1)).shape == (2, 3, 4, 1)
    assert len(trace.fallbacks) == 5


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 2, 4, 5)], ids=str)
def test_the_mean_over_other_inputs_is_torchs(shape: tuple[int, ...], device: str) -> None:
    """Which torch takes for an output of one alone."""
    x = torch.randn(shape, device=device)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        assert torch.equal(GF.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, 1))
        with pytest.raises(RuntimeError):
            GF.adaptive_avg_pool2d(x, 2)
    assert [f.reason for f in trace.fallbacks] == [f"an input of {len(shape)} dimensions"] * 2


def test_symbolic_tracing(device: str) -> None:
    net = gpunn.nn.Sequential(
        gpunn.nn.MaxPool2d(3, 2, 1),
        gpunn.nn.AvgPool2d(2, 1),
        gpunn.nn.AdaptiveMaxPool2d((4, None)),
        gpunn.nn.AdaptiveAvgPool2d(2),
    )
    x = torch.randn(2, 3, 16, 16, device=device)
    with gpunn.backend("auto"):
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))


# --- refusals ---

X, LINE = torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8)
INDICES = torch.zeros(2, 3, 8, 8, dtype=torch.int64)
# The function, its arguments, the message; the error is of the class that torch's is of.
REFUSED: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("max_pool2d", (X, (2, 2, 2)), {}, r"kernel_size: .*integer or 1 or 2, got \(2, 2, 2\)"),
    ("max_pool2d", (X, ()), {}, r"kernel_size: .* got \(\)"),
    ("max_pool2d", (X, 0), {}, "kernel_size: .*at least 1, got 0"),
    ("max_pool2d", (X, 2.0), {}, "kernel_size: max_pool2d expects integers, got 2.0"),
    ("max_pool2d", (X, True), {}, "kernel_size: .*integers, got True"),
    ("max_pool2d", (X, 2, (1, 0)), {}, r"stride: .*at least 1, got \(1, 0\)"),
    ("max_pool2d", (X, 2, (1, 1, 1)), {}, r"stride: .*got \(1, 1, 1\)"),
    ("max_pool2d", (X, 2, 2**31), {}, "stride: .*at most 2147483647, got 2147483648"),
    ("max_pool2d", (X, 3, 1, -1), {}, "padding: .*at least 0, got -1"),
    ("max_pool2d", (X, 3, 1, 2), {}, "padding: .*at most half of kernel_size 3, got 2"),
    ("max_pool2d", (X, 3, 1, 2, 2), {}, "padding: .*at most half of kernel_size 3, got 2"),
    ("max_pool2d", (X, 3, 1, None), {}, "padding: .*integers, got None"),
    ("max_pool2d", (X, 3, 1, 0, 0), {}, "dilation: .*at least 1, got 0"),
    ("max_pool2d", (X, 9), {}, "input: too small .*size 0: size 8, kernel 9"),
    ("max_pool2d", (X, 3, 1, 0, 4), {}, "input: too small .*dilation 4"),
    ("max_pool2d", (X, 2), {"ceil_mode": 1}, "ceil_mode: .*bool, got int"),
    ("max_pool2d", (X[0, 0], 2), {}, r"input: .*3 or 4 dimensions, got 2: \(8, 8\)"),
    ("max_pool2d", (X[None], 2), {}, "input: .*got 5"),
    ("max_pool2d", (X[:, :0], 2), {}, r"input: .*size 0, got \(2, 0, 8, 8\)"),
    ("max_pool2d", (X[0, :0], 2), {}, "input: .*size 0"),
    ("max_pool1d", (LINE, (2, 2)), {}, r"kernel_size: .*integer or 1, got \(2, 2\)"),
    ("max_pool1d", (X, 2), {}, "input: .*2 or 3 dimensions, got 4"),
    ("max_pool1d", (LINE[..., :0], 1), {}, "input: .*size 0"),
    ("avg_pool2d", (X, 2), {"divisor_override": 0}, "divisor_override: .*other than 0, got 0"),
    ("avg_pool2d", (X, 2), {"divisor_override": 2.0}, "divisor_override: .*integer.*got 2.0"),
    ("avg_pool2d", (X, 2), {"count_include_pad": 1}, "count_include_pad: .*bool, got int"),
    ("avg_pool1d", (LINE, 3, 1, 2), {}, "padding: .*at most half"),
    ("adaptive_max_pool2d", (X, -1), {}, "output_size: .*no negative size, got -1"),
    ("adaptive_max_pool2d", (X, (2,)), {}, r"output_size: .*integer or 2, got \(2,\)"),
    ("adaptive_max_pool2d", (X, None), {}, "output_size: .*integers, got None"),
    ("adaptive_max_pool1d", (LINE, (None,)), {}, r"output_size: .*integers, got \(None,\)"),
    ("adaptive_avg_pool2d", (X, (2, -1)), {}, r"output_size: .*negative.*got \(2, -1\)"),
    ("adaptive_avg_pool2d", (X[..., :0], 2), {}, "input: .*size 0"),
    ("adaptive_avg_pool1d", (LINE, 2.5), {}, "output_size: .*integers, got 2.5"),
    ("max_unpool2d", (X, INDICES[0], 2), {}, r"indices: .*shape \(2, 3, 8, 8\), got \(3, 8, 8\)"),
    ("max_unpool2d", (X, INDICES.int(), 2), {}, "indices: .*torch.int64, got torch.int32"),
    ("max_unpool2d", (X, INDICES, 2, 2, 0, (14, 16)), {}, "output_size: .*14 and 18.*of 14"),
    ("max_unpool2d", (X, INDICES, 2, 2, 0, (16,)), {}, r"output_size: .*2 or 4 sizes, got \(16,\)"),
    ("max_unpool2d", (X[:, :0], INDICES[:, :0], 2), {}, "input: .*size 0"),
    ("max_unpool1d", (X, INDICES, 2), {}, "input: .*2 or 3 dimensions, got 4"),
    ("max_unpool1d", (LINE, INDICES[..., 0], 2, 2, 0, 16), {}, "output_size: .*sequence, got 16"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "keywords", "message"), REFUSED, ids=[row[-1] for row in REFUSED]
)
def test_refused_as_torch_refuses(
    name: str, arguments: tuple[Any, ...], keywords: dict[str, Any], message: str, device: str
) -> None:
    given = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    with one_thread(), pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        getattr(F, name)(*given, **keywords)
    with gpunn.trace() as trace, pytest.raises(theirs.type, match=message):
        getattr(GF, name)(*given, **keywords)
    assert not trace.launches


def test_a_negative_size_is_refused(device: str) -> None:
    """Torch's error is a RuntimeError up to 2.11, a ValueError in 2.13."""
    x, indices = X.to(device), INDICES.to(device)
    with one_thread(), pytest.raises((RuntimeError, ValueError)):
        F.max_unpool2d(x, indices, 1, 1, 9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"output_size: .*no negative size"):
        GF.max_unpool2d(x, indices, 1, 1, 9)


def test_no_tensors_are_refused() -> None:
    for name in ("max_pool2d", "avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d"):
        with pytest.raises(TypeError, match=f"input: {name} expects a tensor, got list"):
            getattr(GF, name)([1.0], 2)
    with pytest.raises(TypeError, match="indices: max_unpool2d expects a tensor, got list"):
        GF.max_unpool2d(X, [0], 2)  # type: ignore[arg-type]


def test_integers_of_numpy_and_of_tensors_are_integers(device: str) -> None:
    x = X.to(device)
    expected = F.max_pool2d(x, 2)
    assert torch.equal(GF.max_pool2d(x, np.int64(2)), expected)
    assert torch.equal(GF.max_pool2d(x, torch.tensor(2)), expected)  # type: ignore[arg-type]
    assert torch.equal(GF.max_pool2d(x, [2], []), expected)
    assert torch.equal(GF.avg_pool2d(x, (np.int64(2), torch.tensor(2))), expected)  # type: ignore[arg-type]
