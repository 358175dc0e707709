"""Launchers of convolution: forward, transposed (which is the gradient of the input), and weight.

``padding`` is [top, bottom, left, right]; bottom and right are in the output's size. Results lie
in memory as torch's do: channels_last where the input or the weight does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from gpunn.kernels.convolve import (
    FEWEST_CHANNELS,
    Outputs,
    are_small,
    convolve,
    forward_taps,
    partial_weights,
    precision_of,
    transposed_taps,
)
from gpunn.kernels.elementwise import in_memory_order_of
from gpunn.kernels.launch import chosen_backend, operator, record_fallback
from gpunn.kernels.linear import as_matrix, saves
from gpunn.kernels.pooling import format_of, is_channels_last
from gpunn.kernels.product import Epilogue, finish, library_is_faster, product

MOST_INNER = 864
"""Channels times taps up to which, in ``auto``, the kernel sums: see ``library_is_faster``.

Halfway between 576 and 1152, with which convolutions of bfloat16 in channels_last, with bias and
relu, took an H200 146 and 108 us in one kernel, 171 and 95 by PyTorch.
"""


def _y_format(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    return format_of(is_channels_last(x) or is_channels_last(weight))


def _allocated(
    shape: tuple[int, ...],
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    activation: str,
    parameters: list[float],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and what ``saves`` calls "saved", for inputs of any convolution."""
    memory_format = _y_format(x, weight)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    kept = keep and saves(activation, parameters, 0.0, residual is not None) == "saved"
    return y, torch.empty_like(y) if kept else y.new_empty((0,))


def _outputs(
    y: torch.Tensor,
    saved: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    parameters: list[float],
) -> Outputs:
    return Outputs(
        y,
        saved if saved.numel() else None,
        None if bias is None else bias.contiguous(),
        None if residual is None else in_memory_order_of(residual, y),
        activation,
        parameters,
    )


def _as_rows(images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) as a matrix of N · H · W rows of channels: a view of channels_last images."""
    return as_matrix(images.permute(0, 2, 3, 1))


def _as_planes(images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) as a matrix of N · C rows of pixels: a view of contiguous images."""
    return images.flatten(0, 1).flatten(1)


def _epilogue(outputs: Outputs) -> Epilogue:
    """What follows the sums; those of planes, which have no column for a bias, have it already."""
    rows, bias, y = _as_rows, outputs.bias, outputs.y
    if not _is_matrix(y):
        rows, bias = _as_planes, None
    residual, saved = (None if t is None else rows(t) for t in (outputs.residual, outputs.saved))
    return Epilogue(rows(y), bias, residual, None, saved, outputs.activation, outputs.parameters)


def _is_matrix(images: torch.Tensor) -> bool:
    return images.permute(0, 2, 3, 1).is_contiguous()


def _are_single_taps(x: torch.Tensor, y: torch.Tensor, *geometry: list[int]) -> bool:
    """Whether each output looks up one input, and both lie as matrices of channels."""
    kernel, stride, padding, groups = geometry
    single = (*kernel, *stride, *groups) == (1,) * 5 and not any(padding)
    return single and _is_matrix(x) and _is_matrix(y)


