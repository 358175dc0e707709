"""linear_cross_entropy: chunks of classes against NumPy float64, every argument, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from drawing import drawing
from gpunn.kernels import cross_entropy as tiles
from gpunn.kernels import launch
from gpunn.kernels.launch import Device
from gpunn.kernels.linear_cross_entropy import chunk_size_of
from gpunn.kernels.softmax import SoftmaxLaunch
from gpunn.reference.cross_entropy import shares
from gpunn.reference.linear_cross_entropy import (
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)
from kit import as_numpy, check_gradients, each_dtype, launched, layouts, short_name
from test_convolution_memory import Nowhere, peak_on_cpu, peak_on_cuda

OPERATORS = ("linear_cross_entropy_forward", "linear_cross_entropy_backward")


def by_torch(
    x: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, linear_bias: Any = None,
    **arguments: Any,
) -> torch.Tensor:  # fmt: skip
    """What every release of torch can compute, with all logits in memory."""
    return F.cross_entropy(F.linear(x, linear_weight, linear_bias), target, **arguments)


def with_gradients(
    function: Any, layer: list[torch.Tensor], dy: torch.Tensor | None, *given: Any, **arguments: Any
) -> list[torch.Tensor]:
    """The value, and the gradients of x, W and, where it is one of them, b."""
    x, weight, *bias = leaves = [tensor.detach().requires_grad_() for tensor in layer]
    y = function(x, weight, *given, linear_bias=bias[0] if bias else None, **arguments)
    return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy)]


def layer_of(
    n_rows: int, n_features: int, n_classes: int, dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """x, W and b."""
    x = torch.randn(n_rows, n_features, device=device)
    weight = torch.randn(n_classes, n_features, device=device) / n_features**0.5
    return [tensor.to(dtype) for tensor in (x, weight, torch.randn(n_classes, device=device))]


def assert_as_torchs(
    layer: list[torch.Tensor], target: torch.Tensor, dy: torch.Tensor | None = None,
    chunk_size: int = 16, **arguments: Any,
) -> None:  # fmt: skip
    """In chunks, no worse than twice torch's own error; torch in float64 is the truth."""
    with gpunn.trace() as trace:
        got = with_gradients(
            GF.linear_cross_entropy, layer, dy, target, chunk_size=chunk_size, **arguments
        )
    launched(trace, *OPERATORS)
    baseline = with_gradients(by_torch, layer, dy, target, **arguments)
    if arguments.get("weight") is not None:
        arguments["weight"] = arguments["weight"].double()
    wide = None if dy is None else dy.double()
    exact = with_gradients(by_torch, [t.double() for t in layer], wide, target, **arguments)
    names = ("loss", "dx", "dW", "db")
    for name, mine, truth, torchs in zip(names, got, exact, baseline, strict=False):
        assert_accurate(mine, as_numpy(truth), torchs, name)


