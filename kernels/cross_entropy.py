"""Cross-entropy of logits: each row's loss, and the gradient of the logits.

With p = softmax(x), lse = log Σ exp(x), class weights w and smoothing ε, over C classes::

    target y:           (1 - ε) w_y (lse - x_y) + ε / C Σ_c w_c (lse - x_c)
    probabilities t:    Σ_c w_c t'_c (lse - x_c),  t' = (1 - ε) t + ε / C

Logits are (outer, classes, inner). They are read once forward and once backward; p is computed
again from the row's lse.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gpunn.kernels.launch import cdiv, operator, run
from gpunn.kernels.numeric import widen
from gpunn.kernels.softmax import INNER, LAST, LONG, SoftmaxLaunch, tile_rows

NAME, NAME_BACKWARD = "cross_entropy_forward", "cross_entropy_backward"


@triton.jit
def class_weights(weight_ptr, cols, n_cols, like):
    """w_c of a tile's columns, 1 where there are none."""
    if weight_ptr is None:
        return tl.full(cols.shape, 1.0, like.dtype)[None, :]
    return widen(tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0))[None, :]


@triton.jit
def target_of(target_ptr, weight_ptr, rows, is_row, n_cols, ignore_index):
    """The class of each row, whether it counts, and its weight; NaN of a class that is none."""
    y = tl.load(target_ptr + rows, mask=is_row, other=0)
    counts = is_row & (y != ignore_index)
    is_class = (y >= 0) & (y < n_cols)
    weight = tl.where(is_class, 1.0, float("nan"))
    if weight_ptr is not None:
        weight *= widen(tl.load(weight_ptr + y, mask=counts & is_class, other=0.0))
    return y, counts, is_class, tl.where(counts, weight, 0.0)


@triton.jit
def cross_entropy_forward_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, row_weight_ptr, lse_ptr,
    n_rows, n_cols, n_inner, ignore_index, smoothing,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, LAST_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Loss, weight and lse of rows. A program owns BLOCK_ROWS rows.

    The weight is w_y, or, of probabilities, Σ w_c t'_c.
    """
    program = tl.program_id(0).to(tl.int64)
    first, is_row = tile_rows(program, n_rows, n_cols, n_inner, LAST_DIM, BLOCK_ROWS)
    rows = first // n_cols if LAST_DIM else first // (n_cols * n_inner) * n_inner + first % n_inner
    stride = 1 if LAST_DIM else n_inner
    out_type: tl.constexpr = tl.float64 if lse_ptr.dtype.element_ty == tl.float64 else tl.float32
    peak = tl.full((BLOCK_ROWS,), -float("inf"), dtype=out_type)
    total = tl.zeros((BLOCK_ROWS,), dtype=out_type)
    weights = tl.zeros((BLOCK_ROWS,), dtype=out_type)
    weighted = tl.zeros((BLOCK_ROWS,), dtype=out_type)
    for col in tl.range(0, n_cols, BLOCK_COLS):
        cols = col + tl.arange(0, BLOCK_COLS)
        at = first[:, None] + cols.to(tl.int64)[None, :] * stride
        inside = is_row[:, None] & (cols < n_cols)[None, :]
        x = widen(tl.load(x_ptr + at, mask=inside, other=0.0))
        s = tl.where(inside, x, -float("inf"))
        highest = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        peak = highest
        if PROBABILITIES or SMOOTH:
            share = class_weights(weight_ptr, cols, n_cols, x)
            if PROBABILITIES:
                t = widen(tl.load(target_ptr + at, mask=inside, other=0.0))
                share = share * ((1 - smoothing) * t + smoothing / n_cols)
            share = tl.where(inside, share, 0.0)
            weights += tl.sum(share, 1)
            weighted += tl.sum(share * x, 1)
    lse = peak + tl.log(total)
    if PROBABILITIES:
        loss, row_weight = weights * lse - weighted, weights
    else:
        y, counts, is_class, row_weight = target_of(target_ptr, weight_ptr, rows, is_row, n_cols,
                                                    ignore_index)  # fmt: skip
        own = widen(tl.load(x_ptr + first + y * stride, mask=counts & is_class, other=0.0))
        loss = row_weight * (lse - own)
        if SMOOTH:
            even = (weights * lse - weighted) / n_cols
            loss = (1 - smoothing) * loss + smoothing * even
        loss = tl.where(counts, loss, 0.0)
    tl.store(loss_ptr + rows, loss, mask=is_row)
    tl.store(row_weight_ptr + rows, row_weight, mask=is_row)
    tl.store(lse_ptr + rows, lse, mask=is_row)


@triton.jit
def cross_entropy_backward_kernel(
    dloss_ptr, x_ptr, target_ptr, weight_ptr, weight_sum_ptr, row_weight_ptr, lse_ptr, dx_ptr,
    n_rows, n_cols, n_inner, ignore_index, smoothing,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, LAST_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dx of a tile of logits: dloss times p Σ w t' - w t', t' one-hot where the target is a class.

    A program owns one tile.
    """
    across = tl.cdiv(n_cols, BLOCK_COLS)
    program = tl.program_id(0).to(tl.int64) // across
    first, is_row = tile_rows(program, n_rows, n_cols, n_inner, LAST_DIM, BLOCK_ROWS)
    rows = first // n_cols if LAST_DIM else first // (n_cols * n_inner) * n_inner + first % n_inner
    cols = tl.program_id(0) % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    at = first[:, None] + cols.to(tl.int64)[None, :] * (1 if LAST_DIM else n_inner)
    inside = is_row[:, None] & (cols < n_cols)[None, :]
    x = widen(tl.load(x_ptr + at, mask=inside, other=0.0))
    lse = tl.load(lse_ptr + rows, mask=is_row, other=0.0)
    dloss = widen(tl.load(dloss_ptr + rows, mask=is_row, other=0.0))
    row_weight = tl.load(row_weight_ptr + rows, mask=is_row, other=0.0)
    p = tl.exp(x - lse[:, None])
    if PROBABILITIES:
        t = widen(tl.load(target_ptr + at, mask=inside, other=0.0))
        share = class_weights(weight_ptr, cols, n_cols, x)
        dx = p * row_weight[:, None] - share * ((1 - smoothing) * t + smoothing / n_cols)
    else:
        y = tl.load(target_ptr + rows, mask=is_row, other=0)
        one_hot = tl.where(cols[None, :] == y[:, None], 1.0, 0.0)
        dx = row_weight[:, None] * (p - one_hot)
        if SMOOTH:
            share = class_weights(weight_ptr, cols, n_cols, x)
            even = (p * tl.load(weight_sum_ptr) - share) / n_cols
            dx = (1 - smoothing) * dx + smoothing * even
        dx = tl.where((y != ignore_index)[:, None], dx, 0.0)
    dx *= dloss[:, None]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _launch_for(n_cols: int, n_inner: int) -> SoftmaxLaunch:
    """Softmax's tiles, but for those of its longest rows, which are walked along here."""
    tiles, widest = (LAST, LONG) if n_inner == 1 else (INNER, INNER[-1])
    return next((t for t in tiles if n_cols <= t.block_cols <= LONG.block_cols), widest)


