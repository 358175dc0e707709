"""Cross-entropy of logits: each row's loss, and the gradient of the logits.

With p = softmax(x), lse = log Σ exp(x), class weights w and smoothing ε, over C classes::

    target y:           (1 - ε) w_y (lse - x_y) + ε / C Σ_c w_c (lse - x_c)
    probabilities t:    Σ_c w_c t'_c (lse - x_c),  t' = (1 - ε) t + ε / C

Logits are (outer, classes, inner). They are read once forward and once backward; p is computed
again from the row's lse. Where the losses are to be summed, the forward kernel can write the
gradient in the same pass: of a row that it holds, or, of one too long for that, as it reads it
again, from the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gpunn.kernels.cross_entropy_tiles import (
    class_weights,
    logits_tile,
    loss_of_class,
    statistics,
    store_gradient,
    target_of,
)
from gpunn.kernels.elementwise import LAUNCH as SCALE
from gpunn.kernels.launch import Launch, cdiv, device_of, operator, run
from gpunn.kernels.numeric import widen
from gpunn.kernels.softmax import (
    INNER,
    LAST,
    SoftmaxLaunch,
    row_numbers,
    stages_for,
    tile_rows,
    whole_rows,
)


@dataclass(frozen=True)
class TotalsLaunch(Launch):
    """Targets that a program adds at a time: 64 bytes a thread."""

    block_rows: int = 1024


TOTALS = TotalsLaunch()
# Of 16,384 rows of 50,304 classes an H200 reads each once in 387 us (438 by twice the warps and
# columns), and twice, with their gradient, in 1220 us (1454 by 32 warps, 8192 columns).
ONCE = SoftmaxLaunch(8, block_rows=1, block_cols=2048)
TWICE = SoftmaxLaunch(16, block_rows=1, block_cols=4096)
MOST_HELD = 8192  # columns of a row in registers until its gradient; 16384, weighted, spill
MOST_TOTALS = 64  # which each program of the forward kernel adds for itself: 256 bytes


@triton.jit
def cross_entropy_forward_kernel(
    x_ptr, target_ptr, weight_ptr, totals_ptr, loss_ptr, row_weight_ptr, lse_ptr, dx_ptr,
    n_rows, n_cols, n_inner, n_totals, divisor, ignore_index, smoothing,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, LAST_DIM: tl.constexpr,
    ONE_PASS: tl.constexpr, MOST_TOTALS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Loss, weight and lse of rows. A program owns BLOCK_ROWS rows.

    The weight is w_y, or, of probabilities, Σ w_c t'_c. With ``dx_ptr`` also the gradient of the
    sum of all losses over Σ totals or, without those, over the divisor.
    """
    program = tl.program_id(0).to(tl.int64)
    first, is_row = tile_rows(program, n_rows, n_cols, n_inner, LAST_DIM, BLOCK_ROWS)
    rows = row_numbers(program, n_inner, LAST_DIM, BLOCK_ROWS)
    stride, block = 1 if LAST_DIM else n_inner, tl.arange(0, BLOCK_COLS)
    out_type: tl.constexpr = tl.float64 if lse_ptr.dtype.element_ty == tl.float64 else tl.float32
    parts: tl.constexpr = (BLOCK_COLS + 7) // 8 if LAST_DIM and not ONE_PASS else 1
    zeros = tl.zeros((BLOCK_ROWS, parts), dtype=out_type)
    peak, total, weights, weighted = zeros - float("inf"), zeros, zeros, zeros
    if ONE_PASS:
        x, at, inside = logits_tile(x_ptr, first, is_row, block, n_cols, stride)
        peak, total, weights, weighted = statistics(
            x, target_ptr, weight_ptr, at, inside, block, n_cols, smoothing, peak, total, weights,
            weighted, PROBABILITIES, SMOOTH,
        )  # fmt: skip
    else:
        for col in tl.range(0, n_cols, BLOCK_COLS, num_stages=STAGES):
            x, at, inside = logits_tile(x_ptr, first, is_row, col + block, n_cols, stride)
            peak, total, weights, weighted = statistics(
                x, target_ptr, weight_ptr, at, inside, col + block, n_cols, smoothing, peak, total,
                weights, weighted, PROBABILITIES, SMOOTH,
            )  # fmt: skip
    peak, total = whole_rows(peak, total)
    weights, weighted = tl.sum(weights, 1), tl.sum(weighted, 1)
    lse = peak + tl.log(total)
    y, counts, row_weight = rows, is_row, weights
    if PROBABILITIES:
        loss = weights * lse - weighted
    else:
        y, counts, is_class, row_weight = target_of(target_ptr, weight_ptr, rows, is_row, n_cols,
                                                    ignore_index)  # fmt: skip
        own = widen(tl.load(x_ptr + first + y * stride, mask=counts & is_class, other=0.0))
        loss = loss_of_class(lse, own, row_weight, weights, weighted, counts, n_cols, smoothing,
                             SMOOTH)  # fmt: skip
    tl.store(loss_ptr + rows, loss, mask=is_row)
    tl.store(row_weight_ptr + rows, row_weight, mask=is_row)
    tl.store(lse_ptr + rows, lse, mask=is_row)
    if dx_ptr is not None:
        if ONE_PASS and SMOOTH and not PROBABILITIES:
            # Once more, from the tile: with the sum above, each thread is given a whole row.
            share = class_weights(weight_ptr, block, n_cols, x)
            weights = tl.sum(tl.where(inside, share, 0.0), 1)
        scale = tl.zeros_like(lse) + 1 / divisor
        if totals_ptr is not None:
            part = tl.arange(0, MOST_TOTALS)
            totals = tl.load(totals_ptr + part, mask=part < n_totals, other=0.0)
            scale = tl.zeros_like(lse) + 1 / tl.sum(totals)
        if ONE_PASS:
            store_gradient(
                x, target_ptr, weight_ptr, dx_ptr, at, inside, block, scale, y, counts, lse,
                row_weight, weights[:, None], n_cols, 0, n_cols, smoothing, PROBABILITIES, SMOOTH,
            )  # fmt: skip
        else:
            last = (n_cols - 1) // BLOCK_COLS * BLOCK_COLS
            # backwards: the end is what the caches hold
            for back in tl.range(0, n_cols, BLOCK_COLS, num_stages=STAGES):
                cols = last - back + block
                x, at, inside = logits_tile(x_ptr, first, is_row, cols, n_cols, stride)
                store_gradient(
                    x, target_ptr, weight_ptr, dx_ptr, at, inside, cols, scale, y, counts, lse,
                    row_weight, weights[:, None], n_cols, 0, n_cols, smoothing, PROBABILITIES,
                    SMOOTH,
                )  # fmt: skip