@each_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_chunks_against_the_reference(smoothing: float, dtype: torch.dtype, device: str) -> None:
    """Targets at both ends of chunks, the last of which is not full; a row that is ignored."""
    layer = layer_of(7, 12, 37, dtype, device)
    target = torch.tensor([0, 15, 16, 31, 32, 36, 4], device=device)
    weight = (torch.rand(37, device=device) + 0.5).to(dtype)
    dy = torch.randn(7, device=device).to(dtype)
    arguments: Any = dict(
        weight=weight, reduction="none", ignore_index=4, label_smoothing=smoothing
    )
    with gpunn.trace() as trace:
        got = with_gradients(GF.linear_cross_entropy, layer, dy, target, chunk_size=16, **arguments)
    n_chunks = [r.operator for r in launched(trace, *OPERATORS)].count(OPERATORS[1])
    assert n_chunks == 3 * 4
    baseline = with_gradients(by_torch, layer, dy, target, **arguments)
    share = shares(target.cpu().numpy(), 37, 4, smoothing)
    given: Any = *map(as_numpy, layer), share, as_numpy(weight)
    exact = (
        linear_cross_entropy_forward(*given),
        *linear_cross_entropy_backward(as_numpy(dy), *given),
    )
    for mine, truth, torchs in zip(got, exact, baseline, strict=True):
        assert_accurate(mine, truth, torchs)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes, chunks and arguments."""
    n_classes = draw(st.integers(2, 40))
    return {
        "sizes": (draw(st.integers(1, 9)), draw(st.integers(1, 20)), n_classes),
        "chunk_size": draw(st.integers(1, n_classes - 1)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "smoothing": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "has_bias": draw(st.booleans()),
        "has_weight": draw(st.booleans()),
        "ignore_index": draw(st.sampled_from([None, 0, n_classes - 1])),
        "needs": draw(st.lists(st.booleans(), min_size=3, max_size=3)),
        "keep_logits": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@drawing(0, 16)
@given(problem=problems())
def test_agrees_with_torch_on_drawn_problems(problem: dict[str, Any], device: str) -> None:
    torch.manual_seed(problem["seed"])
    n_rows, n_features, n_classes = problem["sizes"]
    layer = layer_of(n_rows, n_features, n_classes, torch.float32, device)[
        : 2 + problem["has_bias"]
    ]
    target = torch.randint(n_classes, (n_rows,), device=device)
    arguments: Any = dict(reduction=problem["reduction"], label_smoothing=problem["smoothing"])
    if problem["has_weight"]:
        arguments["weight"] = torch.rand(n_classes, device=device) + 0.5
    if problem["ignore_index"] is not None:
        arguments["ignore_index"] = problem["ignore_index"]
    results = []
    in_chunks = {name: problem[name] for name in ("chunk_size", "keep_logits")}
    for function, extra in ((GF.linear_cross_entropy, in_chunks), (by_torch, {})):
        needs = [*problem["needs"]]
        x, weight, *bias = leaves = [
            t.detach().requires_grad_(need) for t, need in zip(layer, needs, strict=False)
        ]
        y = function(x, weight, target, linear_bias=bias[0] if bias else None, **arguments, **extra)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        torch.manual_seed(1)
        gradients = torch.autograd.grad(y, wanted, torch.randn_like(y)) if wanted else []
        results.append([y, *gradients])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_chunks_longer_than_a_tile(
    smoothing: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a chunk are walked along; more rows than a program has."""
    tile = SoftmaxLaunch(4, block_rows=2, block_cols=16)
    monkeypatch.setattr(tiles, "LAST", ())
    monkeypatch.setattr(tiles, "ONCE", tile)
    layer = layer_of(5, 8, 83, torch.float32, device)
    target = torch.tensor([3, 39, 40, 79, 82], device=device)
    weight = torch.rand(83, device=device) + 0.5
    assert_as_torchs(layer, target, chunk_size=40, weight=weight, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short_name)
def test_sums_over_chunks_are_float32(dtype: torch.dtype, device: str) -> None:
    """A chunk makes dx 1.23, and 15 more of them add less to it than 16 bits could keep."""
    x = torch.zeros(2, 16, device=device, dtype=dtype).requires_grad_()
    weight = torch.full((64, 16), 16 * 0.45 * torch.finfo(dtype).eps, device=device, dtype=dtype)
    weight[0], weight[1:4] = -1.25, 0
    target = torch.zeros(2, device=device, dtype=torch.int64)
    loss = GF.linear_cross_entropy(x, weight, target, reduction="sum", chunk_size=4)
    (dx,) = torch.autograd.grad(loss, x)
    (torchs,) = torch.autograd.grad(by_torch(x, weight, target, reduction="sum"), x)
    exact = weight.double().mean(0) - weight[0].double()
    assert_accurate(dx, as_numpy(exact.expand(2, 16)), torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short_name)
def test_layouts(dtype: torch.dtype, device: str) -> None:
    x, weight, bias = layer_of(4, 6, 20, dtype, device)
    target = torch.randint(20, (4, 2), device=device)[:, 0]
    for (name, given_x), (_, given_weight) in zip(layouts(x), layouts(weight), strict=True):
        if "expanded" not in name:
            assert_as_torchs([given_x, given_weight, bias], target, reduction="sum")
    expanded = torch.randn(1, device=device).to(dtype).expand(4)
    assert_as_torchs([x, weight, bias[:1].expand(20)], target, expanded, reduction="none")


def test_large_logits_and_infinities(device: str) -> None:
    x, weight, bias = layer_of(4, 6, 20, torch.float32, device)
    hole, below, late = bias.clone(), bias - 1e3, bias.clone()
    hole[3], late[:16] = -math.inf, -math.inf
    target = torch.tensor([17, 18, 19, 16], device=device)
    for layer in (
        [1e4 * x, weight], [x, weight, hole],
        [x, weight, below],  # no exponential of these is more than zero
        [x, weight, late],  # whole chunks of nothing, the first ones
    ):  # fmt: skip
        ours = with_gradients(GF.linear_cross_entropy, layer, None, target, chunk_size=8)
        theirs = with_gradients(by_torch, layer, None, target)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # of logits of 1e3


