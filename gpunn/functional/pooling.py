"""Pooling in one and two dimensions, with torch's names and arguments, and max pooling undone.

An input is (N, C, H, W) or (C, H, W), for the 1d ops (N, C, W) or (C, W); every channel is pooled
by itself. Max pooling keeps for its backward where in its window each maximum was, one byte an
output for windows of up to 256 elements, and nothing when no gradient is wanted. torch's int64
indices are made only when asked for.

Source: Ranzato et al. 2007 and Boureau et al. 2010 (max and average pooling); Zeiler and Fergus
2014 (unpooling).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.differentiable_pooling import AveragePooling, MaxPooling, MaxUnpooling
from gpunn.functional.dispatch import autocast_is_on, is_tensor
from gpunn.functional.window import (
    Sizes,
    adaptive_size,
    as_given,
    as_images,
    check_flag,
    pooled_size,
    unpooled_size,
    window_of,
)
from gpunn.kernels.cuda import takes_cuda
from gpunn.kernels.launch import chosen_backend, decline, record_fallback
from gpunn.kernels.pooling import avg_pool_forward, max_pool_forward
from gpunn.kernels.unpooling import max_unpool_forward

# A thread walks through its window alone: what is left to PyTorch's reductions. An estimate.
LARGEST_PLANE = 1024


def _is_reduction(name: str, x: torch.Tensor, size: list[int]) -> bool:
    """Whether an adaptive pooling is one of large planes to one element, and PyTorch's to do."""
    n_elements = x.shape[2] * x.shape[3]
    if size != [1, 1] or n_elements <= LARGEST_PLANE or chosen_backend() != "auto":
        return False
    record_fallback(name, f"a reduction of {n_elements} elements to one: PyTorch's")
    return True


# --- max pooling ---


def _needs_gradient(input: torch.Tensor) -> bool:
    return input.requires_grad and torch.is_grad_enabled()


def _pool_max(
    n: int, input: torch.Tensor, x: torch.Tensor, size: list[int], window: list[int], indices: bool
) -> Any:
    """The maxima, and their indices if asked for, in the dimensions of ``input``."""
    if _needs_gradient(x):
        result = MaxPooling.apply(x, size, window, indices)
    else:
        y, _, where = max_pool_forward(x, size, window, False, indices)
        result = (y, where) if indices else y
    if not indices:
        return as_given(result, n, input.dim())
    return tuple(as_given(part, n, input.dim()) for part in result)


def _max_pool(
    name: str,
    n: int,
    input: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
    return_indices: bool,
) -> Any:
    if not (is_tensor(name, input) and takes_cuda(name, input)):
        arguments = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return getattr(F, name)(input, *arguments)
    x = as_images(name, n, input, input.dim() - n - 1)
    window = window_of(name, n, kernel_size, stride, padding, dilation)
    size = pooled_size(name, x.shape, window, ceil_mode)
    return _pool_max(n, input, x, size, window, bool(return_indices))


