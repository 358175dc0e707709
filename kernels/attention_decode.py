"""Attention of one query a sequence to a long cache of keys and values: decoding.

The keys of a sequence are shared out to several programs, each of which keeps a maximum, a sum and
a weighted sum of values; a second kernel puts them together ("Flash-Decoding", 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). A cache may be paged (Kwon et al., 2023,
https://arxiv.org/abs/2309.06180): a table says which page holds which positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gpunn.kernels.attention_operands import block_of, unit_of
from gpunn.kernels.attention_problem import SCORE_UNIT
from gpunn.kernels.flash import finite, load_rows, power, scores
from gpunn.kernels.launch import Launch, device_of, operator, run
from gpunn.kernels.numeric import LOG2E, multiple
from gpunn.kernels.product import precision_of


@dataclass(frozen=True)
class DecodeLaunch(Launch):
    """Keys a step."""

    num_warps: int = 4
    num_stages: int = 3
    block_keys: int = 64


@dataclass(frozen=True)
class CombineLaunch(Launch):
    """One program a head."""

    num_warps: int = 4


NARROW, WIDE, WIDEST = DecodeLaunch(), DecodeLaunch(block_keys=32), DecodeLaunch(4, 2, 16)
COMBINE = CombineLaunch()
MOST_PARTS = 64
LEAST_KEYS_A_PART = 256


@triton.jit
def cache_rows(
    ptr, table_ptr, position, n_keys, page_size, stride_page, stride_row, stride_col,
    N_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Rows of a cache from a position on, zero past n_keys; ``table_ptr`` is that of a sequence."""
    rows, cols = position + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS).to(tl.int64)
    mask, slot, first = rows < n_keys, rows, tl.zeros((BLOCK_ROWS,), dtype=tl.int64)
    if table_ptr is not None:
        page = tl.load(table_ptr + rows // page_size, mask=mask, other=0)
        slot, first = rows % page_size, page.to(tl.int64) * stride_page
    at = (first + slot.to(tl.int64) * stride_row)[:, None] + cols[None, :] * stride_col
    return tl.load(ptr + at, mask=mask[:, None] & (cols < N_COLS)[None, :], other=0.0)


@triton.jit
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, slopes_ptr, total_ptr, maxima_ptr, sums_ptr,
    n_key_heads, group, page_size, n_parts, before,
    stride_q_batch, stride_q_head, stride_q_col,
    stride_k_page, stride_k_head, stride_k_row, stride_k_col,
    stride_v_page, stride_v_head, stride_v_row, stride_v_col, stride_table,
    stride_slopes_batch, stride_slopes_head, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, BEFORE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_HEAD_V: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Of a part of the keys of a sequence: Σ exp(s - m) v, m and Σ exp(s - m), per query head.

    A program owns a part and a key head, with the query heads that share it. The results are
    (batch, heads, parts, Ev) and (batch, heads, parts).
    """
    part, index = tl.program_id(0) % n_parts, tl.program_id(0) // n_parts
    batch, key_head = (index // n_key_heads).to(tl.int64), (index % n_key_heads).to(tl.int64)
    n_keys = tl.load(lengths_ptr + batch).to(tl.int32)
    own = n_keys - 1
    steps = tl.cdiv(tl.cdiv(n_keys, n_parts), BLOCK_KEYS)
    start = part * steps * BLOCK_KEYS
    end = tl.minimum(start + steps * BLOCK_KEYS, n_keys)
    if BEFORE:
        start = tl.maximum(start, tl.maximum(own - before, 0) // BLOCK_KEYS * BLOCK_KEYS)
    stride_q_batch, stride_q_head = multiple(stride_q_batch, UNIT), multiple(stride_q_head, UNIT)
    stride_k_page, stride_v_page = multiple(stride_k_page, UNIT), multiple(stride_v_page, UNIT)
    stride_k_head, stride_v_head = multiple(stride_k_head, UNIT), multiple(stride_v_head, UNIT)
    stride_k_row, stride_v_row = multiple(stride_k_row, UNIT), multiple(stride_v_row, UNIT)
    members = tl.arange(0, BLOCK_GROUP)
    heads = key_head * group + members
    q = load_rows(q_ptr + batch * stride_q_batch + key_head * group * stride_q_head, 0, group,
                  stride_q_head, stride_q_col, HEAD, BLOCK_GROUP, BLOCK_HEAD)  # fmt: skip
    slope = 0.0
    if slopes_ptr is not None:
        at_slope = batch * stride_slopes_batch + heads * stride_slopes_head
        slopes = tl.load(slopes_ptr + at_slope, mask=members < group, other=0.0)
        slope = slopes[:, None] * LOG2E
    out_type: tl.constexpr = total_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_GROUP, BLOCK_HEAD_V), dtype=out_type)
    peak = tl.full((BLOCK_GROUP,), -float("inf"), dtype=out_type)
    norm = tl.zeros((BLOCK_GROUP,), dtype=out_type)
    k_ptr += key_head * stride_k_head
    v_ptr += key_head * stride_v_head
    if table_ptr is None:
        k_ptr += batch * stride_k_page
        v_ptr += batch * stride_v_page
    else:
        table_ptr += batch * stride_table
    for key in tl.range(start, end, BLOCK_KEYS):
        k = cache_rows(k_ptr, table_ptr, key, n_keys, page_size, stride_k_page, stride_k_row,
                       stride_k_col, HEAD, BLOCK_KEYS, BLOCK_HEAD)  # fmt: skip
        products = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=out_type)
        rows, cols = tl.full((1, 1), own, tl.int32), (key + tl.arange(0, BLOCK_KEYS))[None, :]
        s, _ = scores(products, 0.0, rows, cols, n_keys, slope, scale, softcap, before, 0, 0, False,
                      slopes_ptr is not None, HAS_SOFTCAP, BEFORE, False, True)  # fmt: skip
        highest = tl.maximum(peak, tl.max(s, 1))
        shift = finite(highest)
        p, decay = power(s - shift[:, None], False), power(peak - shift, False)
        norm, peak = norm * decay + tl.sum(p, 1), highest
        v = cache_rows(v_ptr, table_ptr, key, n_keys, page_size, stride_v_page, stride_v_row,
                       stride_v_col, HEAD_V, BLOCK_KEYS, BLOCK_HEAD_V)  # fmt: skip
        total = tl.dot(p.to(v.dtype), v, total * decay[:, None], input_precision=PRECISION,
                       out_dtype=out_type)  # fmt: skip
    at = (batch * n_key_heads * group + heads) * n_parts + part
    cols = tl.arange(0, BLOCK_HEAD_V)
    tl.store(total_ptr + at[:, None] * HEAD_V + cols[None, :], total,
             mask=(members < group)[:, None] & (cols < HEAD_V)[None, :])  # fmt: skip
    tl.store(maxima_ptr + at, peak, mask=members < group)
    tl.store(sums_ptr + at, norm, mask=members < group)


@triton.jit
def attention_combine_kernel(
    total_ptr, maxima_ptr, sums_ptr, y_ptr,
    N_PARTS: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_HEAD_V: tl.constexpr,
):  # fmt: skip
    """y = Σ exp(m - max m) total / Σ exp(m - max m) sum over parts. A program owns a head."""
    index, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_HEAD_V)
    peak = -float("inf")
    for part in range(N_PARTS):
        peak = tl.maximum(peak, tl.load(maxima_ptr + index * N_PARTS + part))
    peak = finite(peak)
    y = tl.zeros((BLOCK_HEAD_V,), dtype=total_ptr.dtype.element_ty)
    norm = tl.zeros((1,), dtype=total_ptr.dtype.element_ty)
    for part in range(N_PARTS):
        at = index * N_PARTS + part
        weight = power(tl.load(maxima_ptr + at) - peak, False)
        total = tl.load(total_ptr + at * HEAD_V + cols, mask=cols < HEAD_V, other=0.0)
        y += weight * total
        norm += weight * tl.load(sums_ptr + at)
    y /= tl.where(norm == 0, 1.0, norm)
    tl.store(y_ptr + index * HEAD_V + cols, y.to(y_ptr.dtype.element_ty), mask=cols < HEAD_V)


def n_parts_for(n_programs: int, most_keys: int, n_multiprocessors: int) -> int:
    """Into how many parts the keys are shared out: so many that each multiprocessor has two.

    A power of two, since each number is a kernel of its own.
    """
    wanted = min(2 * n_multiprocessors // n_programs, most_keys // LEAST_KEYS_A_PART, MOST_PARTS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def launch_for(widest: int, dtype: torch.dtype) -> DecodeLaunch:
    """The configuration for heads of this size."""
    by_size = widest * dtype.itemsize
    return NARROW if by_size <= 256 else WIDE if by_size <= 512 else WIDEST


def _decode_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    before: int,
) -> torch.Tensor:
    return q.new_empty((*q.shape[:2], v.shape[-1]))


@operator(
    "attention_decode(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? table, Tensor? slopes, "
    "float scale, float softcap, int before) -> Tensor",
    fake=_decode_fake,
)
def attention_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    before: int,
) -> torch.Tensor:
    """y (batch, heads, Ev) for q (batch, heads, E); the last of ``lengths`` keys is q's own place.

    k and v are (batch, key heads, positions, E), or, with a table (batch, pages) of pages,
    (pages, key heads, positions of a page, E). ``before`` is -1 where there is no window.
    """
    y = _decode_fake(q, k, v, lengths, table, slopes, scale, softcap, before)
    if y.numel() == 0:
        return y
    lengths, table = lengths.contiguous(), None if table is None else table.contiguous()
    (n_batches, n_heads, head), head_v, n_key_heads = q.shape, v.shape[-1], k.shape[1]
    page_size, group = k.shape[2], n_heads // n_key_heads
    most_keys = page_size * (1 if table is None else table.shape[1])
    parts = n_parts_for(n_batches * n_key_heads, most_keys, device_of(q).n_multiprocessors)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    total = q.new_empty((n_batches, n_heads, parts, head_v), dtype=wide)
    maxima, sums = (total.new_empty(total.shape[:3]) for _ in range(2))
    blocks: dict[str, Any] = dict(
        HEAD=head, HEAD_V=head_v, BLOCK_HEAD=block_of(head), BLOCK_HEAD_V=block_of(head_v)
    )
    slope_strides = (0, 0) if slopes is None else slopes.expand(n_batches, n_heads).stride()
    run(
        "attention_decode", attention_decode_kernel, (parts * n_batches * n_key_heads,),
        q, k, v, lengths, table, slopes, total, maxima, sums,
        n_key_heads, group, page_size, parts, before, *q.stride(), *k.stride(), *v.stride(),
        0 if table is None else table.stride(0), *slope_strides,
        scale / softcap if softcap else scale * SCORE_UNIT, softcap * SCORE_UNIT,
        launch=launch_for(max(blocks["BLOCK_HEAD"], blocks["BLOCK_HEAD_V"]), q.dtype),
        HAS_SOFTCAP=softcap != 0, BEFORE=before >= 0, PRECISION=precision_of(q.dtype),
        UNIT=unit_of(q, k, v), BLOCK_GROUP=block_of(group), **blocks,
    )  # fmt: skip
    run(
        "attention_decode", attention_combine_kernel, (n_batches * n_heads,),
        total, maxima, sums, y, launch=COMBINE, N_PARTS=parts, HEAD_V=head_v,
        BLOCK_HEAD_V=blocks["BLOCK_HEAD_V"],
    )  # fmt: skip
    return y
