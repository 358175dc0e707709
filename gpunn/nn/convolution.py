"""Convolutions, with the activation and the residual that follow them in the same kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules.conv import _ConvNd

import gpunn.functional as GF
from gpunn.functional.activation import ActivationName, resolve_activation
from gpunn.functional.convolution import Fused, finished
from gpunn.functional.dispatch import check_arguments, record_fallback
from gpunn.functional.window import Sizes
from gpunn.nn.overrides import overrides


class _Fused(_ConvNd):
    """What the convolutions share: what is fused, and padding other than zeros."""

    activation: ActivationName = None

    def _fuse(self, activation: ActivationName) -> None:
        resolve_activation(activation)  # or raises
        self.activation = activation

    def extra_repr(self) -> str:
        """torch's description, and the activation where there is one."""
        parts = [super().extra_repr()]
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)

    def _convolved(
        self,
        function: Any,
        base: type[_ConvNd],
        input: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """By the function, or by what has replaced the _conv_forward of torch's class."""
        if overrides(self, base, "_conv_forward"):
            reason = "a _conv_forward of the user's own: called, not fused with what follows"
            record_fallback(function.__name__, reason)
            check_arguments(0.0, residual=residual)
            y = self._conv_forward(input, self.weight, self.bias)
            return finished(y, residual, Fused(*resolve_activation(self.activation)))
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            around = self._reversed_padding_repeated_twice
            input, padding = F.pad(input, around, mode=self.padding_mode), 0
        result: torch.Tensor = function(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
            activation=self.activation, residual=residual,
        )  # fmt: skip
        return result

    def _transposed(
        self,
        function: Any,
        n: int,
        input: torch.Tensor,
        output_size: list[int] | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        extra = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, n, self.dilation
        )
        result: torch.Tensor = function(
            input, self.weight, self.bias, self.stride, self.padding, extra, self.groups,
            self.dilation, activation=self.activation, residual=residual,
        )  # fmt: skip
        return result


class Conv1d(_Fused, torch.nn.Conv1d):
    """``torch.nn.Conv1d`` on ``gpunn.functional.conv1d``, where the formula stands.

    Parameters, initialisation and ``state_dict`` are torch's; ``activation`` is by keyword. A
    ``_conv_forward`` of a subclass's or the layer's own is called, as torch calls it; activation
    and residual are applied to its result.

    Raises:
        ValueError: an unknown activation, or torch's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: ActivationName = None,
    ) -> None:
        torch.nn.Conv1d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation,  # type: ignore[arg-type]
            groups, bias, padding_mode, device, dtype,
        )  # fmt: skip
        self._fuse(activation)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """f(conv(input)) + residual."""
        return self._convolved(GF.conv1d, torch.nn.Conv1d, input, residual)


class Conv2d(_Fused, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` on ``gpunn.functional.conv2d``, where the formula stands, as ``Conv1d``.

    Raises:
        ValueError: an unknown activation, or torch's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: ActivationName = None,
    ) -> None:
        torch.nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation,  # type: ignore[arg-type]
            groups, bias, padding_mode, device, dtype,
        )  # fmt: skip
        self._fuse(activation)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """f(conv(input)) + residual."""
        return self._convolved(GF.conv2d, torch.nn.Conv2d, input, residual)


class ConvTranspose1d(_Fused, torch.nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` on ``gpunn.functional.conv_transpose1d``, as ``Conv1d``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: ActivationName = None,
    ) -> None:
        torch.nn.ConvTranspose1d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, output_padding,  # type: ignore[arg-type]
            groups, bias, dilation, padding_mode, device, dtype,
        )  # fmt: skip
        self._fuse(activation)

    def forward(
        self,
        input: torch.Tensor,
        output_size: list[int] | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """f(conv_transpose(input)) + residual."""
        return self._transposed(GF.conv_transpose1d, 1, input, output_size, residual)


class ConvTranspose2d(_Fused, torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` on ``gpunn.functional.conv_transpose2d``, as ``Conv2d``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: ActivationName = None,
    ) -> None:
        torch.nn.ConvTranspose2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, output_padding,  # type: ignore[arg-type]
            groups, bias, dilation, padding_mode, device, dtype,
        )  # fmt: skip
        self._fuse(activation)

    def forward(
        self,
        input: torch.Tensor,
        output_size: list[int] | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """f(conv_transpose(input)) + residual."""
        return self._transposed(GF.conv_transpose2d, 2, input, output_size, residual)
