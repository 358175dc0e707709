"""Layer normalisation and root mean square normalisation, with dropout and residual before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gpunn.functional.dispatch import (
    autocast_is_on,
    check_arguments,
    differentiable_gradients,
    distinct,
    is_tensor,
)
from gpunn.kernels.dropout import dropout_factors
from gpunn.kernels.launch import decline, record_fallback, takes
from gpunn.kernels.layer_norm import row_norm_backward, row_norm_forward
from gpunn.kernels.philox import draw_seed


class Options(NamedTuple):
    """How rows are normalised."""

    dropout_p: float
    eps: float
    centred: bool


def composed(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    factors: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and s of rows, in torch's operations, which can be differentiated twice."""
    s = x if factors is None else x * factors
    s = s if residual is None else s + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True) if options.centred else wide
    y = centred * (centred.pow(2).mean(-1, keepdim=True) + options.eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, s


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        seed: torch.Tensor | None,
        options: Options,
        return_sum: bool,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        y, s, mean, invstd = row_norm_forward(
            x, residual, weight, bias, seed, *options, True, dtype
        )
        is_x = residual is None and seed is None
        ctx.save_for_backward(x, residual, x if is_x else s, weight, bias, seed, mean, invstd)
        ctx.options, ctx.dtype = options, dtype
        ctx.set_materialize_grads(False)
        if not return_sum:
            return y, None
        return y, x.view_as(x) if is_x else s

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, extra: torch.Tensor | None) -> tuple[Any, ...]:
        x, residual, s, weight, bias, seed, mean, invstd = ctx.saved_tensors
        needs, options = ctx.needs_input_grad[:4], ctx.options
        dy = s.new_zeros(s.shape, dtype=ctx.dtype) if dy is None else dy
        if torch.is_grad_enabled():
            wide = torch.promote_types(dy.dtype, torch.float32)
            factors = None if seed is None else dropout_factors(seed, x, options.dropout_p)

            def both(x: Any, residual: Any, weight: Any, bias: Any) -> torch.Tensor:
                y, total = composed(x, residual, weight, bias, factors, options)
                loss = (y * dy.to(wide)).sum()
                return loss if extra is None else loss + (total * extra.to(wide)).sum()

            one = torch.ones((), dtype=wide, device=dy.device)
            gradients = differentiable_gradients(both, (x, residual, weight, bias), needs, one)
            return *gradients, None, None, None, None
        extra = None if extra is None else extra.contiguous()
        same = seed is None and needs[0] and needs[1]
        wanted = [needs[0], needs[1] and not same, *needs[2:]]
        found = row_norm_backward(
            dy.contiguous(), s, weight, bias, mean, invstd, extra, seed, options.dropout_p,
            options.centred, wanted,
        )  # fmt: skip
        gradients = [g if need else None for g, need in zip(found, wanted, strict=True)]
        if same:
            gradients[1] = gradients[0]
        return *gradients, None, None, None, None


def _normalise(
    name: str,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    options: Options,
    return_sum: bool,
) -> Any:
    """By the kernels, or, where they do not take it, by torch."""
    given = {"bias": bias, "residual": residual}
    check_arguments(options.dropout_p, **given, **({} if weight is None else {"weight": weight}))
    if not is_tensor(name, input):
        return _by_torch(input, normalized_shape, weight, bias, residual, options, return_sum)
    if input.is_nested:
        decline(name, "nested tensor")
        return _by_torch(input, normalized_shape, weight, bias, residual, options, return_sum)
    dtypes = (input.dtype, torch.float32) if options.centred else None
    shape = _checked_shape(name, input, normalized_shape, weight, bias, residual, dtypes)
    n_cols = math.prod(shape)
    plain = residual is None and options.dropout_p == 0
    if not takes(name, input, weight, bias, residual):
        return _by_torch(input, shape, weight, bias, residual, options, return_sum)
    if residual is not None and residual.dtype != input.dtype:
        record_fallback(name, f"a residual in {residual.dtype}: PyTorch's sum")
        return _by_torch(input, shape, weight, bias, residual, options, return_sum)
    if n_cols == 0:
        decline(name, f"no kernel for rows of shape {tuple(shape)}")
        return _by_torch(input, shape, weight, bias, residual, options, return_sum)
    dtype = torch.float32 if autocast_is_on(input) and input.is_cuda else input.dtype
    tensors = tuple(as_rows(t, len(shape)) for t in (input, residual, weight, bias))
    seed = draw_seed(input.device) if options.dropout_p > 0 else None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, s = _RowNorm.apply(*distinct(tensors), seed, options, return_sum, dtype)
    else:
        forward: Any = row_norm_forward
        y, s, _, _ = forward(*tensors, seed, *options, return_sum, dtype)
        s = input if plain else s
    y = y if len(shape) == 1 else y.view(input.shape)
    if not return_sum:
        return y
    # With a gradient the stream goes through the norm, whose backward pass then adds it to dx.
    return y, s if s is input or len(shape) == 1 else s.view(input.shape)


