"""What the gradients of attention want to know of each row first; see ``flash_backward.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.flash import finite, load_rows
from gpunn.kernels.numeric import multiple, widen


@triton.jit
def shift_of(maxima, sums):
    """What to subtract from the scores of rows instead of a division of their exp by the sum.

    The difference is rounded as its larger part, of which 16-bit results see nothing.
    """
    return finite(maxima) + tl.log2(tl.where(sums == 0, 1.0, sums))


@triton.jit
def attention_delta_kernel(
    dy_ptr, y_ptr, rest_ptr, maxima_ptr, sums_ptr, delta_ptr, shifts_ptr, n_heads, n_queries,
    stride_dy_batch, stride_dy_head, stride_dy_row, stride_dy_col,
    stride_y_batch, stride_y_head, stride_y_row, stride_y_col,
    UNIT: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_HEAD_V: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    """delta = Σ dy (y + rest) of each row, (batch, head, row), and with ``shifts_ptr`` the shift.

    Where the gradients nearly cancel, that of a y of 16 bits alone would be far off. The shift is
    found here, since each pair of a query and a key would cost a share of its logarithm. A program
    owns BLOCK_QUERIES rows.
    """
    n_blocks = tl.cdiv(n_queries, BLOCK_QUERIES)
    row, index = tl.program_id(0) % n_blocks * BLOCK_QUERIES, tl.program_id(0) // n_blocks
    batch, head = (index // n_heads).to(tl.int64), (index % n_heads).to(tl.int64)
    stride_dy_row, stride_y_row = multiple(stride_dy_row, UNIT), multiple(stride_y_row, UNIT)
    at_dy = multiple(batch * stride_dy_batch + head * stride_dy_head, UNIT)
    at_y = multiple(batch * stride_y_batch + head * stride_y_head, UNIT)
    dy = load_rows(dy_ptr + at_dy, row, n_queries, stride_dy_row, stride_dy_col, HEAD_V,
                   BLOCK_QUERIES, BLOCK_HEAD_V)  # fmt: skip
    y = widen(load_rows(y_ptr + at_y, row, n_queries, stride_y_row, stride_y_col, HEAD_V,
                        BLOCK_QUERIES, BLOCK_HEAD_V))  # fmt: skip
    if rest_ptr is not None:
        y += widen(load_rows(rest_ptr + at_y, row, n_queries, stride_y_row, stride_y_col, HEAD_V,
                             BLOCK_QUERIES, BLOCK_HEAD_V))  # fmt: skip
    rows = row + tl.arange(0, BLOCK_QUERIES)
    delta = tl.sum(widen(dy) * y, 1)
    at, mask = index.to(tl.int64) * n_queries + rows, rows < n_queries
    tl.store(delta_ptr + at, delta, mask=mask)
    if shifts_ptr is not None:
        maxima = tl.load(maxima_ptr + at, mask=mask, other=0.0)
        sums = tl.load(sums_ptr + at, mask=mask, other=1.0)
        tl.store(shifts_ptr + at, shift_of(maxima, sums), mask=mask)
