"""Kernels of normalisations over rows: layer normalisation, and by the root mean square.

The input of both is s = dropout(x) + residual, where there are any, rounded to x's type as torch
would; it is written where the backward pass or the caller wants it. Rows stand in registers where
they fit; longer ones are read twice.

Sources: J. Ba et al., "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450; B. Zhang and
R. Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.numeric import widen
from gpunn.kernels.philox import dropout_factor


@triton.jit
def sum_tile(
    x_ptr, residual_ptr, seed_ptr, sum_ptr, rows, col, n_cols, mask, threshold, dropout_scale,
    QUADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """s of a tile, 0 outside of it; stored to ``sum_ptr``, if given."""
    at = rows[:, None] * n_cols + (col + tl.arange(0, BLOCK_COLS))[None, :]
    s = widen(tl.load(x_ptr + at, mask=mask, other=0.0))
    if seed_ptr is not None:
        s *= dropout_factor(seed_ptr, rows, col, n_cols, threshold, dropout_scale, QUADS,
                            BLOCK_ROWS, BLOCK_COLS)  # fmt: skip
    if residual_ptr is not None:
        s += widen(tl.load(residual_ptr + at, mask=mask, other=0.0))
    if sum_ptr is not None:
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=mask)
        s = widen(rounded)
    return s


@triton.jit
def scaled_tile(hat, weight_ptr, bias_ptr, cols, n_cols):
    """weight hat + bias, of which there may be either or none."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0)
        hat *= widen(weight)[None, :]
    if bias_ptr is not None:
        hat += widen(tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0))[None, :]
    return hat


