"""Attention by tiles: y = dropout(softmax(s)) v, with no matrix of scores in memory.

The score of query i and key j is s = cap(scale q_i·k_j) + bias_ij, where cap(z) = c tanh(z / c) if
there is a softcap, and -∞ where a mask, a window or causality rules the pair out. A program keeps
running maxima and sums of its rows while it walks over the keys (T. Dao, "FlashAttention-2", 2023,
https://arxiv.org/abs/2307.08691). Tiles that are ruled out as a whole are skipped.

Scores are in units of log2(e), so that exp is one exp2: scale, softcap and slopes come multiplied
by it. With an additive mask they are NATURAL, since a mask of the smallest float would overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.activation import tanh
from gpunn.kernels.numeric import LOG2E, multiple, widen
from gpunn.kernels.philox import dropout_factor


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """exp(x), of x in the scores' units."""
    return tl.exp2(x * LOG2E if NATURAL else x)


@triton.jit
def finite(m):
    """The maximum of a row, or 0 where all of it is ruled out: to subtract without a NaN."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def load_rows(
    ptr, row, n_rows, stride_row, stride_col,
    N_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Tile (BLOCK_ROWS, BLOCK_COLS) of a matrix of N_COLS columns, zero past its end."""
    rows, cols = row + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
    mask = (rows < n_rows)[:, None]
    if N_COLS < BLOCK_COLS:
        mask = mask & (cols < N_COLS)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def load_tile(
    x, batch, head, row, n_rows, stride_row, stride_col,
    N_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """``load_rows`` of one head, of a descriptor of all or, where there is none, its pointer."""
    if BY_DESCRIPTOR:
        at = [batch.to(tl.int32), head.to(tl.int32), row, 0]
        tile = x.load(at).reshape(BLOCK_ROWS, BLOCK_COLS)
    else:
        tile = load_rows(x, row, n_rows, stride_row, stride_col, N_COLS, BLOCK_ROWS, BLOCK_COLS)
    return tile


@triton.jit
def store_rows(
    ptr, tile, row, n_rows, stride_row, stride_col,
    N_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The counterpart of ``load_rows``."""
    rows, cols = row + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
    mask = (rows < n_rows)[:, None] & (cols < N_COLS)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def sequence(starts_ptr, batch, n):
    """First row and length, at most n, of a packed sequence; without ``starts_ptr``, 0 and n."""
    first, length = tl.cast(0, tl.int64), tl.cast(n, tl.int32)
    if starts_ptr is not None:
        first = tl.load(starts_ptr + batch).to(tl.int64)
        length = tl.minimum(tl.load(starts_ptr + batch + 1) - first, n).to(tl.int32)
    return first, length


@triton.jit
def visible_range(
    first, last, n, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Which of n positions a block of others, from ``first`` to ``last``, may be paired with.

    Position p is paired with those from p - before to p + after, where BEFORE and AFTER say that
    there are such bounds. Four bounds of three ranges: tiles with pairs that are ruled out, tiles
    with none, and, up to the end, tiles with some again; all but the last at multiples of BLOCK.
    """
    start, end, whole_start, whole_end = 0, n, 0, n // BLOCK * BLOCK
    if BEFORE:
        start = tl.minimum(tl.maximum(first - before, 0) // BLOCK * BLOCK, n)
        whole_start = tl.cdiv(tl.maximum(last - before, 0), BLOCK) * BLOCK
    if AFTER:
        end = tl.minimum(tl.maximum(last + after + 1, 0), n)
        whole_end = tl.minimum(tl.maximum(first + after + 1, 0) // BLOCK * BLOCK, whole_end)
    start = tl.minimum(start, end)
    whole_start = tl.minimum(tl.maximum(whole_start, start), tl.cdiv(end, BLOCK) * BLOCK)
    whole_end = tl.maximum(whole_start, whole_end)
    return start, whole_start, whole_end, end


@triton.jit
def slope_of(slopes_ptr, at, NATURAL: tl.constexpr):
    """The slope of a head, in the scores' units; 0 where there are none."""
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + at)
        slope = slope if NATURAL else slope * LOG2E
    return slope


@triton.jit
def batch_of_mask(mask_batches_ptr, batch):
    """Which of a mask's batches belongs to a batch: they may be repeated in any pattern."""
    if mask_batches_ptr is not None:
        batch = tl.load(mask_batches_ptr + batch)
    return batch


@triton.jit
def bias_tile(mask_ptr, rows, cols, n_rows, n_cols, stride_row, stride_col):
    """What a mask adds to a tile of scores; of a boolean one, -∞ where it is False.

    ``rows`` and ``cols`` are the queries' and keys' positions, in tensors that broadcast.
    """
    at = rows.to(tl.int64) * stride_row + cols.to(tl.int64) * stride_col
    inside = (rows < n_rows) & (cols < n_cols)
    bias = tl.load(mask_ptr + at, mask=inside, other=0)
    if mask_ptr.dtype.element_ty == tl.uint8:
        bias = tl.where(bias != 0, 0.0, -float("inf"))
    return widen(bias)


@triton.jit
def scores(
    products, bias, rows, cols, n_cols, slope, scale, softcap, before, after, offset,
    HAS_BIAS: tl.constexpr, HAS_SLOPE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scores of a tile from its products q·k, and the derivative of the softcap, cap'.

    EDGE says that the tile may reach past the last key or hold pairs that are ruled out.
    """
    s, derivative = products * scale, 1.0
    if HAS_SOFTCAP:
        t = tanh(s, 0.0, 0.0)
        s, derivative = softcap * t, 1 - t * t
    distance = cols - (rows + offset)
    if HAS_SLOPE:
        s -= slope * tl.abs(distance)
    if HAS_BIAS:
        s += bias
    if EDGE:
        keep = cols < n_cols
        if AFTER and not HAS_SLOPE:  # a bound of a row, and one comparison an element
            keep = cols < tl.minimum(rows + offset + after + 1, n_cols)
        elif AFTER:
            keep = keep & (distance <= after)
        if BEFORE:
            keep = keep & (distance >= -before)
        s = tl.where(keep, s, -float("inf"))
    return s, derivative


@triton.jit
def attend(
    total, peak, norm, q, k_ptr, v_ptr, mask_ptr, seed_ptr, batch, key_head, rows, stat_rows,
    start, end, n_queries, n_keys, n_columns, stride_k_row, stride_k_col, stride_v_row,
    stride_v_col, stride_mask_row, stride_mask_col, slope, scale, softcap, before, after, offset,
    threshold, dropout_scale,
    HAS_SLOPE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    NATURAL: tl.constexpr, SCALED_LATE: tl.constexpr, QUADS: tl.constexpr,
    PRECISION: tl.constexpr, BY_DESCRIPTOR: tl.constexpr, EDGE: tl.constexpr,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    BLOCK_HEAD_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys from ``start`` to ``end``: Σ p v, the maxima and Σ p.

    SCALED_LATE, the maxima are those of the products, and scale and shift are one instruction.
    """
    late = scale if SCALED_LATE else 1.0
    for key in tl.range(start, end, BLOCK_KEYS):
        cols = (key + tl.arange(0, BLOCK_KEYS))[None, :]
        bias, wanted = 0.0, True
        if mask_ptr is not None:
            bias = bias_tile(mask_ptr, rows, cols, n_queries, n_keys, stride_mask_row,
                             stride_mask_col)  # fmt: skip
            wanted = tl.max(bias) != -float("inf")
        if wanted:
            k = load_tile(k_ptr, batch, key_head, key, n_keys, stride_k_row, stride_k_col, HEAD,
                          BLOCK_KEYS, BLOCK_HEAD, BY_DESCRIPTOR)  # fmt: skip
            products = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=total.dtype)
            s, _ = scores(products, bias, rows, cols, n_keys, slope,
                          1.0 if SCALED_LATE else scale, softcap, before, after, offset,
                          mask_ptr is not None, HAS_SLOPE, HAS_SOFTCAP, BEFORE, AFTER,
                          EDGE)  # fmt: skip
            highest = tl.maximum(peak, tl.max(s, 1))
            shift = finite(highest) * late
            p = power(s * late - shift[:, None], NATURAL)
            decay = power(peak * late - shift, NATURAL)
            norm = norm * decay + tl.sum(p, 1)
            peak = highest
            if seed_ptr is not None:
                p *= dropout_factor(seed_ptr, stat_rows, key, n_columns, threshold, dropout_scale,
                                    QUADS, BLOCK_QUERIES, BLOCK_KEYS)  # fmt: skip
            v = load_tile(v_ptr, batch, key_head, key, n_keys, stride_v_row, stride_v_col, HEAD_V,
                          BLOCK_KEYS, BLOCK_HEAD_V, BY_DESCRIPTOR)  # fmt: skip
            total = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision=PRECISION,
                           out_dtype=total.dtype)  # fmt: skip
    return total, peak, norm


@triton.jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, mask_batches_ptr, seed_ptr, starts_q_ptr,
    starts_k_ptr, y_ptr, rest_ptr, maxima_ptr, sums_ptr,
    n_heads, group, n_queries, n_keys, before, after,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_v_batch, stride_v_head, stride_v_row, stride_v_col,
    stride_y_batch, stride_y_head, stride_y_row, stride_y_col,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_col,
    stride_slopes_batch, stride_slopes_head, stride_stat_batch, stride_stat_head,
    scale, softcap, threshold, dropout_scale,
    LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, NATURAL: tl.constexpr, SCALED_LATE: tl.constexpr, QUADS: tl.constexpr,
    UNEVEN: tl.constexpr, PRECISION: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
    UNIT: tl.constexpr, HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    BLOCK_HEAD_V: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """y = dropout(softmax(s)) v, and of each row the maximum of s and the sum of exp(s - maximum).

    ``rest_ptr``, laid out as y, is for what y loses when it is rounded to 16 bits. A program owns
    BLOCK_QUERIES rows of one head, the last ones first: with causality they take longest.
    """
    n_blocks = tl.cdiv(n_queries, BLOCK_QUERIES)
    row = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_QUERIES
    batch, head = tl.program_id(0) // n_blocks // n_heads, tl.program_id(0) // n_blocks % n_heads
    first_q, n_q = sequence(starts_q_ptr, batch, n_queries)
    first_k, n_k = sequence(starts_k_ptr, batch, n_keys)
    wide, wide_head, key_head = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    stride_q_row, stride_k_row = multiple(stride_q_row, UNIT), multiple(stride_k_row, UNIT)
    stride_v_row, stride_y_row = multiple(stride_v_row, UNIT), multiple(stride_y_row, UNIT)
    if not BY_DESCRIPTOR:
        q_ptr += multiple(wide * stride_q_batch + wide_head * stride_q_head, UNIT)
        k_ptr += multiple(wide * stride_k_batch + key_head * stride_k_head, UNIT)
        v_ptr += multiple(wide * stride_v_batch + key_head * stride_v_head, UNIT)
        q_ptr += first_q * stride_q_row
        k_ptr += first_k * stride_k_row
        v_ptr += first_k * stride_v_row
    first_stat = wide * stride_stat_batch + wide_head * stride_stat_head + first_q
    if mask_ptr is not None:
        mask_batch = batch_of_mask(mask_batches_ptr, wide)
        mask_ptr += mask_batch * stride_mask_batch + wide_head * stride_mask_head
    slope = slope_of(slopes_ptr, wide * stride_slopes_batch + wide_head * stride_slopes_head,
                     NATURAL)  # fmt: skip
    offset = n_k - n_q if LOWER_RIGHT else 0
    row_index = row + tl.arange(0, BLOCK_QUERIES)
    rows, stat_rows = row_index[:, None], first_stat + row_index
    out_type: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    q = load_tile(q_ptr, batch, head, row, n_q, stride_q_row, stride_q_col, HEAD, BLOCK_QUERIES,
                  BLOCK_HEAD, BY_DESCRIPTOR)  # fmt: skip
    total = tl.zeros((BLOCK_QUERIES, BLOCK_HEAD_V), dtype=out_type)
    peak = tl.full((BLOCK_QUERIES,), -float("inf"), dtype=out_type)
    norm = tl.zeros((BLOCK_QUERIES,), dtype=out_type)
    start, whole_start, whole_end, end = visible_range(
        row + offset, tl.minimum(row + BLOCK_QUERIES, n_q) - 1 + offset,
        tl.where(row < n_q, n_k, 0), before, after, BEFORE, AFTER, BLOCK_KEYS
    )  # fmt: skip
    HAS_MASK: tl.constexpr = mask_ptr is not None
    if HAS_MASK:  # one loop, to save code and registers
        whole_end = start
    for part in tl.static_range(3):
        lower = start if part == 0 else whole_start if part == 1 else whole_end
        upper = whole_start if part == 0 else whole_end if part == 1 else end
        if (HAS_MASK or AFTER or UNEVEN) if part == 2 else not HAS_MASK and (BEFORE or part == 1):
            total, peak, norm = attend(
                total, peak, norm, q, k_ptr, v_ptr, mask_ptr, seed_ptr, batch, key_head, rows,
                stat_rows, lower, upper, n_q, n_k, n_keys, stride_k_row, stride_k_col,
                stride_v_row, stride_v_col, stride_mask_row, stride_mask_col, slope, scale,
                softcap, before, after, offset, threshold, dropout_scale, slopes_ptr is not None,
                HAS_SOFTCAP, BEFORE, AFTER, NATURAL, SCALED_LATE, QUADS, PRECISION, BY_DESCRIPTOR,
                part != 1, HEAD, HEAD_V, BLOCK_HEAD, BLOCK_HEAD_V, BLOCK_QUERIES, BLOCK_KEYS,
            )  # fmt: skip
    if SCALED_LATE:
        peak *= scale
    y = total / tl.where(norm == 0, 1.0, norm)[:, None]
    at_y = multiple(wide * stride_y_batch + wide_head * stride_y_head, UNIT)
    at_y += first_q * stride_y_row
    store_rows(y_ptr + at_y, y, row, n_q, stride_y_row, stride_y_col, HEAD_V, BLOCK_QUERIES,
               BLOCK_HEAD_V)  # fmt: skip
    if rest_ptr is not None:
        rest = y - y.to(y_ptr.dtype.element_ty).to(out_type)
        store_rows(rest_ptr + at_y, rest, row, n_q, stride_y_row, stride_y_col, HEAD_V,
                   BLOCK_QUERIES, BLOCK_HEAD_V)  # fmt: skip
    tl.store(maxima_ptr + stat_rows, peak, mask=row_index < n_q)
    tl.store(sums_ptr + stat_rows, norm, mask=row_index < n_q)
