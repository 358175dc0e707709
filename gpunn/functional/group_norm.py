"""Group and instance normalisation, with the activation that follows in the same pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gpunn.functional.activation import (
    TORCH,
    TWICE_DIFFERENTIABLE,
    ActivationName,
    resolve_activation,
)
from gpunn.functional.batch_norm import batch_norm
from gpunn.functional.dispatch import (
    as_vector,
    autocast_is_on,
    check_arguments,
    differentiable_gradients,
    distinct,
    is_tensor,
)
from gpunn.kernels.group_norm import group_norm_backward, group_norm_forward
from gpunn.kernels.launch import decline, takes

MOST_POSITIONS = 2**31 - 2**18


class Options(NamedTuple):
    """How groups are normalised, the activation that follows, and the type of the result."""

    eps: float
    name: str
    parameters: list[float]
    dtype: torch.dtype


def composed(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_groups: int,
    options: Options,
) -> torch.Tensor:
    """The same in torch's operations, which can be differentiated twice."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    groups = wide.reshape(x.shape[0], num_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    hat = centred * (centred.pow(2).mean(-1, keepdim=True) + options.eps).rsqrt()
    y = hat.view(x.shape)
    by_channel = (-1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(by_channel)
    y = y if bias is None else y + bias.view(by_channel)
    result: torch.Tensor = TWICE_DIFFERENTIABLE[options.name](y, *options.parameters)
    return result.to(options.dtype)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        num_groups: int,
        options: Options,
    ) -> tuple[torch.Tensor, ...]:
        forward: Any = group_norm_forward
        y, mean, invstd, var = forward(x, num_groups, weight, bias, *options)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.num_groups, ctx.options = num_groups, options
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        x, weight, bias, mean, invstd = ctx.saved_tensors
        needs, options = ctx.needs_input_grad[:3], ctx.options
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(
                lambda x, weight, bias: composed(x, weight, bias, ctx.num_groups, options),
                (x, weight, bias),
                needs,
                dy,
            )
            return *gradients, None, None
        found = group_norm_backward(
            dy, x, weight, bias, mean, invstd, options.name, options.parameters, list(needs)
        )
        return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None


