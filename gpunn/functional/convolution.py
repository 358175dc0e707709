"""Convolution with what usually follows it: bias, activation and residual in the same kernel.

An input is (N, C, H, W) or (C, H, W), for the 1d ops (N, C, W) or (C, W), which are computed as
images of one row. Results lie in memory as torch's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gpunn.functional.activation import (
    TORCH,
    TWICE_DIFFERENTIABLE,
    ActivationName,
    resolve_activation,
)
from gpunn.functional.convolution_arguments import (
    Geometry,
    check_operands,
    check_residual,
    forward_geometry,
    transposed_geometry,
)
from gpunn.functional.dispatch import (
    autocast_is_on,
    autocast_to_lower,
    check_arguments,
    differentiable_gradients,
    distinct,
    is_tensor,
)
from gpunn.functional.window import Sizes, as_given
from gpunn.kernels.convolution import (
    conv_forward,
    conv_transpose_forward,
    conv_weight_gradient,
    library_differentiates,
    output_padding,
)
from gpunn.kernels.launch import chosen_backend, decline, record_fallback, takes
from gpunn.kernels.linear import linear_epilogue_backward, saves

MOST_PLACES = 2**31 - 2**10
"""Which kernels count in 32 bits, to the end of the last tile."""


class Fused(NamedTuple):
    """What follows the sum: an activation's name and parameters."""

    name: str
    parameters: list[float]


def _launch(
    tensors: Sequence[torch.Tensor | None], geometry: Geometry, fused: Fused, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and "saved" of x, weight, bias and residual."""
    *sliding, output_size = geometry
    forward: Any = conv_forward if output_size is None else conv_transpose_forward
    size = [] if output_size is None else [output_size]
    y, saved = forward(*tensors, *size, *sliding, *fused, keep)
    return y, saved


def finished(
    y: torch.Tensor,
    residual: torch.Tensor | None,
    fused: Fused,
    table: dict[str, Callable[..., torch.Tensor]] = TORCH,
) -> torch.Tensor:
    """The activation and the residual, which has to be of y's shape, in torch's operations."""
    if residual is not None and isinstance(y, torch.Tensor):
        check_residual(residual, y.shape, y.device)
    if fused.name != "identity":
        z, y = y, table[fused.name](y, *fused.parameters)
        if fused.name == "softplus":  # which autocast widens on CUDA
            y = y.to(z.dtype)
    return y if residual is None else y + residual


def _composed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    fused: Fused,
) -> torch.Tensor:
    """The same convolution in torch's operations that can be differentiated twice."""
    stride, padding, dilation, groups, output_size = geometry
    top, bottom, left, right = padding
    if output_size is None:
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        y = F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)
    else:
        extra = output_padding(x, weight, output_size, stride, padding, dilation)
        y = F.conv_transpose2d(x, weight, bias, stride, (top, left), extra, groups, dilation)
    return finished(y, None, fused, TWICE_DIFFERENTIABLE)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        geometry: Geometry,
        fused: Fused,
    ) -> torch.Tensor:
        y, saved = _launch((x, weight, bias, residual), geometry, fused, True)
        kind = saves(*fused, 0.0, residual is not None)
        kept = {"nothing": None, "y": y, "saved": saved}[kind]
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.geometry, ctx.fused = geometry, fused
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        needed, geometry, fused = ctx.needs_input_grad, ctx.geometry, ctx.fused
        dresidual = dy if needed[3] else None
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(
                lambda x, weight, bias: _composed(x, weight, bias, geometry, fused),
                (x, weight, bias),
                needed[:3],
                dy,
            )
            return (*gradients, dresidual, None, None)
        dz, dbias = _before_the_epilogue(dy, saved, fused, needed[0] or needed[1], needed[2])
        dx, dweight = _gradients(dz, x, weight, geometry, needed)
        return dx, dweight, dbias, dresidual, None, None


