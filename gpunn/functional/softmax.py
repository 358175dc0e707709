"""softmax, its logarithm and softmin, along any dimension, with a scale and a mask."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from gpunn.functional.dispatch import autocast_is_on, differentiable_gradients, is_tensor
from gpunn.kernels.launch import decline, takes
from gpunn.kernels.softmax import softmax_backward, softmax_forward


def composed(
    input: torch.Tensor,
    mask: torch.Tensor | None,
    dim: int,
    scale: float,
    logarithm: bool,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """The same in torch's operations."""
    s = input if dtype is None else input.to(dtype)
    s = s if scale == 1 else s * scale
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    return torch.log_softmax(s, dim) if logarithm else torch.softmax(s, dim)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        dim: int,
        scale: float,
        logarithm: bool,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        y = softmax_forward(x, _as_bytes(mask), dim, scale, logarithm, dtype)
        ctx.save_for_backward(x, mask, y)
        ctx.options = dim, scale, logarithm
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, mask, y = ctx.saved_tensors
        dim, scale, logarithm = ctx.options
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(
                lambda x, mask: composed(x, mask, dim, scale, logarithm, y.dtype), (x, mask),
                needs, dy,
            )  # fmt: skip
            return *gradients, None, None, None, None
        if not needs[1]:
            return softmax_backward(dy, y, dim, scale, logarithm, x.dtype), *(None,) * 5
        ds = softmax_backward(dy, y, dim, 1.0, logarithm, y.dtype)
        dx = (ds * scale).to(x.dtype) if needs[0] else None
        return dx, ds.to(mask.dtype), None, None, None, None


def _as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _check(name: str, input: torch.Tensor, mask: Any, dim: int, dtype: torch.dtype | None) -> None:
    """Refuse what is no dimension, dtype or mask."""
    n_dims = max(input.dim(), 1)
    if not -n_dims <= dim < n_dims:
        raise IndexError(f"dim: expected a dimension from {-n_dims} to {n_dims - 1}, got {dim}")
    if not (input.is_floating_point() or (dtype is not None and dtype.is_floating_point)):
        raise RuntimeError(f"input: {name} expects floating-point numbers, got {input.dtype}")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: {name} expects a tensor, got {type(mask).__name__}")
    if mask.device != input.device or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise RuntimeError(
            f"mask: {name} expects booleans or floating-point numbers on {input.device}, "
            f"got {mask.dtype} on {mask.device}"
        )
    shape = torch.broadcast_shapes(mask.shape, input.shape)
    if shape != input.shape:
        raise RuntimeError(
            f"mask: {name} expects a shape that broadcasts to {tuple(input.shape)}, "
            f"got {tuple(mask.shape)}"
        )


def _apply(
    name: str,
    input: torch.Tensor,
    dim: int | None,
    dtype: torch.dtype | None,
    scale: float,
    mask: torch.Tensor | None,
    logarithm: bool = False,
) -> torch.Tensor:
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1
        warnings.warn(
            f"Implicit dimension choice for {name} has been deprecated: give dim.", stacklevel=4
        )
    if not is_tensor(name, input):
        return composed(input, mask, dim, scale, logarithm, dtype)
    _check(name, input, mask, dim, dtype)
    if not takes(name, input, *([] if mask is None or mask.dtype == torch.bool else [mask])):
        return composed(input, mask, dim, scale, logarithm, dtype)
    if autocast_is_on(input) and not input.is_cpu and dtype is None:
        dtype = torch.promote_types(input.dtype, torch.float32)
    result = input.dtype if dtype is None else dtype
    if mask is not None and mask.is_floating_point():
        result = torch.promote_types(result, mask.dtype)
    if result not in (torch.float16, torch.bfloat16, torch.float32, input.dtype):
        decline(name, f"no kernel for a result in {result}")
        return composed(input, mask, dim, scale, logarithm, dtype)
    x = input if input.dim() else input.view(1)
    mask = None if mask is None else mask.expand(x.shape)
    dim %= x.dim()
    wanted = input.requires_grad or (mask is not None and mask.requires_grad)
    if torch.is_grad_enabled() and wanted:
        y: torch.Tensor = _Softmax.apply(x, mask, dim, scale, logarithm, result)
    else:
        y = softmax_forward(x, _as_bytes(mask), dim, scale, logarithm, result)
    return y if input.dim() else y.view(())


def softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_i = exp(s_i) / Σ_j exp(s_j) along ``dim``, with s = scale input + mask.

    Args:
        input: of any shape and strides.
        dim: None is torch's old guess, with its warning.
        dtype: of the result; what the input is read as.
        scale: a number.
        mask: broadcasts to input's shape. Of booleans, True keeps; or added, with a gradient.

    A slice of which everything is ruled out gives NaN, as torch's softmax of -inf does.

    Raises:
        IndexError: ``dim`` is no dimension.
        RuntimeError: input or mask is of the wrong dtype, device or shape.
        TypeError: the input or the mask is no tensor.

    Source: J. Bridle, "Probabilistic interpretation of feedforward classification network outputs",
    1990.
    """
    return _apply("softmax", input, dim, dtype, scale, mask)


def log_softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_i = s_i - log Σ_j exp(s_j); otherwise as ``softmax``, also its source."""
    return _apply("log_softmax", input, dim, dtype, scale, mask, logarithm=True)


def softmin(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax of s = -scale input + mask; otherwise as ``softmax``, also its source."""
    return _apply("softmin", input, dim, dtype, -scale, mask)