def max_pool2d(
    input: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """y[oh, ow] = max over r, s of x[oh sh - ph + r dh, ow sw - pw + s dw], inside of x.

    A NaN in the window is its maximum. With ``return_indices`` also the int64 places ih W + iw of
    the maxima: of equal ones the first, of NaNs the last.

    Returns:
        (N, C, OH, OW), with N where input has it; OH = (H + 2 ph - dh (kh - 1) - 1) / sh + 1,
        rounded down, or in ``ceil_mode`` up where that window begins inside; OW likewise.

    Raises:
        RuntimeError: dimensions, an empty dimension, or an argument's length or range that torch
            refuses.
        TypeError: an argument is not of its type.
    """
    return _max_pool(
        "max_pool2d", 2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    )


def max_pool1d(
    input: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As ``max_pool2d``, along the last dimension alone."""
    return _max_pool(
        "max_pool1d", 1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    )


def _adaptive_max_pool(
    name: str, n: int, input: torch.Tensor, output_size: Any, return_indices: bool
) -> Any:
    if not (is_tensor(name, input) and takes_cuda(name, input)):
        return getattr(F, name)(input, output_size, return_indices)
    x = as_images(name, n, input, 1)
    size = adaptive_size(name, n, output_size, x.shape)
    if _is_reduction(name, x, size):
        return getattr(F, name)(input, output_size, return_indices)
    return _pool_max(n, input, x, size, [], bool(return_indices))


def adaptive_max_pool2d(
    input: torch.Tensor,
    output_size: int | Sequence[int | None] | None,
    return_indices: bool = False,
) -> Any:
    """y[oh, ow] = the maximum of rows floor(oh H / OH) to ceil((oh + 1) H / OH), columns likewise.

    NaNs and ``return_indices`` as in ``max_pool2d``; None in ``output_size`` is the input's size.

    Returns:
        (N, C, OH, OW), with N where input has it, (OH, OW) the ``output_size``.

    Raises:
        RuntimeError: dimensions, an empty dimension, or an ``output_size`` that torch refuses.
        TypeError: an argument is not of its type.
    """
    return _adaptive_max_pool("adaptive_max_pool2d", 2, input, output_size, return_indices)


def adaptive_max_pool1d(
    input: torch.Tensor, output_size: Sizes, return_indices: bool = False
) -> Any:
    """As ``adaptive_max_pool2d``, along the last dimension alone."""
    return _adaptive_max_pool("adaptive_max_pool1d", 1, input, output_size, return_indices)


# --- average pooling ---


def _average(
    n: int, input: torch.Tensor, x: torch.Tensor, size: list[int], window: list[int], *how: Any
) -> torch.Tensor:
    pool = AveragePooling.apply if _needs_gradient(x) else avg_pool_forward
    return as_given(pool(x, size, window, *how), n, input.dim())


def _avg_pool(
    name: str,
    n: int,
    input: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    *divisor: int | None,
) -> torch.Tensor:
    if not (is_tensor(name, input) and takes_cuda(name, input)):
        arguments = (kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor)
        return getattr(F, name)(input, *arguments)  # type: ignore[no-any-return]
    x = as_images(name, n, input, input.dim() - n - 1)
    window = window_of(name, n, kernel_size, stride, padding)
    size = pooled_size(name, x.shape, window, ceil_mode)
    check_flag(name, "count_include_pad", count_include_pad)
    by = divisor[0] if divisor else None
    if by is not None and type(by) is not int:
        raise TypeError(f"divisor_override: {name} expects an integer or None, got {by!r}")
    if by == 0:
        raise RuntimeError(f"divisor_override: {name} expects an integer other than 0, got 0")
    return _average(n, input, x, size, window, count_include_pad, by or 0)


def avg_pool2d(
    input: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """y[oh, ow] = the sum of the window of x, divided by how many elements it has.

    The elements of the padding count if ``count_include_pad``, those that ``ceil_mode`` adds past
    it never; ``divisor_override`` replaces the count.

    Returns:
        (N, C, OH, OW), with N where input has it; sizes as ``max_pool2d``'s, at a dilation of 1.

    Raises:
        RuntimeError: dimensions, an empty dimension, or an argument's length or range that torch
            refuses.
        TypeError: an argument is not of its type.
    """
    return _avg_pool(
        "avg_pool2d", 2, input, kernel_size, stride, padding, ceil_mode, count_include_pad,
        divisor_override,
    )  # fmt: skip


def avg_pool1d(
    input: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:
    """As ``avg_pool2d``, along the last dimension alone."""
    return _avg_pool(
        "avg_pool1d", 1, input, kernel_size, stride, padding, ceil_mode, count_include_pad
    )


def _adaptive_avg_pool(name: str, n: int, input: torch.Tensor, output_size: Any) -> torch.Tensor:
    if not (is_tensor(name, input) and takes_cuda(name, input)):
        return getattr(F, name)(input, output_size)  # type: ignore[no-any-return]
    if n == 2 and input.dim() not in (3, 4):  # which torch takes for an output of one
        decline(name, f"an input of {input.dim()} dimensions")
        return getattr(F, name)(input, output_size)  # type: ignore[no-any-return]
    x = as_images(name, n, input, input.dim() - n)
    size = adaptive_size(name, n, output_size, x.shape)
    if _is_reduction(name, x, size):
        return getattr(F, name)(input, output_size)  # type: ignore[no-any-return]
    return _average(n, input, x, size, [], False, 0)


def adaptive_avg_pool2d(
    input: torch.Tensor, output_size: int | Sequence[int | None] | None
) -> torch.Tensor:
    """y[oh, ow] = the mean of rows floor(oh H / OH) to ceil((oh + 1) H / OH), columns likewise.

    None in ``output_size`` is the input's size.

    Returns:
        (N, C, OH, OW), with N where input has it, (OH, OW) the ``output_size``.

    Raises:
        RuntimeError: dimensions, an empty dimension, or an ``output_size`` that torch refuses.
        TypeError: an argument is not of its type.
    """
    return _adaptive_avg_pool("adaptive_avg_pool2d", 2, input, output_size)


def adaptive_avg_pool1d(input: torch.Tensor, output_size: Sizes) -> torch.Tensor:
    """As ``adaptive_avg_pool2d``, along the last dimension alone."""
    return _adaptive_avg_pool("adaptive_avg_pool1d", 1, input, output_size)


# --- max pooling undone ---


def _check_indices(name: str, input: torch.Tensor, indices: torch.Tensor) -> None:
    if indices.dtype != torch.int64:
        raise RuntimeError(f"indices: {name} expects torch.int64, got {indices.dtype}")
    if indices.shape != input.shape:
        expected, given = tuple(input.shape), tuple(indices.shape)
        raise RuntimeError(f"indices: {name} expects input's shape {expected}, got {given}")
    if indices.device != input.device:
        raise RuntimeError(
            f"indices: {name} expects device {input.device}, that of input, got {indices.device}"
        )


def _max_unpool(
    name: str,
    n: int,
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    output_size: Sequence[int] | None,
) -> torch.Tensor:
    tensors = is_tensor(name, input) and is_tensor(name, indices, "indices")
    if not (tensors and takes_cuda(name, input)):
        arguments = (kernel_size, stride, padding, output_size)
        return getattr(F, name)(input, indices, *arguments)  # type: ignore[no-any-return]
    x = as_images(name, n, input, 1)
    given = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    given["stride"] = kernel_size if stride is None else stride
    size = unpooled_size(name, n, x.shape, given, output_size)
    _check_indices(name, input, indices)
    if x.is_cpu and x.dtype != torch.float64 and autocast_is_on(x):
        x = x.float()  # max_unpool2d is on autocast's float32 list for the CPU
    where = as_images(name, n, indices, 1)
    unpool = MaxUnpooling.apply if _needs_gradient(x) else max_unpool_forward
    return as_given(unpool(x, where, size), n, input.dim())


def max_unpool2d(
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """y is 0, except y[n, c, indices[n, c, h, w]] = x[n, c, h, w], the place counted in a plane.

    Of several inputs for one place the last is taken. y has ``output_size``, with or without the
    dimensions before it, or (H - 1) sh + kh - 2 ph rows, and columns likewise.

    Raises:
        RuntimeError: dimensions or an empty one, indices of another shape, dtype or device, or
            outside of y.
        TypeError: an argument is not of its type.
        ValueError: an ``output_size`` that the arguments do not lead to.
    """
    arguments = (kernel_size, stride, padding, output_size)
    return _max_unpool("max_unpool2d", 2, input, indices, *arguments)


def max_unpool1d(
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """As ``max_unpool2d``, along the last dimension alone."""
    arguments = (kernel_size, stride, padding, output_size)
    return _max_unpool("max_unpool1d", 1, input, indices, *arguments)
