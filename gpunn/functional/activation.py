"""Activation functions with torch's names and arguments, on one pair of kernels.

Every function takes a tensor of any shape and strides and returns one of the same shape and dtype.
Where torch's formula gives NaN at an infinity although the limit exists (softsign's gradient, say),
these give the limit; otherwise infinities and NaN propagate as torch's do. ``inplace=True`` is
left to torch.

Raises, each of them: TypeError where the input is no tensor or a parameter no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.dispatch import (
    AGAIN,
    autocast_is_on,
    is_number,
    is_tensor,
    number,
    record_fallback,
)
from gpunn.kernels.activation import ACTIVATIONS
from gpunn.kernels.elementwise import activation_backward, activation_forward
from gpunn.kernels.launch import decline, takes

# Torch's own op for each activation: called as (input, *parameters).
TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
    "hardtanh": F.hardtanh,
    "tanhshrink": F.tanhshrink,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
}

# The same, able to be differentiated twice: torch has no second derivative of hardsigmoid.
TWICE_DIFFERENTIABLE = TORCH | {"hardsigmoid": lambda x: F.hardtanh(x, -3.0, 3.0) / 6 + 0.5}

# The gradients from the output, in differentiable torch operations: (dy, y, *parameters).
_aten = torch.ops.aten
TORCH_GRADIENT: dict[str, Callable[..., torch.Tensor]] = {
    "relu": lambda dy, y: _aten.threshold_backward(dy, y, 0),
    "sigmoid": _aten.sigmoid_backward,
    "tanh": _aten.tanh_backward,
}

ActivationName = str | tuple[Any, ...] | None


def resolve_activation(activation: ActivationName) -> tuple[str, list[float]]:
    """Name and parameters of ``None``, ``"relu"`` or ``("leaky_relu", 0.2)``.

    Raises:
        RuntimeError, ValueError: a parameter that the activation's function refuses.
        TypeError: neither a name nor a tuple of a name and numbers.
        ValueError: an unknown name, or more parameters than the activation has.
    """
    if activation is None:
        return "identity", []
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return activation, list(ACTIVATIONS[activation].defaults)
    name, *given = (activation,) if not isinstance(activation, tuple) else activation or (None,)
    if not isinstance(name, str) or not all(map(is_number, given)):
        raise TypeError(
            "activation: expected a name, a tuple of a name and its parameters, or None, "
            f"got {activation!r}"
        )
    if name not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: unknown name {name!r}; allowed are None and {allowed}")
    defaults = ACTIVATIONS[name].defaults
    if len(given) > len(defaults):
        raise ValueError(
            f"activation: {name} takes at most {len(defaults)} parameters, got {tuple(given)}"
        )
    parameters = [float(value) for value in given] + list(defaults[len(given) :])
    _check_parameters(name, parameters)
    return name, parameters


def _check_parameters(name: str, parameters: Sequence[float]) -> None:
    """Refuse the parameters that torch refuses."""
    if name == "celu" and parameters[0] == 0:
        raise RuntimeError("alpha: celu needs an alpha other than 0, got 0")
    if name == "softshrink" and not 0 <= parameters[0] < math.inf:
        raise RuntimeError(f"lambd: softshrink needs a finite lambd >= 0, got {parameters[0]}")
    if name == "hardtanh" and not parameters[0] <= parameters[1]:
        raise ValueError(f"min_val: hardtanh needs min_val <= max_val, got {tuple(parameters)}")


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, parameters: list[float]) -> torch.Tensor:
        y = activation_forward(x, name, parameters)
        ctx.save_for_backward(y if ACTIVATIONS[name].saves == "output" else x)
        ctx.name, ctx.parameters = name, parameters
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        name, parameters = ctx.name, ctx.parameters
        if not torch.is_grad_enabled():
            return activation_backward(dy, saved, name, parameters), None, None
        record_fallback(name, AGAIN)
        if ACTIVATIONS[name].saves == "output":
            return TORCH_GRADIENT[name](dy, saved, *parameters), None, None
        alias = saved.view_as(saved)
        y = TWICE_DIFFERENTIABLE[name](alias, *parameters)
        (dx,) = torch.autograd.grad(y, alias, dy, create_graph=True)
        return dx, None, None


def _activate(
    name: str, input: torch.Tensor, parameters: Sequence[float] = (), inplace: bool = False
) -> torch.Tensor:
    """f(input) on the kernel where there is one for the case, else on torch's op."""
    values = [number(name, value) for value in parameters]
    _check_parameters(name, values)
    if not is_tensor(name, input):
        return TORCH[name](input, *values, **({"inplace": True} if inplace else {}))
    if inplace:
        decline(name, "inplace=True")
        return TORCH[name](input, *values, inplace=True)
    if not takes(name, input):
        return TORCH[name](input, *values)
    if name == "softplus" and input.is_cuda and autocast_is_on(input):
        input = input.float()  # softplus is on autocast's float32 list for CUDA
    if input.requires_grad and torch.is_grad_enabled():
        return _Activation.apply(input, name, values)  # type: ignore[no-any-return]
    return activation_forward(input, name, values)


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """y = max(x, 0). Nair and Hinton 2010."""
    return _activate("relu", input, inplace=inplace)


