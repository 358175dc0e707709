"""The matrix product behind linear: y = dropout(f(a bᵀ + bias)) + residual, in one kernel.

``a`` is (n_rows, n_inner) and ``b`` is (n_cols, n_inner), as the input and weight of torch's
linear are; with other strides the same kernel gives a product of any transposition. A program is
persistent: it walks over output tiles, in groups of rows so that tiles computed at one time share
their operands in the L2 cache. Where there are too few tiles to fill the chip the inner dimension
is split, each part writes a float32 partial, and ``epilogue_kernel`` adds them in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.numeric import widen
from gpunn.kernels.philox import dropout_factor


@triton.jit
def tile_position(tile, tiles_down, tiles_across, GROUP_ROWS: tl.constexpr):
    """Row and column of a tile: down GROUP_ROWS tiles, then one to the right, then the next group.

    With 4 x 3 tiles and groups of two rows::

        0  2  4
        1  3  5
        6  8 10
        7  9 11
    """
    per_group = GROUP_ROWS * tiles_across
    first_row = tile // per_group * GROUP_ROWS
    rows_in_group = tl.minimum(tiles_down - first_row, GROUP_ROWS)
    within = tile % per_group
    return first_row + within % rows_in_group, within // rows_in_group


@triton.jit
def operand_tile(
    operand, row, inner, n_rows, n_inner, stride_row, stride_inner,
    LAYOUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Tile (BLOCK_ROWS, BLOCK_INNER) of an operand from position (row, inner), zero past its end.

    LAYOUT says what ``operand`` is: a "pointer", or a tensor descriptor of the matrix with its
    inner dimension contiguous ("inner") or of its transpose with the rows contiguous ("rows").
    """
    if LAYOUT == "inner":
        tile = operand.load([row, inner])
    elif LAYOUT == "rows":
        tile = operand.load([inner, row]).T
    else:
        rows = row + tl.arange(0, BLOCK_ROWS)
        inners = inner + tl.arange(0, BLOCK_INNER)
        mask = (rows < n_rows)[:, None] & (inners < n_inner)[None, :]
        at = rows.to(tl.int64)[:, None] * stride_row + inners.to(tl.int64)[None, :] * stride_inner
        tile = tl.load(operand + at, mask=mask, other=0.0)
    return tile