def _before_the_epilogue(
    dy: torch.Tensor, saved: torch.Tensor | None, fused: Fused, needs_dz: bool, needs_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dz = f'(saved) dy, and its sum over all but the channels, where they are needed."""
    needs_dz = needs_dz and saved is not None
    if not (needs_dz or needs_dbias):
        return dy, None
    rows = dy.permute(0, 2, 3, 1)
    kept = None if saved is None else saved.permute(0, 2, 3, 1)
    dz, dbias = linear_epilogue_backward(
        rows, kept, None, *fused, 0.0, dy.dtype, needs_dz, needs_dbias
    )
    return dz.permute(0, 3, 1, 2) if needs_dz else dy, dbias if needs_dbias else None


def _gradients(
    dz: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    geometry: Geometry,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dx and dweight, where they are needed."""
    stride, padding, dilation, groups, output_size = geometry
    if chosen_backend() == "auto" and library_differentiates(weight, padding, groups):
        return _gradients_by_torch(dz, x, weight, geometry, needed)
    dx, dweight = None, None
    if needed[1]:  # first, as what it is summed in is free again when dx is made
        pair = (dz, x) if output_size is None else (x, dz)
        dweight = conv_weight_gradient(*pair, list(weight.shape), stride, padding, dilation, groups)
    if needed[0]:
        size = list(x.shape[2:]) if output_size is None else None
        adjoint = Geometry(stride, padding, dilation, groups, size)
        dx, _ = _launch((dz, weight, None, None), adjoint, Fused("identity", []), False)
    return dx, dweight


def _gradients_by_torch(
    dz: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    geometry: Geometry,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    stride, padding, dilation, groups, output_size = geometry
    if not any(needed[:2]):
        return None, None
    record_fallback("the convolution's gradients", "bare products: PyTorch's")
    transposed, extra = output_size is not None, [0, 0]
    if output_size is not None:
        extra = output_padding(x, weight, output_size, stride, padding, dilation)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dz, x, weight, None, stride, padding[::2], dilation, transposed, extra, groups,
        [*needed[:2], False],
    )  # fmt: skip
    return dx, dweight


def _by_torch(
    name: str, tensors: Sequence[torch.Tensor | None], arguments: tuple[Any, ...], fused: Fused
) -> torch.Tensor:
    """The same in torch's operations, which check all but the residual."""
    input, weight, bias, residual = tensors
    return finished(getattr(F, name)(input, weight, bias, *arguments), residual, fused)


def _by_kernels(
    n: int, tensors: Sequence[torch.Tensor | None], geometry: Geometry, fused: Fused
) -> torch.Tensor:
    """The same by the kernels, which take images in batches: a row is one of height 1."""
    input, weight, bias, residual = tensors
    assert input is not None
    batched = input.dim() == n + 2

    def as_images(tensor: torch.Tensor | None, in_batches: bool) -> torch.Tensor | None:
        if tensor is None:
            return None
        images = tensor if n == 2 else tensor.unsqueeze(-2)
        return images if in_batches else images.unsqueeze(0)

    given = as_images(input, batched), as_images(weight, True), bias, as_images(residual, batched)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        y: torch.Tensor = _Convolution.apply(*distinct(given), geometry, fused)
    else:
        y, _ = _launch(given, geometry, fused, False)
    return as_given(y, n, input.dim())


def _has_too_many_places(n: int, input: torch.Tensor, geometry: Geometry) -> bool:
    """Whether input or result may have more places than 32 bits count: not exact, but safe."""
    n_images = input.shape[0] if input.dim() == n + 2 else 1
    padded = [size + sum(geometry.padding) for size in input.shape[-n:]]
    return n_images * max(math.prod(padded), math.prod(geometry.output_size or [])) > MOST_PLACES


def _convolve(
    name: str,
    n: int,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    arguments: tuple[Any, ...],
    activation: ActivationName,
    geometry_of: Callable[..., Geometry],
) -> torch.Tensor:
    """The function of this name: by the kernels, or by torch's function of that name."""
    fused = Fused(*resolve_activation(activation))
    input, weight, bias, residual = tensors
    check_arguments(0.0, weight=weight, bias=bias, residual=residual)
    if not (is_tensor(name, input) and is_tensor(name, weight, "weight")):
        return _by_torch(name, tensors, arguments, fused)
    if autocast_is_on(input):
        input, weight, bias = autocast_to_lower(input, weight, bias)  # type: ignore[assignment]
    if not takes(name, input, weight, bias, residual):
        return _by_torch(name, (input, weight, bias, residual), arguments, fused)
    geometry = geometry_of(name, n, input, weight, *arguments)
    check_operands(n, input, weight, bias, residual, geometry)
    if residual is not None and residual.dtype != input.dtype:  # as after a layer in float32
        record_fallback(name, f"a residual in {residual.dtype}: PyTorch's sum")
        bare = input, weight, bias, None
        return _convolve(name, n, bare, arguments, activation, geometry_of) + residual
    if fused.name == "identity" and residual is None and chosen_backend() == "auto":
        record_fallback(name, "nothing to fuse: PyTorch's convolution")
        return getattr(F, name)(input, weight, bias, *arguments)  # type: ignore[no-any-return]
    if _has_too_many_places(n, input, geometry):
        decline(name, f"no kernel for images of shape {tuple(input.shape)}")
        return _by_torch(name, (input, weight, bias, residual), arguments, fused)
    return _by_kernels(n, (input, weight, bias, residual), geometry, fused)


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    activation: ActivationName = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = f(z + bias) + residual, z[k, oh, ow] = Σ over c, r, s of x weight[k, c, r, s].

    x is taken at (oh sh - ph + r dh, ow sw - pw + s dw), and is 0 outside of the image.

    Args:
        input: (N, C, H, W) or (C, H, W), with any strides.
        weight: (K, C / groups, R, S).
        bias: (K,), or None.
        stride, dilation, groups: as torch's.
        padding: as torch's; "same" and "valid" too.
        activation: f, as ``gpunn.functional.linear`` takes it.
        residual: of y's shape, added last; of another dtype, by torch, and y is then in the wider.

    Under ``backend("auto")`` a convolution with nothing to fuse is PyTorch's (on a GPU, cuDNN), and
    so are the sums of one over few channels, or over many channels and taps, as an H200 measured,
    and the gradients, except for groups of few channels.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other, or an argument is one that
            torch refuses.
        TypeError: an argument is not of its type.
        ValueError: an unknown activation.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """
    arguments = stride, padding, dilation, groups
    tensors = input, weight, bias, residual
    return _convolve("conv2d", 2, tensors, arguments, activation, forward_geometry)


def conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    activation: ActivationName = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``conv2d``, also its source, along the last dimension alone."""
    arguments = stride, padding, dilation, groups
    tensors = input, weight, bias, residual
    return _convolve("conv1d", 1, tensors, arguments, activation, forward_geometry)


def conv3d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    activation: ActivationName = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``conv2d``, also its source, of volumes (N, C, D, H, W): by PyTorch, for want of a kernel.

    Raises:
        RuntimeError: also under ``backend("kernels")``.
        TypeError, ValueError: as ``conv2d``.
    """
    fused = Fused(*resolve_activation(activation))
    check_arguments(0.0, weight=weight, bias=bias, residual=residual)
    decline("conv3d", "no kernel for volumes")
    tensors = input, weight, bias, residual
    return _by_torch("conv3d", tensors, (stride, padding, dilation, groups), fused)


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    activation: ActivationName = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = f(z + bias) + residual, where z is the gradient that ``conv2d`` with this weight gives.

    Each x[c] adds x[c] weight[c, k, r, s] to z[k, h sh - ph + r dh, w sw - pw + s dw], so z has
    (H - 1) sh - 2 ph + dh (R - 1) + output_padding + 1 rows. weight: (C, K / groups, R, S).

    Raises:
        RuntimeError, TypeError, ValueError: as ``conv2d``.

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016.
    """
    arguments = stride, padding, output_padding, groups, dilation
    tensors = input, weight, bias, residual
    return _convolve("conv_transpose2d", 2, tensors, arguments, activation, transposed_geometry)


def conv_transpose1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    activation: ActivationName = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``conv_transpose2d``, also its source, along the last dimension alone."""
    arguments = stride, padding, output_padding, groups, dilation
    tensors = input, weight, bias, residual
    return _convolve("conv_transpose1d", 1, tensors, arguments, activation, transposed_geometry)
