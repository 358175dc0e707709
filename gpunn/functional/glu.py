"""Gated linear units on one pair of kernels: y = a f(b), a and b the halves of the input.

All follow torch's ``glu`` in taking the *second* half as the gate. Source: Dauphin et al. 2017
(glu); Shazeer, "GLU variants improve Transformer" (2020).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.activation import TORCH
from gpunn.functional.dispatch import differentiable_gradients, is_tensor
from gpunn.kernels.glu import glu_backward, glu_forward
from gpunn.kernels.launch import takes

# The activation that gates each function; with approximate="tanh", geglu's is gelu_tanh.
GATES = {"glu": "sigmoid", "swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def _composed(input: torch.Tensor, dim: int, gate: str) -> torch.Tensor:
    if gate == "sigmoid":
        return F.glu(input, dim)
    a, b = input.chunk(2, dim)
    return a * TORCH[gate](b)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, gate: str) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.dim, ctx.gate = dim, gate
        return glu_forward(x, dim, gate, [])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return glu_backward(dy, x, ctx.dim, ctx.gate, []), None, None
        (dx,) = differentiable_gradients(
            lambda alias: _composed(alias, ctx.dim, ctx.gate), [x], [True], dy
        )
        return dx, None, None


def _gated(name: str, input: torch.Tensor, dim: int, gate: str) -> torch.Tensor:
    if not is_tensor(name, input):
        return _composed(input, dim, gate)
    if input.dim() == 0:
        raise RuntimeError(f"input: {name} needs at least one dimension, got a tensor of none")
    if not -input.dim() <= dim < input.dim():
        raise IndexError(
            f"dim: expected a dimension from {-input.dim()} to {input.dim() - 1}, got {dim}"
        )
    dim %= input.dim()
    if input.shape[dim] % 2:
        raise RuntimeError(
            f"input: {name} halves dimension {dim}, whose size must be even, "
            f"got {input.shape[dim]} of shape {tuple(input.shape)}"
        )
    if not takes(name, input):
        return _composed(input, dim, gate)
    if input.requires_grad and torch.is_grad_enabled():
        return _Glu.apply(input, dim, gate)  # type: ignore[no-any-return]
    return glu_forward(input, dim, gate, [])


def glu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """y = a sigmoid(b), input (…, 2n, …) = (a, b) along ``dim``, y (…, n, …).

    Raises:
        IndexError: ``dim`` is not a dimension of the input.
        RuntimeError: the size of that dimension is odd, or there is no dimension.
        TypeError: the input is no tensor.
    """
    return _gated("glu", input, dim, GATES["glu"])


def swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """y = a silu(b); otherwise as ``glu``."""
    return _gated("swiglu", input, dim, GATES["swiglu"])


def geglu_gate(approximate: str) -> str:
    """The activation that gates geglu.

    Raises:
        RuntimeError: ``approximate`` is neither "none" nor "tanh".
    """
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return GATES["geglu"] if approximate == "none" else "gelu_tanh"


def geglu(input: torch.Tensor, dim: int = -1, approximate: str = "none") -> torch.Tensor:
    """y = a gelu(b), with gelu's ``approximate``; otherwise as ``glu``.

    Raises:
        IndexError, TypeError: as ``glu``.
        RuntimeError: as ``glu``; or ``approximate`` is neither "none" nor "tanh".
    """
    return _gated("geglu", input, dim, geglu_gate(approximate))


def reglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """y = a relu(b); otherwise as ``glu``."""
    return _gated("reglu", input, dim, GATES["reglu"])