@triton.jit
def row_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, sum_ptr, y_ptr, mean_ptr, invstd_ptr,
    n_rows, n_cols, threshold, dropout_scale, eps,
    CENTRED: tl.constexpr, QUADS: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y = (s - mean) / sqrt(var + eps) weight + bias of rows; without CENTRED, mean is 0.

    A program owns BLOCK_ROWS rows.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row, block = (rows < n_rows)[:, None], tl.arange(0, BLOCK_COLS)
    out_type: tl.constexpr = tl.float64 if mean_ptr.dtype.element_ty == tl.float64 else tl.float32
    mean = tl.zeros((BLOCK_ROWS,), dtype=out_type)
    if ONE_PASS:
        mask = is_row & (block < n_cols)[None, :]
        s = sum_tile(x_ptr, residual_ptr, seed_ptr, sum_ptr, rows, 0, n_cols, mask, threshold,
                     dropout_scale, QUADS, BLOCK_ROWS, BLOCK_COLS)  # fmt: skip
        if CENTRED:
            mean = tl.sum(s, 1) / n_cols
        centred = tl.where(mask, s - mean[:, None], 0.0)
        invstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / n_cols + eps)
        y = scaled_tile(centred * invstd[:, None], weight_ptr, bias_ptr, block, n_cols)
        at = rows[:, None] * n_cols + block[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        squares = tl.zeros((BLOCK_ROWS,), dtype=out_type)
        for col in tl.range(0, n_cols, BLOCK_COLS):
            mask = is_row & (col + block < n_cols)[None, :]
            s = sum_tile(x_ptr, residual_ptr, seed_ptr, sum_ptr, rows, col, n_cols, mask, threshold,
                         dropout_scale, QUADS, BLOCK_ROWS, BLOCK_COLS)  # fmt: skip
            if CENTRED:  # Chan's formula for the columns before and these
                n_here = tl.minimum(n_cols - col, BLOCK_COLS)
                own = tl.sum(s, 1) / n_here
                apart = own - mean
                squares += apart * apart * (col * (n_here / (col + n_here)))
                mean += apart * (n_here / (col + n_here))
                s = tl.where(mask, s - own[:, None], 0.0)
            squares += tl.sum(s * s, 1)
        invstd = 1 / tl.sqrt(squares / n_cols + eps)
        source_ptr = x_ptr if sum_ptr is None else sum_ptr
        for col in tl.range(0, n_cols, BLOCK_COLS):
            at = rows[:, None] * n_cols + (col + block)[None, :]
            mask = is_row & (col + block < n_cols)[None, :]
            s = widen(tl.load(source_ptr + at, mask=mask, other=0.0))
            hat = (s - mean[:, None]) * invstd[:, None]
            y = scaled_tile(hat, weight_ptr, bias_ptr, col + block, n_cols)
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(invstd_ptr + rows, invstd, mask=rows < n_rows)


@triton.jit
def hat_and_gradient(dy_ptr, s_ptr, weight_ptr, rows, cols, n_cols, mask, mean, invstd):
    """dy, (s - mean) invstd and the gradient of the latter, dy weight, of a tile."""
    at = rows[:, None] * n_cols + cols[None, :]
    dy = widen(tl.load(dy_ptr + at, mask=mask, other=0.0))
    s = widen(tl.load(s_ptr + at, mask=mask, other=0.0))
    hat = tl.where(mask, (s - mean[:, None]) * invstd[:, None], 0.0)
    return dy, hat, scaled_tile(dy, weight_ptr, None, cols, n_cols)


@triton.jit
def store_gradients(
    ds, extra_ptr, seed_ptr, dx_ptr, dresidual_ptr, rows, col, n_cols, mask, threshold,
    dropout_scale, QUADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dresidual = ds + the gradient of the sum itself, and dx = dropout(dresidual)."""
    at = rows[:, None] * n_cols + (col + tl.arange(0, BLOCK_COLS))[None, :]
    if extra_ptr is not None:
        ds += widen(tl.load(extra_ptr + at, mask=mask, other=0.0))
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        if seed_ptr is not None:
            ds *= dropout_factor(seed_ptr, rows, col, n_cols, threshold, dropout_scale, QUADS,
                                 BLOCK_ROWS, BLOCK_COLS)  # fmt: skip
        tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_norm_backward_kernel(
    dy_ptr, s_ptr, weight_ptr, mean_ptr, invstd_ptr, extra_ptr, seed_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    n_rows, n_cols, threshold, dropout_scale,
    CENTRED: tl.constexpr, QUADS: tl.constexpr, ONE_PASS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of x and the residual, and partial sums of those of weight and bias.

    ds = invstd (g - hat mean(g hat) - mean(g)) with g = dy weight; without CENTRED, no mean(g). Of
    n programs each owns every n-th BLOCK_ROWS rows, and a row of dweight and dbias (n, n_cols).
    """
    block = tl.arange(0, BLOCK_COLS)
    out_type: tl.constexpr = tl.float64 if mean_ptr.dtype.element_ty == tl.float64 else tl.float32
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=out_type)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=out_type)
    step = tl.num_programs(0) * BLOCK_ROWS
    for row in tl.range(tl.program_id(0) * BLOCK_ROWS, n_rows, step, num_stages=STAGES):
        rows = (row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        is_row = rows < n_rows
        mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0)
        invstd = tl.load(invstd_ptr + rows, mask=is_row, other=0.0)
        if ONE_PASS:
            mask = is_row[:, None] & (block < n_cols)[None, :]
            dy, hat, g = hat_and_gradient(dy_ptr, s_ptr, weight_ptr, rows, block, n_cols, mask,
                                          mean, invstd)  # fmt: skip
            ds = g - hat * (tl.sum(g * hat, 1) / n_cols)[:, None]
            if CENTRED:
                ds -= (tl.sum(g, 1) / n_cols)[:, None]
            dweight += dy * hat
            dbias += dy
            store_gradients(ds * invstd[:, None], extra_ptr, seed_ptr, dx_ptr, dresidual_ptr, rows,
                            0, n_cols, mask, threshold, dropout_scale, QUADS, BLOCK_ROWS,
                            BLOCK_COLS)  # fmt: skip
        else:
            along = tl.zeros((BLOCK_ROWS,), dtype=out_type)
            level = tl.zeros((BLOCK_ROWS,), dtype=out_type)
            for col in tl.range(0, n_cols, BLOCK_COLS):
                mask = is_row[:, None] & (col + block < n_cols)[None, :]
                _dy, hat, g = hat_and_gradient(dy_ptr, s_ptr, weight_ptr, rows, col + block, n_cols,
                                               mask, mean, invstd)  # fmt: skip
                along += tl.sum(g * hat, 1) / n_cols
                level += tl.sum(g, 1) / n_cols
            for col in tl.range(0, n_cols, BLOCK_COLS):
                mask = is_row[:, None] & (col + block < n_cols)[None, :]
                _dy, hat, g = hat_and_gradient(dy_ptr, s_ptr, weight_ptr, rows, col + block, n_cols,
                                               mask, mean, invstd)  # fmt: skip
                ds = g - hat * along[:, None]
                if CENTRED:
                    ds -= level[:, None]
                store_gradients(ds * invstd[:, None], extra_ptr, seed_ptr, dx_ptr, dresidual_ptr,
                                rows, col, n_cols, mask, threshold, dropout_scale, QUADS,
                                BLOCK_ROWS, BLOCK_COLS)  # fmt: skip
    if dweight_ptr is not None:
        at = tl.program_id(0).to(tl.int64) * n_cols + block
        tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=block < n_cols)
    if dbias_ptr is not None:
        at = tl.program_id(0).to(tl.int64) * n_cols + block
        tl.store(dbias_ptr + at, tl.sum(dbias, 0), mask=block < n_cols)


@triton.jit
def column_sums_kernel(
    dy_ptr, s_ptr, mean_ptr, invstd_ptr, dweight_ptr, dbias_ptr, n_rows, n_cols, rows_a_program,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Partial sums of dy hat and dy over rows, (programs down, n_cols), for rows too long to hold.

    A program owns ``rows_a_program`` rows of BLOCK_COLS columns. What warps have in common is
    added up at the end: in the loop they would wait for each other.
    """
    across = tl.cdiv(n_cols, BLOCK_COLS)
    down = tl.program_id(0) // across
    cols = tl.program_id(0) % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    out_type: tl.constexpr = tl.float64 if mean_ptr.dtype.element_ty == tl.float64 else tl.float32
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=out_type)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=out_type)
    first = down * rows_a_program
    for row in tl.range(first, tl.minimum(first + rows_a_program, n_rows), BLOCK_ROWS):
        rows = (row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        is_row = rows < n_rows
        mask = is_row[:, None] & (cols < n_cols)[None, :]
        mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0)
        invstd = tl.load(invstd_ptr + rows, mask=is_row, other=0.0)
        dy, hat, _g = hat_and_gradient(dy_ptr, s_ptr, None, rows, cols, n_cols, mask, mean,
                                       invstd)  # fmt: skip
        dweight += dy * hat
        dbias += dy
    at = down.to(tl.int64) * n_cols + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=cols < n_cols)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, 0), mask=cols < n_cols)
