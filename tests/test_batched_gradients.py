"""Gradients of many vectors at once, and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gpunn
import gpunn.functional as GF

Shape = tuple[int, ...]
CLASSES = [1, 0, 2]

# What is called, and with tensors of which shapes.
OPS: dict[str, tuple[Callable[..., torch.Tensor], list[Shape]]] = {
    "linear": (
        lambda x, w, b, r: GF.linear(x, w, b, activation="gelu", residual=r),
        [(3, 4), (5, 4), (5,), (3, 5)],
    ),
    "gelu": (GF.gelu, [(3, 4)]),
    "swiglu": (GF.swiglu, [(3, 8)]),
    "conv2d": (
        lambda x, w, b: GF.conv2d(x, w, b, padding=1, activation="relu"),
        [(2, 3, 5, 5), (4, 3, 3, 3), (4,)],
    ),
    "depthwise": (lambda x, w: GF.conv2d(x, w, groups=3), [(2, 3, 5, 5), (3, 1, 3, 3)]),
    "conv_transpose2d": (
        lambda x, w: GF.conv_transpose2d(x, w, stride=2, activation="silu"),
        [(2, 3, 5, 5), (3, 4, 3, 3)],
    ),
    "attention": (GF.scaled_dot_product_attention, [(1, 2, 4, 8)] * 3),
    "batch_norm": (
        lambda x, w, b: GF.batch_norm(x, None, None, w, b, True, activation="relu"),
        [(4, 3, 2, 2), (3,), (3,)],
    ),
    "layer_norm": (lambda x, w, b: GF.layer_norm(x, (4,), w, b), [(3, 4), (4,), (4,)]),
    "rms_norm": (lambda x, w: GF.rms_norm(x, (4,), w), [(3, 4), (4,)]),
    "group_norm": (lambda x, w, b: GF.group_norm(x, 2, w, b), [(3, 4, 5), (4,), (4,)]),
    "softmax": (lambda x: GF.softmax(x, -1), [(3, 4)]),
    "embedding": (lambda w: GF.embedding(torch.tensor([0, 2, 2], device=w.device), w), [(4, 5)]),
    "rotary_embedding": (
        lambda q, k: GF.rotary_embedding(q, k, *GF.rotary_tables(2, 8, device=q.device))[0],
        [(1, 4, 2, 8)] * 2,
    ),
    "cross_entropy": (
        lambda x: GF.cross_entropy(x, torch.tensor(CLASSES, device=x.device)), [(3, 4)]
    ),
    "linear_cross_entropy": (
        lambda x, w: GF.linear_cross_entropy(
            x, w, torch.tensor(CLASSES, device=x.device), chunk_size=2, reduction="none"
        ),
        [(3, 4), (5, 4)],
    ),
    "nll_loss": (lambda x: GF.nll_loss(x, torch.tensor(CLASSES, device=x.device)), [(3, 4)]),
    "mse_loss": (GF.mse_loss, [(3, 4), (3, 4)]),
    "augment": (lambda x: GF.augment(x, seed=1, rotation=20), [(1, 3, 4, 4)]),
    "elastic": (lambda x: GF.augment(x, seed=1, elastic_amplitude=2.0), [(1, 3, 4, 4)]),
    "dropout": (lambda x: GF.dropout(x, 0.5), [(3, 4)]),
    "max_pool2d": (lambda x: GF.max_pool2d(x, 2), [(1, 3, 4, 4)]),
    "avg_pool2d": (lambda x: GF.avg_pool2d(x, 2), [(1, 3, 4, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_are_those_of_each(name: str, device: str) -> None:
    """By the kernels, once for each."""
    function, shapes = OPS[name]
    tensors = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    y = function(*tensors)
    dys = torch.randn(3, *y.shape, device=device)
    options: Any = dict(retain_graph=True, allow_unused=True)
    each = [torch.autograd.grad(y, tensors, dy, **options) for dy in dys]
    with gpunn.trace() as trace:
        together = torch.autograd.grad(y, tensors, dys, is_grads_batched=True, **options)
    assert len(trace.launches) >= len(dys)
    compared = 0
    for found, *expected in zip(together, *each, strict=True):
        if found is not None:
            torch.testing.assert_close(found, torch.stack(expected))
            assert found.abs().max() > 1e-3
            compared += 1
    assert compared


def test_a_vectorised_jacobian(device: str) -> None:
    x = torch.randn(2, 3, device=device)
    weight = torch.randn(4, 3, device=device)
    function = lambda x: GF.linear(x, weight, activation="tanh")  # noqa: E731
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(function, x, vectorize=True), jacobian(function, x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.func's own
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's, of PyTorch's ops
@pytest.mark.parametrize("name", OPS)
def test_inside_transforms_of_torch_func(name: str, device: str) -> None:
    """PyTorch computes, as the trace says, also the gradients of each of a batch."""
    function, shapes = OPS[name]
    tensors = [torch.randn(2, *shape, device=device) for shape in shapes]
    gradients = torch.func.grad(lambda *t: function(*t).square().sum(), tuple(range(len(shapes))))
    found = []
    for choice in ("auto", "torch"):
        torch.manual_seed(1)
        with gpunn.backend(choice), gpunn.trace() as trace:
            found.append(torch.func.vmap(gradients, randomness="different")(*tensors))
        assert not trace.launches
        reasons = {"auto": "inside a torch.func transform", "torch": "backend('torch')"}
        assert {f.reason for f in trace.fallbacks} == {reasons[choice]}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
