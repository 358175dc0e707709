"""The launches of batch normalisation that are compiled."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch

from gpunn.kernels.launch import launchers
from gpunn.kernels.pooling import format_of
from gpunn.profiling.static_report import meta
from scenario import Scenario

# By bits; and computed again, of those the one with the most registers.
FUSED = {"relu": True, "mish": False}
PARAMETERS: list[float] = []
EPS, MOMENTUM = 1e-5, 0.1


def _batch_norm(
    kind: str, dtype: torch.dtype, channels_last: bool, activation: str, size: int
) -> None:
    """Forward in training, or backward, with residual, weight and bias."""
    images: Any = partial(
        torch.empty, [64, 256, size, size], dtype=dtype, device="meta",
        memory_format=format_of(channels_last),
    )  # fmt: skip
    x, residual, dy = images(), images(), images()
    weight, bias, mean, var = (meta(256, dtype=torch.float32) for _ in range(4))
    keep = FUSED[activation]
    y, *kept, bits = launchers["batch_norm_forward"](
        x, residual, weight, bias, mean, var, kind != "eval", MOMENTUM, EPS, activation,
        PARAMETERS, keep,
    )  # fmt: skip
    if kind == "backward":
        launchers["batch_norm_backward"](
            dy, x, None if keep else residual, bits if keep else None, weight, bias, *kept, None,
            y.numel() // 256, True, activation, PARAMETERS, [True] * 4,
        )  # fmt: skip


def batch_norm_scenarios() -> dict[str, Scenario]:
    """Contiguous planes of 7 by 7 lie at no multiple of 16 bytes: read one by one."""
    found = {}
    for kind, dtype, last, activation in itertools.product(
        ("eval", "backward"), (torch.bfloat16, torch.float32), (True, False), FUSED
    ):
        layout = "channels-last" if last else "contiguous"
        name = f"batch-norm-{kind}-{layout}-{activation}-{str(dtype).removeprefix('torch.')}"
        launch = partial(_batch_norm, kind, dtype, last, activation)
        # the parameters and sums of channels, and the bits, are narrower than 16 bytes
        chips = (90,) if activation == "relu" else (80, 90, 100)
        found[name] = Scenario(partial(launch, 56), False, True, chips, narrow_allowed=24)
    found["batch-norm-odd-planes"] = Scenario(
        partial(_batch_norm, "backward", torch.bfloat16, False, "relu", 7)
    )
    return found
