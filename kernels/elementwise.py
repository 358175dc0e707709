"""One pair of kernels for every activation: y = f(x), and dx = dy f'(x).

Source of the names: ``kernels/activation.py``. Both are bound by memory (one read and one write
forward, two reads and one write backward), so a program moves 16 bytes a thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpunn.kernels.activation import device_functions, gradient_functions
from gpunn.kernels.launch import Launch, cdiv, operator, run
from gpunn.kernels.numeric import widen


@dataclass(frozen=True)
class ElementwiseLaunch(Launch):
    """1024 elements for 4 warps: 16 bytes a thread in 16-bit types, 32 in float32. Not measured."""

    block: int = 1024


LAUNCH = ElementwiseLaunch()


@triton.jit
def activation_forward_kernel(
    x_ptr, y_ptr, n_elements,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = f(x). A program owns BLOCK elements in memory order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n_elements
    x = widen(tl.load(x_ptr + index, mask=mask, other=0.0))
    y = ACTIVATION(x, P0, P1)
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def activation_backward_kernel(
    dy_ptr, saved_ptr, dx_ptr, n_elements,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dy f'(x), from the saved input or output. A program owns BLOCK elements."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n_elements
    dy = widen(tl.load(dy_ptr + index, mask=mask, other=0.0))
    saved = widen(tl.load(saved_ptr + index, mask=mask, other=0.0))
    dx = GRADIENT(dy, saved, P0, P1)
    tl.store(dx_ptr + index, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def in_memory_order_of(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the strides of ``model``: itself if it has them, else a copy."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def _activation_forward_fake(
    x: torch.Tensor, activation: str, parameters: list[float]
) -> torch.Tensor:
    return torch.empty_like(x)


@operator(
    "activation_forward(Tensor x, str activation, float[] parameters) -> Tensor",
    fake=_activation_forward_fake,
)
def activation_forward(x: torch.Tensor, activation: str, parameters: list[float]) -> torch.Tensor:
    """y = f(x), in x's own memory format where x is dense, else contiguous."""
    y = _activation_forward_fake(x, activation, parameters)
    if x.numel():
        run(
            "activation_forward",
            activation_forward_kernel,
            (cdiv(x.numel(), LAUNCH.block),),
            in_memory_order_of(x, y),
            y,
            x.numel(),
            launch=LAUNCH,
            **device_functions(activation, parameters),
        )
    return y


def _activation_backward_fake(
    dy: torch.Tensor, saved: torch.Tensor, activation: str, parameters: list[float]
) -> torch.Tensor:
    return torch.empty_like(saved)


@operator(
    "activation_backward(Tensor dy, Tensor saved, str activation, float[] parameters) -> Tensor",
    fake=_activation_backward_fake,
)
def activation_backward(
    dy: torch.Tensor, saved: torch.Tensor, activation: str, parameters: list[float]
) -> torch.Tensor:
    """dx = dy f'(x), from ``saved``: the input or the output, as the activation says."""
    dx = _activation_backward_fake(dy, saved, activation, parameters)
    if dx.numel():
        run(
            "activation_backward",
            activation_backward_kernel,
            (cdiv(dx.numel(), LAUNCH.block),),
            in_memory_order_of(dy, dx),
            in_memory_order_of(saved, dx),
            dx,
            dx.numel(),
            launch=LAUNCH,
            **gradient_functions(activation, parameters),
        )
    return dx
