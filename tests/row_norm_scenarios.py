"""The launches of the normalisations of rows that are compiled."""

from __future__ import annotations

from functools import partial

import torch

from gpunn.kernels.launch import launchers
from gpunn.kernels.layer_norm import LONGEST, ROWS
from gpunn.profiling.static_report import meta
from scenario import Scenario

HALF, FLOAT = torch.bfloat16, torch.float32


def _row_norm(width: int, dtype: torch.dtype, everything: bool) -> None:
    """Forward and backward of layer_norm, with dropout and residual, or of a bare rms_norm."""
    x, statistic = meta(4096, width, dtype=dtype), meta(4096, dtype=FLOAT)
    weight = meta(width, dtype=dtype)
    residual, bias, seed, p = None, None, None, 0.0
    if everything:
        residual, bias, seed, p = x, weight, meta(1, dtype=torch.int64), 0.1
    launchers["row_norm_forward"](
        x, residual, weight, bias, seed, p, 1e-5, everything, everything, dtype
    )
    launchers["row_norm_backward"](
        x, x, weight, bias, statistic, statistic, residual, seed, p, everything,
        [True, everything, True, everything],
    )  # fmt: skip


def row_norm_scenarios() -> dict[str, Scenario]:
    """Rows that fill a tile are read by 128 bits, and none spills up to ``LONGEST`` columns."""
    found = {}
    for width in [tile.block_cols for tile in ROWS] + [LONGEST + 4096]:
        for dtype in (HALF, FLOAT):
            for everything in (False, True):
                kind = "everything" if everything else "bare"
                name = f"row-norm-{kind}-{width}-{str(dtype).removeprefix('torch.')}"
                found[name] = Scenario(
                    partial(_row_norm, width, dtype, everything),
                    wide_only=width >= 1024,
                    # statistics of rows, the seed, and sums of columns
                    narrow_allowed=24,
                    capabilities=(80, 90, 100) if width == 4096 else (90,),
                )
    return found
