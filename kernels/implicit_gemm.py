"""Convolutions as matrix products whose operands are looked up where they are: no im2col buffer.

One kernel serves the forward pass and the gradient of the input. Output (p, q) of a grid looks up,
for its tap (i, j), the input at p · stride + origin + i · spacing, likewise in the other dimension,
and the weight at first + i · step. A forward convolution is one such grid; the gradient of the
input of a strided one is a grid for each phase of the stride, whose spacing is negative. Groups are
further tiles. Tensors have any strides; 16 bytes are loaded together where channels are contiguous
and their numbers are multiples of UNIT elements, which are so many bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.matmul import tile_position
from gpunn.kernels.numeric import multiple, widen


@triton.jit
def grid_position(place, n_rows, n_cols):
    """Image, row and column of place number ``place`` of a grid of n_rows by n_cols an image."""
    line = place // n_cols
    return line // n_rows, line % n_rows, place % n_cols


@triton.jit
def tap_position(step, n_channels, taps_w, PACKED: tl.constexpr, BLOCK_INNER: tl.constexpr):
    """Row and column of the taps, and the channels, of step number ``step``: (i, j, first, lane).

    Of one tap, BLOCK_INNER channels, first + lane; or, PACKED, BLOCK_INNER of all taps' channels,
    one after the other, so that three channels do not fill the place of sixteen.
    """
    lane = tl.arange(0, BLOCK_INNER)
    if PACKED:
        inner = step * BLOCK_INNER + lane
        tap, first, lane = inner // n_channels, 0, inner % n_channels
    else:
        steps_a_tap = tl.cdiv(n_channels, BLOCK_INNER)
        tap = step // steps_a_tap
        first = step % steps_a_tap * BLOCK_INNER
    return tap // taps_w, tap % taps_w, first, lane


@triton.jit
def along(values, DIMENSION: tl.constexpr, PACKED: tl.constexpr):
    """Taps as a row or a column of a tile where they are many; a number as it is."""
    if PACKED:
        values = tl.expand_dims(values, 1 - DIMENSION)
    return values


@triton.jit
def finish_outputs(
    total, bias_ptr, residual_ptr, y_ptr, saved_ptr, at_row, row_mask, col, col_mask, stride_y_c,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, SAVES_OUTPUT: tl.constexpr,
):  # fmt: skip
    """y = f(total + bias) + residual for outputs ``col`` of the places at offsets ``at_row``."""
    mask = row_mask[:, None] & col_mask[None, :]
    at = at_row[:, None] + (col.to(tl.int64) * stride_y_c)[None, :]
    if bias_ptr is not None:
        total += widen(tl.load(bias_ptr + col, mask=col_mask, other=0.0))[None, :]
    y = ACTIVATION(total, P0, P1)
    if saved_ptr is not None:
        saved = y if SAVES_OUTPUT else total
        tl.store(saved_ptr + at, saved.to(saved_ptr.dtype.element_ty), mask=mask)
    if residual_ptr is not None:
        y += widen(tl.load(residual_ptr + at, mask=mask, other=0.0))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


# Numbers whose being 1, or divisible by 16, would not make the code faster.
POSITIONS = [
    f"{name}_{dimension}"
    for name in ("origin", "spacing", "first_tap", "tap_step", "first_out", "out_step")
    for dimension in "hw"
]


@triton.jit(do_not_specialize=["n_images", *POSITIONS])
def convolution_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, saved_ptr,
    n_images, grid_h, grid_w, height, width, n_groups, n_channels, n_outputs, taps_h, taps_w,
    stride_h, stride_w, origin_h, origin_w, spacing_h, spacing_w,
    first_tap_h, first_tap_w, tap_step_h, tap_step_w,
    first_out_h, first_out_w, out_step_h, out_step_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    stride_weight_g, stride_weight_k, stride_weight_c, stride_weight_h, stride_weight_w,
    stride_y_n, stride_y_c, stride_y_h, stride_y_w,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, ACTIVATION: tl.constexpr, P0: tl.constexpr,
    P1: tl.constexpr, SAVES_OUTPUT: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """y = f(Σ over taps and channels of x weight + bias) + residual, on a grid of outputs.

    A tile is BLOCK_ROWS places of the grid, in all images, by BLOCK_COLS outputs of a group; of n
    programs, each owns every n-th tile. n_channels and n_outputs are those of one group; they and
    the strides between channels' neighbours are multiples of UNIT.
    """
    n_channels, n_outputs = multiple(n_channels, UNIT), multiple(n_outputs, UNIT)
    stride_x_n, stride_x_h = multiple(stride_x_n, UNIT), multiple(stride_x_h, UNIT)
    stride_x_w, stride_weight_g = multiple(stride_x_w, UNIT), multiple(stride_weight_g, UNIT)
    stride_weight_k, stride_y_n = multiple(stride_weight_k, UNIT), multiple(stride_y_n, UNIT)
    stride_weight_h, stride_y_h = multiple(stride_weight_h, UNIT), multiple(stride_y_h, UNIT)
    stride_weight_w, stride_y_w = multiple(stride_weight_w, UNIT), multiple(stride_y_w, UNIT)
    n_places = n_images * grid_h * grid_w
    tiles_down, tiles_across = tl.cdiv(n_places, BLOCK_ROWS), tl.cdiv(n_outputs, BLOCK_COLS)
    n_tiles, n_taps = tiles_down * tiles_across, taps_h * taps_w
    steps = n_taps * tl.cdiv(n_channels, BLOCK_INNER)
    if PACKED:
        steps = tl.cdiv(n_taps * n_channels, BLOCK_INNER)
    out_type: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    for work in tl.range(tl.program_id(0), n_tiles * n_groups, tl.num_programs(0)):
        group = work // n_tiles
        down, across = tile_position(work % n_tiles, tiles_down, tiles_across, GROUP_ROWS)
        place = down * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        image, p, q = grid_position(place, grid_h, grid_w)
        h, w = p * stride_h + origin_h, q * stride_w + origin_w
        k = across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        x_row = image.to(tl.int64) * stride_x_n + h.to(tl.int64) * stride_x_h
        x_row += w.to(tl.int64) * stride_x_w + group.to(tl.int64) * n_channels * stride_x_c
        weight_col = group.to(tl.int64) * stride_weight_g + k.to(tl.int64) * stride_weight_k
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=out_type)
        for step in tl.range(steps):
            i, j, first, lane = tap_position(step, n_channels, taps_w, PACKED, BLOCK_INNER)
            known = (first + lane < n_channels) & (i < taps_h)
            ih = h[:, None] + along(i * spacing_h, 1, PACKED)
            iw = w[:, None] + along(j * spacing_w, 1, PACKED)
            inside = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
            mask = (place < n_places)[:, None] & inside & known[None, :]
            # What a whole tile has in common is added to the pointer, and takes no registers.
            tap = tl.cast(i * spacing_h, tl.int64) * stride_x_h
            tap += tl.cast(j * spacing_w, tl.int64) * stride_x_w + first * stride_x_c
            at_x = x_row[:, None] + (lane.to(tl.int64) * stride_x_c)[None, :]
            x = tl.load(x_ptr + along(tap, 1, PACKED) + at_x, mask=mask, other=0.0)
            tap = tl.cast(first_tap_h + i * tap_step_h, tl.int64) * stride_weight_h
            tap += tl.cast(first_tap_w + j * tap_step_w, tl.int64) * stride_weight_w
            tap += first * stride_weight_c
            at_w = (lane.to(tl.int64) * stride_weight_c)[:, None] + weight_col[None, :]
            mask = known[:, None] & (k < n_outputs)[None, :]
            weight = tl.load(weight_ptr + along(tap, 0, PACKED) + at_w, mask=mask, other=0.0)
            total = tl.dot(x, weight, total, input_precision=PRECISION, out_dtype=out_type)
        oh = first_out_h + p.to(tl.int64) * out_step_h
        ow = first_out_w + q.to(tl.int64) * out_step_w
        at_row = image.to(tl.int64) * stride_y_n + oh * stride_y_h + ow * stride_y_w
        # In two halves, so that a whole tile of results need not stand in registers beside it.
        half: tl.constexpr = BLOCK_COLS // 2
        halves = tl.permute(tl.reshape(total, (BLOCK_ROWS, 2, half)), (0, 2, 1))
        left, right = tl.split(halves)
        k = across * BLOCK_COLS + tl.arange(0, half)
        finish_outputs(
            left, bias_ptr, residual_ptr, y_ptr, saved_ptr, at_row, place < n_places,
            group * n_outputs + k, k < n_outputs, stride_y_c, ACTIVATION, P0, P1, SAVES_OUTPUT,
        )  # fmt: skip
        k += half
        finish_outputs(
            right, bias_ptr, residual_ptr, y_ptr, saved_ptr, at_row, place < n_places,
            group * n_outputs + k, k < n_outputs, stride_y_c, ACTIVATION, P0, P1, SAVES_OUTPUT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_images", *POSITIONS[:4]])
def convolution_weight_kernel(
    dz_ptr, x_ptr, partial_ptr,
    n_images, grid_h, grid_w, height, width, n_groups, n_channels, n_outputs, taps_h, taps_w,
    stride_h, stride_w, origin_h, origin_w, spacing_h, spacing_w,
    stride_dz_n, stride_dz_c, stride_dz_h, stride_dz_w,
    stride_x_n, stride_x_c, stride_x_h, stride_x_w,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr, N_PARTS: tl.constexpr,
):  # fmt: skip
    """The gradient of the weight, in N_PARTS partial sums (n_groups n_outputs, taps, n_channels).

    A program owns BLOCK_ROWS outputs by BLOCK_COLS channels of a tap (PACKED: of all taps), for
    one part of the places (image, p, q), which it goes through in order. UNIT: as above.
    """
    n_channels, n_outputs = multiple(n_channels, UNIT), multiple(n_outputs, UNIT)
    stride_dz_n, stride_x_n = multiple(stride_dz_n, UNIT), multiple(stride_x_n, UNIT)
    stride_dz_h, stride_x_h = multiple(stride_dz_h, UNIT), multiple(stride_x_h, UNIT)
    stride_dz_w, stride_x_w = multiple(stride_dz_w, UNIT), multiple(stride_x_w, UNIT)
    n_places = n_images * grid_h * grid_w
    n_cols = taps_h * taps_w * n_channels
    tiles_down = tl.cdiv(n_outputs, BLOCK_ROWS)
    tiles_across = taps_h * taps_w * tl.cdiv(n_channels, BLOCK_COLS)
    if PACKED:
        tiles_across = tl.cdiv(n_cols, BLOCK_COLS)
    n_tiles = tiles_down * tiles_across
    out_type: tl.constexpr = tl.float64 if dz_ptr.dtype.element_ty == tl.float64 else tl.float32
    # A loop, though a program seldom has more than one: without it, products wait for each other.
    for work in tl.range(tl.program_id(0), n_tiles * n_groups * N_PARTS, tl.num_programs(0)):
        part = work // (n_tiles * n_groups)
        group = work // n_tiles % n_groups
        down = work % n_tiles // tiles_across
        i, j, first, lane = tap_position(
            work % tiles_across, n_channels, taps_w, PACKED, BLOCK_COLS
        )
        c = first + lane
        k = down * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        known = (c < n_channels) & (i < taps_h)
        dz_row = (group * n_outputs + k).to(tl.int64) * stride_dz_c
        x_col = (group * n_channels + c).to(tl.int64) * stride_x_c
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=out_type)
        steps = tl.cdiv(n_places, BLOCK_INNER)
        steps_a_part = tl.cdiv(steps, N_PARTS)
        for step in tl.range(part * steps_a_part, tl.minimum((part + 1) * steps_a_part, steps)):
            place = step * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
            image, p, q = grid_position(place, grid_h, grid_w)
            at_dz = image.to(tl.int64) * stride_dz_n + p.to(tl.int64) * stride_dz_h
            at_dz += q.to(tl.int64) * stride_dz_w
            mask = (k < n_outputs)[:, None] & (place < n_places)[None, :]
            dz = tl.load(dz_ptr + dz_row[:, None] + at_dz[None, :], mask=mask, other=0.0)
            ih = (p * stride_h + origin_h)[:, None] + along(i * spacing_h, 1, PACKED)
            iw = (q * stride_w + origin_w)[:, None] + along(j * spacing_w, 1, PACKED)
            inside = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
            at_x = ih.to(tl.int64) * stride_x_h + iw.to(tl.int64) * stride_x_w + x_col[None, :]
            at_x += (image.to(tl.int64) * stride_x_n)[:, None]
            mask = (place < n_places)[:, None] & inside & known[None, :]
            x = tl.load(x_ptr + at_x, mask=mask, other=0.0)
            total = tl.dot(dz, x, total, input_precision=PRECISION, out_dtype=out_type)
        row = (part.to(tl.int64) * n_groups + group) * n_outputs + k
        col = (i * taps_w + j) * n_channels + c
        tl.store(
            partial_ptr + row[:, None] * n_cols + col[None, :],
            total.to(partial_ptr.dtype.element_ty),
            mask=(k < n_outputs)[:, None] & known[None, :],
        )
