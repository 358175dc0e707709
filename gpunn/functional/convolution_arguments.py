"""The arguments of the convolutions, as torch reads them, and which do not fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gpunn.functional.window import pair


class Geometry(NamedTuple):
    """How a weight slides over images; of a 1d op, over images of one row."""

    stride: list[int]
    padding: list[int]
    """Top, bottom, left, right; of a transposed convolution, those of the one it is a gradient of.

    Bottom and right then lack the output padding, which that convolution would otherwise read as
    further places: they may be negative.
    """
    dilation: list[int]
    groups: int
    output_size: list[int] | None
    """Of a transposed convolution."""


def _check_groups(operator: str, groups: object) -> int:
    if not isinstance(groups, int):
        raise TypeError(f"groups: {operator} expects an integer, got {groups!r}")
    if groups < 1:
        raise RuntimeError(f"groups: {operator} expects at least 1, got {groups}")
    return groups


def _check_dimensions(operator: str, n: int, input: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.dim() != n + 2:
        raise RuntimeError(
            f"weight: {operator} expects {n + 2} dimensions, got {weight.dim()}: "
            f"{tuple(weight.shape)}"
        )
    if input.dim() not in (n + 1, n + 2):
        raise RuntimeError(
            f"input: {operator} expects {n + 1} or {n + 2} dimensions, got {input.dim()}: "
            f"{tuple(input.shape)}"
        )
    if 0 in input.shape[-n:] and 0 not in input.shape[:-n]:
        raise RuntimeError(
            f"input: {operator} expects no empty image, got shape {tuple(input.shape)}"
        )


def _kernel(n: int, weight: torch.Tensor) -> list[int]:
    return [1, *weight.shape[2:]][-2:] if n == 1 else list(weight.shape[2:])


def _padding_of(
    operator: str, n: int, padding: Any, kernel: list[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """Zeros above, below, left and right; of "same", the odd one below and right."""
    if not isinstance(padding, str):
        top, left = pair(operator, "padding", padding, n, 0, 0)
        return [top, top, left, left]
    if padding not in ("same", "valid"):
        raise RuntimeError(f"padding: {operator} expects 'same' or 'valid', got {padding!r}")
    if padding == "valid":
        return [0, 0, 0, 0]
    if max(stride) > 1:
        raise RuntimeError(f"padding: {operator} has 'same' for stride 1 alone, got {stride}")
    totals = [dilation[d] * (kernel[d] - 1) for d in (0, 1)]
    return [part for total in totals for part in (total // 2, total - total // 2)]


def forward_geometry(
    operator: str,
    n: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> Geometry:
    """That of a convolution.

    Raises:
        RuntimeError: an argument has a wrong length or value, or the input is too small.
        TypeError: an argument is not of its type.
    """
    _check_dimensions(operator, n, input, weight)
    groups = _check_groups(operator, groups)
    steps = pair(operator, "stride", stride, n, 1, 1)
    spread, kernel = pair(operator, "dilation", dilation, n, 1, 1), _kernel(n, weight)
    around = _padding_of(operator, n, padding, kernel, steps, spread)
    size = [1, *input.shape[-n:]][-2:]
    for d in (0, 1):
        most, taken = size[d] + around[2 * d] + around[2 * d + 1], spread[d] * (kernel[d] - 1) + 1
        if most < taken or kernel[d] < 1:
            raise RuntimeError(
                f"weight: {operator}'s kernel takes {taken} of a dimension that has {most} with "
                f"its padding: {tuple(weight.shape)} over {tuple(input.shape)}"
            )
    if weight.shape[0] % groups or not weight.shape[0]:
        raise RuntimeError(
            f"weight: {operator} expects a number of outputs divisible by groups={groups}, "
            f"got {tuple(weight.shape)}"
        )
    _check_channels(operator, n, input, weight.shape[1] * groups)
    return Geometry(steps, around, spread, groups, None)


def transposed_geometry(
    operator: str,
    n: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
) -> Geometry:
    """That of a transposed convolution.

    Raises:
        RuntimeError: an argument has a wrong length or value, or the output would be empty.
        TypeError: an argument is not of its type.
    """
    _check_dimensions(operator, n, input, weight)
    groups = _check_groups(operator, groups)
    steps = pair(operator, "stride", stride, n, 1, 1)
    spread, kernel = pair(operator, "dilation", dilation, n, 1, 1), _kernel(n, weight)
    top, left = pair(operator, "padding", padding, n, 0, 0)
    extra = pair(operator, "output_padding", output_padding, n, 0, 0)
    if min(kernel) < 1:
        raise RuntimeError(f"weight: {operator} expects no empty kernel, got {tuple(weight.shape)}")
    if any(extra[d] >= max(steps[d], spread[d]) for d in (0, 1)):
        raise RuntimeError(
            f"output_padding: {operator} expects less than stride or dilation, got {output_padding}"
        )
    size = [1, *input.shape[-n:]][-2:]
    result = [
        (size[d] - 1) * steps[d] - 2 * (top, left)[d] + spread[d] * (kernel[d] - 1) + extra[d] + 1
        for d in (0, 1)
    ]
    if min(result) < 1:
        raise RuntimeError(
            f"input: too small for {operator}, whose output would have size {result[-n:]}"
        )
    if weight.shape[0] % groups:
        raise RuntimeError(
            f"weight: {operator} expects a number of channels divisible by groups={groups}, "
            f"got {tuple(weight.shape)}"
        )
    _check_channels(operator, n, input, weight.shape[0])
    around = [top, top - extra[0], left, left - extra[1]]
    return Geometry(steps, around, spread, groups, result)


def _check_channels(operator: str, n: int, input: torch.Tensor, n_channels: int) -> None:
    if input.shape[-n - 1] != n_channels:
        raise RuntimeError(
            f"input: {operator} expects {n_channels} channels for this weight, "
            f"got {tuple(input.shape)}"
        )


def _result_size(
    n: int, input: torch.Tensor, weight: torch.Tensor, geometry: Geometry
) -> list[int]:
    """(OH, OW)."""
    if geometry.output_size is not None:
        return geometry.output_size
    size, kernel, around = [1, *input.shape[-n:]][-2:], _kernel(n, weight), geometry.padding
    return [
        (size[d] + around[2 * d] + around[2 * d + 1]
         - geometry.dilation[d] * (kernel[d] - 1) - 1) // geometry.stride[d] + 1
        for d in (0, 1)
    ]  # fmt: skip


def check_residual(residual: torch.Tensor, expected: Sequence[int], device: torch.device) -> None:
    """Refuse one that does not fit the result, or lies elsewhere.

    Raises:
        RuntimeError: it does.
    """
    if residual.shape != tuple(expected):
        shapes = f"shape {tuple(expected)}, got {tuple(residual.shape)}"
        raise RuntimeError(f"residual: expected {shapes}")
    if residual.device != device:
        raise RuntimeError(
            f"residual: expected device {device}, that of input, got {residual.device}"
        )


def check_operands(
    n: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    geometry: Geometry,
) -> None:
    """Refuse a bias or a residual that does not fit the result, and mixed dtypes and devices.

    Raises:
        RuntimeError: one does not fit.
    """
    transposed = geometry.output_size is not None
    n_outputs = weight.shape[1] * geometry.groups if transposed else weight.shape[0]
    if bias is not None and bias.shape != (n_outputs,):
        raise RuntimeError(f"bias: expected shape ({n_outputs},), got {tuple(bias.shape)}")
    if residual is not None:
        size = _result_size(n, input, weight, geometry)
        check_residual(residual, (*input.shape[: -n - 1], n_outputs, *size[-n:]), input.device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != input.dtype:
            raise RuntimeError(
                f"{name}: expected dtype {input.dtype}, that of input, got {tensor.dtype}"
            )
        if tensor.device != input.device:
            raise RuntimeError(
                f"{name}: expected device {input.device}, that of input, got {tensor.device}"
            )