@triton.jit
def cross_entropy_backward_kernel(
    dloss_ptr, x_ptr, target_ptr, weight_ptr, weight_sum_ptr, row_weight_ptr, lse_ptr, dx_ptr,
    n_rows, n_cols, n_inner, first_class, n_classes, ignore_index, smoothing,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, LAST_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dx of a tile of logits: dloss times p Σ w t' - w t', t' one-hot where the target is a class.

    The columns are the classes from ``first_class`` on, of ``n_classes``. A program owns one tile.
    """
    across = tl.cdiv(n_cols, BLOCK_COLS)
    program = (tl.program_id(0) // across).to(tl.int64)
    first, is_row = tile_rows(program, n_rows, n_cols, n_inner, LAST_DIM, BLOCK_ROWS)
    rows = row_numbers(program, n_inner, LAST_DIM, BLOCK_ROWS)
    cols = tl.program_id(0) % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    x, at, inside = logits_tile(x_ptr, first, is_row, cols, n_cols, 1 if LAST_DIM else n_inner)
    lse = tl.load(lse_ptr + rows, mask=is_row, other=0.0)
    dloss = widen(tl.load(dloss_ptr + rows, mask=is_row, other=0.0))
    row_weight = tl.load(row_weight_ptr + rows, mask=is_row, other=0.0)
    y, counts, weight_sum = rows, is_row, 0.0
    if not PROBABILITIES:
        y = tl.load(target_ptr + rows, mask=is_row, other=0)
        counts = is_row & (y != ignore_index)
        weight_sum = tl.load(weight_sum_ptr)
    store_gradient(
        x, target_ptr, weight_ptr, dx_ptr, at, inside, cols, dloss, y, counts, lse, row_weight,
        weight_sum, n_cols, first_class, n_classes, smoothing, PROBABILITIES, SMOOTH,
    )  # fmt: skip


@triton.jit
def target_weights_kernel(
    target_ptr, weight_ptr, totals_ptr, n_rows, n_cols, rows_a_program, ignore_index,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Σ w_y over the rows that count. A program owns ``rows_a_program`` rows, and their total."""
    out_type: tl.constexpr = tl.float64 if totals_ptr.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros((BLOCK_ROWS,), dtype=out_type)
    first = tl.program_id(0).to(tl.int64) * rows_a_program
    for row in tl.range(0, rows_a_program, BLOCK_ROWS):
        rows = first + row + tl.arange(0, BLOCK_ROWS)
        _y, _counts, _is_class, weight = target_of(target_ptr, weight_ptr, rows, rows < n_rows,
                                                   n_cols, ignore_index)  # fmt: skip
        sums += weight
    tl.store(totals_ptr + tl.program_id(0), tl.sum(sums))


@triton.jit
def scale_kernel(scale_ptr, x_ptr, n_elements, BLOCK: tl.constexpr):
    """x times a number, in place; where that is 1, x is not read.

    Of n programs, each owns every n-th BLOCK elements. What is 0 stays so: rows that are ignored,
    whatever the number is.
    """
    scale = widen(tl.load(scale_ptr))
    if scale != 1:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in tl.range(first, n_elements, tl.num_programs(0).to(tl.int64) * BLOCK):
            index = start + tl.arange(0, BLOCK)
            mask = index < n_elements
            x = widen(tl.load(x_ptr + index, mask=mask, other=0.0))
            scaled = tl.where(x == 0, x, x * scale)
            tl.store(x_ptr + index, scaled.to(x_ptr.dtype.element_ty), mask=mask)


def launch_for(n_cols: int, n_inner: int, twice: bool = False) -> SoftmaxLaunch:
    """Softmax's tiles for rows of up to ``MOST_HELD`` columns; longer ones are walked along."""
    longer = TWICE if twice else ONCE
    tiles, widest = (LAST, longer) if n_inner == 1 else (INNER, INNER[-1])
    return next((t for t in tiles if n_cols <= t.block_cols <= MOST_HELD), widest)


def _run(
    name: str,
    kernel: Any,
    tensors: tuple[torch.Tensor | None, ...],
    sizes: tuple[int, ...],
    x: torch.Tensor,
    target: torch.Tensor,
    smoothing: float,
    launch: SoftmaxLaunch,
    by_tile: bool,
    **constants: int,
) -> None:
    """Launch a program for each block of rows of x, or, ``by_tile``, for each tile."""
    n_cols, n_inner = x.shape[1], x.shape[2:].numel()
    n_rows, last = x.numel() // n_cols, n_inner == 1
    n_programs = cdiv(n_rows if last else n_inner, launch.block_rows)
    n_programs *= 1 if last else n_rows // n_inner
    n_programs *= cdiv(n_cols, launch.block_cols) if by_tile else 1
    run(
        name, kernel, (n_programs,), *tensors, n_rows, n_cols, n_inner, *sizes, smoothing,
        launch=launch, PROBABILITIES=target.is_floating_point(), SMOOTH=smoothing > 0,
        LAST_DIM=last, **constants,
    )  # fmt: skip


def _forward_fake(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int,
    smoothing: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], *x.shape[2:])
    loss, row_weight, lse = (x.new_empty(shape, dtype=wide) for _ in range(3))
    return loss, row_weight, lse


