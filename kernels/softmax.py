"""softmax and its logarithm along any dimension, of any length, with a scale and a mask.

x is seen as (outer, columns, inner). Rows of up to ``LONGEST`` columns stand in registers; longer
ones are read twice, the first time for a running maximum and sum (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018, https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpunn.kernels.elementwise import in_memory_order_of
from gpunn.kernels.launch import Launch, cdiv, operator, run
from gpunn.kernels.numeric import exp_or_0, widen


@dataclass(frozen=True)
class SoftmaxLaunch(Launch):
    """Rows by columns of a tile."""

    block_rows: int = 1
    block_cols: int = 1024


LONGEST = 16384
# 16 elements a thread, and 32 or more in long rows, of which the values stay in registers. For a
# dimension that is not the last, threads lie along the rows, whose elements are neighbours. None
# was measured.
LAST = tuple(
    SoftmaxLaunch(n_warps, block_rows=max(1, 2048 // n_cols), block_cols=n_cols)
    for n_cols, n_warps in (
        (16, 4), (32, 4), (64, 4), (128, 4), (256, 4), (512, 4), (1024, 4), (2048, 4), (4096, 8),
        (8192, 16), (LONGEST, 32),
    )
)  # fmt: skip
INNER = tuple(
    SoftmaxLaunch(8, block_rows=n_rows, block_cols=n_cols)
    for n_rows, n_cols in ((512, 4), (128, 16), (64, 64), (64, 128))
)
# Longer rows are swept twice by one program, backwards the second time. At most two programs of a
# thousand threads fit on a multiprocessor: of 65,536 columns in 16 bits, 264 rows take 33 MiB of
# the 50 MiB of an H200's L2, where the second sweep finds them.
LONG = SoftmaxLaunch(32, block_rows=1, block_cols=8192)


def stages_for(x: torch.Tensor) -> int:
    """Tiles of a row that is walked along, with the one computed with: some 32 KiB read ahead."""
    return 3 if x.element_size() == 2 else 2


@triton.jit
def tile_rows(program, n_rows, n_cols, n_inner, LAST_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Where a program's rows begin, the stride of columns, and which rows there are.

    Rows of the last dimension follow each other; others lie side by side, n_inner of them.
    """
    if LAST_DIM:
        row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        return row * n_cols, row < n_rows
    across = tl.cdiv(n_inner, BLOCK_ROWS)
    inner = program % across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return program // across * n_cols * n_inner + inner, inner < n_inner


