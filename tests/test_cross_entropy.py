"""cross_entropy: losses and gradients against NumPy float64, every argument, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.kernels import cross_entropy as kernels
from gpunn.kernels import launch
from gpunn.kernels.cross_entropy import TotalsLaunch
from gpunn.kernels.elementwise import ElementwiseLaunch
from gpunn.kernels.launch import Device
from gpunn.kernels.softmax import SoftmaxLaunch
from gpunn.reference.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    shares,
)
from kit import as_numpy, check_gradients, each_dtype, launched, layouts, short_name
from test_convolution_memory import Nowhere, peak_on_cpu, peak_on_cuda

OPERATORS = ("cross_entropy_forward", "cross_entropy_backward")
IN_ONE_PASS = ("cross_entropy_with_gradient", "cross_entropy_scale_gradient")


def value_and_gradient(
    function: Any, x: torch.Tensor, dy: torch.Tensor | None, *given: Any, **arguments: Any
) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf, *given, **arguments)
    return [y, *torch.autograd.grad(y, leaf, torch.ones_like(y) if dy is None else dy)]


def assert_as_torchs(
    x: torch.Tensor, target: torch.Tensor, upstream: float = 1.0, **arguments: Any
) -> None:
    """Value and gradient, no worse than twice torch's own error; torch in float64 is the truth."""
    dy = torch.tensor(upstream, device=x.device)
    with gpunn.trace() as trace:
        got = value_and_gradient(GF.cross_entropy, x, dy.to(x.dtype), target, **arguments)
    launched(trace, *(OPERATORS if x.dtype == torch.float16 else IN_ONE_PASS))
    baseline = value_and_gradient(F.cross_entropy, x, dy.to(x.dtype), target, **arguments)
    soft = target.double() if target.is_floating_point() else target
    if arguments.get("weight") is not None:
        arguments["weight"] = arguments["weight"].double()
    dy = dy.to(x.dtype).double()
    exact = value_and_gradient(F.cross_entropy, x.double(), dy, soft, **arguments)
    for mine, truth, torchs in zip(got, exact, baseline, strict=True):
        assert_accurate(mine, as_numpy(truth), torchs)


@each_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("n_classes", [3, 17, 1000, 4097])
def test_rows_against_the_reference(
    n_classes: int, smoothing: float, dtype: torch.dtype, device: str
) -> None:
    """Of fewer classes than a tile, and of more; with weights and rows that are ignored."""
    x = torch.randn(6, n_classes, device=device).to(dtype)
    target = torch.randint(n_classes, (6,), device=device)
    target[1] = 2
    weight = (torch.rand(n_classes, device=device) + 0.5).to(dtype)
    dy = torch.randn(6, device=device).to(dtype)
    arguments: Any = dict(
        weight=weight, reduction="none", label_smoothing=smoothing, ignore_index=2
    )
    with gpunn.trace() as trace:
        got = value_and_gradient(GF.cross_entropy, x, dy, target, **arguments)
    launched(trace, *OPERATORS)
    baseline = value_and_gradient(F.cross_entropy, x, dy, target, **arguments)
    share = shares(target.cpu().numpy(), n_classes, 2, smoothing)
    # the target's own part counts with its class's weight alone
    loss = cross_entropy_forward(as_numpy(x), share, as_numpy(weight))
    dx = cross_entropy_backward(as_numpy(dy), as_numpy(x), share, as_numpy(weight))
    assert_accurate(got[0], loss, baseline[0])
    assert_accurate(got[1], dx, baseline[1])


@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 7), (2, 5, 3, 66)])
def test_every_reduction_and_dimension(
    shape: tuple[int, ...], kind: str, reduction: str, dtype: torch.dtype, device: str
) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    if kind == "probabilities":
        target = torch.softmax(torch.randn(shape, device=device), min(len(shape) - 1, 1)).to(dtype)
    else:
        rows = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
        target = torch.randint(5, rows, device=device)
    weight = (torch.rand(5, device=device) + 0.5).to(dtype)
    assert_as_torchs(x, target, reduction=reduction)
    assert_as_torchs(x, target, -2.7, reduction=reduction, weight=weight, label_smoothing=0.1)


