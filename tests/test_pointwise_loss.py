"""Losses of elements: every loss, reduction, dtype, weight and layout against NumPy float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.kernels import partial_sums, pointwise_loss
from gpunn.kernels.loss import LOSSES
from gpunn.kernels.pointwise_loss import PointwiseLossLaunch
from gpunn.reference.pointwise_loss import pointwise_loss_backward, pointwise_loss_forward
from kit import LAYOUTS, as_numpy, each_dtype, launched, layouts

OPERATORS = ("pointwise_loss_forward", "pointwise_loss_backward")
BCE = "binary_cross_entropy_with_logits"
# Each loss: the function that computes it, its arguments, and its parameter in the reference.
CALLS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "mse": ("mse_loss", {}, ()),
    "l1": ("l1_loss", {}, ()),
    "smooth_l1": ("smooth_l1_loss", {"beta": 0.75}, (0.75,)),
    "huber": ("huber_loss", {"delta": 1.5}, (1.5,)),
    "bce_with_logits": (BCE, {}, ()),
    "kl_div": ("kl_div", {}, ()),
    "kl_div_log": ("kl_div", {"log_target": True}, ()),
}
each_loss = pytest.mark.parametrize("loss", CALLS)
each_function = pytest.mark.parametrize(
    "name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", BCE, "kl_div"]
)
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # kl_div's


def small_blocks(monkeypatch: pytest.MonkeyPatch, most_parts: int = 3) -> None:
    """Programs of 16 elements; no more than ``most_parts`` in a sum."""
    monkeypatch.setattr(pointwise_loss, "LAUNCH", PointwiseLossLaunch(block=16))
    monkeypatch.setattr(pointwise_loss, "MOST_PARTS", most_parts)


def drawn(
    loss: str, shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """An input and a target that are of use to the loss."""
    x, y = 2 * torch.randn(shape), torch.randn(shape)
    y = y.sigmoid() if loss in ("bce_with_logits", "kl_div") else y
    return x.to(device, dtype), y.to(device, dtype)


def value_and_gradients(
    function: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor,
    dloss: torch.Tensor | None = None, **arguments: Any,
) -> list[torch.Tensor]:  # fmt: skip
    leaves = [tensor.detach().requires_grad_() for tensor in (x, y)]
    loss = function(*leaves, **arguments)
    dloss = torch.full_like(loss, 0.75) if dloss is None else dloss
    return [loss, *torch.autograd.grad(loss, leaves, dloss)]


def assert_right(
    loss: str, x: torch.Tensor, y: torch.Tensor, dloss: torch.Tensor | None = None, **options: Any
) -> list[torch.Tensor]:
    """Value and both gradients are right, and our kernels computed them."""
    name, arguments, parameters = CALLS[loss]
    arguments = {**arguments, **options}
    with gpunn.trace() as trace:
        got = value_and_gradients(getattr(GF, name), x, y, dloss, **arguments)
    launched(trace, *OPERATORS)
    baseline = value_and_gradients(getattr(F, name), x, y, dloss, **arguments)
    reduction = options.get("reduction", "mean")
    weights = {k: as_numpy(w) for k, w in options.items() if isinstance(w, torch.Tensor)}
    given: Any = [*parameters, *([weights["pos_weight"]] if "pos_weight" in weights else [])]
    weight: Any = weights.get("weight", 1.0)
    divisor: Any = {"mean": x.numel(), "batchmean": x.shape[0]}.get(reduction, 1)
    if reduction == "mean" and "weight" in weights and loss in ("mse", "l1"):
        divisor = weight.sum()
    upstream = as_numpy(torch.full_like(got[0], 0.75) if dloss is None else dloss) / divisor
    exact = pointwise_loss_forward(as_numpy(x), as_numpy(y), loss, *given, weight=weight)
    gradients = pointwise_loss_backward(
        upstream, as_numpy(x), as_numpy(y), loss, *given, weight=weight
    )
    exact = exact if reduction == "none" else np.asarray(exact.sum() / divisor)
    for what, mine, truth, torchs in zip(
        ("loss", "dx", "dy"), got, (exact, *gradients), baseline, strict=True
    ):
        assert_accurate(mine, truth, torchs, f"{loss}, {options.keys()}: {what}")
    return got


def test_every_loss_is_tested() -> None:
    assert set(CALLS) == set(LOSSES)


@each_dtype
@each_loss
def test_losses_of_elements(
    loss: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three programs, of which the last has five elements; each loss has a gradient of its own."""
    small_blocks(monkeypatch)
    x, y = drawn(loss, (37,), device, dtype)
    assert_right(loss, x, y, torch.randn(37, device=device).to(dtype), reduction="none")


