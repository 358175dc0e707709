"""Group and instance normalisation, with the activation that follows in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.instancenorm import _InstanceNorm

import gpunn.functional as GF
from gpunn.functional.activation import ActivationName, resolve_activation


def _described(plain: str, activation: ActivationName) -> str:
    """torch's description of a layer, and the activation where there is one."""
    return plain if activation is None else f"{plain}, activation={activation!r}"


class GroupNorm(torch.nn.GroupNorm):
    """``torch.nn.GroupNorm`` on ``gpunn.functional.group_norm``, where the formula stands.

    Parameters and their first values are torch's; ``activation`` is by keyword.

    Raises:
        ValueError: an unknown activation, or torch's.
    """

    activation: ActivationName = None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: ActivationName = None,
    ) -> None:
        without = {} if bias else {"bias": False}  # which older versions of torch do not know
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **without)
        resolve_activation(activation)  # or raises
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """f(group_norm(input)), for (N, C, *)."""
        return GF.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation
        )

    def extra_repr(self) -> str:
        """torch's description, and the activation where there is one."""
        return _described(super().extra_repr(), self.activation)


class _Fused(_InstanceNorm):
    """What the instance normalisations share: torch's checks, and gpunn's function."""

    activation: ActivationName = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: ActivationName = None,
    ) -> None:
        without = {} if bias else {"bias": False}  # which older versions of torch do not know
        _InstanceNorm.__init__(
            self, num_features, eps, momentum, affine, track_running_stats, device, dtype, **without
        )
        resolve_activation(activation)  # or raises
        self.activation = activation

    def _apply_instance_norm(self, input: torch.Tensor) -> torch.Tensor:
        return GF.instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum, self.eps, activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """torch's description, and the activation where there is one."""
        return _described(super().extra_repr(), self.activation)


class InstanceNorm1d(_Fused, torch.nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` on ``gpunn.functional.instance_norm``, where the formula stands.

    Parameters, buffers and their first values are torch's; ``activation`` is by keyword.

    Raises:
        ValueError: an unknown activation, or torch's.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """f(instance_norm(input)), for (N, C, L) or (C, L)."""
        return super().forward(input)


class InstanceNorm2d(_Fused, torch.nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` on ``gpunn.functional.instance_norm``, as ``InstanceNorm1d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """f(instance_norm(input)), for (N, C, H, W) or (C, H, W)."""
        return super().forward(input)


class InstanceNorm3d(_Fused, torch.nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` on ``gpunn.functional.instance_norm``, as ``InstanceNorm1d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """f(instance_norm(input)), for (N, C, D, H, W) or (C, D, H, W)."""
        return super().forward(input)
