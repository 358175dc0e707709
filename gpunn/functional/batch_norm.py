"""Batch normalisation, with the residual and the activation that follow it in the same pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gpunn.functional.activation import (
    TORCH,
    TWICE_DIFFERENTIABLE,
    ActivationName,
    resolve_activation,
)
from gpunn.functional.convolution_arguments import check_residual
from gpunn.functional.dispatch import check_arguments, differentiable_gradients, distinct, is_tensor
from gpunn.kernels.batch_norm import batch_norm_backward, batch_norm_forward, unpacked_bits
from gpunn.kernels.launch import chosen_backend, decline, record_fallback, takes

MOST_POSITIONS = 2**31 - 2**18


class Options(NamedTuple):
    """How a batch is normalised, and the activation that follows."""

    training: bool
    momentum: float
    eps: float
    name: str
    parameters: list[float]


def keeps_bits(name: str, residual: torch.Tensor | None) -> bool:
    """Whether f' is kept, a bit an element.

    Without a residual f' is computed again from x, which is read anyway.
    """
    return name == "relu" and residual is not None


def composed(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: tuple[torch.Tensor, torch.Tensor] | None,
    options: Options,
) -> torch.Tensor:
    """The same in torch's operations, which can be differentiated twice; nothing is updated.

    ``statistics``: mean and 1 / sqrt(var + eps), where they are not the batch's.
    """
    if statistics is None:
        y = F.batch_norm(x, None, None, weight, bias, True, 0.0, options.eps)
    else:
        mean, scale = statistics
        scale = scale if weight is None else scale * weight
        y = (x - _by_channel(mean, x)) * _by_channel(scale, x)
        y = (y if bias is None else y + _by_channel(bias, x)).to(x.dtype)
    y = y if residual is None else y + residual
    result: torch.Tensor = TWICE_DIFFERENTIABLE[options.name](y, *options.parameters)
    return result


def _by_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        options: Options,
    ) -> torch.Tensor:
        keep = keeps_bits(options.name, residual)
        forward: Any = batch_norm_forward
        y, mean, invstd, bits = forward(
            x, residual, weight, bias, running_mean, running_var, *options, keep
        )
        again = None if keep or options.name == "identity" else residual
        ctx.save_for_backward(x, again, weight, bias, mean, invstd, bits if keep else None)
        ctx.options = options
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs, options = ctx.needs_input_grad[:4], ctx.options
        if torch.is_grad_enabled():
            return (*_differentiable(ctx.saved_tensors, options, needs, dy), None, None, None)
        x, residual, weight, bias, mean, invstd, bits = ctx.saved_tensors
        passed_on = needs[1] and options.name == "identity"
        wanted = [needs[0], needs[1] and not passed_on, *needs[2:]]
        found: Sequence[torch.Tensor | None] = [None] * 4
        if any(wanted):
            found = batch_norm_backward(
                dy, x, residual, bits, weight, bias, mean, invstd, None, x.numel() // x.shape[1],
                options.training, options.name, options.parameters, wanted,
            )  # fmt: skip
        gradients = [g if want else None for g, want in zip(found, wanted, strict=True)]
        if passed_on:
            gradients[1] = dy
        return (*gradients, None, None, None)


def _differentiable(
    saved: Sequence[torch.Tensor | None], options: Options, needs: Sequence[bool], dy: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradients of x, residual, weight and bias, able to be differentiated again."""
    x, residual, weight, bias, mean, invstd, bits = saved
    assert x is not None
    assert mean is not None
    assert invstd is not None
    if bits is not None:
        dy, options = dy * unpacked_bits(bits, x), options._replace(name="identity")
    statistics = None if options.training else (mean, invstd)
    gradients = differentiable_gradients(
        lambda x, residual, weight, bias: composed(x, residual, weight, bias, statistics, options),
        (x, residual, weight, bias),
        needs,
        dy,
    )
    if needs[1] and residual is None:
        gradients[1] = dy
    return gradients


