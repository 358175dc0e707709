"""What the functions of this package share: autocast, and gradients that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import has_torch_function_unary

# Of the launchers' room, which the modules do not know, but whose trace they have to tell.
from gpunn.kernels.launch import decline as decline
from gpunn.kernels.launch import record_fallback as record_fallback

AGAIN = "gradients that can be differentiated again: PyTorch's operations"


def is_tensor(operator: str, input: object, name: str = "input") -> bool:
    """Whether an argument is a tensor; False for a stand-in, such as torch.fx's, that acts as one.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(input, torch.Tensor):
        return True
    if has_torch_function_unary(input):
        return False
    raise TypeError(f"{name}: {operator} expects a tensor, got {type(input).__name__}")


def is_number(value: object) -> bool:
    """Whether torch takes it for one: Python's, NumPy's, or a tensor of no dimensions."""
    return isinstance(value, (int, float)) or (
        hasattr(value, "__float__") and not getattr(value, "ndim", 0)
    )


def number(name: str, value: Any) -> float:
    """A number as a float.

    Raises:
        TypeError: it is none.
    """
    if is_number(value):
        return float(value)
    raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_arguments(dropout_p: object, **tensors: object) -> None:
    """Refuse a probability that is none, and what is neither a tensor nor allowed to be None.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: the probability is not in [0, 1].
    """
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")
    for name, tensor in tensors.items():
        if tensor is None and name != "weight":
            continue
        if not isinstance(tensor, torch.Tensor) and not has_torch_function_unary(tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def as_vector(tensor: torch.Tensor) -> torch.Tensor:
    """All elements in one dimension, contiguous: the tensor itself, if it is that."""
    return (tensor if tensor.dim() == 1 else tensor.reshape(-1)).contiguous()


def distinct(tensors: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
    """What an ``autograd.Function`` is applied to, where one tensor may stand in two places.

    torch.compile refuses that: there, the second of them is a view of the first.
    """
    if not torch.compiler.is_compiling():
        return tensors
    found: list[torch.Tensor | None] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if tensor is not None and again else tensor)
    return found


def autocast_is_on(tensor: torch.Tensor) -> bool:
    """Whether autocast is enabled for the tensor's device."""
    if tensor.is_cpu or tensor.is_cuda:
        return torch.is_autocast_enabled("cpu" if tensor.is_cpu else "cuda")
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_to_lower(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as autocast hands them to an op of its lower-precision list, such as linear."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor is not None and _is_eligible(tensor) else tensor
        for tensor in tensors
    )


def _is_eligible(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def differentiable_gradients(
    composition: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
    dy: torch.Tensor,
) -> list[torch.Tensor | None]:
    """The gradients of ``composition(*inputs)``, themselves differentiable, for a double backward.

    ``composition`` is the operator written with torch operations. Each input is aliased first, so
    that a tensor given twice gets the gradient of each of its two places.
    """
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    wanted = [a for a, need in zip(aliases, needed, strict=True) if a is not None and need]
    if not wanted:
        return [None] * len(inputs)
    record_fallback("gradients", AGAIN)
    gradients = iter(torch.autograd.grad(composition(*aliases), wanted, dy, create_graph=True))
    return [
        next(gradients) if alias is not None and need else None
        for alias, need in zip(aliases, needed, strict=True)
    ]
