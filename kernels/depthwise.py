"""Convolutions of many groups with few channels each, depthwise ones above all.

A matrix product would fill its tiles with zeros: these go through a group's channels one by one,
for a tile of outputs of neighbouring groups. The arguments are those of ``implicit_gemm.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.implicit_gemm import POSITIONS, finish_outputs, grid_position
from gpunn.kernels.numeric import widen


@triton.jit(do_not_specialize=["n_images", *POSITIONS])
def grouped_convolution_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, saved_ptr,
    n_images, grid_h, grid_w, height, width, n_groups, n_channels, n_outputs, taps_h, taps_w,
    stride_h, stride_w, origin_h, origin_w, spacing_h, spacing_w,
    first_tap_h, first_tap_w, tap_step_h, tap_step_w,
    first_out_h, first_out_w, out_step_h, out_step_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_weight_g, stride_weight_k, stride_weight_c, stride_weight_h, stride_weight_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, SAVES_OUTPUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y = f(Σ over taps and channels of x weight + bias) + residual, on a grid of outputs.

    A program owns BLOCK_ROWS places of the grid by BLOCK_COLS outputs, counted over all groups.
    """
    n_places, n_cols = n_images * grid_h * grid_w, n_groups * n_outputs
    tiles_across = tl.cdiv(n_cols, BLOCK_COLS)
    place = tl.program_id(0) // tiles_across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(0) % tiles_across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    image, p, q = grid_position(place, grid_h, grid_w)
    h, w = p * stride_h + origin_h, q * stride_w + origin_w
    group, k = (col // n_outputs).to(tl.int64), (col % n_outputs).to(tl.int64)
    x_row = image.to(tl.int64) * stride_x_n + h.to(tl.int64) * stride_x_h
    x_row += w.to(tl.int64) * stride_x_w
    x_col = group * n_channels * stride_x_c
    weight_col = group * stride_weight_g + k * stride_weight_k
    out_type: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=out_type)
    for step in tl.range(taps_h * taps_w * n_channels):
        tap, c = step // n_channels, step % n_channels
        down, right = tap // taps_w * spacing_h, tap % taps_w * spacing_w
        ih, iw = h + down, w + right
        inside = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width) & (place < n_places)
        shift = tl.cast(down, tl.int64) * stride_x_h + tl.cast(right, tl.int64) * stride_x_w
        at_x = x_row[:, None] + x_col[None, :]
        mask = inside[:, None] & (col < n_cols)[None, :]
        x = tl.load(x_ptr + (shift + c * stride_x_c) + at_x, mask=mask, other=0.0)
        r = first_tap_h + tap // taps_w * tap_step_h
        s = first_tap_w + tap % taps_w * tap_step_w
        shift = tl.cast(r, tl.int64) * stride_weight_h + tl.cast(s, tl.int64) * stride_weight_w
        shift += c * stride_weight_c
        weight = tl.load(weight_ptr + shift + weight_col, mask=col < n_cols, other=0.0)
        total += widen(x) * widen(weight)[None, :]
    oh = first_out_h + p.to(tl.int64) * out_step_h
    ow = first_out_w + q.to(tl.int64) * out_step_w
    at_row = image.to(tl.int64) * stride_y_n + oh * stride_y_h + ow * stride_y_w
    finish_outputs(
        total, bias_ptr, residual_ptr, y_ptr, saved_ptr, at_row, place < n_places, col,
        col < n_cols, stride_y_c, ACTIVATION, P0, P1, SAVES_OUTPUT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_images", *POSITIONS[:4]])
def grouped_weight_kernel(
    dz_ptr, x_ptr, partial_ptr,
    n_images, grid_h, grid_w, height, width, n_groups, n_channels, n_outputs, taps_h, taps_w,
    stride_h, stride_w, origin_h, origin_w, spacing_h, spacing_w,
    stride_dz_n, stride_dz_c, stride_dz_h, stride_dz_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    N_PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The gradient of the weight, in N_PARTS partial sums (n_groups n_outputs, taps, n_channels).

    A program owns BLOCK_COLS outputs, counted over all groups, of one tap and channel, for one
    part of the places, which it goes through BLOCK_ROWS at a time.
    """
    n_places, n_cols = n_images * grid_h * grid_w, n_groups * n_outputs
    n_steps = taps_h * taps_w * n_channels
    tiles_across = tl.cdiv(n_cols, BLOCK_COLS)
    col = tl.program_id(0) % tiles_across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    step = tl.program_id(0) // tiles_across % n_steps
    part = tl.program_id(0) // (tiles_across * n_steps)
    tap, c = step // n_channels, step % n_channels
    down, right = tap // taps_w * spacing_h + origin_h, tap % taps_w * spacing_w + origin_w
    dz_col = col.to(tl.int64) * stride_dz_c
    x_col = ((col // n_outputs).to(tl.int64) * n_channels + c) * stride_x_c
    sum_type: tl.constexpr = tl.float64 if dz_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=sum_type)
    steps_a_part = tl.cdiv(tl.cdiv(n_places, BLOCK_ROWS), N_PARTS)
    first = part * steps_a_part * BLOCK_ROWS
    last = tl.minimum(first + steps_a_part * BLOCK_ROWS, n_places)
    for start in tl.range(first, last, BLOCK_ROWS):
        place = start + tl.arange(0, BLOCK_ROWS)
        image, p, q = grid_position(place, grid_h, grid_w)
        ih, iw = p * stride_h + down, q * stride_w + right
        inside = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width) & (place < n_places)
        mask = inside[:, None] & (col < n_cols)[None, :]
        at_dz = image.to(tl.int64) * stride_dz_n + p.to(tl.int64) * stride_dz_h
        at_dz += q.to(tl.int64) * stride_dz_w
        at_x = image.to(tl.int64) * stride_x_n + ih.to(tl.int64) * stride_x_h
        at_x += iw.to(tl.int64) * stride_x_w
        dz = tl.load(dz_ptr + at_dz[:, None] + dz_col[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + at_x[:, None] + x_col[None, :], mask=mask, other=0.0)
        total += widen(dz) * widen(x)
    at = (part.to(tl.int64) * n_cols + col) * n_steps + step
    tl.store(partial_ptr + at, tl.sum(total, 0), mask=col < n_cols)
