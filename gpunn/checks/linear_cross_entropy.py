"""The checks of linear_cross_entropy: several chunks of classes, and one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, as_numpy, compare, drawn
from gpunn.reference.cross_entropy import shares
from gpunn.reference.linear_cross_entropy import (
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)


@dataclass(frozen=True)
class Case:
    """x (rows, features) and W (classes, features), ``chunk`` classes at a time."""

    rows: int
    features: int
    classes: int
    chunk: int
    smoothing: float = 0.0


CASES: dict[str, Case] = {
    "linear_cross_entropy": Case(9, 32, 200, 128),
    "linear_cross_entropy, smoothing": Case(9, 17, 75, 37, smoothing=0.1),
    "linear_cross_entropy, one chunk": Case(9, 32, 75, 128),
}


def check_linear_cross_entropy(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case with class weights and a row that is ignored, and all gradients."""
    case = CASES[name]
    x = drawn((case.rows, case.features), dtype, device)
    linear_weight = drawn((case.classes, case.features), dtype, device) / case.features**0.5
    bias = drawn((case.classes,), dtype, device)
    weight = drawn((case.classes,), dtype, device).abs() + 0.5
    target = torch.arange(case.rows, device=device) * 31 % case.classes
    target[1] = -100
    options: Any = dict(weight=weight, reduction="none", label_smoothing=case.smoothing)
    share = shares(target.cpu().numpy(), case.classes, -100, case.smoothing)

    def exact(dy: Array, *given: Any) -> dict[str, Array]:
        rest: Any = share, as_numpy(weight)
        gradients = linear_cross_entropy_backward(dy, *given, *rest)
        loss = linear_cross_entropy_forward(*given, *rest)
        return dict(zip(("loss", "dx", "dW", "db"), (loss, *gradients), strict=True))

    return compare(
        lambda x, w, b: GF.linear_cross_entropy(
            x, w, target, linear_bias=b, chunk_size=case.chunk, **options
        ),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target, **options),
        exact, [x, linear_weight, bias],
    )  # fmt: skip


CHECKS = [
    Check("linear_cross_entropy", name, functools.partial(check_linear_cross_entropy, name))
    for name in CASES
]
