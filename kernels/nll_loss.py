"""The negative log-likelihood of classes: Σ -w_y x_y, by rows, and the gradient of x.

x is (rows, classes) or (outer, classes, inner) log-probabilities, of which one a row is read,
wherever it lies: no copy is made of x in channels_last, or in any other layout whose inner
dimensions are as one. The gradient is written once: 0, but for the class of each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpunn.kernels.cross_entropy_tiles import target_of
from gpunn.kernels.launch import Launch, cdiv, operator, run
from gpunn.kernels.numeric import widen
from gpunn.kernels.partial_sums import MOST_PARTS, parts_for, sum_parts
from gpunn.kernels.softmax import SoftmaxLaunch, row_numbers, tile_rows

NAME, NAME_BACKWARD = "nll_loss_forward", "nll_loss_backward"


@dataclass(frozen=True)
class NllLaunch(Launch):
    """512 rows for 4 warps: four dependent loads a thread are in flight. Not measured."""

    block: int = 512


LAUNCH = NllLaunch()


@dataclass(frozen=True)
class GradientLaunch(SoftmaxLaunch):
    """How many tiles of its rows, one after the other, a program writes."""

    tiles: int = 1


# 2048 elements of 32, 128, 512 or 2048 classes: a thread writes 16, and nothing of a row must stay
# together.
TILES = tuple(
    GradientLaunch(4, block_rows=2048 // n_cols, block_cols=n_cols)
    for n_cols in (32, 128, 512, 2048)
)
# Classes that are not the last dimension: threads lie along the rows, and write 16 bytes of each of
# a few classes at a time, so that little of a tile is beyond the last of 19 or 21. What belongs to
# a row is read and computed for 32 classes at once. The first is for pictures of up to 64 pixels.
FEW_PIXELS, PIXELS = (
    GradientLaunch(n_warps, block_rows=n_rows, block_cols=n_cols, tiles=32 // n_cols)
    for n_warps, n_rows, n_cols in ((4, 64, 16), (8, 512, 4))
)


@triton.jit
def nll_loss_forward_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, weight_sum_ptr, n_rows, n_cols, n_inner,
    stride_x_outer, stride_x_col, stride_x_inner, ignore_index,
    REDUCE: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-w_y x_y of rows; to REDUCE, a program's sum of them, and, for a MEAN, that of w_y.

    Of n programs each owns every n-th BLOCK rows.
    """
    program = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK,), dtype=wide)
    weights = tl.zeros((BLOCK,), dtype=wide)
    for start in tl.range(program * BLOCK, n_rows, tl.num_programs(0).to(tl.int64) * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        y, counts, is_class, weight = target_of(target_ptr, weight_ptr, rows, rows < n_rows, n_cols,
                                                ignore_index)  # fmt: skip
        at = rows // n_inner * stride_x_outer + rows % n_inner * stride_x_inner + y * stride_x_col
        x = widen(tl.load(x_ptr + at, mask=counts & is_class, other=0.0))
        loss = 0.0 - weight * x  # which is 0, not -0, in rows that do not count
        if REDUCE:
            total += loss
            weights += weight
        else:
            tl.store(loss_ptr + rows, loss.to(loss_ptr.dtype.element_ty), mask=rows < n_rows)
    if REDUCE:
        result = tl.sum(total, 0)
        if MEAN:
            weight_sum = tl.sum(weights, 0)
            tl.store(weight_sum_ptr + program, weight_sum)
            if tl.num_programs(0) == 1:
                result = result / weight_sum
        tl.store(loss_ptr + program, result.to(loss_ptr.dtype.element_ty))


@triton.jit
def nll_loss_backward_kernel(
    dloss_ptr, target_ptr, weight_ptr, weight_sum_ptr, dx_ptr, n_rows, n_cols, n_inner,
    ignore_index, EACH: tl.constexpr, LAST_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dx: -w_y dloss / Σ w at the class of each row, and 0. A program owns TILES tiles of its rows.

    dloss is one number, or one for EACH row.
    """
    across = tl.cdiv(n_cols, BLOCK_COLS * TILES)
    program = (tl.program_id(0) // across).to(tl.int64)
    first, is_row = tile_rows(program, n_rows, n_cols, n_inner, LAST_DIM, BLOCK_ROWS)
    rows = row_numbers(program, n_inner, LAST_DIM, BLOCK_ROWS)
    y, counts, is_class, weight = target_of(target_ptr, weight_ptr, rows, is_row, n_cols,
                                            ignore_index)  # fmt: skip
    if EACH:
        scale = widen(tl.load(dloss_ptr + rows, mask=is_row, other=0.0))
    else:
        scale = widen(tl.load(dloss_ptr))
    if weight_sum_ptr is not None:
        scale = scale / tl.load(weight_sum_ptr)
    own = tl.where(counts & is_class, y, -1).to(tl.int32)
    value = (-weight * scale).to(dx_ptr.dtype.element_ty)
    start = tl.program_id(0) % across * (BLOCK_COLS * TILES)
    for col in tl.range(start, tl.minimum(start + BLOCK_COLS * TILES, n_cols), BLOCK_COLS):
        cols = col + tl.arange(0, BLOCK_COLS)
        is_own = cols[None, :] == own[:, None]
        dx = tl.where(is_own, value[:, None], 0.0)
        at = first[:, None] + cols.to(tl.int64)[None, :] * (1 if LAST_DIM else n_inner)
        inside = is_row[:, None] & (cols < n_cols)[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _forward_fake(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    return loss, x.new_empty(() if reduction == "mean" else (0,), dtype=wide)


@operator(
    "nll_loss_forward(Tensor x, Tensor target, Tensor? weight, int ignore_index, str reduction, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    fake=_forward_fake,
)
def nll_loss_forward(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's loss, or their sum or mean; and, for a mean, the sum of the rows' weights.

    x (N, C, *), of any strides; target (N, *), int64; weight (C,).
    """
    loss, weight_sum = _forward_fake(x, target, weight, ignore_index, reduction, dtype)
    n_rows, reduced, mean = target.numel(), reduction != "none", reduction == "mean"
    if n_rows == 0:
        return loss.fill_(torch.nan if mean else 0.0), weight_sum.zero_()
    x = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    n_programs = cdiv(n_rows, LAUNCH.block)
    n_programs = min(n_programs, MOST_PARTS) if reduced else n_programs
    parts = parts_for(loss, n_programs) if reduced else loss
    weight_parts = parts_for(weight_sum, n_programs) if mean else None
    run(
        NAME, nll_loss_forward_kernel, (n_programs,), x, target.contiguous(),
        None if weight is None else weight.contiguous(), parts, weight_parts, n_rows, x.shape[1],
        x.shape[2], *x.stride(), ignore_index, launch=LAUNCH, REDUCE=reduced, MEAN=mean,
    )  # fmt: skip
    sum_parts(NAME, parts, loss, weight_parts, weight_sum if mean else None)
    return loss, weight_sum


def _backward_fake(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    weight_sum: torch.Tensor,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    if x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(
    "nll_loss_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor weight_sum, "
    "int ignore_index, str reduction) -> Tensor",
    fake=_backward_fake,
)
def nll_loss_backward(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    weight_sum: torch.Tensor,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """dx, whose memory is as x's where that is contiguous or channels_last, else contiguous."""
    dx = _backward_fake(dloss, x, target, weight, weight_sum, ignore_index, reduction)
    if dx.numel() == 0:
        return dx
    n_rows, n_cols, n_inner = target.numel(), x.shape[1], x.shape[2:].numel()
    last = n_inner == 1 or not dx.is_contiguous()
    n_inner = 1 if last else n_inner
    launch = launch_for(n_cols, n_inner, last)
    n_programs = cdiv(n_rows if last else n_inner, launch.block_rows)
    n_programs *= 1 if last else n_rows // n_inner
    n_programs *= cdiv(n_cols, launch.block_cols * launch.tiles)
    run(
        NAME_BACKWARD, nll_loss_backward_kernel, (n_programs,),
        dloss.contiguous(), target.contiguous(),
        None if weight is None else weight.contiguous(),
        weight_sum if reduction == "mean" else None, dx, n_rows, n_cols, n_inner, ignore_index,
        launch=launch, EACH=reduction == "none", LAST_DIM=last,
    )  # fmt: skip
    return dx


def launch_for(n_cols: int, n_inner: int, last: bool) -> GradientLaunch:
    """Of rows, the narrowest tile that holds all classes, else the widest; of pixels, by these."""
    if not last:
        return FEW_PIXELS if n_inner <= FEW_PIXELS.block_rows else PIXELS
    return next((tile for tile in TILES if n_cols <= tile.block_cols), TILES[-1])
