"""The checks of cross-entropy: classes and probabilities, weights, smoothing, more dimensions."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, compare, drawn
from gpunn.reference.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    shares,
)


@dataclass(frozen=True)
class Case:
    """Logits (rows, classes), or (rows / inner, classes, inner)."""

    rows: int
    classes: int
    inner: int = 1
    probabilities: bool = False
    weighted: bool = False
    smoothing: float = 0.0
    mean: bool = False


CASES: dict[str, Case] = {
    "cross_entropy": Case(9, 37),
    "cross_entropy, weights, smoothing": Case(9, 1030, weighted=True, smoothing=0.1),
    "cross_entropy, mean": Case(9, 5000, weighted=True, mean=True),
    "cross_entropy, more dimensions": Case(12, 10, inner=6),
    "cross_entropy, longer than a tile": Case(3, 5000),
    "cross_entropy of probabilities, weights": Case(9, 37, probabilities=True, weighted=True),
}


def check_cross_entropy(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradient of the logits; each row's loss by itself, or their mean."""
    case = CASES[name]
    shape = (case.rows // case.inner, case.classes, *([case.inner] if case.inner > 1 else []))
    weight = drawn((case.classes,), dtype, device).abs() + 0.5 if case.weighted else None
    x, soft = drawn(shape, dtype, device), torch.softmax(drawn(shape, dtype, device).float(), 1)
    labels = torch.arange(case.rows, device=device) % case.classes
    labels[1] = -100
    target: Any = soft.to(dtype) if case.probabilities else labels.view(shape[0], *shape[2:])
    arguments: Any = dict(reduction="mean" if case.mean else "none", label_smoothing=case.smoothing)

    def rows_of(array: Array) -> Array:
        found: Array = array.swapaxes(1, -1).reshape(case.rows, -1)
        return found

    def exact(dy: Array, x: Array) -> dict[str, Array]:
        w = torch.ones(case.classes) if weight is None else weight
        scale = w.double().cpu().numpy()
        share = target.double().cpu().numpy()
        if not case.probabilities:
            share = shares(labels.cpu().numpy(), case.classes, -100, case.smoothing)
        logits = rows_of(x)
        classes = labels.cpu().numpy()
        weights = scale[classes.clip(0)] * (classes >= 0)
        divisor = weights.sum() if case.mean else 1.0
        dloss = np.broadcast_to(dy.reshape(-1) / divisor, case.rows)
        dx = cross_entropy_backward(dloss, logits, share, scale)
        by_row = (shape[0], *shape[2:], case.classes)
        losses = cross_entropy_forward(logits, share, scale).reshape(shape[0], *shape[2:])
        return {
            "loss": losses.sum() / divisor if case.mean else losses,
            "dx": dx.reshape(by_row).swapaxes(1, -1) if case.inner > 1 else dx,
        }

    return compare(
        lambda x: GF.cross_entropy(x, target, weight, **arguments),
        lambda x: F.cross_entropy(x, target, weight, **arguments), exact, [x],
    )  # fmt: skip


CHECKS = [
    Check("cross_entropy", name, functools.partial(check_cross_entropy, name)) for name in CASES
]
