"""Batch normalisation, with the residual and the activation that follow it in the same pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

import gpunn.functional as GF
from gpunn.functional.activation import ActivationName, resolve_activation


class _Fused(_BatchNorm):
    """What the batch normalisations share."""

    activation: ActivationName = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: ActivationName = None,
    ) -> None:
        without = {} if bias else {"bias": False}  # which older versions of torch do not know
        _BatchNorm.__init__(
            self, num_features, eps, momentum, affine, track_running_stats, device, dtype, **without
        )
        resolve_activation(activation)  # or raises
        self.activation = activation

    def _count_batch(self) -> float:
        """What the running statistics are to move by: of a cumulative average, 1 / batches."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return momentum

    def _arguments(self) -> tuple[Any, ...]:
        """What the functions take after the input."""
        momentum = self._count_batch()
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        running: tuple[Any, Any] = (None, None)
        if not self.training or self.track_running_stats:
            running = self.running_mean, self.running_var
        return *running, self.weight, self.bias, by_batch, momentum, self.eps

    def _normalised(self, input: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        self._check_input_dim(input)
        return GF.batch_norm(
            input, *self._arguments(), activation=self.activation, residual=residual
        )

    def extra_repr(self) -> str:
        """torch's description, and the activation where there is one."""
        parts = [super().extra_repr()]
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)


class BatchNorm1d(_Fused, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` on ``gpunn.functional.batch_norm``, where the formula stands.

    Parameters, buffers and their first values are torch's; ``activation`` is by keyword.

    Raises:
        ValueError: an unknown activation, or torch's.
    """

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """f(batch_norm(input) + residual), for (N, C) or (N, C, L)."""
        return self._normalised(input, residual)


class BatchNorm2d(_Fused, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` on ``gpunn.functional.batch_norm``, as ``BatchNorm1d``."""

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """f(batch_norm(input) + residual), for (N, C, H, W)."""
        return self._normalised(input, residual)


class BatchNorm3d(_Fused, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` on ``gpunn.functional.batch_norm``, as ``BatchNorm1d``."""

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """f(batch_norm(input) + residual), for (N, C, D, H, W)."""
        return self._normalised(input, residual)


class SyncBatchNorm(_Fused, torch.nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` on ``gpunn.functional.sync_batch_norm``, as ``BatchNorm1d``.

    In training, where torch.distributed is initialised with more than one process, the statistics
    are those of all of them.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: ActivationName = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, activation=activation,
        )  # fmt: skip
        self.process_group = process_group

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """f(batch_norm(input) + residual), for (N, C, *)."""
        group = self.process_group
        alone = not (dist.is_available() and dist.is_initialized())
        if not self.training or alone or dist.get_world_size(group) < 2:
            return self._normalised(input, residual)
        self._check_input_dim(input)
        *tensors, _, momentum, eps = self._arguments()
        arguments: Any = (input, *tensors, momentum, eps, group)
        return GF.sync_batch_norm(*arguments, activation=self.activation, residual=residual)

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: Any = None
    ) -> torch.nn.Module:
        """The module with each batch normalisation in it, torch's or gpunn's, made one of these.

        Parameters, buffers and activation stay. A module that is one itself is returned converted.
        """
        converted = module
        if isinstance(module, _BatchNorm):
            converted = cls(
                module.num_features, module.eps, module.momentum, module.affine,
                module.track_running_stats, process_group,
                activation=getattr(module, "activation", None),
            )  # fmt: skip
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(converted, name, getattr(module, name))
            converted.training = module.training
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted
