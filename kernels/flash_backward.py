"""Gradients of attention, by tiles: those of keys and values, and those of queries.

With p = softmax(s), d the dropout's factors, and dy the gradient of y = (p d) v::

    dv = (p d)ᵀ dy        dp = d (dy vᵀ)        delta = Σ_j p dp = Σ dy y
    ds = p (dp - delta)   dz = cap' ds          dq = scale dz k      dk = scale dzᵀ q

p is computed again from the scores and the row's maximum and sum. Each result has a kernel that
owns a tile of it and adds up in a fixed order: no atomics, and the same bits from run to run.
It walks over whole tiles apart from those with pairs that are ruled out, but with ONE_LOOP.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.flash import (
    batch_of_mask,
    bias_tile,
    finite,
    load_tile,
    power,
    scores,
    sequence,
    slope_of,
    store_rows,
    visible_range,
)
from gpunn.kernels.numeric import multiple
from gpunn.kernels.philox import dropout_factor


@triton.jit
def load_statistic(ptr, first, rows, n_rows, other, PAST_END: tl.constexpr):
    """One number of each row; with PAST_END, ``other`` of those that are."""
    if PAST_END:
        found = tl.load(ptr + first + rows, mask=rows < n_rows, other=other)
    else:
        found = tl.load(ptr + first + rows)
    return found


@triton.jit
def row_statistics(
    shifts_ptr, sums_ptr, delta_ptr, first, rows, n_rows, PAST_END: tl.constexpr
):  # fmt: skip
    """What to subtract from the scores of rows, what to multiply exp of it by, and delta, or 0.

    Without ``sums_ptr``, the shifts are those of ``shift_of``, and there is no factor; with it,
    they are the maxima. PAST_END says that rows may be past the last one.
    """
    shift = load_statistic(shifts_ptr, first, rows, n_rows, float("inf"), PAST_END)
    factor, delta = tl.zeros_like(shift), tl.zeros_like(shift)
    if sums_ptr is not None:
        total = load_statistic(sums_ptr, first, rows, n_rows, 1.0, PAST_END)
        shift, factor = finite(shift), 1 / tl.where(total == 0, 1.0, total)
    if delta_ptr is not None:
        delta = load_statistic(delta_ptr, first, rows, n_rows, 0.0, PAST_END)
    return shift, factor, delta


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
def add_key_gradients(
    dk, dv, k, v, q_ptr, dy_ptr, mask_ptr, seed_ptr, shifts_ptr, sums_ptr, delta_ptr, batch, head,
    key, cols, start, end, n_queries, n_keys, n_columns, stride_q_row, stride_q_col,
    stride_dy_row, stride_dy_col, stride_mask_row, stride_mask_col, first_stat, slope, scale,
    softcap, before, after, offset, threshold, dropout_scale,
    HAS_SLOPE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    NATURAL: tl.constexpr, QUADS: tl.constexpr, PRECISION: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr, EDGE: tl.constexpr, PAST_END: tl.constexpr, HEAD: tl.constexpr,
    HEAD_V: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_HEAD_V: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv of a tile of keys what the queries from ``start`` to ``end`` give.

    EDGE says that pairs may be ruled out, PAST_END that there may be fewer queries.
    """
    EXACT: tl.constexpr = sums_ptr is not None
    for row in tl.range(start, end, BLOCK_QUERIES):
        row_index = row + tl.arange(0, BLOCK_QUERIES)
        rows, bias, wanted = row_index[None, :], 0.0, True
        if mask_ptr is not None:
            bias = bias_tile(mask_ptr, rows, cols, n_queries, n_keys, stride_mask_row,
                             stride_mask_col)  # fmt: skip
            wanted = tl.max(bias) != -float("inf")
        if wanted:
            q = load_tile(q_ptr, batch, head, row, n_queries, stride_q_row, stride_q_col, HEAD,
                          BLOCK_QUERIES, BLOCK_HEAD, BY_DESCRIPTOR)  # fmt: skip
            dy = load_tile(dy_ptr, batch, head, row, n_queries, stride_dy_row, stride_dy_col,
                           HEAD_V, BLOCK_QUERIES, BLOCK_HEAD_V, BY_DESCRIPTOR)  # fmt: skip
            shift, factor, delta = row_statistics(
                shifts_ptr, sums_ptr, delta_ptr, first_stat, row_index, n_queries, PAST_END
            )
            products = tl.dot(k, q.T, input_precision=PRECISION, out_dtype=dk.dtype)
            dp = tl.dot(v, dy.T, input_precision=PRECISION, out_dtype=dk.dtype)
            dropped = 1.0
            if seed_ptr is not None:
                dropped = dropout_factor(seed_ptr, first_stat + row_index, key, n_columns,
                                         threshold, dropout_scale, QUADS, BLOCK_QUERIES,
                                         BLOCK_KEYS).T  # fmt: skip
            kept, _ds, dz = tile_gradients(
                products, dp, bias, shift[None, :], factor[None, :], delta[None, :], dropped,
                rows, cols, n_keys, slope, scale, softcap, before, after, offset,
                mask_ptr is not None, HAS_SLOPE, HAS_SOFTCAP, seed_ptr is not None, BEFORE,
                AFTER, NATURAL, EXACT, EDGE,
            )  # fmt: skip
            dv = tl.dot(kept.to(dy.dtype), dy, dv, input_precision=PRECISION, out_dtype=dv.dtype)
            dk = tl.dot(dz.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv


@triton.jit
def attention_key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, mask_batches_ptr, seed_ptr, starts_q_ptr,
    starts_k_ptr, dy_ptr, shifts_ptr, sums_ptr, delta_ptr, dk_ptr, dv_ptr,
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
    AFTER: tl.constexpr, NATURAL: tl.constexpr, QUADS: tl.constexpr, UNEVEN: tl.constexpr,
    ONE_LOOP: tl.constexpr, PRECISION: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
    UNIT: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_HEAD: tl.constexpr,
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
    stride_q_row, stride_k_row = multiple(stride_q_row, UNIT), multiple(stride_k_row, UNIT)
    stride_v_row, stride_dy_row = multiple(stride_v_row, UNIT), multiple(stride_dy_row, UNIT)
    stride_dk_row, stride_dv_row = multiple(stride_dk_row, UNIT), multiple(stride_dv_row, UNIT)
    if not BY_DESCRIPTOR:
        k_ptr += multiple(batch * stride_k_batch + key_head * stride_k_head, UNIT)
        v_ptr += multiple(batch * stride_v_batch + key_head * stride_v_head, UNIT)
        k_ptr += first_k * stride_k_row
        v_ptr += first_k * stride_v_row
    k = load_tile(k_ptr, batch, key_head, key, n_k, stride_k_row, stride_k_col, HEAD, BLOCK_KEYS,
                  BLOCK_HEAD, BY_DESCRIPTOR)  # fmt: skip
    v = load_tile(v_ptr, batch, key_head, key, n_k, stride_v_row, stride_v_col, HEAD_V, BLOCK_KEYS,
                  BLOCK_HEAD_V, BY_DESCRIPTOR)  # fmt: skip
    offset = n_k - n_q if LOWER_RIGHT else 0
    cols = (key + tl.arange(0, BLOCK_KEYS))[:, None]
    out_type: tl.constexpr = tl.float64 if dk_ptr.dtype.element_ty == tl.float64 else tl.float32
    dk = tl.zeros((BLOCK_KEYS, BLOCK_HEAD), dtype=out_type)
    dv = tl.zeros((BLOCK_KEYS, BLOCK_HEAD_V), dtype=out_type)
    start, whole_start, whole_end, end = visible_range(
        key - offset, tl.minimum(key + BLOCK_KEYS, n_k) - 1 - offset,
        tl.where(key < n_k, n_q, 0), after, before, AFTER, BEFORE, BLOCK_QUERIES
    )  # fmt: skip
    mask_batch = batch_of_mask(mask_batches_ptr, batch)
    if ONE_LOOP:
        whole_end = start
    for member in range(group):
        head = key_head * group + member
        q_head_ptr, dy_head_ptr, mask_head_ptr = q_ptr, dy_ptr, mask_ptr
        if not BY_DESCRIPTOR:
            q_head_ptr += multiple(batch * stride_q_batch + head * stride_q_head, UNIT)
            dy_head_ptr += multiple(batch * stride_dy_batch + head * stride_dy_head, UNIT)
            q_head_ptr += first_q * stride_q_row
            dy_head_ptr += first_q * stride_dy_row
        if mask_ptr is not None:
            mask_head_ptr += mask_batch * stride_mask_batch + head * stride_mask_head
        first_stat = batch * stride_stat_batch + head * stride_stat_head + first_q
        slope = slope_of(slopes_ptr, batch * stride_slopes_batch + head * stride_slopes_head,
                         NATURAL)  # fmt: skip
        # Whole tiles first: the other way round the assembler waits for each product.
        for part in tl.static_range(3):
            lower = whole_start if part == 0 else start if part == 1 else whole_end
            upper = whole_end if part == 0 else whole_start if part == 1 else end
            some = (ONE_LOOP or BEFORE or UNEVEN) if part == 2 else AFTER or part == 0
            if some and (part == 2 or not ONE_LOOP):
                dk, dv = add_key_gradients(
                    dk, dv, k, v, q_head_ptr, dy_head_ptr, mask_head_ptr, seed_ptr, shifts_ptr,
                    sums_ptr, delta_ptr, batch, head, key, cols, lower, upper, n_q, n_k, n_keys,
                    stride_q_row, stride_q_col, stride_dy_row, stride_dy_col, stride_mask_row,
                    stride_mask_col, first_stat, slope, scale, softcap, before, after, offset,
                    threshold, dropout_scale, slopes_ptr is not None, HAS_SOFTCAP, BEFORE, AFTER,
                    NATURAL, QUADS, PRECISION, BY_DESCRIPTOR, part != 0 and (BEFORE or AFTER),
                    part != 0 and UNEVEN, HEAD, HEAD_V, BLOCK_HEAD, BLOCK_HEAD_V, BLOCK_QUERIES,
                    BLOCK_KEYS,
                )  # fmt: skip
    dk_ptr += multiple(batch * stride_dk_batch + key_head * stride_dk_head, UNIT)
    dv_ptr += multiple(batch * stride_dv_batch + key_head * stride_dv_head, UNIT)
    dk_ptr += first_k * stride_dk_row
    dv_ptr += first_k * stride_dv_row
    store_rows(dk_ptr, dk * gradient_scale, key, n_k, stride_dk_row, stride_dk_col, HEAD,
               BLOCK_KEYS, BLOCK_HEAD)  # fmt: skip
    store_rows(dv_ptr, dv, key, n_k, stride_dv_row, stride_dv_col, HEAD_V, BLOCK_KEYS,
               BLOCK_HEAD_V)  # fmt: skip


@triton.jit
def add_query_gradient(
    dq, total, q, dy, k_ptr, v_ptr, mask_ptr, seed_ptr, shift, factor, delta, batch, key_head,
    rows, stat_rows, start, end, n_queries, n_keys, n_columns, stride_k_row, stride_k_col,
    stride_v_row, stride_v_col, stride_mask_row, stride_mask_col, slope, scale, softcap, before,
    after, offset, threshold, dropout_scale,
    IS_DELTA: tl.constexpr, HAS_SLOPE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, NATURAL: tl.constexpr, EXACT: tl.constexpr,
    QUADS: tl.constexpr, PRECISION: tl.constexpr, BY_DESCRIPTOR: tl.constexpr, EDGE: tl.constexpr,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    BLOCK_HEAD_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Add to dq of a tile of rows, or to Σ ds, what keys from ``start`` to ``end`` give."""
    for key in tl.range(start, end, BLOCK_KEYS):
        cols, bias, wanted = (key + tl.arange(0, BLOCK_KEYS))[None, :], 0.0, True
        if mask_ptr is not None:
            bias = bias_tile(mask_ptr, rows, cols, n_queries, n_keys, stride_mask_row,
                             stride_mask_col)  # fmt: skip
            wanted = tl.max(bias) != -float("inf")
        if wanted:
            k = load_tile(k_ptr, batch, key_head, key, n_keys, stride_k_row, stride_k_col, HEAD,
                          BLOCK_KEYS, BLOCK_HEAD, BY_DESCRIPTOR)  # fmt: skip
            v = load_tile(v_ptr, batch, key_head, key, n_keys, stride_v_row, stride_v_col, HEAD_V,
                          BLOCK_KEYS, BLOCK_HEAD_V, BY_DESCRIPTOR)  # fmt: skip
            products = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=dq.dtype)
            dp = tl.dot(dy, v.T, input_precision=PRECISION, out_dtype=dq.dtype)
            dropped = 1.0
            if seed_ptr is not None:
                dropped = dropout_factor(seed_ptr, stat_rows, key, n_columns, threshold,
                                         dropout_scale, QUADS, BLOCK_QUERIES,
                                         BLOCK_KEYS)  # fmt: skip
            _kept, ds, dz = tile_gradients(
                products, dp, bias, shift[:, None], factor[:, None], delta[:, None], dropped,
                rows, cols, n_keys, slope, scale, softcap, before, after, offset,
                mask_ptr is not None, HAS_SLOPE, HAS_SOFTCAP, seed_ptr is not None, BEFORE,
                AFTER, NATURAL, EXACT, EDGE,
            )  # fmt: skip
            if IS_DELTA:
                total += tl.sum(ds, 1)
            else:
                dq = tl.dot(dz.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)
    return dq, total


@triton.jit
def attention_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, mask_batches_ptr, seed_ptr, starts_q_ptr,
    starts_k_ptr, dy_ptr, shifts_ptr, sums_ptr, delta_ptr, dq_ptr,
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
    AFTER: tl.constexpr, NATURAL: tl.constexpr, QUADS: tl.constexpr, UNEVEN: tl.constexpr,
    ONE_LOOP: tl.constexpr, PRECISION: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
    UNIT: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    BLOCK_HEAD_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
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
    stride_q_row, stride_k_row = multiple(stride_q_row, UNIT), multiple(stride_k_row, UNIT)
    stride_v_row, stride_dy_row = multiple(stride_v_row, UNIT), multiple(stride_dy_row, UNIT)
    stride_dq_row = multiple(stride_dq_row, UNIT)
    if not BY_DESCRIPTOR:
        q_ptr += multiple(batch * stride_q_batch + head * stride_q_head, UNIT)
        k_ptr += multiple(batch * stride_k_batch + key_head * stride_k_head, UNIT)
        v_ptr += multiple(batch * stride_v_batch + key_head * stride_v_head, UNIT)
        dy_ptr += multiple(batch * stride_dy_batch + head * stride_dy_head, UNIT)
        q_ptr += first_q * stride_q_row
        k_ptr += first_k * stride_k_row
        v_ptr += first_k * stride_v_row
        dy_ptr += first_q * stride_dy_row
    if mask_ptr is not None:
        mask_batch = batch_of_mask(mask_batches_ptr, batch)
        mask_ptr += mask_batch * stride_mask_batch + head * stride_mask_head
    slope = slope_of(slopes_ptr, batch * stride_slopes_batch + head * stride_slopes_head, NATURAL)
    row_index = row + tl.arange(0, BLOCK_QUERIES)
    first_stat = batch * stride_stat_batch + head * stride_stat_head + first_q
    shift, factor, delta = row_statistics(
        shifts_ptr, sums_ptr, None if dq_ptr is None else delta_ptr, first_stat, row_index, n_q,
        True
    )  # fmt: skip
    q = load_tile(q_ptr, batch, head, row, n_q, stride_q_row, stride_q_col, HEAD, BLOCK_QUERIES,
                  BLOCK_HEAD, BY_DESCRIPTOR)  # fmt: skip
    dy = load_tile(dy_ptr, batch, head, row, n_q, stride_dy_row, stride_dy_col, HEAD_V,
                   BLOCK_QUERIES, BLOCK_HEAD_V, BY_DESCRIPTOR)  # fmt: skip
    offset, rows = n_k - n_q if LOWER_RIGHT else 0, row_index[:, None]
    out_type: tl.constexpr = shifts_ptr.dtype.element_ty
    dq = tl.zeros((BLOCK_QUERIES, BLOCK_HEAD), dtype=out_type)
    total = tl.zeros((BLOCK_QUERIES,), dtype=out_type)
    start, whole_start, whole_end, end = visible_range(
        row + offset, tl.minimum(row + BLOCK_QUERIES, n_q) - 1 + offset,
        tl.where(row < n_q, n_k, 0), before, after, BEFORE, AFTER, BLOCK_KEYS
    )  # fmt: skip
    if ONE_LOOP:
        whole_end = start
    for part in tl.static_range(3):
        lower = start if part == 0 else whole_start if part == 1 else whole_end
        upper = whole_start if part == 0 else whole_end if part == 1 else end
        if (ONE_LOOP or AFTER or UNEVEN) if part == 2 else not ONE_LOOP and (BEFORE or part == 1):
            dq, total = add_query_gradient(
                dq, total, q, dy, k_ptr, v_ptr, mask_ptr, seed_ptr, shift, factor, delta, batch,
                key_head, rows, first_stat + row_index, lower, upper, n_q, n_k, n_keys,
                stride_k_row, stride_k_col, stride_v_row, stride_v_col, stride_mask_row,
                stride_mask_col, slope, scale, softcap, before, after, offset, threshold,
                dropout_scale, dq_ptr is None, slopes_ptr is not None, HAS_SOFTCAP, BEFORE, AFTER,
                NATURAL, sums_ptr is not None, QUADS, PRECISION, BY_DESCRIPTOR,
                part != 1 and (BEFORE or AFTER or UNEVEN), HEAD, HEAD_V, BLOCK_HEAD, BLOCK_HEAD_V,
                BLOCK_QUERIES, BLOCK_KEYS,
            )  # fmt: skip
    if dq_ptr is None:
        tl.store(delta_ptr + first_stat + row_index, total, mask=row_index < n_q)
    else:
        dq_ptr += multiple(batch * stride_dq_batch + head * stride_dq_head, UNIT)
        dq_ptr += first_q * stride_dq_row
        store_rows(dq_ptr, dq * gradient_scale, row, n_q, stride_dq_row, stride_dq_col, HEAD,
                   BLOCK_QUERIES, BLOCK_HEAD)  # fmt: skip
