"""Activation checkpointing: what is computed again is the same, and saved tensors are read once."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

import gpunn.functional as GF


def test_a_convolution(device: str) -> None:
    shapes = (2, 6, 5, 4), (5, 6, 3, 3), (5,)
    given = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    x, weight, bias = given

    def function(x: torch.Tensor) -> torch.Tensor:
        return GF.conv2d(x, weight, bias, activation="gelu")

    results = checkpoint(function, x, use_reentrant=False), function(x)
    dy = torch.randn_like(results[1])
    torch.testing.assert_close(*(torch.autograd.grad(y, given, dy) for y in results))


def test_a_gradient_that_is_differentiated(device: str) -> None:
    x, weight = (torch.randn(s, device=device, requires_grad=True) for s in ((4, 3), (5, 3)))

    def penalty(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight))

    def function(x: torch.Tensor) -> torch.Tensor:
        return GF.linear(x, weight, activation="gelu")

    got = penalty(checkpoint(function, x, use_reentrant=False))
    torch.testing.assert_close(got, penalty(function(x)))


def test_linear_cross_entropy_in_chunks(device: str) -> None:
    shapes = (4, 6), (20, 6), (20,)
    layer = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    target = torch.arange(4, device=device)

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return GF.linear_cross_entropy(x, weight, target, linear_bias=bias, chunk_size=2)

    got = torch.autograd.grad(checkpoint(loss, *layer, use_reentrant=False), layer)
    assert all(map(torch.equal, got, torch.autograd.grad(loss(*layer), layer)))