@each_dtype
@each_loss
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions(loss: str, reduction: str, dtype: torch.dtype, device: str) -> None:
    """One program, whose sum is the result."""
    assert_right(loss, *drawn(loss, (7, 31), device, dtype), reduction=reduction)


@each_dtype
@pytest.mark.parametrize(("n", "most"), [(37, 3), (100, 3), (112, 3), (1200, 70)], ids=str)
def test_sums_of_parts(
    n: int, most: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program with one block, or with several; the last full or not; parts beyond a tile."""
    small_blocks(monkeypatch, most)
    monkeypatch.setattr(partial_sums, "LAUNCH", partial_sums.PartsLaunch(block=32))
    x, y = drawn("mse", (n,), device, dtype)
    with gpunn.trace() as trace:
        assert_right("mse", x, y)
    first, second, backward = launched(trace, *OPERATORS)
    assert (first.grid, second.grid) == ((most,), (1,))
    assert second.kernel == "sum_parts_kernel"
    assert backward.grid == (math.ceil(n / 16),)


@each_dtype
def test_batchmean(dtype: torch.dtype, device: str) -> None:
    for loss in ("kl_div", "kl_div_log"):
        assert_right(loss, *drawn(loss, (3, 5, 2), device, dtype), reduction="batchmean")
    x, y = drawn("kl_div", (), device, dtype)
    expected = F.kl_div(x, y, reduction="batchmean")
    torch.testing.assert_close(GF.kl_div(x, y, reduction="batchmean"), expected)


@each_dtype
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_of_elements(reduction: str, dtype: torch.dtype, device: str) -> None:
    """The mean of mse and l1 divides by their sum, that of huber and bce by their number."""
    for loss in ("mse", "l1", "huber", "bce_with_logits"):
        x, y = drawn(loss, (4, 9), device, dtype)
        weight = (torch.rand(4, 9, device=device) + 0.5).to(dtype)
        assert_right(loss, x, y, weight=weight, reduction=reduction)


SHAPE = (2, 3, 2, 5)
# What is broadcast to SHAPE, and whether that is copied to all of its elements.
WEIGHTS: dict[str, tuple[tuple[int, ...], bool]] = {
    "one number": ((), False),
    "one number of four dimensions": ((1, 1, 1, 1), False),
    "the last dimension": ((5,), False),
    "the first dimension": ((2, 1, 1, 1), False),
    "channels": ((3, 1, 1), False),
    "two that follow each other": ((1, 3, 2, 1), False),
    "the last two": ((2, 5), False),
    "the first three": ((2, 3, 2, 1), False),
    "two that do not": ((2, 1, 2, 1), True),
    "all": (SHAPE, False),
}


@pytest.mark.parametrize(
    ("kind", "far"), [*((kind, pointwise_loss.FAR) for kind in WEIGHTS), ("channels", 0)], ids=str
)
def test_weights_that_repeat(
    kind: str, far: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In x of either order of memory, over blocks that begin anywhere in the pattern."""
    small_blocks(monkeypatch)
    monkeypatch.setattr(pointwise_loss, "FAR", far)
    shape, _ = WEIGHTS[kind]
    weight, other = (torch.rand(shape, device=device) + 0.5 for _ in range(2))
    x, y = drawn("bce_with_logits", SHAPE, device)
    for format in (torch.contiguous_format, torch.channels_last):
        laid_out = x.contiguous(memory_format=format), y.contiguous(memory_format=format)
        dloss = torch.randn(SHAPE, device=device)
        weights = {"pos_weight": weight, "weight": other}
        assert_right("bce_with_logits", *laid_out, dloss, reduction="none", **weights)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_repeats_is_not_copied(kind: str, device: str) -> None:
    shape, copied = WEIGHTS[kind]
    x, given = torch.empty(SHAPE, device=device), torch.empty(shape, device=device)
    found = pointwise_loss._repeated(given, x)
    assert found.numbers is not None
    assert (found.numbers.data_ptr() == given.data_ptr()) == (not copied)
    found = pointwise_loss._repeated(given.expand(SHAPE), x)
    assert found.numbers is not None
    assert (found.numbers.data_ptr() == given.data_ptr()) == (not copied)


@pytest.mark.parametrize(("n", "how"), [(2**30 - 512, "near"), (2**30 - 511, "far")])
def test_a_pattern_past_2_to_the_31_is_far(n: int, how: str) -> None:
    """Where a block that begins at the end of the pattern would pass what 32 bits can say."""
    x, given = torch.empty(3, 2, n, device="meta"), torch.empty(2, 1, device="meta")
    assert pointwise_loss._repeated(given, x)[1:] == (n, 2, how)


def test_layouts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the input, of the target and of the gradient; the result lies as torch's does."""
    monkeypatch.setattr(pointwise_loss, "LAUNCH", PointwiseLossLaunch(block=32))
    x, y = drawn("huber", SHAPE, device)
    dloss = torch.randn(SHAPE, device=device)
    x.view(-1)[0], y.view(-1)[0], dloss.view(-1)[0] = 1.25, -0.5, 0.75  # what the expanded repeat
    for _, laid_out in layouts(x):
        assert_right("huber", laid_out, y, dloss, reduction="none")
    for _, laid_out in layouts(y):
        assert_right("huber", x, laid_out, dloss, reduction="none")
    for _, laid_out in layouts(dloss):
        assert_right("huber", x, y, laid_out, reduction="none")
    last = LAYOUTS["channels_last"][2](x), LAYOUTS["channels_last"][2](y)
    got = assert_right("huber", *last, dloss, reduction="none")
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in got)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (0,), (3, 0), (0, 3)], ids=str)
@each_function
def test_no_elements_and_one(name: str, shape: tuple[int, ...], device: str) -> None:
    x, y = torch.rand(shape, device=device), torch.rand(shape, device=device)
    reductions = ("none", "sum", "mean", *["batchmean"] * (name == "kl_div"))
    for reduction in reductions:
        ours = value_and_gradients(getattr(GF, name), x, y, reduction=reduction)
        theirs = value_and_gradients(getattr(F, name), x, y, reduction=reduction)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@each_loss
