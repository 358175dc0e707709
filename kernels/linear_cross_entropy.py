"""Cross-entropy of logits x Wᵀ + b a chunk of classes at a time: never all of them in memory.

Forward, the logits of a chunk are a product in a buffer; a kernel takes from them what runs along
rows: the maximum, Σ exp(x - maximum), the logit of the row's class, with smoothing Σ w x. Backward,
each chunk's logits are computed again, unless all were kept, and their gradient takes the buffer.
From that follow all of the chunk's rows of dW and db, each from one sum, and what the chunk adds to
dx, which is float32 until it is complete.

Sources: M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018,
https://arxiv.org/abs/1805.02867; E. Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
Models", 2025, https://arxiv.org/abs/2411.09009 (logits computed twice rather than kept).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from gpunn.kernels.cross_entropy import launch_for, sum_of_weights, write_gradient
from gpunn.kernels.cross_entropy_tiles import logits_tile, loss_of_class, statistics, target_of
from gpunn.kernels.launch import cdiv, chosen_backend, operator, record_fallback, run
from gpunn.kernels.linear import linear_epilogue_backward
from gpunn.kernels.numeric import widen
from gpunn.kernels.product import Epilogue, product
from gpunn.kernels.softmax import stages_for, whole_rows

FORWARD, BACKWARD = "linear_cross_entropy_forward", "linear_cross_entropy_backward"
# Logits in memory at one time: 256 MiB in 16 bits; of 8192 rows, 16384 classes. For each byte that
# adding a chunk's product to dx reads and writes, the product makes an eighth of its classes in
# floating-point operations: 512 with LEAST_CLASSES, where an H200 makes some 180.
MOST_LOGITS = 2**27
LEAST_CLASSES = 4096


@triton.jit
def chunk_statistics_kernel(
    x_ptr, target_ptr, weight_ptr, weight_sum_ptr, state_ptr, loss_ptr, row_weight_ptr, lse_ptr,
    n_rows, n_cols, first_class, n_classes, ignore_index, smoothing,
    SMOOTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The state (4, n_rows) of rows after one more chunk, of ``n_cols`` classes; x is its logits.

    The state is the maximum, Σ exp(x - maximum), the logit of the row's class and Σ w x. With
    ``loss_ptr`` the chunk is the last: the rows' loss, weight and lse. A program owns BLOCK_ROWS
    rows.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < n_rows
    stride = tl.cast(n_rows, tl.int64)
    parts: tl.constexpr = (BLOCK_COLS + 7) // 8
    part = tl.arange(0, parts)[None, :]  # the first goes on from what is known of the row
    state, known = state_ptr + rows[:, None] + part, is_row[:, None] & (part == 0)
    peak = tl.load(state, mask=known, other=-float("inf"))
    total = tl.load(state + stride, mask=known, other=0.0)
    weighted = tl.load(state + 3 * stride, mask=known, other=0.0)
    own = tl.load(state_ptr + 2 * stride + rows, mask=is_row, other=0.0)
    weights, first = tl.zeros_like(total), rows * n_cols
    share_ptr = weight_ptr
    if weight_ptr is not None:
        share_ptr += first_class
    for col in tl.range(0, n_cols, BLOCK_COLS, num_stages=STAGES):
        cols = col + tl.arange(0, BLOCK_COLS)
        x, at, inside = logits_tile(x_ptr, first, is_row, cols, n_cols, 1)
        peak, total, weights, weighted = statistics(
            x, target_ptr, share_ptr, at, inside, cols, n_cols, smoothing, peak, total, weights,
            weighted, False, SMOOTH,
        )  # fmt: skip
    peak, total = whole_rows(peak, total)
    weighted = tl.sum(weighted, 1)
    y, counts, _is_class, row_weight = target_of(target_ptr, weight_ptr, rows, is_row, n_classes,
                                                 ignore_index)  # fmt: skip
    here = counts & (y >= first_class) & (y < first_class + n_cols)
    own += widen(tl.load(x_ptr + first + y - first_class, mask=here, other=0.0))
    if loss_ptr is None:
        tl.store(state_ptr + rows, peak, mask=is_row)
        tl.store(state_ptr + stride + rows, total, mask=is_row)
        tl.store(state_ptr + 2 * stride + rows, own, mask=is_row)
        tl.store(state_ptr + 3 * stride + rows, weighted, mask=is_row)
    else:
        lse = peak + tl.log(total)
        loss = loss_of_class(lse, own, row_weight, tl.load(weight_sum_ptr), weighted, counts,
                             n_classes, smoothing, SMOOTH)  # fmt: skip
        tl.store(loss_ptr + rows, loss, mask=is_row)
        tl.store(row_weight_ptr + rows, row_weight, mask=is_row)
        tl.store(lse_ptr + rows, lse, mask=is_row)


def chunk_size_of(n_rows: int) -> int:
    """Classes to a chunk: a multiple of 128, so that rows of logits are aligned for any product."""
    return max(MOST_LOGITS // max(n_rows, 1) // 128 * 128, LEAST_CLASSES)


def _chunks(
    n_rows: int, n_classes: int, chunk_size: int, *memory: torch.Tensor
) -> Iterator[tuple[Any, ...]]:
    """The classes of one chunk after another, and its (n_rows, classes) in each of ``memory``.

    What has room for all chunks has one behind the other, what has not is used again.
    """
    for first in range(0, n_classes, chunk_size):
        here = slice(first, min(first + chunk_size, n_classes))
        n_here = here.stop - first
        starts = (first * n_rows if m.numel() == n_rows * n_classes else 0 for m in memory)
        pairs = zip(memory, starts, strict=True)
        yield here, *(m[s : s + n_rows * n_here].view(n_rows, n_here) for m, s in pairs)


def _compute(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    here: slice,
    logits: torch.Tensor,
) -> None:
    """The logits of a chunk."""
    part = None if bias is None else bias[here]
    if part is not None and chosen_backend() == "auto":
        record_fallback(f"{name}: the product", "a bias alone: PyTorch's")
        torch.addmm(part, x, weight[here].T, out=logits)
    else:
        product(name, x, weight[here], Epilogue(logits, part))


def _forward_fake(
    x: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    smoothing: float,
    chunk_size: int,
    keep: bool,
) -> tuple[torch.Tensor, ...]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss, row_weight, lse = (x.new_empty(x.shape[0], dtype=wide) for _ in range(3))
    return loss, row_weight, lse, x.new_empty(x.shape[0] * linear_weight.shape[0] if keep else 0)


@operator(
    "linear_cross_entropy_forward(Tensor x, Tensor linear_weight, Tensor? linear_bias, "
    "Tensor target, Tensor? weight, int ignore_index, float smoothing, SymInt chunk_size, "
    "bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
def linear_cross_entropy_forward(
    x: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    smoothing: float,
    chunk_size: int,
    keep: bool,
) -> tuple[torch.Tensor, ...]:
    """Loss, weight and lse of each row of x (N, H), for linear_weight (C, H), linear_bias (C,).

    target (N,), int64, and weight (C,) are contiguous, the others of any strides. Last the logits,
    a chunk behind the other, to ``keep`` them, else nothing.
    """
    given = x, linear_weight, linear_bias, target, weight, ignore_index, smoothing, chunk_size
    *outputs, kept = _forward_fake(*given, keep)
    n_rows, n_classes = x.shape[0], linear_weight.shape[0]
    memory = kept if keep else x.new_empty(n_rows * min(chunk_size, n_classes))
    state = outputs[0].new_zeros((4, n_rows))
    state[0] = -math.inf
    weight_sum = sum_of_weights(weight, n_classes, state)
    for here, logits in _chunks(n_rows, n_classes, chunk_size, memory):
        _compute(FORWARD, x, linear_weight, linear_bias, here, logits)
        results = outputs if here.stop == n_classes else (None, None, None)
        tensors = logits, target, weight, weight_sum, state, *results
        chunk_statistics(tensors, here.start, n_classes, ignore_index, smoothing)
    return *outputs, kept


def chunk_statistics(
    tensors: tuple[torch.Tensor | None, ...],
    first_class: int,
    n_classes: int,
    ignore_index: int,
    smoothing: float,
) -> None:
    """Launch ``chunk_statistics_kernel`` on its pointer arguments."""
    logits: Any = tensors[0]
    n_rows, n_cols = logits.shape
    launch = launch_for(n_cols, 1)
    run(
        FORWARD, chunk_statistics_kernel, (cdiv(n_rows, launch.block_rows),), *tensors, n_rows,
        n_cols, first_class, n_classes, ignore_index, smoothing, launch=launch,
        SMOOTH=smoothing > 0, STAGES=stages_for(logits),
    )  # fmt: skip


def _backward_fake(
    dloss: torch.Tensor,
    x: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    row_weight: torch.Tensor,
    lse: torch.Tensor,
    kept: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    chunk_size: int,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    shapes = x.shape, linear_weight.shape, linear_weight.shape[:1]
    return tuple(x.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))


@operator(
    "linear_cross_entropy_backward(Tensor dloss, Tensor x, Tensor linear_weight, "
    "Tensor? linear_bias, Tensor target, Tensor? weight, Tensor row_weight, Tensor lse, "
    "Tensor kept, int ignore_index, float smoothing, SymInt chunk_size, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)
def linear_cross_entropy_backward(
    dloss: torch.Tensor,
    x: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    row_weight: torch.Tensor,
    lse: torch.Tensor,
    kept: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    chunk_size: int,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    """dx, dW and db, those that ``needs`` says, from each loss's gradient; the others are empty."""
    n_rows, n_classes = x.shape[0], linear_weight.shape[0]
    # dx in its own type comes last, when the chunk's memory is free
    dweight = x.new_empty(linear_weight.shape if needs[1] else (0,))
    dbias = x.new_empty((n_classes if needs[2] else 0,))
    sums = lse.new_zeros(x.shape if needs[0] else (0,))
    dloss, weight_sum = dloss.contiguous(), sum_of_weights(weight, n_classes, lse)
    buffer = x.new_empty(n_rows * min(chunk_size, n_classes))
    memory = kept if kept.numel() else buffer
    for here, logits, dlogits in _chunks(n_rows, n_classes, chunk_size, memory, buffer):
        if memory is buffer:
            _compute(BACKWARD, x, linear_weight, linear_bias, here, logits)
        part = None if weight is None else weight[here]
        tensors = dloss, logits, target, part, weight_sum, row_weight, lse, dlogits
        write_gradient(BACKWARD, tensors, here.start, n_classes, ignore_index, smoothing)
        if needs[0]:
            _add_product(sums, dlogits, linear_weight[here])
        if needs[1]:
            product(BACKWARD, dlogits.T, x.T, Epilogue(dweight[here]))
        if needs[2]:
            options: Any = "identity", [], 0.0, x.dtype, False, True
            dbias[here] = linear_epilogue_backward(dlogits, None, None, *options)[1]
    del buffer, memory, logits, dlogits
    return sums.to(x.dtype) if needs[0] else x.new_empty((0,)), dweight, dbias


