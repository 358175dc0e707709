"""The gradient of an additive mask of attention, by tiles; see ``flash_backward.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.flash import batch_of_mask, bias_tile, load_rows, slope_of
from gpunn.kernels.flash_backward import row_statistics, tile_gradients
from gpunn.kernels.numeric import multiple
from gpunn.kernels.philox import dropout_factor


@triton.jit
def attention_mask_gradient_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, sharers_ptr, seed_ptr, dy_ptr, maxima_ptr, sums_ptr,
    delta_ptr, dmask_ptr,
    n_sharers, n_heads, group, n_queries, n_keys, before, after,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_dy_batch, stride_dy_head, stride_dy_row, stride_dy_col,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_col,
    stride_slopes_batch, stride_slopes_head,
    scale, softcap, threshold, dropout_scale,
    MASK_HEADS: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, QUADS: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_HEAD_V: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """dmask = Σ ds over the dimensions along which the mask is repeated; dmask is contiguous.

    A program owns a tile of dmask, and adds up in order: over the ``n_sharers`` batches that share
    it, which follow one another where ``sharers_ptr`` lists none, and over the dimensions that, as
    MASK_HEADS and the like say, the mask has not.
    """
    down, across = tl.cdiv(n_queries, BLOCK_QUERIES), tl.cdiv(n_keys, BLOCK_KEYS)
    n_down, n_across = down if MASK_ROWS else 1, across if MASK_COLS else 1
    index = tl.program_id(0)
    own_across, own_down = index % n_across, index // n_across % n_down
    own_head = index // n_across // n_down % (n_heads if MASK_HEADS else 1)
    own_batch = index // n_across // n_down // (n_heads if MASK_HEADS else 1)
    sum_heads = 1 if MASK_HEADS else n_heads
    sum_down, sum_across = 1 if MASK_ROWS else down, 1 if MASK_COLS else across
    offset = n_keys - n_queries if LOWER_RIGHT else 0
    out_type: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), dtype=out_type)
    stride_q_row, stride_k_row = multiple(stride_q_row, UNIT), multiple(stride_k_row, UNIT)
    stride_v_row, stride_dy_row = multiple(stride_v_row, UNIT), multiple(stride_dy_row, UNIT)
    for step in range(n_sharers * sum_heads * sum_down * sum_across):
        key = (own_across + step % sum_across) * BLOCK_KEYS
        row = (own_down + step // sum_across % sum_down) * BLOCK_QUERIES
        head = (own_head + step // sum_across // sum_down % sum_heads).to(tl.int64)
        sharer = own_batch * n_sharers + step // sum_across // sum_down // sum_heads
        batch = batch_of_mask(sharers_ptr, sharer.to(tl.int64))
        row_index = row + tl.arange(0, BLOCK_QUERIES)
        rows, cols = row_index[:, None], (key + tl.arange(0, BLOCK_KEYS))[None, :]
        at_mask = own_batch.to(tl.int64) * stride_mask_batch + head * stride_mask_head
        bias = bias_tile(mask_ptr + at_mask, rows, cols, n_queries, n_keys, stride_mask_row,
                         stride_mask_col)  # fmt: skip
        wanted = tl.max(bias) != -float("inf")
        if BEFORE:
            wanted = wanted & (key + BLOCK_KEYS > row + offset - before)
        if AFTER:
            wanted = wanted & (key < row + BLOCK_QUERIES + offset + after)
        if wanted:
            first_stat = (batch * n_heads + head) * n_queries
            at_q = multiple(batch * stride_q_batch + head * stride_q_head, UNIT)
            at_k = multiple(batch * stride_k_batch + head // group * stride_k_head, UNIT)
            at_v = multiple(batch * stride_v_batch + head // group * stride_v_head, UNIT)
            at_dy = multiple(batch * stride_dy_batch + head * stride_dy_head, UNIT)
            slope = slope_of(slopes_ptr, batch * stride_slopes_batch + head * stride_slopes_head,
                             True)  # fmt: skip
            q = load_rows(q_ptr + at_q, row, n_queries, stride_q_row, stride_q_col, HEAD,
                          BLOCK_QUERIES, BLOCK_HEAD)  # fmt: skip
            k = load_rows(k_ptr + at_k, key, n_keys, stride_k_row, stride_k_col, HEAD, BLOCK_KEYS,
                          BLOCK_HEAD)  # fmt: skip
            v = load_rows(v_ptr + at_v, key, n_keys, stride_v_row, stride_v_col, HEAD_V,
                          BLOCK_KEYS, BLOCK_HEAD_V)  # fmt: skip
            dy = load_rows(dy_ptr + at_dy, row, n_queries, stride_dy_row, stride_dy_col, HEAD_V,
                           BLOCK_QUERIES, BLOCK_HEAD_V)  # fmt: skip
            shift, factor, delta = row_statistics(
                maxima_ptr, sums_ptr, delta_ptr, first_stat, row_index, n_queries, True
            )
            products = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=out_type)
            dp = tl.dot(dy, v.T, input_precision=PRECISION, out_dtype=out_type)
            dropped = 1.0
            if seed_ptr is not None:
                dropped = dropout_factor(
                    seed_ptr, first_stat + row_index, key, n_keys, threshold, dropout_scale,
                    QUADS, BLOCK_QUERIES, BLOCK_KEYS,
                )  # fmt: skip
            _kept, ds, _dz = tile_gradients(
                products, dp, bias, shift[:, None], factor[:, None], delta[:, None], dropped,
                rows, cols, n_keys, slope, scale, softcap, before, after, offset, True,
                slopes_ptr is not None, HAS_SOFTCAP, seed_ptr is not None, BEFORE, AFTER, True,
                True, True,
            )  # fmt: skip
            total += ds
    row, key = own_down * BLOCK_QUERIES, own_across * BLOCK_KEYS
    rows, cols = row + tl.arange(0, BLOCK_QUERIES)[:, None], key + tl.arange(0, BLOCK_KEYS)[None, :]
    if not MASK_ROWS:
        total, rows = tl.sum(total, 0, keep_dims=True), own_down + tl.arange(0, 1)[:, None]
    if not MASK_COLS:
        total, cols = tl.sum(total, 1, keep_dims=True), own_across + tl.arange(0, 1)[None, :]
    n_rows, n_cols = n_queries if MASK_ROWS else 1, n_keys if MASK_COLS else 1
    n_mask_heads = n_heads if MASK_HEADS else 1
    first_row = (own_batch.to(tl.int64) * n_mask_heads + own_head) * n_rows
    tl.store(dmask_ptr + (first_row + rows) * n_cols + cols, total.to(dmask_ptr.dtype.element_ty),
             mask=(rows < n_rows) & (cols < n_cols))  # fmt: skip