def test_infinities_and_nans(loss: str, device: str) -> None:
    """As torch's; of bce, where it has NaN, or a limit of what was computed."""
    name, arguments, _ = CALLS[loss]
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0, -1.0, 0.5])
    # Of bce torch's larger terms overflow where ours do not; of kl_div, whichever terms a fused
    # multiply-add does not round.
    if loss not in ("bce_with_logits", "kl_div"):
        special = torch.cat([special, torch.tensor([3e38, -3e38])])
    x, y = torch.cartesian_prod(special, special).to(device).unbind(1)
    got = value_and_gradients(getattr(GF, name), x, y, reduction="none", **arguments)
    expected = value_and_gradients(getattr(F, name), x, y, reduction="none", **arguments)
    if loss != "bce_with_logits":
        torch.testing.assert_close(got, expected, equal_nan=True)
        return
    for ours, theirs in zip(got, expected, strict=True):
        known = ~theirs.isnan()
        torch.testing.assert_close(ours[known], theirs[known])
    assert got[0][x.isnan() | y.isnan()].isnan().all()


@each_dtype
def test_sure_logits(dtype: torch.dtype, device: str) -> None:
    """What is right by far has a small loss and a small gradient: neither is rounded to 0."""
    x = torch.tensor([8.0, 9.5, -8.0, -9.5], device=device).to(dtype)
    y = torch.tensor([1.0, 1.0, 0.0, 0.0], device=device).to(dtype)
    loss, dx, _ = value_and_gradients(getattr(GF, BCE), x, y, reduction="none")
    expected = F.softplus(-x.double().abs())
    torch.testing.assert_close(loss.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    expected = 0.75 * torch.sigmoid(-x.double().abs()) * (1 - 2 * y.double())
    torch.testing.assert_close(dx.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_large_logits(device: str) -> None:
    x, y = torch.linspace(-100, 100, 101, device=device), torch.rand(101, device=device)
    pos_weight = torch.rand(101, device=device) + 0.5
    assert_right("bce_with_logits", x, y, reduction="none")
    assert_right("bce_with_logits", x, y, reduction="none", pos_weight=pos_weight)


def test_kinks(device: str) -> None:
    """At beta and delta themselves, and at equal input and target."""
    x = torch.tensor([-1.5, -0.75, 0.0, 0.75, 1.5, 0.5], device=device)
    for loss in ("l1", "smooth_l1", "huber"):
        assert_right(loss, x, torch.zeros_like(x), reduction="none")
    got = value_and_gradients(GF.smooth_l1_loss, x, x / 2, beta=0.0)
    torch.testing.assert_close(got, value_and_gradients(F.l1_loss, x, x / 2))


def test_a_target_of_zero_has_no_divergence(device: str) -> None:
    x, y = torch.tensor([-1.0, -2.0], device=device), torch.tensor([0.0, 0.5], device=device)
    ours = value_and_gradients(GF.kl_div, x, y, reduction="none")
    theirs = value_and_gradients(F.kl_div, x, y, reduction="none")
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours[0][0] == 0


@pytest.mark.parametrize("of_target", [torch.float32, torch.float16, torch.bfloat16])
@each_dtype
@each_function
def test_mixed_dtypes(name: str, dtype: torch.dtype, of_target: torch.dtype, device: str) -> None:
    """The types of the result and of the gradients are torch's; huber has none of this."""
    if name == "huber_loss" and dtype != of_target:
        with gpunn.trace() as trace:
            x, y = (torch.ones(2, device=device, dtype=d) for d in (dtype, of_target))
            GF.huber_loss(x, y)
        assert [r.reason for r in trace.fallbacks] == ["arguments that PyTorch may refuse"]
        return
    x, y = torch.rand(9, device=device).to(dtype), torch.rand(9, device=device).to(of_target)
    ours = value_and_gradients(getattr(GF, name), x, y)
    try:
        theirs = value_and_gradients(getattr(F, name), x, y)
    except RuntimeError:  # torch 2.11 has no gradient of an mse_loss of two dtypes
        assert name == "mse_loss"
        wide = value_and_gradients(getattr(F, name), x.float(), y.float())
        theirs = [wide[0].to(ours[0].dtype), wide[1].to(dtype), wide[2].to(of_target)]
        assert ours[0].dtype == getattr(F, name)(x, y).dtype
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)


def test_what_has_no_dimensions_is_promoted_to(device: str) -> None:
    """Not by: torch's rule for numbers."""
    x, y = torch.rand(3, device=device).bfloat16(), torch.tensor(0.5, device=device)
    for given in ((x, y), (y, x), (y, y.half())):
        ours, theirs = (package.kl_div(*given, reduction="none") for package in (GF, F))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)  # and of one dtype


@pytest.mark.parametrize("weighted", [False, True])
@each_function
def test_autocast_as_torch(name: str, weighted: bool, device: str) -> None:
    if weighted and name in ("smooth_l1_loss", "kl_div"):
        return
    x, y = (torch.rand(9, device=device).bfloat16() for _ in range(2))
    arguments: Any = {"weight": torch.rand_like(x)} if weighted else {}
    with torch.autocast(device, torch.bfloat16), gpunn.backend("auto"), gpunn.trace() as trace:
        for reduction in ("none", "mean"):
            arguments["reduction"] = reduction
            ours = value_and_gradients(getattr(GF, name), x, y, **arguments)
            theirs = value_and_gradients(getattr(F, name), x, y, **arguments)
            assert [t.dtype for t in ours] == [t.dtype for t in theirs]
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    composed = weighted and name in ("mse_loss", "l1_loss")
    reasons = {"weights under autocast"} if composed else set()
    assert {r.reason for r in trace.fallbacks} == reasons
