"""Linear, with the activation, dropout and residual that follow it in the same kernel."""

from __future__ import annotations

from typing import Any

import torch

import gpunn.functional as GF
from gpunn.functional.activation import ActivationName, resolve_activation


class Linear(torch.nn.Linear):
    """y = dropout(f(x Wᵀ + b)) + residual: ``torch.nn.Linear`` and what usually follows it.

    Parameters, initialisation and ``state_dict`` are those of ``torch.nn.Linear``.

    Args:
        in_features, out_features, bias, device, dtype: as torch's.
        activation: f, as ``gpunn.functional.linear`` takes it.
        dropout_p: the dropout's probability, applied in training mode alone.

    Raises:
        RuntimeError: a parameter that the activation refuses, such as ``("celu", 0.0)``.
        TypeError: the activation is neither a name nor a tuple of a name and numbers.
        ValueError: an unknown activation, or a dropout_p outside of [0, 1].
    """

    activation: ActivationName = None
    dropout_p: float = 0.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: ActivationName = None,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        resolve_activation(activation)
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")
        self.activation = activation
        self.dropout_p = dropout_p

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output for input (*, in_features) and residual (*, out_features)."""
        return GF.linear(
            input,
            self.weight,
            self.bias,
            activation=self.activation,
            residual=residual,
            dropout_p=self.dropout_p,
            training=self.training,
        )

    def extra_repr(self) -> str:
        """torch's description, and the fused parts where there are any."""
        parts = [super().extra_repr()]
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.dropout_p:
            parts.append(f"dropout_p={self.dropout_p}")
        return ", ".join(parts)