def relu6(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """y = min(max(x, 0), 6). Krizhevsky 2010."""
    return _activate("relu6", input, ACTIVATIONS["relu6"].defaults, inplace)


def leaky_relu(
    input: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> torch.Tensor:
    """y = x for x > 0, else negative_slope · x. Maas et al. 2013."""
    return _activate("leaky_relu", input, (negative_slope,), inplace)


def elu(input: torch.Tensor, alpha: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """y = x for x > 0, else alpha (exp(x) - 1). Clevert et al. 2016."""
    return _activate("elu", input, (alpha,), inplace)


def celu(input: torch.Tensor, alpha: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """y = max(x, 0) + min(0, alpha (exp(x / alpha) - 1)). Barron 2017.

    Raises:
        RuntimeError: alpha is 0.
        TypeError: the input is no tensor, or alpha no number.
    """
    return _activate("celu", input, (alpha,), inplace)


def selu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """y = 1.0507 · (x for x > 0, else 1.6733 (exp(x) - 1)). Klambauer et al. 2017."""
    return _activate("selu", input, inplace=inplace)


def sigmoid(input: torch.Tensor) -> torch.Tensor:
    """y = 1 / (1 + exp(-x))."""
    return _activate("sigmoid", input)


def logsigmoid(input: torch.Tensor) -> torch.Tensor:
    """y = log(1 / (1 + exp(-x))), finite for every finite x."""
    return _activate("logsigmoid", input)


def hardsigmoid(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """y = min(max(x + 3, 0), 6) / 6. Howard et al. 2019."""
    return _activate("hardsigmoid", input, inplace=inplace)


def tanh(input: torch.Tensor) -> torch.Tensor:
    """y = tanh(x)."""
    return _activate("tanh", input)


def hardtanh(
    input: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> torch.Tensor:
    """y = min(max(x, min_val), max_val).

    Raises:
        TypeError: the input is no tensor, or a limit no number.
        ValueError: min_val is above max_val, or one of them NaN.
    """
    return _activate("hardtanh", input, (min_val, max_val), inplace)


def tanhshrink(input: torch.Tensor) -> torch.Tensor:
    """y = x - tanh(x)."""
    return _activate("tanhshrink", input)


def softplus(input: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
    """y = log(1 + exp(beta x)) / beta; x where beta x > threshold. Dugas et al. 2001."""
    return _activate("softplus", input, (beta, threshold))


def softsign(input: torch.Tensor) -> torch.Tensor:
    """y = x / (1 + |x|)."""
    return _activate("softsign", input)


def softshrink(input: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    """y = x - lambd above lambd, x + lambd below -lambd, else 0.

    Raises:
        RuntimeError: lambd is negative, infinite or NaN.
        TypeError: the input is no tensor, or lambd no number.
    """
    return _activate("softshrink", input, (lambd,))


def hardshrink(input: torch.Tensor, lambd: float = 0.5) -> torch.Tensor:
    """y = x above lambd and below -lambd, else 0."""
    return _activate("hardshrink", input, (lambd,))


def silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """y = x sigmoid(x). Hendrycks and Gimpel 2016; Elfwing et al. 2018."""
    return _activate("silu", input, inplace=inplace)


def hardswish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """y = x min(max(x + 3, 0), 6) / 6. Howard et al. 2019."""
    return _activate("hardswish", input, inplace=inplace)


def mish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """y = x tanh(log(1 + exp(x))). Misra 2020."""
    return _activate("mish", input, inplace=inplace)


def gelu(input: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """y = x Φ(x), Φ the normal distribution function. Hendrycks and Gimpel 2016.

    ``approximate="tanh"``: y = x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2.

    Raises:
        RuntimeError: ``approximate`` is neither "none" nor "tanh".
        TypeError: the input is no tensor.
    """
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return _activate("gelu" if approximate == "none" else "gelu_tanh", input)