@operator(
    "cross_entropy_forward(Tensor x, Tensor target, Tensor? weight, int ignore_index, "
    "float smoothing) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
def cross_entropy_forward(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int,
    smoothing: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Loss, weight and lse of each row of x (N, C, *), contiguous.

    target (N, *), int64, or, contiguous, probabilities of x's shape. weight (C,).
    """
    outputs = _forward_fake(x, target, weight, ignore_index, smoothing)
    if x.numel():
        launch = launch_for(x.shape[1], x.shape[2:].numel())
        _run(
            "cross_entropy_forward", cross_entropy_forward_kernel,
            (x, target, weight, None, *outputs, None), (0, 1, ignore_index), x, target, smoothing,
            launch, False, ONE_PASS=x.shape[1] <= launch.block_cols, MOST_TOTALS=MOST_TOTALS,
            STAGES=stages_for(x),
        )  # fmt: skip
    return outputs


def _with_gradient_fake(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int,
    smoothing: float, mean: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    outputs = _forward_fake(x, target, weight, ignore_index, smoothing)
    return *outputs, torch.empty_like(x)


@operator(
    "cross_entropy_with_gradient(Tensor x, Tensor target, Tensor? weight, int ignore_index, "
    "float smoothing, bool mean) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_with_gradient_fake,
)
def cross_entropy_with_gradient(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int,
    smoothing: float, mean: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """``cross_entropy_forward``, and dx of the sum of its losses, or of their ``mean``."""
    outputs = _with_gradient_fake(x, target, weight, ignore_index, smoothing, mean)
    if x.numel():
        # Of blocks of 1024 threads a multiprocessor holds one or two: up to 264 rows at a time on a
        # chip of 132, of which the L2 cache (50 MB) keeps what is read again: all of 50,257 classes
        # in bfloat16 (27 MB), most of 128,256 (68 MB), since the last that was read comes first.
        launch = launch_for(x.shape[1], x.shape[2:].numel(), twice=True)
        totals = None
        if mean and not target.is_floating_point():
            totals = _totals(target, weight, outputs[0], x.shape[1], ignore_index)
        divisor = outputs[0].numel() if mean and totals is None else 1
        sizes = 0 if totals is None else len(totals), divisor, ignore_index
        _run(
            "cross_entropy_with_gradient", cross_entropy_forward_kernel,
            (x, target, weight, totals, *outputs), sizes, x, target, smoothing, launch, False,
            ONE_PASS=x.shape[1] <= launch.block_cols, MOST_TOTALS=MOST_TOTALS,
            STAGES=stages_for(x),
        )  # fmt: skip
    return outputs


def _totals(
    target: torch.Tensor,
    weight: torch.Tensor | None,
    loss: torch.Tensor,
    n_classes: int,
    ignore_index: int,
) -> torch.Tensor:
    """Sums of the targets' weights, at most ``MOST_TOTALS`` of them, in the type of ``loss``."""
    n_rows, block = target.numel(), TOTALS.block_rows
    rows_a_program = cdiv(cdiv(n_rows, MOST_TOTALS), block) * block
    totals = loss.new_empty(cdiv(n_rows, rows_a_program))
    run(
        "cross_entropy_with_gradient", target_weights_kernel, (len(totals),), target, weight,
        totals, n_rows, n_classes, rows_a_program, ignore_index, launch=TOTALS,
    )  # fmt: skip
    return totals


def _backward_fake(
    dloss: torch.Tensor, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None,
    row_weight: torch.Tensor, lse: torch.Tensor, ignore_index: int, smoothing: float,
) -> torch.Tensor:  # fmt: skip
    return torch.empty_like(x)


@operator(
    "cross_entropy_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, "
    "Tensor row_weight, Tensor lse, int ignore_index, float smoothing) -> Tensor",
    fake=_backward_fake,
)
def cross_entropy_backward(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    row_weight: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    smoothing: float,
) -> torch.Tensor:
    """dx, from what ``cross_entropy_forward`` was given and gave, and each loss's gradient."""
    dx = torch.empty_like(x)
    if dx.numel():
        weight_sum = sum_of_weights(weight, x.shape[1], lse)
        rows = dloss.contiguous(), x, target, weight, weight_sum, row_weight, lse, dx
        write_gradient("cross_entropy_backward", rows, 0, x.shape[1], ignore_index, smoothing)
    return dx


def sum_of_weights(weight: torch.Tensor | None, n_classes: int, like: torch.Tensor) -> torch.Tensor:
    """Σ w_c, one number in memory, in the type of ``like``."""
    return like.new_full((1,), n_classes) if weight is None else weight.to(like.dtype).sum()


def write_gradient(
    name: str,
    tensors: tuple[torch.Tensor | None, ...],
    first_class: int,
    n_classes: int,
    ignore_index: int,
    smoothing: float,
) -> None:
    """Launch ``cross_entropy_backward_kernel`` on its pointer arguments; dx may be x itself.

    x holds the classes from ``first_class`` on, of ``n_classes``; so does weight.
    """
    x: Any = tensors[1]
    target: Any = tensors[2]
    launch = launch_for(x.shape[1], x.shape[2:].numel())
    sizes = first_class, n_classes, ignore_index
    _run(
        name, cross_entropy_backward_kernel, tensors, sizes, x, target, smoothing, launch, True
    )  # fmt: skip


def _scale_gradient_fake(dx: torch.Tensor, scale: torch.Tensor) -> None:
    pass


@operator(
    "cross_entropy_scale_gradient(Tensor(a!) dx, Tensor scale) -> ()", fake=_scale_gradient_fake
)
def cross_entropy_scale_gradient(dx: torch.Tensor, scale: torch.Tensor) -> None:
    """dx = scale dx, for one number in memory; where it is 1, dx is neither read nor written."""
    if dx.numel():
        # 16 programs of 4 warps are all that a multiprocessor holds.
        n_programs = min(cdiv(dx.numel(), SCALE.block), 16 * device_of(dx).n_multiprocessors)
        run(
            "cross_entropy_scale_gradient", scale_kernel, (n_programs,), scale, dx, dx.numel(),
            launch=SCALE,
        )  # fmt: skip
        torch.autograd.graph.increment_version(dx)
