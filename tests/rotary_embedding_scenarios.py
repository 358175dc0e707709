"""The launches of rotary embedding that are compiled."""

from __future__ import annotations

from functools import partial

import torch

from gpunn.kernels.launch import launchers
from gpunn.kernels.rotary_embedding import LAUNCHES
from gpunn.profiling.static_report import meta
from scenario import Scenario

HALF, FLOAT = torch.bfloat16, torch.float32


def _rotary(n_pairs: int, rest: int, dtype: torch.dtype, interleaved: bool, whole: bool) -> None:
    shape = 4, 4096, 32, 2 * n_pairs + rest
    query, key = meta(*shape, dtype=dtype).transpose(1, 2), meta(*shape, dtype=dtype)[:, :, :8]
    tables = meta(1, 4096, 2 * n_pairs if whole else n_pairs, dtype=dtype if whole else FLOAT)
    launchers["rotary_embedding"](
        query, key.transpose(1, 2), tables, tables, n_pairs, interleaved, whole
    )


def rotary_embedding_scenarios() -> dict[str, Scenario]:
    """All is read and written by 128 bits. Llama's heads are of 64 pairs.

    Each tile turns heads in part, by whole tables and back, in 16 bits one kind of pairs and in
    float32 the other; Llama's turns whole heads forward, both kinds.
    """
    found = {}
    for tile in LAUNCHES:
        for dtype, interleaved in ((HALF, False), (FLOAT, True)):
            name = f"rotary-in-part-{tile.block_pairs}-{str(dtype).removeprefix('torch.')}"
            turn = partial(_rotary, tile.block_pairs, 32, dtype, interleaved, True)
            found[name] = Scenario(turn, wide_only=True, capabilities=(90,))
    for interleaved in (False, True):
        name = f"rotary-{'interleaved' if interleaved else 'halves'}"
        found[name] = Scenario(partial(_rotary, 64, 0, HALF, interleaved, False), wide_only=True)
    return found
