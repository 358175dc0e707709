"""The launches of linear_cross_entropy that are compiled."""

from __future__ import annotations

from functools import partial

import torch

from gpunn.kernels import cross_entropy, linear_cross_entropy, product
from gpunn.profiling.static_report import meta
from scenario import Scenario

ROWS, CLASSES = 8192, 16384


def _chunk(dtype: torch.dtype, smooth: bool, last: bool) -> None:
    """The statistics of a chunk of classes, or, of the ``last``, the loss; and its gradient."""
    logits, state = meta(ROWS, CLASSES, dtype=dtype), meta(4, ROWS, dtype=torch.float32)
    target, rows = meta(ROWS, dtype=torch.int64), meta(ROWS, dtype=torch.float32)
    weight, smoothing = (meta(CLASSES, dtype=dtype), 0.1) if smooth else (None, 0.0)
    weight_sum, results = meta(1, dtype=torch.float32), [rows if last else None] * 3
    tensors = logits, target, weight, weight_sum, state, *results
    linear_cross_entropy.chunk_statistics(tensors, CLASSES, 8 * CLASSES, -100, smoothing)
    if last:
        given = rows, logits, target, weight, weight_sum, rows, rows, logits
        cross_entropy.write_gradient("chunk", given, CLASSES, 8 * CLASSES, -100, smoothing)


def _add_to_sum(tile: product.MatmulLaunch) -> None:
    """What a chunk of 16 bits adds to a float32 sum."""
    sums, logits = meta(ROWS, 4096, dtype=torch.float32), meta(ROWS, CLASSES)
    epilogue = product.Epilogue(sums, residual=sums)
    product.multiply("chunk", logits, meta(CLASSES, 4096).T, epilogue, tile)


def linear_cross_entropy_scenarios() -> dict[str, Scenario]:
    """Chunks are read by 128 bits; what belongs to rows, and each row's logit, as it fits."""
    found: dict[str, Scenario] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for name, smooth, last in (("plain", False, False), ("last", True, True)):
            short = str(dtype).removeprefix("torch.")
            found[f"linear-cross-entropy-{name}-{short}"] = Scenario(
                partial(_chunk, dtype, smooth, last), wide_only=True, narrow_allowed=20,
                capabilities=(80, 90, 100) if dtype == torch.bfloat16 else (90,),
            )  # fmt: skip
    for tile in (*product.DESCRIPTOR_TILES_16_BIT, *product.POINTER_TILES_16_BIT):
        chips = (90, 100) if tile in product.DESCRIPTOR_TILES_16_BIT else (80,)
        shape = f"{tile.block_rows}x{tile.block_cols}x{tile.block_inner}"
        found[f"linear-cross-entropy-sum-{shape}-{chips[0]}"] = Scenario(
            partial(_add_to_sum, tile), tensor_cores=True, capabilities=chips
        )
    return found
