"""The launches of cross-entropy that are compiled."""

from __future__ import annotations

from functools import partial

import torch

from gpunn.kernels.launch import launchers
from gpunn.profiling.static_report import meta
from scenario import Scenario


def _cross_entropy(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    """Forward and backward; "plain", or with all that there is, of classes or probabilities.

    "shares" are probabilities with nothing else.
    """
    rows = shape[0], *shape[2:]
    x, target = meta(*shape, dtype=dtype), meta(*rows, dtype=torch.int64)
    weight, smoothing = None, 0.0
    if kind in ("classes", "probabilities"):
        weight, smoothing = meta(shape[1], dtype=dtype), 0.1
    target = meta(*shape, dtype=dtype) if kind in ("probabilities", "shares") else target
    loss, *kept = launchers["cross_entropy_forward"](x, target, weight, -100, smoothing)
    launchers["cross_entropy_with_gradient"](x, target, weight, -100, smoothing, True)
    launchers["cross_entropy_backward"](loss, x, target, weight, *kept, -100, smoothing)


def cross_entropy_scenarios() -> dict[str, Scenario]:
    """A large vocabulary is read by 128 bits; a few classes, and pixels of them, as they fit."""
    found = {}
    for kind in ("plain", "classes", "probabilities"):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"cross-entropy-{kind}-{str(dtype).removeprefix('torch.')}"
            # what belongs to rows, and the one logit of each row's class
            found[name] = Scenario(
                partial(_cross_entropy, (4096, 131072), dtype, kind), wide_only=True,
                narrow_allowed=16, capabilities=(80, 90, 100) if kind == "plain" else (90,),
            )  # fmt: skip
        pixels = partial(_cross_entropy, (64, 20, 4096), torch.bfloat16, kind)
        found[f"cross-entropy-pixels-{kind}"] = Scenario(pixels, capabilities=(90,))
        if kind != "plain":  # the longest rows that stand in registers
            row = partial(_cross_entropy, (4096, 8192), torch.float32, kind)
            found[f"cross-entropy-row-{kind}"] = Scenario(row, capabilities=(90,))
    for kind in ("classes", "shares"):
        few = partial(_cross_entropy, (4096, 10), torch.bfloat16, kind)
        found[f"cross-entropy-few-{kind}"] = Scenario(few, capabilities=(90,))
    dx, number = meta(4096, 4096), meta(dtype=torch.float32)
    scale = partial(launchers["cross_entropy_scale_gradient"], dx, number)
    found["cross-entropy-scale"] = Scenario(scale, wide_only=True, narrow_allowed=1)
    return found