@triton.jit
def row_numbers(program, n_inner, LAST_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The numbers of a program's rows, in the order of a target (outer, inner)."""
    if LAST_DIM:
        return program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    across = tl.cdiv(n_inner, BLOCK_ROWS)
    first = program // across * n_inner + program % across * BLOCK_ROWS
    return first + tl.arange(0, BLOCK_ROWS)


@triton.jit
def scores_of(x_ptr, mask_ptr, at, inside, scale):
    """scale x + mask of a tile, -∞ outside of it."""
    s = widen(tl.load(x_ptr + at, mask=inside, other=0.0)) * scale
    if mask_ptr is not None:
        bias = tl.load(mask_ptr + at, mask=inside, other=0)
        if mask_ptr.dtype.element_ty == tl.uint8:
            s = tl.where(bias != 0, s, -float("inf"))
        else:
            s += widen(bias)
    return tl.where(inside, s, -float("inf"))


@triton.jit
def in_parts(tile, PARTS: tl.constexpr):
    """The rows of a tile by parts of neighbours.

    What runs along a part is one thread's where it has eight: threads need not wait for each other.
    """
    return tl.reshape(tile, (tile.shape[0], PARTS, tile.shape[1] // PARTS))


@triton.jit
def sums_of_parts(tile, PARTS: tl.constexpr):
    """The sum of each part of a tile's rows."""
    if PARTS == 1:
        return tl.sum(tile, 1)[:, None]
    return tl.sum(in_parts(tile, PARTS), 2)


@triton.jit
def run_along(s, peak, total, PARTS: tl.constexpr):
    """The maximum and Σ exp(s - maximum) of the parts of rows, after one more tile of them."""
    if PARTS == 1:
        highest = tl.maximum(peak, tl.max(s, 1)[:, None])
    else:
        highest = tl.maximum(peak, tl.max(in_parts(s, PARTS), 2))
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    if PARTS == 1:
        sums = tl.sum(exp_or_0(s - shift), 1)[:, None]
    else:
        sums = tl.sum(exp_or_0(in_parts(s, PARTS) - shift[:, :, None]), 2)
    return highest, total * exp_or_0(peak - shift) + sums


@triton.jit
def whole_rows(peak, total):
    """The maximum and Σ exp(s - maximum) of rows, of those of their parts."""
    highest = tl.max(peak, 1)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    return highest, tl.sum(total * exp_or_0(peak - shift[:, None]), 1)


@triton.jit
def softmax_forward_kernel(
    x_ptr, mask_ptr, y_ptr, n_rows, n_cols, n_inner, scale,
    LOGARITHM: tl.constexpr, LAST_DIM: tl.constexpr, ONE_PASS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = softmax(scale x + mask) of rows, or its logarithm. A program owns BLOCK_ROWS rows."""
    program = tl.program_id(0).to(tl.int64)
    first, is_row = tile_rows(program, n_rows, n_cols, n_inner, LAST_DIM, BLOCK_ROWS)
    cols, stride = tl.arange(0, BLOCK_COLS), 1 if LAST_DIM else n_inner
    out_type: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    if ONE_PASS:
        at = first[:, None] + cols.to(tl.int64)[None, :] * stride
        inside = is_row[:, None] & (cols < n_cols)[None, :]
        s = scores_of(x_ptr, mask_ptr, at, inside, scale)
        shifted = s - tl.max(s, 1)[:, None]
        e = tl.exp(shifted)
        total = tl.sum(e, 1)[:, None]
        y = shifted - tl.log(total) if LOGARITHM else e / total
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        parts: tl.constexpr = (BLOCK_COLS + 7) // 8 if LAST_DIM else 1
        peak = tl.full((BLOCK_ROWS, parts), -float("inf"), dtype=out_type)
        total = tl.zeros((BLOCK_ROWS, parts), dtype=out_type)
        for col in tl.range(0, n_cols, BLOCK_COLS, num_stages=STAGES):
            at = first[:, None] + (col + cols).to(tl.int64)[None, :] * stride
            inside = is_row[:, None] & (col + cols < n_cols)[None, :]
            s = scores_of(x_ptr, mask_ptr, at, inside, scale)
            peak, total = run_along(s, peak, total, parts)
        peak, total = whole_rows(peak, total)
        logarithm, factor = tl.log(total)[:, None], (1 / total)[:, None]
        last = (n_cols - 1) // BLOCK_COLS * BLOCK_COLS
        for back in tl.range(0, n_cols, BLOCK_COLS, num_stages=STAGES):  # the end is in the caches
            col = last - back
            at = first[:, None] + (col + cols).to(tl.int64)[None, :] * stride
            inside = is_row[:, None] & (col + cols < n_cols)[None, :]
            shifted = scores_of(x_ptr, mask_ptr, at, inside, scale) - peak[:, None]
            y = shifted - logarithm if LOGARITHM else exp_or_0(shifted) * factor
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_terms(dy_ptr, y_ptr, at, inside, LOGARITHM: tl.constexpr):
    """dy and y of a tile, and what is summed over a row: dy, or dy y."""
    dy = widen(tl.load(dy_ptr + at, mask=inside, other=0.0))
    y = widen(tl.load(y_ptr + at, mask=inside, other=0.0))
    return dy, y, dy if LOGARITHM else dy * y


@triton.jit
def softmax_backward_kernel(
    dy_ptr, y_ptr, dx_ptr, n_rows, n_cols, n_inner, scale,
    LOGARITHM: tl.constexpr, LAST_DIM: tl.constexpr, ONE_PASS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = scale y (dy - Σ dy y), or, of the logarithm, scale (dy - exp(y) Σ dy), over rows."""
    program = tl.program_id(0).to(tl.int64)
    first, is_row = tile_rows(program, n_rows, n_cols, n_inner, LAST_DIM, BLOCK_ROWS)
    cols, stride = tl.arange(0, BLOCK_COLS), 1 if LAST_DIM else n_inner
    out_type: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    if ONE_PASS:
        at = first[:, None] + cols.to(tl.int64)[None, :] * stride
        inside = is_row[:, None] & (cols < n_cols)[None, :]
        dy, y, terms = gradient_terms(dy_ptr, y_ptr, at, inside, LOGARITHM)
        total = tl.sum(terms, 1)[:, None]
        dx = dy - tl.exp(y) * total if LOGARITHM else y * (dy - total)
        tl.store(dx_ptr + at, (dx * scale).to(dx_ptr.dtype.element_ty), mask=inside)
    else:
        sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=out_type)
        for col in tl.range(0, n_cols, BLOCK_COLS, num_stages=STAGES):
            at = first[:, None] + (col + cols).to(tl.int64)[None, :] * stride
            inside = is_row[:, None] & (col + cols < n_cols)[None, :]
            _dy, _y, terms = gradient_terms(dy_ptr, y_ptr, at, inside, LOGARITHM)
            sums += terms
        total = tl.sum(sums, 1)[:, None]
        last = (n_cols - 1) // BLOCK_COLS * BLOCK_COLS
        for back in tl.range(0, n_cols, BLOCK_COLS, num_stages=STAGES):
            col = last - back
            at = first[:, None] + (col + cols).to(tl.int64)[None, :] * stride
            inside = is_row[:, None] & (col + cols < n_cols)[None, :]
            dy, y, _terms = gradient_terms(dy_ptr, y_ptr, at, inside, LOGARITHM)
            dx = dy - exp_or_0(y) * total if LOGARITHM else y * (dy - total)
            tl.store(dx_ptr + at, (dx * scale).to(dx_ptr.dtype.element_ty), mask=inside)


def launch_for(n_cols: int, n_inner: int) -> SoftmaxLaunch:
    """The narrowest tile that holds a row; the one for long rows where none does."""
    tiles, widest = (LAST, LONG) if n_inner == 1 else (INNER, INNER[-1])
    return next((tile for tile in tiles if n_cols <= tile.block_cols), widest)


def _run(
    name: str, kernel: object, tensors: tuple[torch.Tensor | None, ...], y: torch.Tensor, dim: int,
    scale: float, logarithm: bool,
) -> None:  # fmt: skip
    """Launch one of the kernels on contiguous tensors of y's shape."""
    n_cols, n_inner = y.shape[dim], y.shape[dim + 1 :].numel()
    n_rows = y.numel() // n_cols
    launch = launch_for(n_cols, n_inner)
    last = n_inner == 1
    n_programs = cdiv(n_rows if last else n_inner, launch.block_rows)
    run(
        name, kernel, (n_programs if last else n_programs * (n_rows // n_inner),), *tensors,
        n_rows, n_cols, n_inner, scale, launch=launch, LOGARITHM=logarithm, LAST_DIM=last,
        ONE_PASS=n_cols <= launch.block_cols, STAGES=stages_for(y),
    )  # fmt: skip


def _forward_fake(
    x: torch.Tensor, mask: torch.Tensor | None, dim: int, scale: float, logarithm: bool,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@operator(
    "softmax_forward(Tensor x, Tensor? mask, int dim, float scale, bool logarithm, "
    "ScalarType dtype) -> Tensor",
    fake=_forward_fake,
)
def softmax_forward(
    x: torch.Tensor, mask: torch.Tensor | None, dim: int, scale: float, logarithm: bool,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """y = softmax(scale x + mask) along ``dim``, or its logarithm, in ``dtype``; contiguous.

    The mask, of x's shape, is uint8, 0 where an element is ruled out, or added.
    """
    y = _forward_fake(x, mask, dim, scale, logarithm, dtype)
    if y.numel():
        masked = None if mask is None else mask.contiguous()
        _run(
            "softmax_forward", softmax_forward_kernel, (x.contiguous(), masked, y), y, dim, scale,
            logarithm,
        )  # fmt: skip
    return y


def _backward_fake(
    dy: torch.Tensor, y: torch.Tensor, dim: int, scale: float, logarithm: bool, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_like(y, dtype=dtype)


@operator(
    "softmax_backward(Tensor dy, Tensor y, int dim, float scale, bool logarithm, "
    "ScalarType dtype) -> Tensor",
    fake=_backward_fake,
)
def softmax_backward(
    dy: torch.Tensor, y: torch.Tensor, dim: int, scale: float, logarithm: bool, dtype: torch.dtype
) -> torch.Tensor:
    """dx = scale y (dy - Σ dy y), or, of the logarithm, scale (dy - exp(y) Σ dy), in ``dtype``."""
    dx = _backward_fake(dy, y, dim, scale, logarithm, dtype)
    if dx.numel():
        _run(
            "softmax_backward", softmax_backward_kernel, (in_memory_order_of(dy, y), y, dx), y, dim,
            scale, logarithm,
        )  # fmt: skip
    return dx