def test_rows_that_are_ignored_or_of_no_class(device: str) -> None:
    layer = layer_of(4, 6, 20, torch.float32, device)
    target = torch.tensor([0, 20, -1, -100], device=device)
    loss, dx, *_ = with_gradients(
        GF.linear_cross_entropy, layer, None, target, chunk_size=8, reduction="none"
    )
    assert loss.isnan().tolist() == [False, True, True, False]
    assert dx[1:3].isnan().all()
    assert not dx[3].any()
    ignored = torch.full((4,), -100, device=device)
    loss, *gradients = with_gradients(GF.linear_cross_entropy, layer, None, ignored, chunk_size=8)
    assert loss.isnan()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_row(reduction: str, device: str) -> None:
    x, weight, bias = layer_of(1, 6, 20, torch.float32, device)
    target = torch.tensor(17, device=device)
    assert_as_torchs([x[0], weight, bias], target, reduction=reduction)


def test_logits_that_are_kept(device: str) -> None:
    """One chunk, probabilities, more dimensions, features or rows that there are none of."""
    x, weight, bias = layer_of(4, 6, 20, torch.float32, device)
    classes = torch.randint(20, (4,), device=device)
    soft = torch.softmax(torch.randn(4, 20, device=device), 1)
    for target, chunk_size in ((classes, 20), (classes, None), (soft, 8)):
        with gpunn.trace() as trace:
            got = with_gradients(
                GF.linear_cross_entropy, [x, weight, bias], None, target, chunk_size=chunk_size
            )
        launched(trace, "linear_forward", "cross_entropy_with_gradient")
        torch.testing.assert_close(got, with_gradients(by_torch, [x, weight, bias], None, target))
    targets = torch.randint(5, (4, 2, 2), device=device)
    with gpunn.trace() as trace:
        loss = GF.linear_cross_entropy(
            x, weight.view(5, 2, 2, 6), targets, linear_bias=bias.view(5, 2, 2), chunk_size=2
        )
    launched(trace, "linear_forward", "cross_entropy_forward")
    logits = F.linear(x, weight, bias).view(4, 5, 2, 2)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    nothing = GF.linear_cross_entropy(x[:, :0], weight[:, :0], classes, chunk_size=8)
    torch.testing.assert_close(nothing.item(), math.log(20))
    with gpunn.backend("auto"):
        assert GF.linear_cross_entropy(x[:0], weight, classes[:0], chunk_size=8).isnan()


def test_refuses_a_gradient_for_the_class_weights_as_torch_does(device: str) -> None:
    x, weight, _ = layer_of(4, 6, 20, torch.float32, device)
    classes, scale = torch.arange(4, device=device), torch.rand(20, device=device)
    scale.requires_grad_()
    with gpunn.backend("auto"), pytest.raises(RuntimeError, match="argument 'weight'"):
        GF.linear_cross_entropy(x, weight, classes, weight=scale, chunk_size=8)


def test_the_size_of_chunks() -> None:
    """2²⁷ logits; aligned; not too narrow for a product."""
    assert [chunk_size_of(n) for n in (8192, 5000, 10**6)] == [16384, 26752, 4096]


def test_gradcheck() -> None:
    x, weight, bias = layer_of(2, 2, 3, torch.float64, "cpu")
    target, scale = torch.tensor([2, 0]), torch.rand(3).double()

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return GF.linear_cross_entropy(
            x, weight, target, linear_bias=bias, weight=scale, label_smoothing=0.1, chunk_size=2
        )

    check_gradients(loss, x, weight, bias)


def test_backward_twice_and_compiled(device: str) -> None:
    layer = [t.requires_grad_() for t in layer_of(4, 6, 20, torch.float32, device)]
    target = torch.arange(4, device=device)

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return GF.linear_cross_entropy(x, weight, target, linear_bias=bias, chunk_size=8)

    value = loss(*layer)
    first = torch.autograd.grad(value, layer, retain_graph=True)
    for expected, again in zip(first, torch.autograd.grad(value, layer), strict=True):
        assert torch.equal(expected, again)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*layer), layer), first)


def test_autocast(device: str) -> None:
    x, weight, bias = layer_of(4, 6, 20, torch.float32, device)
    target = torch.arange(4, device=device)
    with torch.autocast(device, torch.bfloat16):
        ours = with_gradients(
            GF.linear_cross_entropy, [x, weight, bias], None, target, chunk_size=8
        )
        theirs = with_gradients(by_torch, [x, weight, bias], None, target)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    wide = GF.linear_cross_entropy(x, weight, target, linear_bias=bias, chunk_size=8)
    assert not torch.equal(ours[0], wide)


