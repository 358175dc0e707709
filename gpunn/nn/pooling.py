"""Pooling layers with torch's names, arguments and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import gpunn.functional as GF


class MaxPool1d(torch.nn.MaxPool1d):
    """``torch.nn.MaxPool1d`` on ``gpunn.functional.max_pool1d``."""

    def forward(self, input: torch.Tensor) -> Any:
        return GF.max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool2d(torch.nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` on ``gpunn.functional.max_pool2d``."""

    def forward(self, input: torch.Tensor) -> Any:
        return GF.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class AvgPool1d(torch.nn.AvgPool1d):
    """``torch.nn.AvgPool1d`` on ``gpunn.functional.avg_pool1d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.avg_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` on ``gpunn.functional.avg_pool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """``torch.nn.AdaptiveMaxPool1d`` on ``gpunn.functional.adaptive_max_pool1d``."""

    def forward(self, input: torch.Tensor) -> Any:
        return GF.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """``torch.nn.AdaptiveMaxPool2d`` on ``gpunn.functional.adaptive_max_pool2d``."""

    def forward(self, input: torch.Tensor) -> Any:
        return GF.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` on ``gpunn.functional.adaptive_avg_pool1d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` on ``gpunn.functional.adaptive_avg_pool2d``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.adaptive_avg_pool2d(input, self.output_size)


class MaxUnpool1d(torch.nn.MaxUnpool1d):
    """``torch.nn.MaxUnpool1d`` on ``gpunn.functional.max_unpool1d``."""

    def forward(
        self,
        input: torch.Tensor,
        indices: torch.Tensor,
        output_size: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return GF.max_unpool1d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )


class MaxUnpool2d(torch.nn.MaxUnpool2d):
    """``torch.nn.MaxUnpool2d`` on ``gpunn.functional.max_unpool2d``."""

    def forward(
        self,
        input: torch.Tensor,
        indices: torch.Tensor,
        output_size: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return GF.max_unpool2d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )
