"""The launches of the losses of elements that are compiled."""

from __future__ import annotations

from functools import partial

import torch

from gpunn.kernels.launch import launchers
from gpunn.kernels.loss import LOSSES
from gpunn.profiling.static_report import meta
from scenario import Scenario

SHAPE = (4096, 4096)


def _loss(name: str, dtype: torch.dtype, kind: str) -> None:
    """Forward and backward: a "mean", the losses of "each", or "weighted" ones.

    Of weights there is one a row, and a pos_weight a column.
    """
    x, y, dloss = meta(*SHAPE, dtype=dtype), meta(*SHAPE, dtype=dtype), meta(dtype=dtype)
    weight = pos_weight = None
    parameters, divisor = ([0.75] if name in ("smooth_l1", "huber") else []), 2**24
    if kind == "weighted":
        weight, pos_weight = meta(SHAPE[0], 1, dtype=dtype), meta(SHAPE[1], dtype=dtype)
        parameters = [1.0]
    given = x, y, weight, pos_weight, name, parameters, None if kind == "each" else divisor
    loss = launchers["pointwise_loss_forward"](*given, dtype)
    dloss = loss if kind == "each" else dloss
    launchers["pointwise_loss_backward"](dloss, *given, [True, kind != "mean"])


def pointwise_loss_scenarios() -> dict[str, Scenario]:
    """All is read by 128 bits, but for what there is one of, and what repeats."""
    found = {}
    for name in LOSSES:
        # The formulas differ, the memory accesses do not: all on one chip, one on the others.
        chips = (80, 90, 100) if name == "bce_with_logits" else (90,)
        found[f"pointwise-loss-{name}"] = Scenario(
            partial(_loss, name, torch.bfloat16, "mean"), wide_only=True, narrow_allowed=2,
            capabilities=chips,
        )  # fmt: skip
    for kind in ("each", "weighted"):
        found[f"pointwise-loss-bce_with_logits-{kind}"] = Scenario(
            partial(_loss, "bce_with_logits", torch.float32, kind), wide_only=True,
            narrow_allowed=0 if kind == "each" else 20, capabilities=(90,),
        )  # fmt: skip
    return found