@each_dtype
def test_bare_products_are_torchs_where_that_is_faster(dtype: torch.dtype, device: str) -> None:
    layer = layer_of(4, 6, 20, dtype, device)
    target = torch.arange(4, device=device)
    for given_layer in (layer, layer[:2]):
        with gpunn.backend("auto"), gpunn.trace() as trace:
            ours = with_gradients(GF.linear_cross_entropy, given_layer, None, target, chunk_size=8)
        assert {r.kernel for r in trace.launches} >= {"chunk_statistics_kernel"}
        assert "matmul_kernel" not in {r.kernel for r in trace.launches}
        assert {r.operator for r in trace.fallbacks} == {f"{o}: the product" for o in OPERATORS}
        theirs = with_gradients(by_torch, given_layer, None, target)
        exact = with_gradients(by_torch, [t.double() for t in given_layer], None, target)
        for mine, truth, torchs in zip(ours, exact, theirs, strict=True):
            assert_accurate(mine, as_numpy(truth), torchs)


def test_on_a_gpu_the_sums_of_16_bit_products_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's product with a dtype for its result, which there is for no CPU."""
    results, mm = set(), torch.mm

    def product(*given: Any, **arguments: Any) -> torch.Tensor:
        found = mm(*given, **arguments)
        results.add((found.shape, found.dtype))
        return found

    monkeypatch.setattr(torch, "mm", product)
    x, weight, bias = (t.to("meta") for t in layer_of(5, 6, 20, torch.bfloat16, "cpu"))
    target = torch.zeros(5, dtype=torch.int64, device="meta")
    with gpunn.backend("auto"), launch.captured(Device(90, 132)):
        _, *gradients = with_gradients(
            GF.linear_cross_entropy, [x, weight, bias], None, target, chunk_size=8
        )
    of_dx = {dtype for shape, dtype in results if shape == x.shape}
    assert of_dx == {torch.float32}
    for found, like in zip(gradients, (x, weight, bias), strict=True):
        assert (found.shape, found.dtype) == (like.shape, like.dtype)


def test_floating_point_operations_are_counted(device: str) -> None:
    """The product of the logits twice, and those of the gradients."""
    layer = layer_of(4, 6, 20, torch.float32, device)
    target = torch.arange(4, device=device)
    with FlopCounterMode(display=False) as counter:
        with_gradients(GF.linear_cross_entropy, layer, None, target, chunk_size=8)
    assert counter.get_total_flops() == 4 * 2 * 4 * 6 * 20


@pytest.mark.parametrize("has_function", [True, False])
def test_what_torch_computes(
    has_function: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a release that has no such function."""
    if not has_function:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    x, weight, bias = layer_of(4, 6, 20, torch.float32, device)
    target = torch.randint(20, (4,), device=device)
    with gpunn.backend("torch"), gpunn.trace() as trace:
        loss = GF.linear_cross_entropy(
            x, weight, target, linear_bias=bias, ignore_index=int(target[0]), chunk_size=8
        )
    assert [r.reason for r in trace.fallbacks] == ["backend('torch')"]
    expected = by_torch(x, weight, target, bias, ignore_index=int(target[0]))
    torch.testing.assert_close(loss, expected)


def test_memory_of_a_large_vocabulary(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """128k classes of 4096 features: inputs, gradients, a chunk, and a tenth of that."""
    torch.use_deterministic_algorithms(False)  # or filling what is new would take memory of its own
    options: Any = dict(device=device, dtype=torch.bfloat16, requires_grad=True)
    x, weight = torch.empty(8192, 4096, **options), torch.empty(131072, 4096, **options)
    target = torch.zeros(8192, device=device, dtype=torch.int64)

    def step() -> object:
        return torch.autograd.grad(GF.linear_cross_entropy(x, weight, target), [x, weight])

    if device == "cpu":
        monkeypatch.setattr(launch, "_capture", (Device(90, 132), Nowhere()))
    peak = peak_on_cuda(step) if device == "cuda" else peak_on_cpu(step)
    inputs, chunk = x.nbytes + weight.nbytes, 2 * x.shape[0] * chunk_size_of(8192)
    assert chunk < 2 * 8192 * 131072 / 7
    assert weight.nbytes + chunk < peak <= 1.1 * (2 * inputs + chunk) - inputs
