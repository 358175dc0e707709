"""The launches of lookups that are compiled."""

from __future__ import annotations

from functools import partial

import torch

from gpunn.kernels.embedding import LOOKUPS
from gpunn.kernels.launch import launchers
from gpunn.profiling.static_report import meta
from scenario import Scenario

HALF, FLOAT = torch.bfloat16, torch.float32


def _embedding(n_cols: int, dtype: torch.dtype, everything: bool) -> None:
    """Forward and backward; of a bare lookup by int32, or with all that is fused."""
    indices = meta(8192, dtype=torch.int64 if everything else torch.int32)
    weight, positional, positions, seed = meta(50257, n_cols, dtype=dtype), None, None, None
    if everything:
        positional, positions = meta(2048, n_cols, dtype=dtype), indices
        seed = meta(1, dtype=torch.int64)
    p = 0.1 if everything else 0.0
    y = launchers["embedding_forward"](
        indices, weight, positions, positional, seed, 1024, 2.0, p, dtype
    )
    launchers["embedding_backward"](y, indices, seed, 1024, 50257, 3, 2.0, p, dtype)
    launchers["embedding_backward"](y, None, seed, 1024, 2048, -1, 2.0, p, dtype)


def embedding_scenarios() -> dict[str, Scenario]:
    """Tables are read by 128 bits; indices, the seed and the sum of a run as they fit."""
    found = {}
    for tile in LOOKUPS:  # those of sums are as wide
        n_cols = 768 if tile is LOOKUPS[-1] else tile.block_cols
        for dtype, everything in ((HALF, True), (FLOAT, True), (HALF, False)):
            if everything or n_cols == 768:
                kind = "everything" if everything else "bare"
                name = f"embedding-{kind}-{n_cols}-{str(dtype).removeprefix('torch.')}"
                found[name] = Scenario(
                    partial(_embedding, n_cols, dtype, everything), wide_only=True,
                    narrow_allowed=24,
                    capabilities=(80, 90, 100) if everything and n_cols == 768 else (90,),
                )  # fmt: skip
    return found
