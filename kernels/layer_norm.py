"""Launchers of layer normalisation and of that by the root mean square, and their gradients.

x is (*, columns), contiguous; statistics are float32 (of float64, float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpunn.kernels.launch import Launch, cdiv, device_of, operator, run
from gpunn.kernels.partial_sums import add_up
from gpunn.kernels.philox import dropout_arguments
from gpunn.kernels.rows import column_sums_kernel, row_norm_backward_kernel, row_norm_forward_kernel


@dataclass(frozen=True)
class RowLaunch(Launch):
    """Rows by columns of a tile."""

    block_rows: int = 1
    block_cols: int = 1024


LONGEST = 16384
LONGEST_BACKWARD = 8192
"""Columns up to which a row of the backward pass stands in registers; with more it spills."""
LONGEST_SUMMED = 4096
"""Columns up to which the backward pass holds the sums for weight and bias beside a row."""
# Eight or sixteen elements a thread, so that the parts of a row stay in registers; not measured.
ROWS = tuple(
    RowLaunch(n_warps, block_rows=max(1, 1024 // n_cols), block_cols=n_cols)
    for n_cols, n_warps in (
        (16, 4), (64, 4), (256, 4), (1024, 4), (2048, 8), (4096, 8), (8192, 16), (LONGEST, 32)
    )
)  # fmt: skip
# Longer rows are swept twice by one program. At most two programs of a thousand threads fit on a
# multiprocessor: of 65,536 columns in 16 bits, 264 rows take 33 MiB of the 50 MiB of an H200's L2,
# where the second sweep finds them. Backward reads dy and s, and has one program a multiprocessor.
LONG = RowLaunch(32, block_rows=1, block_cols=8192)
COLUMNS = RowLaunch(8, block_rows=32, block_cols=128)
WARPS = 16
"""Of a multiprocessor, where the backward pass holds sums: on an H200, with three rows on their
way, 16384 by 4096 in bfloat16 took 118 us so (144 with twice the warps), 32768 by 1024 took 85."""
NAME, NAME_BACKWARD = "row_norm_forward", "row_norm_backward"


def launch_for(n_cols: int) -> RowLaunch:
    """The narrowest tile that holds a row; the one for long rows where none does."""
    return next((launch for launch in ROWS if n_cols <= launch.block_cols), LONG)


def wide(x: torch.Tensor) -> torch.dtype:
    """The type of statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    eps: float,
    centred: bool,
    keep: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    y = torch.empty_like(x, dtype=dtype)
    changed = residual is not None or seed is not None
    s = torch.empty_like(x) if keep and changed else x.new_empty((0,))
    mean = x.new_empty((math.prod(x.shape[:-1]),), dtype=wide(x))
    return y, s, mean, torch.empty_like(mean)