def output_padding(
    x: torch.Tensor,
    weight: torch.Tensor,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> list[int]:
    """What torch's transposed convolution is to add to its result, to have it of this size."""
    return [
        output_size[d] - (x.shape[2 + d] - 1) * stride[d] + 2 * padding[2 * d]
        - dilation[d] * (weight.shape[2 + d] - 1) - 1
        for d in (0, 1)
    ]  # fmt: skip


def library_takes(padding: list[int]) -> bool:
    """Whether PyTorch's convolution (cuDNN) takes the arguments."""
    return padding[::2] == padding[1::2]


def library_differentiates(weight: torch.Tensor, padding: list[int], groups: int) -> bool:
    """Whether PyTorch's gradients may be the faster ones, and it takes the arguments.

    Groups of few channels, depthwise ones above all, are what it is known to be slow at.
    """
    small = are_small(groups, weight.shape[1], weight.shape[0] // groups)
    return not small and library_takes(padding)


def _left_to_library(
    name: str,
    outputs: Outputs,
    n_channels: int,
    n_taps: int,
    n_phases: int,
    convolution: Callable[..., torch.Tensor],
) -> bool:
    """Whether, in ``auto``, PyTorch's convolution and a kernel for the rest were called instead.

    Of bfloat16 in channels_last, with bias and relu, an H200 took for images of three channels 1274
    us by PyTorch and 1760 in one kernel; for groups of one channel 287 and 341; transposed, with
    four phases, 83 and 267.
    """
    y, epilogue, reason = outputs.y, _epilogue(outputs), None
    if chosen_backend() != "auto" or epilogue.is_bare:  # gradients, which are bare, were decided on
        return False
    if n_channels < FEWEST_CHANNELS:
        reason = f"{n_channels} channels: PyTorch's, then the fused epilogue"
    elif n_phases > 1:
        reason = f"{n_phases} phases of outputs: PyTorch's, then the fused epilogue"
    else:
        n_inner, precision = n_channels * n_taps, precision_of(y.dtype)
        reason = library_is_faster(n_inner, y.dtype, precision, epilogue, MOST_INNER)
    if reason is None:
        return False
    record_fallback(f"{name}: the sums", reason)
    bias = outputs.bias if epilogue.bias is None else None
    sums = in_memory_order_of(convolution(bias=bias), y)
    finish(name, (_as_rows if _is_matrix(y) else _as_planes)(sums)[None], epilogue)
    return True


def _conv_forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    parameters: list[float],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = [
        (x.shape[2 + d] + padding[2 * d] + padding[2 * d + 1]
         - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    ]  # fmt: skip
    shape = x.shape[0], weight.shape[0], *size
    return _allocated(shape, x, weight, residual, activation, parameters, keep)


SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {}SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, str activation, float[] parameters, "
    "bool keep) -> (Tensor, Tensor)"
)


@operator("conv_forward" + SCHEMA.format(""), fake=_conv_forward_fake)
def conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    parameters: list[float],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (N, K, OH, OW) = f(conv(x, weight) + bias) + residual; and, to ``keep``, "saved".

    x (N, C, H, W), weight (K, C / groups, R, S), with any strides.
    """
    y, saved = _conv_forward_fake(
        x, weight, bias, residual, stride, padding, dilation, groups, activation, parameters, keep
    )
    if not y.numel():
        return y, saved
    outputs = _outputs(y, saved, bias, residual, activation, parameters)
    kernel = list(weight.shape[2:])
    if _are_single_taps(x, y, kernel, stride, padding, [groups]):
        product("conv_forward", _as_rows(x), weight.flatten(1), _epilogue(outputs))
        return y, saved
    if library_takes(padding):
        _, n_channels, *taps = weight.shape
        sums = partial(
            torch.conv2d, x, weight,
            stride=stride, padding=padding[::2], dilation=dilation, groups=groups,
        )  # fmt: skip
        if _left_to_library("conv_forward", outputs, n_channels, math.prod(taps), 1, sums):
            return y, saved
    rows, cols = (
        forward_taps(y.shape[2 + d], kernel[d], stride[d], padding[2 * d], dilation[d])
        for d in (0, 1)
    )
    by_group = weight[None] if groups == 1 else weight.unflatten(0, (groups, -1))
    convolve("conv_forward", x, by_group, outputs, (rows, cols))
    return y, saved


def _conv_transpose_forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    parameters: list[float],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = x.shape[0], weight.shape[1] * groups, *output_size
    return _allocated(shape, x, weight, residual, activation, parameters, keep)


@operator(
    "conv_transpose_forward" + SCHEMA.format("SymInt[] output_size, "),
    fake=_conv_transpose_forward_fake,
)
def conv_transpose_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    parameters: list[float],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (N, K, *output_size): what a convolution whose gradient is x would get for its input.

    x (N, C, H, W), weight (C, K / groups, R, S); otherwise as ``conv_forward``.
    """
    y, saved = _conv_transpose_forward_fake(
        x, weight, bias, residual, output_size, stride, padding, dilation, groups, activation,
        parameters, keep,
    )  # fmt: skip
    if not y.numel():
        return y, saved
    outputs = _outputs(y, saved, bias, residual, activation, parameters)
    kernel = list(weight.shape[2:])
    if _are_single_taps(x, y, kernel, stride, padding, [groups]):
        epilogue = _epilogue(outputs)
        product("conv_transpose_forward", _as_rows(x), weight.flatten(1).T, epilogue)
        return y, saved
    if library_takes(padding):
        extra = output_padding(x, weight, output_size, stride, padding, dilation)
        sums = partial(
            torch.conv_transpose2d, x, weight, stride=stride, padding=padding[::2],
            output_padding=extra, groups=groups, dilation=dilation,
        )  # fmt: skip
        of_output = weight.shape[0] // groups, math.prod(kernel), math.prod(stride)
        if _left_to_library("conv_transpose_forward", outputs, *of_output, sums):
            return y, saved
    by_group = weight[None] if groups == 1 else weight.unflatten(0, (groups, -1))
    by_group = by_group.transpose(1, 2)
    rows, cols = (
        transposed_taps(output_size[d], kernel[d], stride[d], padding[2 * d], dilation[d])
        for d in (0, 1)
    )
    for phase in itertools.product(rows, cols):
        convolve("conv_transpose_forward", x, by_group, outputs, phase)
    return y, saved


def _conv_weight_gradient_fake(
    dz: torch.Tensor,
    x: torch.Tensor,
    weight_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    return dz.new_empty(weight_size)


@operator(
    "conv_weight_gradient(Tensor dz, Tensor x, SymInt[] weight_size, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor",
    fake=_conv_weight_gradient_fake,
)
def conv_weight_gradient(
    dz: torch.Tensor,
    x: torch.Tensor,
    weight_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """dweight (K, C / groups, R, S): for each tap the sum of dz times the inputs it was over.

    dz (N, K, OH, OW), x (N, C, H, W). The places are summed in parts, which are added in order.
    """
    dweight = _conv_weight_gradient_fake(dz, x, weight_size, stride, padding, dilation, groups)
    if not dz.numel() or not dweight.numel():
        return dweight.zero_()
    n_outputs, n_channels, *kernel = weight_size
    dz = dz.contiguous(memory_format=torch.channels_last)
    if groups > 1 or n_channels >= FEWEST_CHANNELS:
        x = x.contiguous(memory_format=torch.channels_last)
    rows, cols = (
        forward_taps(dz.shape[2 + d], kernel[d], stride[d], padding[2 * d], dilation[d])
        for d in (0, 1)
    )
    partials = partial_weights(dz, x, weight_size, (rows, cols), groups)
    total = dweight.new_empty((n_outputs, math.prod(kernel) * n_channels))
    finish("conv_weight_gradient", partials, Epilogue(total))
    return dweight.copy_(total.view(n_outputs, *kernel, n_channels).permute(0, 3, 1, 2))


@register_flop_formula(torch.ops.gpunn.conv_forward)
def _forward_flops(x: Any, weight: Any, *rest: Any, out_shape: Any, **keywords: Any) -> int:
    """Of the sums alone, as torch counts its own convolutions; arguments are shapes."""
    return int(conv_flop_count(x, weight, out_shape[0]))


@register_flop_formula(torch.ops.gpunn.conv_transpose_forward)
def _transpose_flops(x: Any, weight: Any, *rest: Any, out_shape: Any, **keywords: Any) -> int:
    return int(conv_flop_count(x, weight, out_shape[0], transposed=True))


@register_flop_formula(torch.ops.gpunn.conv_weight_gradient)
def _weight_gradient_flops(dz: Any, x: Any, weight_size: Any, *rest: Any, **keywords: Any) -> int:
    return int(2 * math.prod(dz) * math.prod(weight_size[1:]))
