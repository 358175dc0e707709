"""The launches of the negative log-likelihood that are compiled."""

from __future__ import annotations

from functools import partial

import torch

from gpunn.kernels.launch import launchers
from gpunn.kernels.nll_loss import TILES
from gpunn.profiling.static_report import meta
from scenario import Scenario


def _forward(shape: tuple[int, ...], reduction: str) -> None:
    target = meta(shape[0], *shape[2:], dtype=torch.int64)
    given = meta(*shape), target, meta(shape[1]), -100, reduction, torch.bfloat16
    launchers["nll_loss_forward"](*given)


def _backward(shape: tuple[int, ...], reduction: str) -> None:
    target = meta(shape[0], *shape[2:], dtype=torch.int64)
    dloss = meta(*target.shape) if reduction == "none" else meta()
    given = dloss, meta(*shape), target, meta(shape[1]), meta(dtype=torch.float32)
    launchers["nll_loss_backward"](*given, -100, reduction)


def nll_loss_scenarios() -> dict[str, Scenario]:
    """Every tile of the gradient; the widest write by 128 bits."""
    found = {}
    for name, shape in (("mean", (4096, 1000)), ("mean", (8, 19, 4096)), ("none", (8, 19, 4096))):
        found[f"nll-loss-{len(shape)}d-{name}"] = Scenario(
            partial(_forward, shape, name), capabilities=(90,)
        )
    for tile in TILES:
        last = tile == TILES[-1]
        found[f"nll-loss-backward-{tile.block_cols}"] = Scenario(
            partial(_backward, (4096, tile.block_cols), "mean" if last else "none"),
            wide_only=last, narrow_allowed=8, capabilities=(80, 90, 100) if last else (90,),
        )  # fmt: skip
    for n_pixels in (64, 4096):
        found[f"nll-loss-backward-pixels-{n_pixels}"] = Scenario(
            partial(_backward, (8, 19, n_pixels), "mean"), capabilities=(90,),
            wide_only=n_pixels > 64, narrow_allowed=8,
        )  # fmt: skip
    return found
