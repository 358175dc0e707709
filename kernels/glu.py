"""Gated linear units: y = a f(b), where a and b are the two halves of the input.

Source: Shazeer, "GLU variants improve Transformer" (2020); torch's ``glu`` (f = sigmoid), whose
order of the halves all the variants follow: the gate f is applied to the second one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpunn.kernels.activation import ACTIVATIONS, device_functions, gradient_functions, widen
from gpunn.kernels.launch import Launch, operator, run


@dataclass(frozen=True)
class GluLaunch(Launch):
    """A program owns ``block`` neighbouring elements of a half row. Not measured."""

    block: int = 1024


@triton.jit
def glu_forward_kernel(
    x_ptr, y_ptr, half, n_blocks,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = a f(b) for x of shape (n_rows, 2, half) = (a, b). A program owns BLOCK of a row of y."""
    program = tl.program_id(0)
    row = (program // n_blocks).to(tl.int64)
    cols = (program % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < half
    a = widen(tl.load(x_ptr + row * 2 * half + cols, mask=mask, other=0.0))
    b = widen(tl.load(x_ptr + row * 2 * half + half + cols, mask=mask, other=0.0))
    y = a * ACTIVATION(b, P0, P1)
    tl.store(y_ptr + row * half + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, half, n_blocks,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    SAVES_OUTPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """da = dy f(b), db = dy a f'(b), for x = (a, b) as in the forward kernel."""
    program = tl.program_id(0)
    row = (program // n_blocks).to(tl.int64)
    cols = (program % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < half
    first, second = row * 2 * half + cols, row * 2 * half + half + cols
    a = widen(tl.load(x_ptr + first, mask=mask, other=0.0))
    b = widen(tl.load(x_ptr + second, mask=mask, other=0.0))
    dy = widen(tl.load(dy_ptr + row * half + cols, mask=mask, other=0.0))
    gate = ACTIVATION(b, P0, P1)
    db = GRADIENT(dy * a, gate if SAVES_OUTPUT else b, P0, P1)
    tl.store(dx_ptr + first, (dy * gate).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + second, db.to(dx_ptr.dtype.element_ty), mask=mask)


def _grid(half: int, outer: int, launch: GluLaunch) -> tuple[int, int]:
    n_blocks = triton.cdiv(half, launch.block)
    return outer * n_blocks, n_blocks


def _glu_forward_fake(
    x: torch.Tensor, dim: int, activation: str, parameters: list[float]
) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] //= 2
    return x.new_empty(shape)


@operator(
    "glu_forward(Tensor x, int dim, str activation, float[] parameters) -> Tensor",
    fake=_glu_forward_fake,
)
def glu_forward(
    x: torch.Tensor, dim: int, activation: str, parameters: list[float]
) -> torch.Tensor:
    """y = a f(b), a and b the halves of x along ``dim`` (not negative); y is contiguous."""
    y = _glu_forward_fake(x, dim, activation, parameters)
    launch = GluLaunch()
    half = y.shape[dim:].numel()
    if y.numel():
        n_programs, n_blocks = _grid(half, y.numel() // half, launch)
        run(
            "glu_forward",
            glu_forward_kernel,
            (n_programs,),
            x.contiguous(),
            y,
            half,
            n_blocks,
            launch=launch,
            **device_functions(activation, parameters),
        )
    return y


def _glu_backward_fake(
    dy: torch.Tensor, x: torch.Tensor, dim: int, activation: str, parameters: list[float]
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(
    "glu_backward(Tensor dy, Tensor x, int dim, str activation, float[] parameters) -> Tensor",
    fake=_glu_backward_fake,
)
def glu_backward(
    dy: torch.Tensor, x: torch.Tensor, dim: int, activation: str, parameters: list[float]
) -> torch.Tensor:
    """The gradient of x = (a, b): da = dy f(b), db = dy a f'(b)."""
    dx = _glu_backward_fake(dy, x, dim, activation, parameters)
    launch = GluLaunch()
    half = dy.shape[dim:].numel()
    if dx.numel():
        n_programs, n_blocks = _grid(half, dy.numel() // half, launch)
        run(
            "glu_backward",
            glu_backward_kernel,
            (n_programs,),
            dy.contiguous(),
            x.contiguous(),
            dx,
            half,
            n_blocks,
            launch=launch,
            SAVES_OUTPUT=ACTIVATIONS[activation].saves == "output",
            **gradient_functions(activation, parameters),
        )
    return dx
