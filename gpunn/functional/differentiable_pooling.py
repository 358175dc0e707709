"""Pooling as autograd knows it: every gradient by a kernel, and able to be differentiated again.

All of these are linear in what they differentiate (max pooling, once it is known where the maxima
are), so the gradient of a gradient is a pooling again, or gathers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpunn.functional.dispatch import AGAIN, record_fallback
from gpunn.kernels.pooling import (
    avg_pool_backward,
    avg_pool_forward,
    is_channels_last,
    max_pool_backward,
    max_pool_forward,
    pool_of,
)
from gpunn.kernels.unpooling import max_unpool_backward, max_unpool_forward


def _axis_of(
    tap: torch.Tensor, output: torch.Tensor, size: int, n_outputs: int, window: Sequence[int]
) -> torch.Tensor:
    """Where in the input tap number ``tap`` of window number ``output`` lies, along one axis."""
    if window:
        _, stride, padding, dilation = window
        return output * stride - padding + tap * dilation
    return output * size // n_outputs + tap


def _gather_maxima(ddx: torch.Tensor, positions: torch.Tensor, window: list[int]) -> torch.Tensor:
    """What of ddx lies where the maxima were, given the places of these in their windows.

    Nothing does for a window that dilation and padding put wholly outside of the input.
    """
    (height, width), (n_rows, n_cols) = ddx.shape[2:], positions.shape[2:]
    row = torch.arange(n_rows, device=ddx.device)[:, None]
    col = torch.arange(n_cols, device=ddx.device)
    places, n_columns = positions.long(), pool_of(ddx.shape, positions.shape[2:], window).columns
    ih = _axis_of(places // n_columns, row, height, n_rows, window[::2])
    iw = _axis_of(places % n_columns, col, width, n_cols, window[1::2])
    inside = (ih < height) & (iw < width)
    found = _gather(ddx, torch.where(inside, ih * width + iw, 0))
    return torch.where(inside, found, 0)


def _gather(images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """images[n, c] at the flat indices[n, c]."""
    record_fallback("max_pool", AGAIN)
    return torch.gather(images.flatten(2), 2, indices.flatten(2)).view(indices.shape)


class MaxPooling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, output_size: list[int], window: list[int], keeps_indices: bool
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y, positions, indices = max_pool_forward(x, output_size, window, True, keeps_indices)
        ctx.save_for_backward(positions)
        ctx.input_size, ctx.window = list(x.shape), window
        if not keeps_indices:
            return y
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)  # or the indices would be given a gradient of zeros
        return y, indices

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        if dy is None:
            return None, None, None, None
        backward = _MaxPoolingGradient.apply if torch.is_grad_enabled() else max_pool_backward
        return backward(dy, positions, ctx.input_size, ctx.window), None, None, None


class _MaxPoolingGradient(torch.autograd.Function):
    """Linear in dy, so its own gradient only gathers what arrived where the maxima were."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: torch.Tensor,
        positions: torch.Tensor,
        input_size: list[int],
        window: list[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(positions)
        ctx.window = window
        return max_pool_backward(dy, positions, input_size, window)

    @staticmethod
    def backward(ctx: Any, ddx: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        return _gather_maxima(ddx, positions, ctx.window), None, None, None


class AveragePooling(torch.autograd.Function):
    """Linear, as its gradient is: each is the backward of the other."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, output_size: list[int], window: list[int], counts: bool, by: int
    ) -> torch.Tensor:
        ctx.arguments = list(x.shape), window, counts, by, is_channels_last(x)
        return avg_pool_forward(x, output_size, window, counts, by)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        backward = _AveragePoolingGradient.apply if torch.is_grad_enabled() else avg_pool_backward
        return backward(dy, *ctx.arguments), None, None, None, None


class _AveragePoolingGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dy: torch.Tensor,
        input_size: list[int],
        window: list[int],
        counts: bool,
        by: int,
        channels_last: bool,
    ) -> torch.Tensor:
        ctx.arguments = list(dy.shape[2:]), window, counts, by
        return avg_pool_backward(dy, input_size, window, counts, by, channels_last)

    @staticmethod
    def backward(ctx: Any, ddx: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        forward = AveragePooling.apply if torch.is_grad_enabled() else avg_pool_forward
        return forward(ddx, *ctx.arguments), None, None, None, None, None


class MaxUnpooling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, indices: torch.Tensor, output_size: list[int]
    ) -> torch.Tensor:
        ctx.save_for_backward(indices)
        return max_unpool_forward(x, indices, output_size)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        backward = _gather if torch.is_grad_enabled() else max_unpool_backward
        return backward(dy, indices), None, None