def _add_product(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """sums += a b, of which nothing is rounded to fewer bits than ``sums`` has."""
    if chosen_backend() != "auto":
        product(BACKWARD, a, b.T, Epilogue(sums, residual=sums))
        return
    record_fallback(f"{BACKWARD}: the product", "added to a sum: PyTorch's")
    if not a.is_cpu and a.dtype != sums.dtype:  # torch has this product on GPUs alone
        sums += torch.mm(a, b, out_dtype=sums.dtype)
    else:
        sums.addmm_(a.to(sums.dtype), b.to(sums.dtype))


@register_flop_formula(torch.ops.gpunn.linear_cross_entropy_forward)
def _forward_flops(x: Any, linear_weight: Any, *rest: Any, **keywords: Any) -> int:
    """Of the product; arguments are shapes."""
    return int(2 * math.prod(x) * linear_weight[0])


@register_flop_formula(torch.ops.gpunn.linear_cross_entropy_backward)
def _backward_flops(dloss: Any, x: Any, linear_weight: Any, *rest: Any, **keywords: Any) -> int:
    """Of the logits again, unless they were kept, and of the products for dx and dW."""
    *_, kept, _ignore_index, _smoothing, _chunk_size, needs = rest
    n_products = needs[0] + needs[1] + (math.prod(kept) == 0)
    return int(2 * math.prod(x) * linear_weight[0] * n_products)