def check_channels(input: torch.Tensor, **given: torch.Tensor | None) -> None:
    """Refuse an input without channels, and what does not have a number for each of them."""
    if input.dim() < 2:
        raise IndexError(
            f"input: batch_norm expects 2 dimensions or more, got shape {tuple(input.shape)}"
        )
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.numel() != input.shape[1]:
            raise RuntimeError(
                f"{name}: batch_norm expects {input.shape[1]} elements, got {tensor.numel()}"
            )
        if tensor.dtype not in (input.dtype, torch.float32) or tensor.device != input.device:
            raise RuntimeError(
                f"{name}: batch_norm expects {input.dtype} or float32 on {input.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _check_statistics(
    input: torch.Tensor, running: tuple[torch.Tensor | None, torch.Tensor | None], training: bool
) -> None:
    """Refuse a batch without statistics: of one value a channel, or with no running ones."""
    if training and math.prod((input.shape[0], *input.shape[2:])) == 1:
        raise ValueError(
            "input: batch_norm expects more than 1 value per channel when training, "
            f"got shape {tuple(input.shape)}"
        )
    if not training and any(part is None for part in running):
        raise RuntimeError(
            "running_mean, running_var: batch_norm expects both where it is not training"
        )


def _by_torch(
    input: torch.Tensor, residual: torch.Tensor | None, arguments: tuple[Any, ...], options: Options
) -> torch.Tensor:
    y: torch.Tensor = F.batch_norm(input, *arguments, *options[:3])  # type: ignore[call-arg]
    if residual is not None:
        if isinstance(y, torch.Tensor):
            check_residual(residual, y.shape, y.device)
        y = y + residual
    return TORCH[options.name](y, *options.parameters)


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationName = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = f((x - mean) / sqrt(var + eps) weight + bias + residual), for each channel.

    In training, mean and variance (with n in its denominator) are those of the channel over the
    batch, and the running ones move: r += momentum (batch's - r), the variance's with n - 1. Else
    they are the running ones. The residual is added *before* the activation, as in a residual
    block: not as ``linear`` and ``conv2d`` add theirs.

    Args:
        input: (N, C, *), of 2 dimensions or more; contiguous or channels_last without a copy.
        running_mean, running_var: (C,), changed in training; or None, in training alone.
        weight, bias: (C,), or None; of input's dtype or float32, as the running ones.
        training, momentum, eps: as torch's.
        activation: f, as ``gpunn.functional.linear`` takes it.
        residual: of input's shape; of another dtype, what follows the sum is torch's.

    Returns:
        y, of input's shape and dtype; with a residual of another dtype, in the wider of the two.

    Under ``backend("auto")`` a batch_norm with nothing to fuse is PyTorch's.

    Raises:
        IndexError: input has fewer than 2 dimensions.
        RuntimeError: shapes, dtypes or devices do not fit each other, statistics are missing, or a
            parameter that the activation refuses.
        TypeError: an argument is not of its type.
        ValueError: an unknown activation, an eps below 0, or one value a channel or an eps of 0 in
            training.

    Source: S. Ioffe and C. Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.
    """
    options = Options(training, momentum, eps, *resolve_activation(activation))
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"eps: batch_norm needs eps > 0, or 0 but in training, got {eps}")
    arguments = running_mean, running_var, weight, bias
    given = {"running_mean": running_mean, "running_var": running_var, "bias": bias}
    check_arguments(
        0.0, **given, **({} if weight is None else {"weight": weight}), residual=residual
    )
    if not is_tensor("batch_norm", input) or not takes("batch_norm", input, residual, *arguments):
        return _by_torch(input, residual, arguments, options)
    check_channels(input, weight=weight, **given)
    _check_statistics(input, (running_mean, running_var), training)
    if options.name == "identity" and residual is None and chosen_backend() == "auto":
        record_fallback("batch_norm", "nothing to fuse: PyTorch's batch_norm")
        return _by_torch(input, None, arguments, options)
    if input.numel() == 0 or input.numel() // input.shape[1] > MOST_POSITIONS:
        decline("batch_norm", f"no kernel for a batch of shape {tuple(input.shape)}")
        return _by_torch(input, residual, arguments, options)
    if residual is not None:
        check_residual(residual, input.shape, input.device)
        if residual.dtype != input.dtype:
            record_fallback("batch_norm", f"a residual in {residual.dtype}: PyTorch's sum")
            bare = batch_norm(input, *arguments, training, momentum, eps)
            return TORCH[options.name](bare + residual, *options.parameters)
    tensors = input, residual, weight, bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: torch.Tensor = _BatchNorm.apply(*distinct(tensors), running_mean, running_var, options)
    else:
        forward: Any = batch_norm_forward
        y, *_ = forward(*tensors, running_mean, running_var, *options, False)
    return y
