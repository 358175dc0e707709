"""The negative log-likelihood as a module."""

from __future__ import annotations

import warnings
from typing import Any

import torch

import gpunn.functional as GF


class NLLLoss(torch.nn.NLLLoss):
    """``torch.nn.NLLLoss`` on ``gpunn.functional.nll_loss``."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return GF.nll_loss(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch's class warns of its subclasses, too

    class NLLLoss2d(torch.nn.NLLLoss2d):
        """``torch.nn.NLLLoss2d``, torch's deprecated name of ``NLLLoss``."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            warnings.warn(
                "`NLLLoss2d` has been deprecated. Please use `NLLLoss` instead.",
                FutureWarning,
                stacklevel=2,
            )
            super().__init__(*args, **kwargs)

        def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return GF.nll_loss(
                input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction
            )
