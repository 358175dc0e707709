"""Losses of elements as torch's users call them: compiled, twice, broadcast, refused, in memory."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import gpunn
import gpunn.functional as GF
import test_pointwise_loss
from drawing import drawing
from gpunn.kernels import launch, pointwise_loss
from gpunn.kernels.launch import Device
from gpunn.kernels.pointwise_loss import PointwiseLossLaunch
from kit import check_gradients, launched, layouts
from test_convolution_memory import Nowhere, peak_on_cpu, peak_on_cuda
from test_pointwise_loss import (
    BCE,
    CALLS,
    OPERATORS,
    assert_right,
    drawn,
    each_function,
    each_loss,
    value_and_gradients,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # kl_div's


@given(st.data())
@drawing(0, 40)
def test_drawn_losses(device: str, data: st.DataObject) -> None:
    """Every argument at once."""
    loss = data.draw(st.sampled_from(sorted(CALLS)))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    options: dict[str, Any] = {"reduction": data.draw(st.sampled_from(["none", "sum", "mean"]))}
    x, y = (tensor + 0.125 for tensor in drawn(loss, shape, device, dtype))
    if loss == "bce_with_logits":
        for name in data.draw(st.sets(st.sampled_from(["weight", "pos_weight"]))):
            sizes = [size if data.draw(st.booleans()) else 1 for size in shape]
            options[name] = torch.rand(sizes, device=device).to(dtype) + 0.5
    elif loss in ("mse", "l1", "huber") and data.draw(st.booleans()):
        options["weight"] = torch.rand(shape, device=device).to(dtype) + 0.5
    x, y = (data.draw(st.sampled_from([t for _, t in layouts(tensor)])) for tensor in (x, y))
    dloss = torch.randn(shape, device=device).to(dtype) + 2
    dloss = dloss if options["reduction"] == "none" else dloss.view(-1)[0]
    block, most = data.draw(st.sampled_from([32, 64])), data.draw(st.integers(1, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointwise_loss, "LAUNCH", PointwiseLossLaunch(block=block))
        patch.setattr(pointwise_loss, "MOST_PARTS", most)
        assert_right(loss, x, y, dloss, **options)


@pytest.mark.parametrize("shapes", [((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (1, 4)), ((2,), ())])
@each_function
def test_shapes_that_are_broadcast(
    name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], device: str
) -> None:
    """With torch's warning, at the caller's line; of kl_div without; bce refuses."""
    x, y = (torch.rand(shape, device=device) for shape in shapes)
    if name == BCE:
        with pytest.raises(ValueError, match="must be the same as input size"):
            GF.binary_cross_entropy_with_logits(x, y)
        return
    for reduction in ("none", "mean", *["batchmean"] * (name == "kl_div")):
        if name == "kl_div":
            ours = value_and_gradients(GF.kl_div, x, y, reduction=reduction)
            theirs = value_and_gradients(F.kl_div, x, y, reduction=reduction)
        else:
            with pytest.warns(UserWarning, match="different to the input size") as warned:
                ours = value_and_gradients(getattr(GF, name), x, y, reduction=reduction)
            assert [w.filename for w in warned] == [test_pointwise_loss.__file__]
            with pytest.warns(UserWarning, match="different to the input size"):
                theirs = value_and_gradients(getattr(F, name), x, y, reduction=reduction)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_weights_of_an_input_that_is_broadcast(device: str) -> None:
    """The mean divides by the sum of the weights that were given."""
    x, y, weight = (torch.rand(shape, device=device) for shape in ((4,), (3, 4), (4,)))
    for name in ("mse_loss", "l1_loss", "huber_loss"):
        ours = value_and_gradients(getattr(GF, name), x, y, weight=weight)
        theirs = value_and_gradients(getattr(F, name), x, y, weight=weight)
        torch.testing.assert_close(ours, theirs)


@each_loss
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_once_and_twice(loss: str, reduction: str) -> None:
    name, arguments, _ = CALLS[loss]
    x, y = drawn(loss, (3,), "cpu")
    y = y + 0.3 * (loss in ("l1", "smooth_l1", "huber"))
    check_gradients(lambda x, y: getattr(GF, name)(x, y, reduction=reduction, **arguments), x, y)


def test_gradients_with_weights() -> None:
    x, y = drawn("bce_with_logits", (2, 2), "cpu")
    weight, pos_weight = torch.rand(2, 1).double(), torch.rand(2).double()
    given: Any = {"weight": weight, "pos_weight": pos_weight}
    check_gradients(lambda x, y: getattr(GF, BCE)(x, y, **given), x, y)
    weights = torch.rand(2).double()
    x, y = x[0], y[0]
    check_gradients(lambda x, y: GF.mse_loss(x, y, weight=weights), x, y)
    check_gradients(lambda x, y: GF.huber_loss(x, y, weight=weights, reduction="none"), x, y)


def test_differentiable_gradients_are_computed_in_float32(device: str) -> None:
    """As the kernels' are: in bfloat16, 1 - sigmoid(8) would be 0."""
    x = torch.tensor([8.0, -8.0], device=device).bfloat16().requires_grad_()
    y = torch.tensor([1.0, 0.0], device=device).bfloat16()
    loss = GF.binary_cross_entropy_with_logits(x, y)
    (by_kernels,) = torch.autograd.grad(loss, x, retain_graph=True)
    (differentiable,) = torch.autograd.grad(loss, x, create_graph=True)
    assert by_kernels.all()
    torch.testing.assert_close(differentiable, by_kernels)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_gradient_that_is_not_needed_is_not_written(
    needs: tuple[bool, bool], device: str
) -> None:
    x, y = drawn("huber", (3, 5), device)
    both = value_and_gradients(GF.huber_loss, x, y)[1:]
    x, y = x.requires_grad_(needs[0]), y.requires_grad_(needs[1])
    loss = GF.huber_loss(x, y)
    loss.backward()
    for tensor, gradient, needed in zip((x, y), both, needs, strict=True):
        assert needed == (tensor.grad is not None)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, gradient / 0.75)
    sizes = [g.numel() for g in pointwise_loss.pointwise_loss_backward(
        loss.detach(), x.detach(), y.detach(), None, None, "huber", [1.0], 15, needs
    )]  # fmt: skip
    assert sizes == [15 * needed for needed in needs]


