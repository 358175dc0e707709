"""cross_entropy: losses and gradients against NumPy float64, every argument, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.kernels import launch
from gpunn.kernels.launch import Device
from gpunn.reference.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    shares,
)
from kit import as_numpy, check_gradients, each_dtype, launched, layouts
from test_convolution_memory import Nowhere, peak_on_cpu, peak_on_cuda

OPERATORS = ("cross_entropy_forward", "cross_entropy_backward")


def value_and_gradient(
    function: Any, x: torch.Tensor, dy: torch.Tensor | None, *given: Any, **arguments: Any
) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf, *given, **arguments)
    return [y, *torch.autograd.grad(y, leaf, torch.ones_like(y) if dy is None else dy)]


def assert_as_torchs(x: torch.Tensor, target: torch.Tensor, **arguments: Any) -> None:
    """Value and gradient, no worse than twice torch's own error; torch in float64 is the truth."""
    with gpunn.trace() as trace:
        got = value_and_gradient(GF.cross_entropy, x, None, target, **arguments)
    launched(trace, *OPERATORS)
    baseline = value_and_gradient(F.cross_entropy, x, None, target, **arguments)
    soft = target.double() if target.is_floating_point() else target
    if arguments.get("weight") is not None:
        arguments["weight"] = arguments["weight"].double()
    exact = value_and_gradient(F.cross_entropy, x.double(), None, soft, **arguments)
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
    assert_as_torchs(x, target, reduction=reduction, weight=weight, label_smoothing=0.1)


@each_dtype
def test_layouts(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(3, 5, 4, 6, device=device).to(dtype)
    target = torch.randint(5, (3, 4, 6), device=device)
    for _, laid_out in layouts(x):
        if laid_out.flatten().unique().numel() > 1:
            assert_as_torchs(laid_out, target)
    assert_as_torchs(x, target.transpose(1, 2).contiguous().transpose(1, 2))


def test_rows_that_are_all_ignored(device: str) -> None:
    x, target = torch.randn(3, 5, device=device), torch.full((3,), -100, device=device)
    assert GF.cross_entropy(x, target).isnan()
    assert F.cross_entropy(x, target).isnan()
    assert GF.cross_entropy(x, target, reduction="sum") == 0
    (dx,) = value_and_gradient(GF.cross_entropy, x, None, target, reduction="sum")[1:]
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
    target = torch.tensor([1, 0, -100, 2])
    check_gradients(lambda x: GF.cross_entropy(x, target, label_smoothing=0.1), torch.randn(4, 3))
    soft = torch.softmax(torch.randn(2, 3, 2), 1).double()
    check_gradients(lambda x: GF.cross_entropy(x, soft, reduction="none"), torch.randn(2, 3, 2))


def test_backward_twice_and_compiled(device: str) -> None:
    x, target = torch.randn(4, 9, device=device).requires_grad_(), torch.arange(4, device=device)
    loss = GF.cross_entropy(x, target)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, again)
    torch._dynamo.reset()
    compiled = torch.compile(GF.cross_entropy, fullgraph=True, backend="aot_eager")
    (dx,) = torch.autograd.grad(compiled(x, target), x)
    torch.testing.assert_close(dx, first)


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
def test_refuses_what_torch_refuses(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011  (torch raises errors of many classes)
        F.cross_entropy(*arguments)
    with pytest.raises(type(expected.value)):
        GF.cross_entropy(*arguments)