@each_dtype
def test_layouts(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(3, 5, 4, 6, device=device).to(dtype)
    target = torch.randint(5, (3, 4, 6), device=device)
    for _, laid_out in layouts(x):
        if laid_out.flatten().unique().numel() > 1:
            assert_as_torchs(laid_out, target)
    assert_as_torchs(x, target.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short_name)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("shape", [(5, 37), (2, 11, 6)])
def test_rows_longer_than_a_tile_in_one_pass(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They are read again from their end, a tile that is not full; and totals are of many parts."""
    monkeypatch.setattr(kernels, "LAST", (SoftmaxLaunch(4, block_rows=2, block_cols=16),))
    monkeypatch.setattr(kernels, "INNER", (SoftmaxLaunch(4, block_rows=4, block_cols=4),))
    monkeypatch.setattr(kernels, "TOTALS", TotalsLaunch(block_rows=2))
    monkeypatch.setattr(kernels, "MOST_TOTALS", 2)  # of two or three blocks each
    x, n_classes = torch.randn(shape, device=device).to(dtype), shape[1]
    target = torch.randint(n_classes, (shape[0], *shape[2:]), device=device)
    target.view(-1)[1], target.view(-1)[3] = n_classes - 1, 0
    weight = (torch.rand(n_classes, device=device) + 0.5).to(dtype)
    arguments: Any = dict(weight=weight, label_smoothing=0.2)
    if kind == "probabilities":
        target = torch.softmax(torch.randn(shape, device=device), 1).to(dtype)
    else:
        arguments["ignore_index"] = 0
        assert_as_torchs(x, target, ignore_index=0)
    assert_as_torchs(x, target, **arguments)
    assert_as_torchs(x, target, 0.3, reduction="sum", **arguments)


def test_programs_scale_more_than_one_block(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SCALE", ElementwiseLaunch(block=4))
    n_elements = 9 * 16 * launch.device_of(torch.empty(0, device=device)).n_multiprocessors + 1
    dx, scale = torch.randn(n_elements, device=device), torch.tensor(0.3, device=device)
    expected = dx * scale
    kernels.cross_entropy_scale_gradient(dx, scale)
    assert torch.equal(dx, expected)


def test_what_a_loss_scale_lifts_in_float16(device: str) -> None:
    """Gradients that are zero in float16 before the scale, and are not after it, as torch's."""
    x = 3 * torch.randn(64, 40, device=device).half()
    target = torch.randint(40, (64,), device=device)
    scale = torch.tensor(65504.0, device=device).half()
    (ours,) = value_and_gradient(GF.cross_entropy, x, scale, target)[1:]
    (theirs,) = value_and_gradient(F.cross_entropy, x, scale, target)[1:]
    flushed = value_and_gradient(F.cross_entropy, x, None, target)[1] == 0
    assert (flushed & (theirs != 0)).sum() > 20
    assert (flushed & (ours != 0)).sum() > 20
    assert_accurate(ours, as_numpy(value_and_gradient(
        F.cross_entropy, x.double(), scale.double(), target)[1]), theirs)  # fmt: skip


@pytest.mark.parametrize("upstream", [math.nan, math.inf, 0.0])
def test_ignored_rows_have_no_gradient_whatever_comes(upstream: float, device: str) -> None:
    x, target = torch.randn(3, 5, device=device), torch.tensor([1, -100, 2], device=device)
    for arguments in ({}, {"label_smoothing": 0.1}):
        for dtype in (torch.float32, torch.float16):  # in one pass, and in two
            dy = torch.tensor(upstream, device=device, dtype=dtype)
            (dx,) = value_and_gradient(GF.cross_entropy, x.to(dtype), dy, target, **arguments)[1:]
            assert not dx[1].any()
            assert dx[[0, 2]].isfinite().all() == math.isfinite(upstream)


def test_rows_that_are_all_ignored(device: str) -> None:
    x, target = torch.randn(3, 5, device=device), torch.full((3,), -100, device=device)
    assert GF.cross_entropy(x, target).isnan()
    assert F.cross_entropy(x, target).isnan()
    assert GF.cross_entropy(x, target, reduction="sum") == 0
    for reduction in ("sum", "mean"):
        for dtype in (torch.float32, torch.float16):
            leaf = x.to(dtype)
            (dx,) = value_and_gradient(GF.cross_entropy, leaf, None, target, reduction=reduction)[
                1:
            ]
            assert not dx.any()


def test_large_logits_and_infinities(device: str) -> None:
    x = 1e4 * torch.randn(4, 9, device=device)
    x[1, 3] = -math.inf
    target = torch.tensor([1, 2, 3, 4], device=device)
    for arguments in ({}, {"reduction": "none"}):
        ours = value_and_gradient(GF.cross_entropy, x, None, target, **arguments)
        theirs = value_and_gradient(F.cross_entropy, x, None, target, **arguments)
        torch.testing.assert_close(ours, theirs)
    target[1] = 3
    torch.testing.assert_close(GF.cross_entropy(x, target), F.cross_entropy(x, target))


def test_a_number_that_is_no_class_gives_nan(device: str) -> None:
    """And reads nothing: torch stops the GPU, and a kernel cannot raise."""
    x, target = torch.randn(3, 5, device=device), torch.tensor([0, 5, -1], device=device)
    loss = GF.cross_entropy(x, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]


def test_gradcheck() -> None:
    target = torch.tensor([1, 0, -100])
    check_gradients(lambda x: GF.cross_entropy(x, target, label_smoothing=0.1), torch.randn(3, 3))
    soft = torch.softmax(torch.randn(1, 3, 2), 1).double()
    check_gradients(lambda x: GF.cross_entropy(x, soft, reduction="none"), torch.randn(1, 3, 2))


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_again(reduction: str, kind: str, device: str) -> None:
    """The gradient that the forward pass computed is handed out once, to be written to."""
    x = torch.randn(4, 9, device=device).requires_grad_()
    target = torch.arange(4, device=device)
    if kind == "probabilities":
        target = torch.softmax(torch.randn(4, 9, device=device), 1)
    dy = torch.randn(4 if reduction == "none" else (), device=device)
    weight, leaf = torch.rand(9, device=device), x.detach().requires_grad_()
    theirs = F.cross_entropy(leaf, target, weight, reduction=reduction)
    (expected,) = torch.autograd.grad(theirs, leaf, dy)
    loss = GF.cross_entropy(x, target, weight, reduction=reduction)
    (twice,) = torch.autograd.grad(loss, x, dy, create_graph=True)
    torch.testing.assert_close(twice, expected)
    for _ in range(3):
        with gpunn.trace() as trace:
            (found,) = torch.autograd.grad(loss, x, dy, retain_graph=True)
        torch.testing.assert_close(found, expected)
        found.zero_()
    assert [r.operator for r in trace.launches] == ["cross_entropy_backward"]
    loss.backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant: bool, device: str) -> None:
    x, target = torch.randn(4, 9, device=device).requires_grad_(), torch.arange(4, device=device)
    loss = checkpoint(GF.cross_entropy, x, target, use_reentrant=use_reentrant)
    (2 * loss).backward()
    (expected,) = torch.autograd.grad(2 * F.cross_entropy(x, target), x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_probabilities_of_another_dtype(reduction: str, device: str) -> None:
    """The loss is in the wider of both."""
    x = torch.randn(4, 9, device=device)
    probabilities = x.roll(1, 0).softmax(-1)
    for logits, target in ((x.bfloat16(), probabilities), (x, probabilities.bfloat16())):
        ours = GF.cross_entropy(logits, target, reduction=reduction)
        theirs = F.cross_entropy(logits, target, reduction=reduction)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@each_dtype
def test_autocast(dtype: torch.dtype, device: str) -> None:
    x, target = torch.randn(4, 9, device=device).to(dtype), torch.arange(4, device=device)
    with torch.autocast(device, torch.bfloat16):
        ours = value_and_gradient(GF.cross_entropy, x, None, target)
        theirs = value_and_gradient(F.cross_entropy, x, None, target)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    eps = torch.finfo(dtype).eps  # a GPU's takes the logarithm in the dtype of the logits
    torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=2 * eps)


def test_compiled(device: str) -> None:
    x, target = torch.randn(4, 9, device=device).requires_grad_(), torch.arange(4, device=device)
    (expected,) = torch.autograd.grad(GF.cross_entropy(x, target), x)
    torch._dynamo.reset()
    compiled = torch.compile(GF.cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(x, target)
    with gpunn.trace() as trace:
        (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(dx, expected)
    assert [r.operator for r in trace.launches] == ["cross_entropy_backward"]
    assert torch.equal(torch.autograd.grad(loss, x)[0], dx)


def test_a_gradient_for_the_target_is_torchs(device: str) -> None:
    x = torch.randn(4, 5, device=device)
    target = torch.softmax(torch.randn(4, 5, device=device), 1).requires_grad_()
    with gpunn.backend("auto"), gpunn.trace() as trace:
        loss = GF.cross_entropy(x, target)
    assert [r.reason for r in trace.fallbacks] == ["a gradient for target or weight"]
    assert torch.autograd.grad(loss, target)[0].any()


def test_memory_of_a_large_vocabulary(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits and their gradient, and next to nothing else."""
    torch.use_deterministic_algorithms(False)  # or filling what is new would take memory of its own
    x = torch.zeros(64, 131072, device=device, dtype=torch.bfloat16).requires_grad_()
    target = torch.zeros(64, device=device, dtype=torch.int64)

    def step() -> object:
        return torch.autograd.grad(GF.cross_entropy(x, target), x)

    if device == "cpu":
        monkeypatch.setattr(launch, "_capture", (Device(90, 132), Nowhere()))
    peak = peak_on_cuda(step) if device == "cuda" else peak_on_cpu(step)
    assert x.nbytes <= peak <= 1.01 * x.nbytes


def test_the_layer(device: str) -> None:
    x, target = torch.randn(4, 5, device=device), torch.randint(5, (4,), device=device)
    weight = torch.rand(5, device=device)
    arguments: Any = dict(ignore_index=int(target[0]), label_smoothing=0.1)
    ours = gpunn.nn.CrossEntropyLoss(weight, **arguments)(x, target)
    torch.testing.assert_close(ours, torch.nn.CrossEntropyLoss(weight, **arguments)(x, target))


X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "arguments",
    [
        (X, Y[:2]), (X, Y.int()), (X, torch.randn(3, 5)), (X, Y, torch.ones(3)),
        (X, Y, None, None, -100, None, "average"), (X, Y, None, None, -100, None, "mean", 1.5),
        (torch.tensor(1.0), torch.tensor(0)), ([1.0], Y), (X, [0, 1, 2]),
    ],
)  # fmt: skip
def test_refuses_what_torch_refuses(arguments: tuple[Any, ...], device: str) -> None:
    arguments = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)
    with pytest.raises(Exception) as expected:  # noqa: PT011  (torch raises errors of many classes)
        F.cross_entropy(*arguments)
    with pytest.raises(type(expected.value)):
        GF.cross_entropy(*arguments)
