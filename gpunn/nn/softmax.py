"""softmax, its logarithm and softmin as modules, with a scale and a mask."""

from __future__ import annotations

import torch

import gpunn.functional as GF


class Softmax(torch.nn.Softmax):
    """``torch.nn.Softmax`` on ``gpunn.functional.softmax``; ``forward(input, mask=None)``."""

    def __init__(self, dim: int | None = None, *, scale: float = 1.0) -> None:
        super().__init__(dim)
        self.scale = scale

    def forward(self, input: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return GF.softmax(input, self.dim, scale=_scale_of(self), mask=mask)


class LogSoftmax(torch.nn.LogSoftmax):
    """``torch.nn.LogSoftmax`` on ``gpunn.functional.log_softmax``, as ``Softmax``."""

    def __init__(self, dim: int | None = None, *, scale: float = 1.0) -> None:
        super().__init__(dim)
        self.scale = scale

    def forward(self, input: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return GF.log_softmax(input, self.dim, scale=_scale_of(self), mask=mask)


class Softmin(torch.nn.Softmin):
    """``torch.nn.Softmin`` on ``gpunn.functional.softmin``, as ``Softmax``."""

    def __init__(self, dim: int | None = None, *, scale: float = 1.0) -> None:
        super().__init__(dim)
        self.scale = scale

    def forward(self, input: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return GF.softmin(input, self.dim, scale=_scale_of(self), mask=mask)


class Softmax2d(torch.nn.Softmax2d):
    """``torch.nn.Softmax2d``: softmax over the channels of (N, C, H, W) or (C, H, W).

    Raises:
        ValueError: in forward, the input has neither 3 nor 4 dimensions.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dim() not in (3, 4):
            raise ValueError(f"input: Softmax2d expects 3 or 4 dimensions, got {input.dim()}")
        return GF.softmax(input, -3)


def _scale_of(layer: torch.nn.Module) -> float:
    """1 for a layer that torch made, and that was given its class here."""
    scale: float = vars(layer).get("scale", 1.0)
    return scale
