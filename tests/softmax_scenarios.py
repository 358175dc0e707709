"""The launches of softmax that are compiled."""

from __future__ import annotations

from functools import partial

import torch

from gpunn.kernels.launch import launchers
from gpunn.kernels.softmax import INNER, LAST, LONG, LONGEST
from gpunn.profiling.static_report import meta
from scenario import Scenario

HALF, FLOAT = torch.bfloat16, torch.float32


def _softmax(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, logarithm: bool, masked: bool
) -> None:
    """Forward and backward."""
    x = meta(*shape, dtype=dtype)
    mask = meta(*shape, dtype=dtype) if masked else None
    y = launchers["softmax_forward"](x, mask, dim, 0.5, logarithm, dtype)
    launchers["softmax_backward"](x, y, dim, 0.5, logarithm, dtype)


def softmax_scenarios() -> dict[str, Scenario]:
    """Rows that fill a tile are read by 128 bits, and no tile spills up to ``LONGEST`` columns."""
    found = {}
    widths = [tile.block_cols for tile in LAST] + [LONG.block_cols + LONGEST]
    for width in widths:
        for dtype in (HALF, FLOAT):
            name = f"softmax-{width}-{str(dtype).removeprefix('torch.')}"
            found[name] = Scenario(
                partial(_softmax, (4096, width), 1, dtype, False, dtype == HALF),
                wide_only=True,
                capabilities=(80, 90, 100) if width in (1024, LONGEST) else (90,),
            )
    found["log-softmax"] = Scenario(partial(_softmax, (4096, 4096), 1, HALF, True, False))
    for tile in INNER:
        found[f"softmax-inner-{tile.block_cols}"] = Scenario(
            partial(_softmax, (64, tile.block_cols, 4096), 1, HALF, False, False), wide_only=True
        )
    return found
