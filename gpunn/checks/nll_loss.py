"""The checks of the negative log-likelihood: weights, ignored rows, more dimensions, reductions."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, as_numpy, compare, drawn
from gpunn.reference.nll_loss import nll_loss_backward, nll_loss_forward, row_weights


@dataclass(frozen=True)
class Case:
    """Log-probabilities (N, C, *), and how their losses are reduced."""

    shape: tuple[int, ...]
    reduction: str = "none"
    weighted: bool = False
    channels_last: bool = False


CASES: dict[str, Case] = {
    "nll_loss": Case((9, 37)),
    "nll_loss, weights, mean": Case((700, 5), "mean", weighted=True),
    "nll_loss, more dimensions, sum": Case((2, 7, 3, 5), "sum"),
    "nll_loss, channels_last, mean": Case((2, 7, 3, 5), "mean", channels_last=True),
}


def check_nll_loss(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradient of the log-probabilities."""
    case = CASES[name]
    n_classes = case.shape[1]
    x = drawn(case.shape, dtype, device)
    if case.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    target = torch.arange(x[:, 0].numel(), device=device).view(x[:, 0].shape) % n_classes
    target.view(-1)[1] = -100
    weight = drawn((n_classes,), dtype, device).abs() + 0.5 if case.weighted else None
    arguments: Any = dict(weight=weight, reduction=case.reduction)

    def exact(dy: Array, x: Array) -> dict[str, Array]:
        y, rows = target.cpu().numpy().reshape(-1), x.swapaxes(1, -1)
        w = as_numpy(torch.ones(n_classes) if weight is None else weight)
        if x.ndim > 2:
            y = target.cpu().numpy().swapaxes(1, -1).reshape(-1)
        flat = rows.reshape(-1, n_classes) if x.ndim > 2 else x
        losses = nll_loss_forward(flat, y, w, -100)
        total = row_weights(y, w, -100).sum() if case.reduction == "mean" else 1.0
        upstream = dy.reshape(-1) if case.reduction == "none" else dy / total + 0 * losses
        dx = nll_loss_backward(upstream, flat, y, w, -100)
        whole = losses if case.reduction == "none" else losses.sum() / total
        return {
            "loss": np.asarray(whole),
            "dx": dx.reshape(rows.shape).swapaxes(1, -1) if x.ndim > 2 else dx,
        }

    return compare(
        lambda x: GF.nll_loss(x, target, **arguments),
        # on a CPU torch has no gradient for channels_last
        lambda x: F.nll_loss(x.contiguous(), target, **arguments), exact, [x],
    )  # fmt: skip


CHECKS = [Check("nll_loss", name, functools.partial(check_nll_loss, name)) for name in CASES]
