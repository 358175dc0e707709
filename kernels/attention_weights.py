"""The probabilities of attention themselves, of the heads that are wanted."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gpunn.kernels.attention import ARGUMENTS
from gpunn.kernels.attention_problem import Problem
from gpunn.kernels.flash import batch_of_mask, bias_tile, finite, load_rows, power, scores, slope_of
from gpunn.kernels.launch import cdiv, operator, run
from gpunn.kernels.numeric import multiple


@triton.jit
def attention_weights_kernel(
    q_ptr, k_ptr, mask_ptr, slopes_ptr, mask_batches_ptr, heads_ptr, maxima_ptr, sums_ptr,
    weights_ptr,
    n_heads, group, n_queries, n_keys, before, after, n_wanted,
    stride_q_batch, stride_q_head, stride_q_row, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_row, stride_k_col,
    stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_col,
    stride_slopes_batch, stride_slopes_head, scale, softcap,
    LOWER_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """weights = softmax(s), (batch, wanted heads, queries, keys), contiguous.

    A program owns a tile of one head. ``heads_ptr`` has the numbers of the heads.
    """
    across, down = tl.cdiv(n_keys, BLOCK_KEYS), tl.cdiv(n_queries, BLOCK_QUERIES)
    key = tl.program_id(0) % across * BLOCK_KEYS
    row = tl.program_id(0) // across % down * BLOCK_QUERIES
    index = tl.program_id(0) // across // down
    batch, head = (index // n_wanted).to(tl.int64), tl.load(heads_ptr + index % n_wanted)
    stride_q_row, stride_k_row = multiple(stride_q_row, UNIT), multiple(stride_k_row, UNIT)
    at_q = multiple(batch * stride_q_batch + head * stride_q_head, UNIT)
    at_k = multiple(batch * stride_k_batch + head // group * stride_k_head, UNIT)
    q = load_rows(q_ptr + at_q, row, n_queries, stride_q_row, stride_q_col, HEAD, BLOCK_QUERIES,
                  BLOCK_HEAD)  # fmt: skip
    k = load_rows(k_ptr + at_k, key, n_keys, stride_k_row, stride_k_col, HEAD, BLOCK_KEYS,
                  BLOCK_HEAD)  # fmt: skip
    row_index, col_index = row + tl.arange(0, BLOCK_QUERIES), key + tl.arange(0, BLOCK_KEYS)
    rows, cols, bias = row_index[:, None], col_index[None, :], 0.0
    if mask_ptr is not None:
        mask_batch = batch_of_mask(mask_batches_ptr, batch)
        at_mask = mask_batch * stride_mask_batch + head * stride_mask_head
        bias = bias_tile(mask_ptr + at_mask, rows, cols, n_queries, n_keys, stride_mask_row,
                         stride_mask_col)  # fmt: skip
    slope = slope_of(slopes_ptr, batch * stride_slopes_batch + head * stride_slopes_head, NATURAL)
    at = (batch * n_heads + head) * n_queries + row_index
    shift = finite(tl.load(maxima_ptr + at, mask=row_index < n_queries, other=0.0))
    total = tl.load(sums_ptr + at, mask=row_index < n_queries, other=1.0)
    products = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=total.dtype)
    offset = n_keys - n_queries if LOWER_RIGHT else 0
    s, _ = scores(products, bias, rows, cols, n_keys, slope, scale, softcap, before, after, offset,
                  mask_ptr is not None, slopes_ptr is not None, HAS_SOFTCAP, BEFORE, AFTER,
                  True)  # fmt: skip
    weights = power(s - shift[:, None], NATURAL) / tl.where(total == 0, 1.0, total)[:, None]
    at_weights = (index.to(tl.int64) * n_queries + rows) * n_keys + cols
    tl.store(weights_ptr + at_weights, weights.to(weights_ptr.dtype.element_ty),
             mask=(rows < n_queries) & (cols < n_keys))  # fmt: skip


def _weights_fake(
    heads: torch.Tensor, maxima: torch.Tensor, sums: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    problem = Problem(*arguments)
    shape = problem.n_batches, heads.shape[0], problem.n_queries, problem.n_keys
    return problem.q.new_empty(shape)


@operator(
    f"attention_weights(Tensor heads, Tensor maxima, Tensor sums, {ARGUMENTS}) -> Tensor",
    fake=_weights_fake,
)
def attention_weights(
    heads: torch.Tensor, maxima: torch.Tensor, sums: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    """softmax(s) of these heads, (batch, heads, queries, keys).

    The maxima and sums are those of ``attention_forward``; the arguments, fields of ``Problem``.
    """
    problem, launch = Problem(*arguments), Problem(*arguments).launch("weights")
    weights = _weights_fake(heads, maxima, sums, *arguments)
    if weights.numel() == 0:
        return weights
    down, across = launch.block_queries, launch.block_keys
    n_tiles = cdiv(problem.n_queries, down) * cdiv(problem.n_keys, across)
    constants = problem.constants()
    for name in ("QUADS", "HEAD_V", "BLOCK_HEAD_V"):
        del constants[name]
    run(
        "attention_weights", attention_weights_kernel,
        (n_tiles * problem.n_batches * heads.shape[0],),
        problem.q, problem.k, problem.mask, problem.slopes, problem.mask_batches,
        heads, maxima, sums, weights,
        *problem.sizes(), heads.shape[0], *problem.strides()[:8], *problem.strides()[12:],
        *problem.scalars()[:2],
        launch=launch, NATURAL=problem.is_natural, **constants,
    )  # fmt: skip
    return weights