@operator(
    "row_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
    "float dropout_p, float eps, bool centred, bool keep, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
def row_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    eps: float,
    centred: bool,
    keep: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """y = (s - mean) invstd weight + bias for s = dropout(x) + residual, s, mean and invstd.

    x and residual (*, columns), contiguous and of one type; weight and bias (columns,). s is
    written to ``keep`` it, and empty where it is x itself. Without ``centred``, mean is 0.
    """
    y, s, mean, invstd = _forward_fake(
        x, residual, weight, bias, seed, dropout_p, eps, centred, keep, dtype
    )
    if x.numel() == 0:
        return y, s, mean.zero_(), invstd.fill_(torch.nan)
    n_rows, n_cols = mean.shape[0], x.shape[-1]
    launch = launch_for(n_cols)
    run(
        NAME, row_norm_forward_kernel, (cdiv(n_rows, launch.block_rows),),
        x, residual, weight, bias, seed, s if s.numel() else None, y, mean, invstd,
        n_rows, n_cols, *dropout_arguments(dropout_p or 1.0), eps, launch=launch, CENTRED=centred,
        QUADS=n_cols % 4 == 0, ONE_PASS=n_cols <= launch.block_cols,
    )  # fmt: skip
    return y, s, mean, invstd


def _backward_fake(
    dy: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    extra: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    centred: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    dx, dresidual = (torch.empty_like(s) if needed else s.new_empty((0,)) for needed in needs[:2])
    dweight, dbias = (
        s.new_empty((s.shape[-1] if needed else 0,), dtype=s.dtype if like is None else like.dtype)
        for needed, like in zip(needs[2:], (weight, bias), strict=True)
    )
    return dx, dresidual, dweight, dbias


@operator(
    "row_norm_backward(Tensor dy, Tensor s, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, Tensor? extra, Tensor? seed, float dropout_p, bool centred, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)
def row_norm_backward(
    dy: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    extra: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    centred: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """dx, dresidual, dweight and dbias; each is empty where it is not in ``needs``.

    ``extra``: an upstream gradient of s itself. dy, s and extra are contiguous.
    """
    gradients = _backward_fake(
        dy, s, weight, bias, mean, invstd, extra, seed, dropout_p, centred, needs
    )
    dx, dresidual, dweight, dbias = gradients
    n_rows, n_cols = mean.shape[0], s.shape[-1]
    if s.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    launch = launch_for(n_cols) if n_cols <= LONGEST_BACKWARD else LONG
    held = n_cols <= LONGEST_SUMMED
    most = n_rows
    if launch == LONG:
        most = device_of(s).n_multiprocessors
    elif held and any(needs[2:]):
        most = WARPS // launch.num_warps * device_of(s).n_multiprocessors
    n_programs = min(cdiv(n_rows, launch.block_rows), most)
    sums = [
        s.new_empty((n_programs, n_cols), dtype=wide(s)) if n and held else None for n in needs[2:]
    ]
    if held or any(needs[:2]):
        run(
            NAME_BACKWARD, row_norm_backward_kernel, (n_programs,),
            dy, s, weight, mean, invstd, extra, seed,
            dx if needs[0] else None, dresidual if needs[1] else None, *sums,
            n_rows, n_cols, *dropout_arguments(dropout_p or 1.0), launch=launch, CENTRED=centred,
            QUADS=n_cols % 4 == 0, ONE_PASS=n_cols <= launch.block_cols,
            STAGES=_stages_for(s, launch, n_programs < n_rows),
        )  # fmt: skip
    if not held and any(needs[2:]):
        sums = _column_sums(dy, s, mean, invstd, needs[2:])
    for gradient, partial in zip((dweight, dbias), sums, strict=True):
        if partial is not None:
            add_up(partial, gradient)
    return gradients


def _stages_for(s: torch.Tensor, launch: RowLaunch, has_several: bool) -> int:
    """Rows of each operand on their way, with the one computed with, where a program has several.

    Of tiles of several rows some spill; of 32 bits, more than two do.
    """
    if launch.block_rows > 1 or not has_several:
        return 1
    return 3 if s.element_size() == 2 else 2


def _column_sums(
    dy: torch.Tensor,
    s: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Partial sums for weight and bias, of rows that are too long to hold."""
    n_rows, n_cols = mean.shape[0], s.shape[-1]
    across = cdiv(n_cols, COLUMNS.block_cols)
    wanted = max(1, 4 * device_of(s).n_multiprocessors // across)
    rows_a_program = cdiv(cdiv(n_rows, wanted), COLUMNS.block_rows) * COLUMNS.block_rows
    down = cdiv(n_rows, rows_a_program)
    sums = [s.new_empty((down, n_cols), dtype=wide(s)) if needed else None for needed in needs]
    run(
        NAME_BACKWARD, column_sums_kernel, (down * across,), dy, s, mean, invstd, *sums,
        n_rows, n_cols, rows_a_program, launch=COLUMNS,
    )  # fmt: skip
    return sums
