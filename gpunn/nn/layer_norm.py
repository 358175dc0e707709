"""Layer normalisation and root mean square normalisation, fused with what comes before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import gpunn.functional as GF


def _settings(dropout_p: float, return_sum: bool) -> tuple[float, bool]:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")
    return dropout_p, return_sum


def _given(layer: torch.nn.Module) -> dict[str, Any]:
    """What a layer of torch's that was given its class here does not have."""
    own = vars(layer)
    return {
        "dropout_p": own.get("dropout_p", 0.0) if layer.training else 0.0,
        "return_sum": own.get("return_sum", False),
    }


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` on ``gpunn.functional.layer_norm``.

    ``forward(input, residual=None)`` gives y, or, with ``return_sum``, y and the sum.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: torch's.
        dropout_p: of the input, in training alone.
        return_sum: whether the residual stream is given, too.

    Raises:
        ValueError: dropout_p is no probability.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dropout_p: float = 0.0,
        return_sum: bool = False,
    ) -> None:
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout_p, self.return_sum = _settings(dropout_p, return_sum)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return GF.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual,
            **_given(self),
        )  # fmt: skip


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` on ``gpunn.functional.rms_norm``; otherwise as ``LayerNorm``."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dropout_p: float = 0.0,
        return_sum: bool = False,
    ) -> None:
        shape: Any = normalized_shape
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self.dropout_p, self.return_sum = _settings(dropout_p, return_sum)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return GF.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, residual=residual, **_given(self)
        )