def as_rows(tensor: torch.Tensor | None, n_dims: int) -> torch.Tensor | None:
    """(*, n), contiguous, of a tensor of which the last ``n_dims`` dimensions are a row."""
    if tensor is None:
        return None
    return (tensor if n_dims == 1 else tensor.flatten(-n_dims)).contiguous()


def _checked_shape(
    name: str,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...] | None,
) -> tuple[int, ...]:
    """The normalised shape; what does not fit it is refused, as torch does.

    ``dtypes`` are those that weight and bias may have; None for any.
    """
    shape = tuple(normalized_shape)
    if len(shape) < 1:
        raise RuntimeError(f"normalized_shape: {name} expects one dimension or more, got {shape}")
    if tuple(input.shape[input.dim() - len(shape) :]) != shape or input.dim() < len(shape):
        raise RuntimeError(
            f"normalized_shape: {name} expects the last dimensions of input, "
            f"{tuple(input.shape)}, got {shape}"
        )
    for which, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"{which}: {name} expects shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != input.device or (dtypes and tensor.dtype not in dtypes):
            raise RuntimeError(
                f"{which}: {name} expects {input.dtype} or float32 on {input.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if residual is not None and residual.shape != input.shape:
        raise RuntimeError(
            f"residual: {name} expects shape {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    return shape


def _by_torch(
    input: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    options: Options,
    return_sum: bool,
) -> Any:
    s = F.dropout(input, options.dropout_p) if options.dropout_p > 0 else input
    s = s if residual is None else s + residual
    if options.centred:
        y = F.layer_norm(s, shape, weight, bias, options.eps)
    else:
        y = F.rms_norm(s, shape, weight, options.eps)
    return (y, s) if return_sum else y


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Any:
    """y = (s - mean) / sqrt(var + eps) weight + bias, with s = dropout(input) + residual.

    Mean and variance (with n in its denominator) are those of s over the last dimensions, in
    float32. Memory is passed over once forward, and once for the gradient of input: rows of up to
    16,384 elements, backward 8,192, stand in registers, and longer ones are swept twice, by a
    program that finds them in L2 again, up to 65,536 of 16 bits. For more than 4,096, the gradients
    of weight and bias take a pass of their own.

    Args:
        input: (*, *normalized_shape).
        normalized_shape: the last dimensions of input.
        weight, bias: of that shape, or None; of input's dtype or float32.
        eps: as torch's.
        residual: of input's shape.
        dropout_p: applied whatever the mode; the bits are those of ``gpunn.functional.dropout``.
        return_sum: also s, the residual stream that a next layer adds to.

    Returns:
        y, of input's shape and dtype; under autocast on a GPU, in float32.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other.
        TypeError: an argument is not of its type.
        ValueError: dropout_p is no probability.

    Source: J. Ba et al., "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450.
    """
    options = Options(dropout_p, eps, True)
    return _normalise(
        "layer_norm", input, normalized_shape, weight, bias, residual, options, return_sum
    )


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Any:
    """y = s / sqrt(mean(s²) + eps) weight, with s = dropout(input) + residual.

    ``eps`` None is the smallest step at 1 of the dtype that sums have: float32, or input's if it is
    wider. The weight may be of any dtype. Otherwise as ``layer_norm``.

    Source: B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019,
    https://arxiv.org/abs/1910.07467.
    """
    if eps is None:
        given: Any = input
        wide = input.dtype == torch.float64 if isinstance(given, torch.Tensor) else False
        eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    options = Options(dropout_p, eps, False)
    return _normalise(
        "rms_norm", input, normalized_shape, weight, None, residual, options, return_sum
    )
