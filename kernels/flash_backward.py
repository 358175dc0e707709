"""Gradients of attention, by tiles: those of keys and values, of queries, and of an additive mask.

With p = softmax(s), d the dropout's factors, and dy the gradient of y = (p d) v::

    dv = (p d)ᵀ dy        dp = d (dy vᵀ)        delta = Σ_j p dp = Σ dy y
    ds = p (dp - delta)   dz = cap' ds          dq = scale dz k      dk = scale dzᵀ q

p is computed again from the scores and the row's maximum and sum. Each result has a kernel that
owns a tile of it and adds up in a fixed order: no atomics, and the same bits from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.flash import (
    batch_of_mask,
    bias_tile,
    finite,
    load_rows,
    power,
    scores,
    sequence,
    slope_of,
    store_rows,
    visible_range,
)
from gpunn.kernels.numeric import widen
from gpunn.kernels.philox import dropout_factor


@triton.jit
def row_statistics(maxima_ptr, sums_ptr, delta_ptr, at, mask, EXACT: tl.constexpr):
    """What to subtract from the scores of rows, what to multiply exp of it by, and delta, or 0.

    Not EXACT, the sum is subtracted too, and saves a multiplication; the difference is rounded as
    its larger part, of which 16-bit results see nothing.
    """
    shift = finite(tl.load(maxima_ptr + at, mask=mask, other=float("inf")))
    total = tl.load(sums_ptr + at, mask=mask, other=1.0)
    total = tl.where(total == 0, 1.0, total)
    delta = tl.zeros_like(total)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + at, mask=mask, other=0.0)
    if EXACT:
        return shift, 1 / total, delta
    return shift + tl.log2(total), total, delta


@triton.jit
def tile_gradients(
    products, dp, bias, shift, factor, delta, dropped, rows, cols, n_cols, slope, scale, softcap,
    before, after, offset,
    HAS_BIAS: tl.constexpr, HAS_SLOPE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, NATURAL: tl.constexpr,
    EXACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """p d, ds and dz of a tile, from the products q·k and dy·v."""
    s, derivative = scores(
        products, bias, rows, cols, n_cols, slope, scale, softcap, before, after, offset,
        HAS_BIAS, HAS_SLOPE, HAS_SOFTCAP, BEFORE, AFTER, EDGE,
    )  # fmt: skip
    p = power(s - shift, NATURAL)
    if EXACT:
        p *= factor
    kept = p
    if HAS_DROPOUT:
        kept, dp = p * dropped, dp * dropped
    ds = p * (dp - delta)
    dz = ds * derivative if HAS_SOFTCAP else ds
    return kept, ds, dz


@triton.jit
def attention_delta_kernel(
    dy_ptr, y_ptr, rest_ptr, delta_ptr, n_heads, n_queries,
    stride_dy_batch, stride_dy_head, stride_dy_row, stride_dy_col,
    stride_y_batch, stride_y_head, stride_y_row, stride_y_col,
    HEAD_V: tl.constexpr, BLOCK_HEAD_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    """delta = Σ dy (y + rest) of each row, (batch, head, row). A program owns BLOCK_QUERIES rows.

    Where the gradients nearly cancel, that of a y of 16 bits alone would be far off.
    """
    n_blocks = tl.cdiv(n_queries, BLOCK_QUERIES)
    row, index = tl.program_id(0) % n_blocks * BLOCK_QUERIES, tl.program_id(0) // n_blocks
    batch, head = (index // n_heads).to(tl.int64), (index % n_heads).to(tl.int64)
    dy = load_rows(dy_ptr + batch * stride_dy_batch + head * stride_dy_head, row, n_queries,
                   stride_dy_row, stride_dy_col, HEAD_V, BLOCK_QUERIES, BLOCK_HEAD_V)  # fmt: skip
    at_y = batch * stride_y_batch + head * stride_y_head
    y = widen(load_rows(y_ptr + at_y, row, n_queries, stride_y_row, stride_y_col, HEAD_V,
                        BLOCK_QUERIES, BLOCK_HEAD_V))  # fmt: skip
    if rest_ptr is not None:
        y += widen(load_rows(rest_ptr + at_y, row, n_queries, stride_y_row, stride_y_col, HEAD_V,
                             BLOCK_QUERIES, BLOCK_HEAD_V))  # fmt: skip
    rows = row + tl.arange(0, BLOCK_QUERIES)
    delta = tl.sum(widen(dy) * y, 1)
    tl.store(delta_ptr + index.to(tl.int64) * n_queries + rows, delta, mask=rows < n_queries)


@triton.jit
def attention_key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, mask_batches_ptr, seed_ptr, starts_q_ptr,
    starts_k_ptr, dy_ptr, maxima_ptr, sums_ptr, delta_ptr, dk_ptr, dv_ptr,
    n_heads, group, n_queries, n_keys, before, after,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_dy_batch, stride_dy_head, stride_dy_row, stride_dy_col,
    stride_dk_batch, stride_dk_head, stride_dk_row, stride_dk_col,
    stride_dv_batch, stride_dv_head, stride_dv_row, stride_dv_col,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_col,
    stride_slopes_batch, stride_slopes_head, stride_stat_batch, stride_stat_head,
    scale, softcap, threshold, dropout_scale, gradient_scale,
    LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, NATURAL: tl.constexpr, EXACT: tl.constexpr, QUADS: tl.constexpr,
    PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    BLOCK_HEAD_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """dk and dv. A program owns BLOCK_KEYS keys of one head, with all query heads that share it."""
    n_blocks = tl.cdiv(n_keys, BLOCK_KEYS)
    key = tl.program_id(0) % n_blocks * BLOCK_KEYS
    n_key_heads = n_heads // group
    index = tl.program_id(0) // n_blocks
    batch, key_head = (index // n_key_heads).to(tl.int64), (index % n_key_heads).to(tl.int64)
    first_q, n_q = sequence(starts_q_ptr, batch, n_queries)
    first_k, n_k = sequence(starts_k_ptr, batch, n_keys)
    at_k = batch * stride_k_batch + key_head * stride_k_head + first_k * stride_k_row
    at_v = batch * stride_v_batch + key_head * stride_v_head + first_k * stride_v_row
    k = load_rows(k_ptr + at_k, key, n_k, stride_k_row, stride_k_col, HEAD, BLOCK_KEYS, BLOCK_HEAD)
    v = load_rows(v_ptr + at_v, key, n_k, stride_v_row, stride_v_col, HEAD_V, BLOCK_KEYS,
                  BLOCK_HEAD_V)  # fmt: skip
    offset = n_k - n_q if LOWER_RIGHT else 0
    cols = (key + tl.arange(0, BLOCK_KEYS))[:, None]
    out_type: tl.constexpr = tl.float64 if dk_ptr.dtype.element_ty == tl.float64 else tl.float32
    dk = tl.zeros((BLOCK_KEYS, BLOCK_HEAD), dtype=out_type)
    dv = tl.zeros((BLOCK_KEYS, BLOCK_HEAD_V), dtype=out_type)
    start, _whole_start, _whole_end, end = visible_range(
        key - offset, tl.minimum(key + BLOCK_KEYS, n_k) - 1 - offset,
        tl.where(key < n_k, n_q, 0), after, before, AFTER, BEFORE, BLOCK_QUERIES
    )  # fmt: skip
    mask_batch = batch_of_mask(mask_batches_ptr, batch)
    for member in range(group):
        head = key_head * group + member
        at_q = batch * stride_q_batch + head * stride_q_head + first_q * stride_q_row
        at_dy = batch * stride_dy_batch + head * stride_dy_head + first_q * stride_dy_row
        first_stat = batch * stride_stat_batch + head * stride_stat_head + first_q
        slope = slope_of(slopes_ptr, batch * stride_slopes_batch + head * stride_slopes_head,
                         NATURAL)  # fmt: skip
        for row in tl.range(start, end, BLOCK_QUERIES):
            row_index = row + tl.arange(0, BLOCK_QUERIES)
            rows, bias, wanted = row_index[None, :], 0.0, True
            if mask_ptr is not None:
                at_mask = mask_batch * stride_mask_batch + head * stride_mask_head
                bias = bias_tile(mask_ptr + at_mask, rows, cols, n_q, n_k, stride_mask_row,
                                 stride_mask_col)  # fmt: skip
                wanted = tl.max(bias) != -float("inf")
            if wanted:
                q = load_rows(q_ptr + at_q, row, n_q, stride_q_row, stride_q_col, HEAD,
                              BLOCK_QUERIES, BLOCK_HEAD)  # fmt: skip
                dy = load_rows(dy_ptr + at_dy, row, n_q, stride_dy_row, stride_dy_col, HEAD_V,
                               BLOCK_QUERIES, BLOCK_HEAD_V)  # fmt: skip
                shift, factor, delta = row_statistics(
                    maxima_ptr, sums_ptr, delta_ptr, first_stat + row_index, row_index < n_q, EXACT
                )
                products = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=out_type)
                dp = tl.dot(v, dy.T, input_precision=PRECISION, out_dtype=out_type)
                dropped = 1.0
                if seed_ptr is not None:
                    dropped = dropout_factor(seed_ptr, first_stat + row_index, key, n_keys,
                                             threshold, dropout_scale, QUADS, BLOCK_QUERIES,
                                             BLOCK_KEYS).T  # fmt: skip
                kept, _ds, dz = tile_gradients(
                    products, dp, bias, shift[None, :], factor[None, :], delta[None, :], dropped,
                    rows, cols, n_k, slope, scale, softcap, before, after, offset,
                    mask_ptr is not None, slopes_ptr is not None, HAS_SOFTCAP,
                    seed_ptr is not None, BEFORE, AFTER, NATURAL, EXACT, BEFORE or AFTER,
                )  # fmt: skip
                dv = tl.dot(kept.to(dy.dtype), dy, dv, input_precision=PRECISION,
                            out_dtype=out_type)  # fmt: skip
                dk = tl.dot(dz.to(q.dtype), q, dk, input_precision=PRECISION,
                            out_dtype=out_type)  # fmt: skip
    dk_ptr += batch * stride_dk_batch + key_head * stride_dk_head + first_k * stride_dk_row
    dv_ptr += batch * stride_dv_batch + key_head * stride_dv_head + first_k * stride_dv_row
    store_rows(dk_ptr, dk * gradient_scale, key, n_k, stride_dk_row, stride_dk_col, HEAD,
               BLOCK_KEYS, BLOCK_HEAD)  # fmt: skip
    store_rows(dv_ptr, dv, key, n_k, stride_dv_row, stride_dv_col, HEAD_V, BLOCK_KEYS,
               BLOCK_HEAD_V)  # fmt: skip


@triton.jit
def attention_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, mask_batches_ptr, seed_ptr, starts_q_ptr,
    starts_k_ptr, dy_ptr, maxima_ptr, sums_ptr, delta_ptr, dq_ptr,
    n_heads, group, n_queries, n_keys, before, after,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_dy_batch, stride_dy_head, stride_dy_row, stride_dy_col,
    stride_dq_batch, stride_dq_head, stride_dq_row, stride_dq_col,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_col,
    stride_slopes_batch, stride_slopes_head, stride_stat_batch, stride_stat_head,
    scale, softcap, threshold, dropout_scale, gradient_scale,
    LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, NATURAL: tl.constexpr, EXACT: tl.constexpr, QUADS: tl.constexpr,
    UNEVEN: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr,
    BLOCK_HEAD: tl.constexpr, BLOCK_HEAD_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """dq, or, without ``dq_ptr``, delta. A program owns rows of one head, the last ones first.

    Delta is Σ p dp then, of the very p and dp that ds = p (dp - delta) is made of: where they
    cancel, float32's Σ dy y would leave its rounding errors.
    """
    n_blocks = tl.cdiv(n_queries, BLOCK_QUERIES)
    row = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_QUERIES
    index = tl.program_id(0) // n_blocks
    batch, head = (index // n_heads).to(tl.int64), (index % n_heads).to(tl.int64)
    first_q, n_q = sequence(starts_q_ptr, batch, n_queries)
    first_k, n_k = sequence(starts_k_ptr, batch, n_keys)
    key_head = head // group
    at_q = batch * stride_q_batch + head * stride_q_head + first_q * stride_q_row
    at_k = batch * stride_k_batch + key_head * stride_k_head + first_k * stride_k_row
    at_v = batch * stride_v_batch + key_head * stride_v_head + first_k * stride_v_row
    at_dy = batch * stride_dy_batch + head * stride_dy_head + first_q * stride_dy_row
    slope = slope_of(slopes_ptr, batch * stride_slopes_batch + head * stride_slopes_head, NATURAL)
    row_index = row + tl.arange(0, BLOCK_QUERIES)
    first_stat = batch * stride_stat_batch + head * stride_stat_head + first_q
    shift, factor, delta = row_statistics(
        maxima_ptr, sums_ptr, None if dq_ptr is None else delta_ptr, first_stat + row_index,
        row_index < n_q, EXACT
    )  # fmt: skip
    q = load_rows(q_ptr + at_q, row, n_q, stride_q_row, stride_q_col, HEAD, BLOCK_QUERIES,
                  BLOCK_HEAD)  # fmt: skip
    dy = load_rows(dy_ptr + at_dy, row, n_q, stride_dy_row, stride_dy_col, HEAD_V, BLOCK_QUERIES,
                   BLOCK_HEAD_V)  # fmt: skip
    offset, rows = n_k - n_q if LOWER_RIGHT else 0, row_index[:, None]
    out_type: tl.constexpr = maxima_ptr.dtype.element_ty
    dq = tl.zeros((BLOCK_QUERIES, BLOCK_HEAD), dtype=out_type)
    total = tl.zeros((BLOCK_QUERIES,), dtype=out_type)
    start, _whole_start, _whole_end, end = visible_range(
        row + offset, tl.minimum(row + BLOCK_QUERIES, n_q) - 1 + offset,
        tl.where(row < n_q, n_k, 0), before, after, BEFORE, AFTER, BLOCK_KEYS
    )  # fmt: skip
    mask_batch = batch_of_mask(mask_batches_ptr, batch)
    for key in tl.range(start, end, BLOCK_KEYS):
        cols, bias, wanted = (key + tl.arange(0, BLOCK_KEYS))[None, :], 0.0, True
        if mask_ptr is not None:
            at_mask = mask_batch * stride_mask_batch + head * stride_mask_head
            bias = bias_tile(mask_ptr + at_mask, rows, cols, n_q, n_k, stride_mask_row,
                             stride_mask_col)  # fmt: skip
            wanted = tl.max(bias) != -float("inf")
        if wanted:
            k = load_rows(k_ptr + at_k, key, n_k, stride_k_row, stride_k_col, HEAD, BLOCK_KEYS,
                          BLOCK_HEAD)  # fmt: skip
            v = load_rows(v_ptr + at_v, key, n_k, stride_v_row, stride_v_col, HEAD_V, BLOCK_KEYS,
                          BLOCK_HEAD_V)  # fmt: skip
            products = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=out_type)
            dp = tl.dot(dy, v.T, input_precision=PRECISION, out_dtype=out_type)
            dropped = 1.0
            if seed_ptr is not None:
                dropped = dropout_factor(
                    seed_ptr, first_stat + row_index, key, n_keys, threshold, dropout_scale,
                    QUADS, BLOCK_QUERIES, BLOCK_KEYS,
                )  # fmt: skip
            _kept, ds, dz = tile_gradients(
                products, dp, bias, shift[:, None], factor[:, None], delta[:, None], dropped,
                rows, cols, n_k, slope, scale, softcap, before, after, offset,
                mask_ptr is not None, slopes_ptr is not None, HAS_SOFTCAP, seed_ptr is not None,
                BEFORE, AFTER, NATURAL, EXACT, BEFORE or AFTER or UNEVEN,
            )  # fmt: skip
            if dq_ptr is None:
                total += tl.sum(ds, 1)
            else:
                dq = tl.dot(dz.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=out_type)
    if dq_ptr is None:
        tl.store(delta_ptr + first_stat + row_index, total, mask=row_index < n_q)
    else:
        dq_ptr += batch * stride_dq_batch + head * stride_dq_head + first_q * stride_dq_row
        store_rows(dq_ptr, dq * gradient_scale, row, n_q, stride_dq_row, stride_dq_col, HEAD,
                   BLOCK_QUERIES, BLOCK_HEAD)  # fmt: skip


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
    AFTER: tl.constexpr, QUADS: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr,
    HEAD_V: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_HEAD_V: tl.constexpr,
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
            at_q = batch * stride_q_batch + head * stride_q_head
            at_k = batch * stride_k_batch + head // group * stride_k_head
            at_v = batch * stride_v_batch + head // group * stride_v_head
            at_dy = batch * stride_dy_batch + head * stride_dy_head
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
                maxima_ptr, sums_ptr, delta_ptr, first_stat + row_index, row_index < n_queries, True
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
