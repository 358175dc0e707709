"""The checks of the losses of elements: each by itself, weighted, and reduced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, as_numpy, compare, drawn
from gpunn.reference.pointwise_loss import pointwise_loss_backward, pointwise_loss_forward


@dataclass(frozen=True)
class Case:
    """A call of one of the functions, and what the reference calls it."""

    function: str
    loss: str
    shape: tuple[int, ...] = (5, 67)
    arguments: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[float, ...] = ()
    reduction: str = "none"
    weighted: tuple[str, ...] = ()


BCE = "binary_cross_entropy_with_logits"
CASES: dict[str, Case] = {
    "mse_loss": Case("mse_loss", "mse"),
    "mse_loss, weights, sum": Case(
        "mse_loss", "mse", (9, 301), reduction="sum", weighted=("weight",)
    ),
    "l1_loss": Case("l1_loss", "l1"),
    "smooth_l1_loss": Case("smooth_l1_loss", "smooth_l1", arguments={"beta": 0.75},
                           parameters=(0.75,)),
    "huber_loss, mean": Case("huber_loss", "huber", (9, 301), {"delta": 1.5}, (1.5,), "mean"),
    BCE: Case(BCE, "bce_with_logits"),
    f"{BCE}, weights, mean": Case(
        BCE, "bce_with_logits", (9, 301), reduction="mean", weighted=("weight", "pos_weight")
    ),
    "kl_div, batchmean": Case("kl_div", "kl_div", (9, 301), reduction="batchmean"),
    "kl_div, log_target": Case("kl_div", "kl_div_log", arguments={"log_target": True}),
}  # fmt: skip


def check_pointwise_loss(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradients of input and target."""
    case = CASES[name]
    x, y = 2 * drawn(case.shape, dtype, device), drawn(case.shape, dtype, device)
    if case.function in (BCE, "kl_div") and case.loss != "kl_div_log":
        y = y.sigmoid()
    shapes = {"weight": case.shape, "pos_weight": case.shape[-1:]}
    weights = {key: drawn(shapes[key], dtype, device).abs() + 0.5 for key in case.weighted}
    arguments = {**case.arguments, **weights, "reduction": case.reduction}

    def exact(dy: Array, x: Array, target: Array) -> dict[str, Array]:
        given = {key: as_numpy(weight) for key, weight in weights.items()}
        parameters = [*case.parameters, *([given["pos_weight"]] if "pos_weight" in given else [])]
        scale = {"mean": x.size, "batchmean": x.shape[0]}.get(case.reduction, 1)
        weight = given.get("weight", 1.0)
        losses = pointwise_loss_forward(x, target, case.loss, *parameters, weight=weight)
        dx, dtarget = pointwise_loss_backward(
            dy / scale, x, target, case.loss, *parameters, weight=weight
        )
        whole = losses if case.reduction == "none" else losses.sum() / scale
        return {"loss": whole, "dx": dx, "dtarget": dtarget}

    def call(package: Any) -> Callable[..., torch.Tensor]:
        return functools.partial(getattr(package, case.function), **arguments)

    return compare(call(GF), call(F), exact, [x, y])


CHECKS = [
    Check("pointwise_loss", name, functools.partial(check_pointwise_loss, name)) for name in CASES
]