def _normalise(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y by the kernels, and mean and variance of each group, (N, num_groups)."""
    tensors = input, *(None if t is None else as_vector(t) for t in (weight, bias))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        found: tuple[torch.Tensor, ...] = _GroupNorm.apply(*distinct(tensors), num_groups, options)
        y, mean, var = found
    else:
        forward: Any = group_norm_forward
        x, *parameters = tensors
        y, mean, _, var = forward(x, num_groups, *parameters, *options)
    return y, mean, var


def _check_parameters(name: str, input: torch.Tensor, **given: torch.Tensor | None) -> None:
    """Refuse what is not one number for each channel."""
    for which, tensor in given.items():
        if tensor is None:
            continue
        if tensor.numel() != input.shape[1] or (name == "group_norm" and tensor.dim() != 1):
            raise RuntimeError(
                f"{which}: {name} expects shape ({input.shape[1]},), got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in (input.dtype, torch.float32) or tensor.device != input.device:
            raise RuntimeError(
                f"{which}: {name} expects {input.dtype} or float32 on {input.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def _check_groups(input: torch.Tensor, num_groups: Any) -> None:
    """Refuse what cannot be parted into groups, or groups of which only one value is known."""
    shape = tuple(input.shape)
    if input.dim() < 2:
        raise RuntimeError(f"input: group_norm expects 2 dimensions or more, got shape {shape}")
    if not isinstance(num_groups, int) or isinstance(num_groups, bool):
        raise TypeError(f"num_groups: expected an integer, got {type(num_groups).__name__}")
    if num_groups < 1 or input.shape[1] % num_groups:
        raise RuntimeError(
            f"num_groups: group_norm expects a divisor of the {input.shape[1]} channels, "
            f"got {num_groups}"
        )
    if input.numel() == num_groups and input.shape[0] == 1:
        raise ValueError(
            f"input: group_norm expects more than 1 value per channel when training, got {shape}"
        )


def _is_too_long(name: str, input: torch.Tensor) -> bool:
    """Whether a plane has more positions than 32 bits count; the trace says so."""
    too_long = math.prod(input.shape[2:]) > MOST_POSITIONS
    if too_long:
        decline(name, f"no kernel for images of shape {tuple(input.shape[2:])}")
    return too_long


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: ActivationName = None,
) -> torch.Tensor:
    """y = f((x - mean) / sqrt(var + eps) weight + bias), for each group of channels of an image.

    Mean and variance (with n in its denominator) are those of the group, in float32. Memory is
    passed over once forward and once backward where a program holds a group, as it does up to 4,096
    positions of few channels; longer groups are read twice, by as many programs as there is work
    for. For the backward pass, x is kept, and what f is given is computed again.

    Args:
        input: (N, C, *), of 2 dimensions or more; contiguous or channels_last without a copy.
        num_groups: a divisor of C.
        weight, bias: (C,), or None; of input's dtype or float32.
        eps: as torch's.
        activation: f, as ``gpunn.functional.linear`` takes it.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other, or the groups the channels.
        TypeError: an argument is not of its type.
        ValueError: an unknown activation, or one value in all to each group.

    Source: Y. Wu and K. He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494.
    """
    name, parameters = resolve_activation(activation)
    check_arguments(0.0, bias=bias, **({} if weight is None else {"weight": weight}))

    def by_torch() -> torch.Tensor:
        return TORCH[name](F.group_norm(input, num_groups, weight, bias, eps), *parameters)

    if not is_tensor("group_norm", input) or not takes("group_norm", input, weight, bias):
        return by_torch()
    _check_groups(input, num_groups)
    _check_parameters("group_norm", input, weight=weight, bias=bias)
    if _is_too_long("group_norm", input):
        return by_torch()
    dtype = torch.float32 if autocast_is_on(input) and input.is_cuda else input.dtype
    options = Options(eps, name, parameters, dtype)
    return _normalise(input, num_groups, weight, bias, options)[0]


def _check_images(
    input: torch.Tensor, running: tuple[torch.Tensor | None, torch.Tensor | None]
) -> None:
    """Refuse images of one position, and half of the running statistics or ones that do not fit."""
    if input.dim() < 2 or math.prod(input.shape[2:]) == 1:
        raise ValueError(
            "input: instance_norm expects more than 1 spatial element when training, "
            f"got shape {tuple(input.shape)}"
        )
    if (running[0] is None) != (running[1] is None):
        raise ValueError("running_mean, running_var: instance_norm expects both or neither")
    for part in running:
        if part is not None and (part.numel() != input.shape[1] or part.device != input.device):
            raise RuntimeError(
                f"running_mean, running_var: instance_norm expects {input.shape[1]} elements "
                f"on {input.device}, got {part.numel()} on {part.device}"
            )


@torch.no_grad()
def _move(running: torch.Tensor, of_images: torch.Tensor, momentum: float) -> None:
    """A running statistic moves towards the mean of those of the images, by ``momentum``."""
    moved = (1 - momentum) * running.to(of_images.dtype) + momentum * of_images.mean(0)
    running.copy_(moved)


def instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationName = None,
) -> torch.Tensor:
    """y = f((x - mean) / sqrt(var + eps) weight + bias), for each channel of an image.

    That is ``group_norm`` of as many groups as channels. The running statistics, if there are any,
    move by ``momentum`` towards the mean over the images of their means, and of their variances
    with n - 1 in the denominator. Without ``use_input_stats`` they take the place of the images'
    own, which is ``batch_norm`` in eval mode, and computed as such.

    Args:
        input: (N, C, *), of 3 dimensions or more; contiguous or channels_last without a copy.
        running_mean, running_var: (C,), changed where the images' statistics are used; or None.
        weight, bias: (C,), or None; of input's dtype or float32.
        use_input_stats, momentum, eps: as torch's.
        activation: f, as ``gpunn.functional.linear`` takes it.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other, or statistics are missing.
        TypeError: an argument is not of its type.
        ValueError: an unknown activation, images of one position, or one running statistic alone.

    Source: D. Ulyanov et al., "Instance Normalization: The Missing Ingredient for Fast
    Stylization", 2016, https://arxiv.org/abs/1607.08022.
    """
    name, parameters = resolve_activation(activation)
    running = {"running_mean": running_mean, "running_var": running_var}
    given = weight, bias
    check_arguments(0.0, **running, bias=bias, **({} if weight is None else {"weight": weight}))

    def by_torch() -> torch.Tensor:
        arguments = *given, use_input_stats, momentum, eps
        y = F.instance_norm(input, running_mean, running_var, *arguments)
        return TORCH[name](y, *parameters)

    if not is_tensor("instance_norm", input) or not takes("instance_norm", input, *given):
        return by_torch()
    if not use_input_stats:
        arguments: Any = (running_mean, running_var, *given, False, momentum, eps)
        return batch_norm(input, *arguments, activation=activation)
    _check_images(input, (running_mean, running_var))
    _check_parameters("instance_norm", input, weight=weight, bias=bias)
    if input.numel() == 0 and running_mean is not None:
        decline("instance_norm", f"no statistics of a batch of shape {tuple(input.shape)}")
        return by_torch()
    if _is_too_long("instance_norm", input):
        return by_torch()
    n, options = math.prod(input.shape[2:]), Options(eps, name, parameters, input.dtype)
    y, mean, var = _normalise(input, input.shape[1], *given, options)
    if running_mean is not None and running_var is not None:
        _move(running_mean, mean, momentum)
        _move(running_var, var * (n / (n - 1)), momentum)
    return y
