"""Losses of elements as modules."""

from __future__ import annotations

import torch

import gpunn.functional as GF


class MSELoss(torch.nn.MSELoss):
    """``torch.nn.MSELoss`` on ``gpunn.functional.mse_loss``."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return GF.mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss):
    """``torch.nn.L1Loss`` on ``gpunn.functional.l1_loss``."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return GF.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """``torch.nn.SmoothL1Loss`` on ``gpunn.functional.smooth_l1_loss``."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return GF.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss):
    """``torch.nn.HuberLoss`` on ``gpunn.functional.huber_loss``."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return GF.huber_loss(input, target, self.reduction, self.delta)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """``torch.nn.BCEWithLogitsLoss`` on ``gpunn.functional.binary_cross_entropy_with_logits``."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return GF.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(torch.nn.KLDivLoss):
    """``torch.nn.KLDivLoss`` on ``gpunn.functional.kl_div``."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return GF.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)