def _forward_fake(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> tuple[torch.Tensor, ...]:
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
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> tuple[torch.Tensor, ...]:
    """Loss, weight and lse of each row of x (N, C, *), contiguous.

    target (N, *), int64, or, contiguous, probabilities of x's shape. weight (C,).
    """
    loss, row_weight, lse = _forward_fake(x, target, weight, ignore_index, smoothing)
    if loss.numel():
        given = x, target, weight, loss, row_weight, lse
        _run(NAME, cross_entropy_forward_kernel, given, x, target, ignore_index, smoothing, False)
    return loss, row_weight, lse


def _run(
    name: str,
    kernel: Any,
    given: tuple[torch.Tensor | None, ...],
    x: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    by_tile: bool,
) -> None:
    """Launch a program for each block of rows, or, ``by_tile``, for each tile."""
    n_cols, n_inner = x.shape[1], x.shape[2:].numel()
    n_rows, last = x.numel() // n_cols, n_inner == 1
    launch = _launch_for(n_cols, n_inner)
    n_programs = cdiv(n_rows if last else n_inner, launch.block_rows)
    n_programs *= 1 if last else n_rows // n_inner
    n_programs *= cdiv(n_cols, launch.block_cols) if by_tile else 1
    run(
        name, kernel, (n_programs,), *given, n_rows, n_cols, n_inner, ignore_index, smoothing,
        launch=launch, PROBABILITIES=target.is_floating_point(), SMOOTH=smoothing > 0,
        LAST_DIM=last,
    )  # fmt: skip


def _backward_fake(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    row_weight: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    smoothing: float,
) -> torch.Tensor:
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
        total = lse.new_full((1,), x.shape[1]) if weight is None else weight.to(lse.dtype).sum()
        given = dloss.contiguous(), x, target, weight, total, row_weight, lse, dx
        _run(NAME_BACKWARD, cross_entropy_backward_kernel, given, x, target, ignore_index,
             smoothing, True)  # fmt: skip
    return dx
