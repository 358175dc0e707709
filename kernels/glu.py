"""Gated linear units: y = a f(b), where a and b are the two halves of the input.

Source: Shazeer, "GLU variants improve Transformer" (2020); torch's ``glu`` (f = sigmoid), whose
order of the halves all the variants follow: the gate f is applied to the second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpunn.kernels.activation import ACTIVATIONS, device_functions, gradient_functions
from gpunn.kernels.elementwise import in_memory_order_of
from gpunn.kernels.launch import Launch, cdiv, operator, run
from gpunn.kernels.numeric import widen


@dataclass(frozen=True)
class GluLaunch(Launch):
    """A program owns a tile of y: 1024 elements, in as few rows as a half row's length allows."""

    block_rows: int = 1
    block_cols: int = 1024


# 16 bytes a thread of 4 warps in 16-bit types. Not measured.
LAUNCHES = tuple(GluLaunch(block_rows=1024 // n, block_cols=n) for n in (16, 64, 256, 1024))


def choose_launch(half: int) -> GluLaunch:
    """The narrowest tile that holds a half row; else the widest."""
    return next((launch for launch in LAUNCHES if half <= launch.block_cols), LAUNCHES[-1])


@triton.jit
def tile_of(half, n_rows, n_across, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """This program's offsets into y and into the first half of x, and what is inside of y."""
    program = tl.program_id(0).to(tl.int64)
    rows = program // n_across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = program % n_across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    start = rows[:, None] * half
    mask = (rows < n_rows)[:, None] & (cols < half)[None, :]
    return start + cols[None, :], 2 * start + cols[None, :], mask


@triton.jit
def glu_forward_kernel(
    x_ptr, y_ptr, half, n_rows, n_across,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y = a f(b) for x of shape (n_rows, 2, half) = (a, b). A program owns a tile of y."""
    at, first, mask = tile_of(half, n_rows, n_across, BLOCK_ROWS, BLOCK_COLS)
    a = widen(tl.load(x_ptr + first, mask=mask, other=0.0))
    b = widen(tl.load(x_ptr + half + first, mask=mask, other=0.0))
    y = a * ACTIVATION(b, P0, P1)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, half, n_rows, n_across,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    SAVES_OUTPUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """da = dy f(b), db = dy a f'(b), for x = (a, b) as in the forward kernel."""
    at, first, mask = tile_of(half, n_rows, n_across, BLOCK_ROWS, BLOCK_COLS)
    a = widen(tl.load(x_ptr + first, mask=mask, other=0.0))
    b = widen(tl.load(x_ptr + half + first, mask=mask, other=0.0))
    dy = widen(tl.load(dy_ptr + at, mask=mask, other=0.0))
    gate = ACTIVATION(b, P0, P1)
    db = GRADIENT(dy * a, gate if SAVES_OUTPUT else b, P0, P1)
    tl.store(dx_ptr + first, (dy * gate).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + half + first, db.to(dx_ptr.dtype.element_ty), mask=mask)


def _order(x: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of x as they follow each other in memory: channels last, or as they are."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return (0, 2, 3, 1)
    return tuple(range(x.dim()))


def _ordered(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, int]:
    """x, contiguous, with its dimensions in ``_order``, and where ``dim`` has gone."""
    order = _order(x)
    return x.permute(order).contiguous(), order.index(dim)


def _empty(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """An empty tensor with this shape and with x's order in memory."""
    order = _order(x)
    empty = x.new_empty([shape[i] for i in order])
    return empty.permute([order.index(i) for i in range(x.dim())])


def _half_of(x: torch.Tensor, dim: int) -> torch.Tensor:
    """An empty tensor with half of x's size in ``dim``, and x's order in memory."""
    return _empty(x, [size // 2 if i == dim else size for i, size in enumerate(x.shape)])


def _glu_forward_fake(
    x: torch.Tensor, dim: int, activation: str, parameters: list[float]
) -> torch.Tensor:
    return _half_of(x, dim)


@operator(
    "glu_forward(Tensor x, int dim, str activation, float[] parameters) -> Tensor",
    fake=_glu_forward_fake,
)
def glu_forward(
    x: torch.Tensor, dim: int, activation: str, parameters: list[float]
) -> torch.Tensor:
    """y = a f(b), a and b the halves of x along ``dim`` (not negative).

    y is channels_last where x is, else contiguous.
    """
    y = _glu_forward_fake(x, dim, activation, parameters)
    if y.numel():
        x, dim = _ordered(x, dim)
        half = x.shape[dim:].numel() // 2
        launch, n_rows = choose_launch(half), y.numel() // half
        n_across = cdiv(half, launch.block_cols)
        run(
            "glu_forward",
            glu_forward_kernel,
            (cdiv(n_rows, launch.block_rows) * n_across,),
            x,
            y,
            half,
            n_rows,
            n_across,
            launch=launch,
            **device_functions(activation, parameters),
        )
    return y


def _glu_backward_fake(
    dy: torch.Tensor, x: torch.Tensor, dim: int, activation: str, parameters: list[float]
) -> torch.Tensor:
    return _empty(x, x.shape)


@operator(
    "glu_backward(Tensor dy, Tensor x, int dim, str activation, float[] parameters) -> Tensor",
    fake=_glu_backward_fake,
)
def glu_backward(
    dy: torch.Tensor, x: torch.Tensor, dim: int, activation: str, parameters: list[float]
) -> torch.Tensor:
    """The gradient of x = (a, b): da = dy f(b), db = dy a f'(b); channels_last where x is."""
    dx = _glu_backward_fake(dy, x, dim, activation, parameters)
    if dx.numel():
        dy = in_memory_order_of(dy, _half_of(x, dim))
        x, dim = _ordered(x, dim)
        half = x.shape[dim:].numel() // 2
        launch, n_rows = choose_launch(half), dy.numel() // half
        n_across = cdiv(half, launch.block_cols)
        run(
            "glu_backward",
            glu_backward_kernel,
            (cdiv(n_rows, launch.block_rows) * n_across,),
            dy,
            x,
            dx,
            half,
            n_rows,
            n_across,
            launch=launch,
            SAVES_OUTPUT=ACTIVATIONS[activation].saves == "output",
            **gradient_functions(activation, parameters),
        )
    return dx
