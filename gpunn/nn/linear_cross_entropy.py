"""The cross-entropy of a linear layer's output as a module."""

from __future__ import annotations

import math
from typing import Any

import torch

import gpunn.functional as GF


class _WithoutTorchs(torch.nn.modules.loss._WeightedLoss):
    """The constructor, for releases of torch that have no ``LinearCrossEntropyLoss``."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"weight: expected shape ({num_classes},), got {weight.shape}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features, self.options = num_classes, out_features, options
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        n_outputs = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, n_outputs, bias, device, dtype)


_Base: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _WithoutTorchs)


class LinearCrossEntropyLoss(_Base):  # type: ignore[misc]
    """``torch.nn.LinearCrossEntropyLoss`` on ``gpunn.functional.linear_cross_entropy``.

    Where torch has none, with its constructor: ``(in_features, num_classes, *, out_features=(),
    bias=False, device=None, dtype=None, reduction="mean", weight=None, ignore_index=None,
    label_smoothing=0.0, options=None)``. The layer's parameters are those of ``linear``.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        outputs, layer = (self.num_classes, *self.out_features), self.linear
        return GF.linear_cross_entropy(
            input, layer.weight.reshape(*outputs, layer.in_features), target,
            linear_bias=None if layer.bias is None else layer.bias.reshape(outputs),
            weight=self.weight,
            reduction=self.reduction, ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing, options=self.options,
        )  # fmt: skip