@triton.jit
def finish_tile(
    total, bias_ptr, residual_ptr, seed_ptr, y_ptr, saved_ptr, row, col, n_rows, n_cols,
    stride_residual_row, stride_residual_col, threshold, scale,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, SAVES_OUTPUT: tl.constexpr,
    QUADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Bias, activation, dropout and residual of a tile at (row, col), and its store to y.

    ``saved_ptr``, if given, receives what the backward pass needs: the activation's output or its
    input. QUADS says that n_cols is divisible by four.
    """
    rows = row + tl.arange(0, BLOCK_ROWS)
    cols = col + tl.arange(0, BLOCK_COLS)
    wide_rows = rows.to(tl.int64)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    at = wide_rows[:, None] * n_cols + cols[None, :]
    if bias_ptr is not None:
        total += widen(tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0))[None, :]
    y = ACTIVATION(total, P0, P1)
    if saved_ptr is not None:
        saved = y if SAVES_OUTPUT else total
        tl.store(saved_ptr + at, saved.to(saved_ptr.dtype.element_ty), mask=mask)
    if seed_ptr is not None:
        y *= dropout_factor(
            seed_ptr, rows, col, n_cols, threshold, scale, QUADS, BLOCK_ROWS, BLOCK_COLS
        )
    if residual_ptr is not None:
        at_residual = wide_rows[:, None] * stride_residual_row
        at_residual += cols.to(tl.int64)[None, :] * stride_residual_col
        y += widen(tl.load(residual_ptr + at_residual, mask=mask, other=0.0))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def matmul_kernel(
    a, b, bias_ptr, residual_ptr, seed_ptr, y_ptr, saved_ptr, n_rows, n_cols, n_inner,
    stride_a_row, stride_a_inner, stride_b_col, stride_b_inner,
    stride_residual_row, stride_residual_col, threshold, scale,
    A_LAYOUT: tl.constexpr, B_LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, SAVES_OUTPUT: tl.constexpr,
    QUADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr, SPLIT_INNER: tl.constexpr,
):  # fmt: skip
    """y = dropout(f(a bᵀ + bias)) + residual, y (n_rows, n_cols) contiguous.

    Of n programs, each owns every n-th output tile; with SPLIT_INNER > 1, parts of tiles, and then
    y is a (SPLIT_INNER, n_rows, n_cols) stack of bare float32 partial products.
    """
    tiles_down, tiles_across = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_cols, BLOCK_COLS)
    n_tiles = tiles_down * tiles_across
    steps = tl.cdiv(n_inner, BLOCK_INNER)
    steps_a_part = tl.cdiv(steps, SPLIT_INNER)
    out_type: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    for work in tl.range(tl.program_id(0), n_tiles * SPLIT_INNER, tl.num_programs(0)):
        part = work // n_tiles
        down, across = tile_position(work % n_tiles, tiles_down, tiles_across, GROUP_ROWS)
        row, col = down * BLOCK_ROWS, across * BLOCK_COLS
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=out_type)
        for step in tl.range(part * steps_a_part, tl.minimum((part + 1) * steps_a_part, steps)):
            inner = step * BLOCK_INNER
            a_tile = operand_tile(a, row, inner, n_rows, n_inner, stride_a_row, stride_a_inner,
                                  A_LAYOUT, BLOCK_ROWS, BLOCK_INNER)  # fmt: skip
            b_tile = operand_tile(b, col, inner, n_cols, n_inner, stride_b_col, stride_b_inner,
                                  B_LAYOUT, BLOCK_COLS, BLOCK_INNER)  # fmt: skip
            total = tl.dot(a_tile, b_tile.T, total, input_precision=PRECISION, out_dtype=out_type)
        # In two halves, so that a whole tile of results need not stand in registers beside it.
        half: tl.constexpr = BLOCK_COLS // 2
        halves = tl.permute(tl.reshape(total, (BLOCK_ROWS, 2, half)), (0, 2, 1))
        left, right = tl.split(halves)
        part_ptr = y_ptr + part.to(tl.int64) * n_rows * n_cols
        finish_tile(
            left, bias_ptr, residual_ptr, seed_ptr, part_ptr, saved_ptr, row, col, n_rows, n_cols,
            stride_residual_row, stride_residual_col, threshold, scale,
            ACTIVATION, P0, P1, SAVES_OUTPUT, QUADS, BLOCK_ROWS, half,
        )  # fmt: skip
        finish_tile(
            right, bias_ptr, residual_ptr, seed_ptr, part_ptr, saved_ptr, row, col + half,
            n_rows, n_cols, stride_residual_row, stride_residual_col, threshold, scale,
            ACTIVATION, P0, P1, SAVES_OUTPUT, QUADS, BLOCK_ROWS, half,
        )  # fmt: skip


@triton.jit
def epilogue_kernel(
    partial_ptr, bias_ptr, residual_ptr, seed_ptr, y_ptr, saved_ptr, n_rows, n_cols,
    stride_residual_row, stride_residual_col, threshold, scale,
    N_PARTS: tl.constexpr, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    SAVES_OUTPUT: tl.constexpr, QUADS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y = dropout(f(Σ partials + bias)) + residual; partials (N_PARTS, n_rows, n_cols).

    A program owns one tile, and adds its parts in order, so that the sum is always the same one.
    """
    tiles_across = tl.cdiv(n_cols, BLOCK_COLS)
    row = tl.program_id(0) // tiles_across * BLOCK_ROWS
    col = tl.program_id(0) % tiles_across * BLOCK_COLS
    rows = row + tl.arange(0, BLOCK_ROWS)
    cols = col + tl.arange(0, BLOCK_COLS)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    at = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    total = widen(tl.load(partial_ptr + at, mask=mask, other=0.0))
    for _ in tl.static_range(N_PARTS - 1):
        at += tl.cast(n_rows, tl.int64) * n_cols
        total += widen(tl.load(partial_ptr + at, mask=mask, other=0.0))
    finish_tile(
        total, bias_ptr, residual_ptr, seed_ptr, y_ptr, saved_ptr, row, col, n_rows, n_cols,
        stride_residual_row, stride_residual_col, threshold, scale,
        ACTIVATION, P0, P1, SAVES_OUTPUT, QUADS, BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip


@triton.jit
def epilogue_backward_kernel(
    dy_ptr, saved_ptr, seed_ptr, dz_ptr, dbias_ptr, n_rows, n_cols, stride_dy_row, stride_dy_col,
    stride_saved_row, stride_saved_col, threshold, scale,
    GRADIENT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dz = f'(saved) dropout(dy), and its column sums, in one pass over dy.

    A program owns a tile, and its place in the partial sums dbias, (tiles of rows, n_cols). Without
    ``saved_ptr`` there is no activation, without ``dz_ptr`` only the sums are wanted, without
    ``dbias_ptr`` only dz.
    """
    tiles_across = tl.cdiv(n_cols, BLOCK_COLS)
    down, col = tl.program_id(0) // tiles_across, tl.program_id(0) % tiles_across * BLOCK_COLS
    rows, cols = down * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), col + tl.arange(0, BLOCK_COLS)
    wide_rows, wide_cols = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    at_dy = wide_rows * stride_dy_row + wide_cols * stride_dy_col
    dz = widen(tl.load(dy_ptr + at_dy, mask=mask, other=0.0))
    if seed_ptr is not None:
        dz *= dropout_factor(
            seed_ptr, rows, col, n_cols, threshold, scale, QUADS, BLOCK_ROWS, BLOCK_COLS
        )
    if saved_ptr is not None:
        at_saved = wide_rows * stride_saved_row + wide_cols * stride_saved_col
        saved = widen(tl.load(saved_ptr + at_saved, mask=mask, other=0.0))
        dz = GRADIENT(dz, saved, P0, P1)
    if dz_ptr is not None:
        at = wide_rows * n_cols + wide_cols
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        at_sum = down.to(tl.int64) * n_cols + cols
        tl.store(dbias_ptr + at_sum, tl.sum(tl.where(mask, dz, 0.0), 0), mask=cols < n_cols)