def test_a_gradient_is_not_rounded_to_the_other_dtype(device: str) -> None:
    """autograd would make good a wrong dtype, but not what it has lost."""
    x, y = torch.rand(3, device=device).bfloat16(), torch.rand(3, device=device)
    options: Any = (None, None, "mse", [], 1, (True, True))
    dloss = torch.ones((), device=device)
    for pair in ((x, y), (y, x)):
        found = pointwise_loss.pointwise_loss_backward(dloss, *pair, *options)
        assert [t.dtype for t in found] == [t.dtype for t in pair]


def test_a_tensor_against_itself(device: str) -> None:
    """Its two places have gradients of their own, which add up."""
    x = torch.randn(5, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(GF.mse_loss(x, x), x, create_graph=True)
    assert not dx.any()
    (dx,) = torch.autograd.grad(GF.binary_cross_entropy_with_logits(x, x), x)
    (expected,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(x, x), x)
    torch.testing.assert_close(dx, expected)


@each_loss
def test_backward_twice_and_nothing_is_overwritten(
    loss: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the same again."""
    monkeypatch.setattr(pointwise_loss, "LAUNCH", PointwiseLossLaunch(block=16))
    name, arguments, _ = CALLS[loss]
    given = [tensor.requires_grad_() for tensor in drawn(loss, (5, 13), device)]
    before = [tensor.detach().clone() for tensor in given]
    first, again = (getattr(GF, name)(*given, **arguments) for _ in range(2))
    gradients = [torch.autograd.grad(first, given, retain_graph=keep) for keep in (True, False)]
    assert torch.equal(first, again)
    assert all(map(torch.equal, *gradients))
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("huber", {"reduction": "none"}), ("smooth_l1", {}), ("kl_div", {}),
        ("bce_with_logits", {"pos_weight": torch.rand(5)}),
        ("kl_div", {"reduction": "batchmean"}), ("mse", {"weight": torch.rand(3, 5)}),
    ],
)  # fmt: skip
def test_compiles_without_a_graph_break(loss: str, options: dict[str, Any], device: str) -> None:
    """For one shape, and then for all."""
    torch._dynamo.reset()
    name, arguments, _ = CALLS[loss]
    options = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in options.items()
    }

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(GF, name)(x, y, **arguments, **options)
        return result

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for shape in ((3, 5), *[(4, 5)] * ("weight" not in options)):
        x, y = drawn(loss, shape, device)
        with gpunn.trace() as trace:
            got = value_and_gradients(compiled, x, y)
        launched(trace, *OPERATORS)
        torch.testing.assert_close(got, value_and_gradients(function, x, y))


def test_compiles_where_it_would_warn(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(GF.mse_loss, fullgraph=True, backend="aot_eager")
    x, y = torch.rand(3, 4, device=device), torch.rand(4, device=device)
    torch.testing.assert_close(compiled(x, y), GF.mse_loss(x, y.expand(3, 4)))


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@each_function
def test_what_is_torchs_and_why(name: str, device: str) -> None:
    """The old names of reductions, and a gradient for weights, which only the composed have."""
    x, y = torch.rand(2, 3, device=device), torch.rand(2, 3, device=device)
    if name != "huber_loss":
        for old in ({"size_average": False}, {"reduce": False}):
            with gpunn.backend("auto"), gpunn.trace() as trace:
                loss = getattr(GF, name)(x, y, **old)
            torch.testing.assert_close(loss, getattr(F, name)(x, y, **old))
            assert [r.reason for r in trace.fallbacks] == ["size_average or reduce"]
    if name in ("mse_loss", "l1_loss", "huber_loss"):
        weight = torch.rand(2, 3, device=device, requires_grad=True)
        with gpunn.backend("auto"), gpunn.trace() as trace:
            getattr(GF, name)(x, y, weight=weight).backward()
        assert [r.reason for r in trace.fallbacks] == ["a gradient for a weight"]
        assert weight.grad is not None
        with torch.no_grad():
            getattr(GF, name)(x, y, weight=weight)
    with gpunn.backend("torch"), gpunn.trace() as trace:
        getattr(GF, name)(x, y)
    assert [r.reason for r in trace.fallbacks] == ["backend('torch')"]


def test_the_mean_of_a_divergence_warns(device: str) -> None:
    x = torch.rand(2, device=device)
    with pytest.warns(UserWarning, match="mean. divides the total loss") as warned:
        GF.kl_div(x, x)
    assert warned[0].filename == __file__


LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("MSELoss", {"reduction": "sum"}), ("L1Loss", {"reduction": "none"}),
    ("SmoothL1Loss", {"beta": 0.25}), ("HuberLoss", {"delta": 0.5, "reduction": "none"}),
    (
        "BCEWithLogitsLoss",
        {"weight": torch.rand(2, 1), "pos_weight": torch.rand(3), "reduction": "sum"},
    ),
    ("KLDivLoss", {"reduction": "batchmean", "log_target": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), LAYERS, ids=[name for name, _ in LAYERS])
def test_the_layers(name: str, arguments: dict[str, Any], device: str) -> None:
    x, y = torch.randn(2, 3, device=device), torch.rand(2, 3, device=device)
    ours = getattr(gpunn.nn, name)(**arguments).to(device)
    with gpunn.trace() as trace:
        loss = ours(x, y)
    launched(trace, OPERATORS[0])
    torch.testing.assert_close(loss, getattr(torch.nn, name)(**arguments).to(device)(x, y))


@pytest.mark.parametrize("order", ["contiguous", "channels_last", "permuted", "one target"])
def test_memory(order: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean takes its gradient's memory and next to no more: no losses, no copies."""
    torch.use_deterministic_algorithms(False)  # or filling what is new would take memory of its own
    x, y = (torch.zeros(16, 8, 64, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    if order == "channels_last":
        x, y = (t.to(memory_format=torch.channels_last) for t in (x, y))
    elif order == "permuted":
        x, y = x.transpose(0, 3), y.transpose(0, 3)
    elif order == "one target":
        y = torch.ones((), device=device, dtype=torch.bfloat16).expand(x.shape)
    pos_weight = torch.ones(x.shape[1], 1, 1, device=device)
    x.requires_grad_()

    def forward() -> torch.Tensor:
        return GF.binary_cross_entropy_with_logits(x, y, pos_weight=pos_weight)

    if device == "cpu":
        monkeypatch.setattr(launch, "_capture", (Device(90, 132), Nowhere()))
    peak_of = peak_on_cuda if device == "cuda" else peak_on_cpu
    assert peak_of(forward) <= 0.03 * x.nbytes
    peak = peak_of(lambda: torch.autograd.grad(forward(), x))
    assert x.nbytes <= peak <= 1.03 * x.nbytes


X, Y = torch.rand(3, 4), torch.rand(3, 4)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("mse_loss", (X, Y[:2]), {}), ("mse_loss", (X, Y), {"reduction": "average"}),
        ("mse_loss", (X, Y), {"weight": torch.ones(4)}), ("mse_loss", (X.int(), Y.int()), {}),
        ("l1_loss", (X, Y[:, :2]), {}), ("l1_loss", (X, Y), {"weight": torch.ones(3)}),
        ("smooth_l1_loss", (X, Y), {"beta": -1.0}), ("smooth_l1_loss", (X, Y), {"beta": "1"}),
        ("huber_loss", (X, Y), {"delta": 0.0}), ("huber_loss", (X, Y), {"delta": -1.0}),
        ("huber_loss", (X, Y), {"weight": torch.ones(4)}),
        ("huber_loss", (X, Y), {"reduction": "batchmean"}),
        (BCE, (X, Y[:2]), {}), (BCE, (X, Y[:1]), {}), (BCE, (X, Y), {"weight": torch.ones(3)}),
        (BCE, (X, Y), {"pos_weight": torch.ones(2, 3, 4)}),
        (BCE, (X, Y), {"weight": torch.ones(4, requires_grad=True)}),
        (BCE, (X, Y), {"reduction": "batchmean"}),
        ("kl_div", (X, Y[:, :2]), {}), ("kl_div", (X, Y), {"reduction": "average"}),
    ],
)  # fmt: skip
def test_refuses_what_torch_refuses(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011  (torch raises errors of many classes)
        getattr(F, name)(*arguments, **options)
    words = re.escape(str(expected.value))
    with pytest.raises(type(expected.value), match=words), gpunn.backend("auto"):
        getattr(GF, name)(*arguments, **options)


@each_function
def test_what_is_no_tensor_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"input: {name} expects a tensor, got list"):
        getattr(GF, name)([1.0], X)
    with pytest.raises(TypeError, match=f"target: {name} expects a tensor, got float"):
        getattr(GF, name)(X, 1.0)
