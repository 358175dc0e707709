"""Linear with all that usually follows it in one kernel: bias, activation, dropout, residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.activation import (
    TORCH,
    TWICE_DIFFERENTIABLE,
    ActivationName,
    resolve_activation,
)
from gpunn.functional.dispatch import (
    autocast_is_on,
    autocast_to_lower,
    check_arguments,
    differentiable_gradients,
    distinct,
    is_tensor,
)
from gpunn.kernels.dropout import dropout_factors
from gpunn.kernels.launch import chosen_backend, decline, record_fallback, takes
from gpunn.kernels.linear import (
    linear_epilogue_backward,
    linear_forward,
    linear_input_gradient,
    linear_weight_gradient,
    saves,
)
from gpunn.kernels.philox import draw_seed

MOST_ROWS = 2**31 - 2**10
"""Which kernels count in 32 bits, to the end of the last tile."""


def _composed(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    name: str,
    parameters: list[float],
    dropout_p: float = 0.0,
    factors: torch.Tensor | None = None,
    table: dict[str, Callable[..., torch.Tensor]] = TORCH,
) -> torch.Tensor:
    """linear in torch's own operations, with a fresh dropout or with the factors of an old one."""
    y = F.linear(input, weight, bias)
    if name != "identity":
        z, y = y, table[name](y, *parameters)
        if name == "softplus":  # which autocast widens on CUDA
            y = y.to(z.dtype)
    if factors is not None:
        y = y * factors
    elif dropout_p > 0:
        y = F.dropout(y, dropout_p)
    return y if residual is None else y + residual


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        name: str,
        parameters: list[float],
        dropout_p: float,
    ) -> torch.Tensor:
        seed = draw_seed(x.device) if dropout_p > 0 else None
        y, saved = linear_forward(
            x, weight, bias, residual, seed, name, parameters, dropout_p, True
        )
        has_residual = residual is not None  # its value is not needed: its gradient is dy
        kind = saves(name, parameters, dropout_p, has_residual)
        # The gradient of a double backward needs x wherever dz depends on it.
        needs_x = ctx.needs_input_grad[1] or kind != "nothing"
        kept = {"nothing": None, "y": y, "saved": saved}[kind]
        ctx.save_for_backward(x if needs_x else None, weight, bias, seed, kept)
        ctx.name, ctx.parameters, ctx.dropout_p = name, parameters, dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, seed, saved = ctx.saved_tensors
        name, parameters, dropout_p = ctx.name, ctx.parameters, ctx.dropout_p
        needed = ctx.needs_input_grad[:3]
        dresidual = dy if ctx.needs_input_grad[3] else None
        if torch.is_grad_enabled():
            operands = x, weight, bias, seed
            return (*_differentiable(ctx, operands, dy, needed), dresidual, None, None, None)
        changes = saved is not None or seed is not None or dy.dtype != weight.dtype
        needs_dz = changes and (needed[0] or needed[1])
        dz, dbias = dy, None
        if needs_dz or needed[2]:
            epilogue = linear_epilogue_backward(
                dy, saved, seed, name, parameters, dropout_p, weight.dtype, needs_dz, needed[2]
            )
            dz = epilogue[0] if needs_dz else dy
            dbias = epilogue[1] if needed[2] else None
        dx = linear_input_gradient(dz, weight) if needed[0] else None
        dweight = linear_weight_gradient(dz, x) if needed[1] else None
        return dx, dweight, dbias, dresidual, None, None, None


def _differentiable(
    ctx: Any, operands: tuple[Any, ...], dy: torch.Tensor, needed: tuple[bool, ...]
) -> list[torch.Tensor | None]:
    """The gradients of x, weight and bias by differentiable torch operations.

    The operands are given, as checkpointing refuses to let what was saved be read a second time.
    """
    x, weight, bias, seed = operands
    if x is None:  # linear in x, and the weight wants no gradient: its value does not matter
        x = weight.new_zeros((*dy.shape[:-1], weight.shape[1])).requires_grad_()
    factors = None
    if seed is not None:
        factors = dropout_factors(seed, dy.detach(), ctx.dropout_p).to(weight.dtype)
    name, parameters = ctx.name, ctx.parameters
    return differentiable_gradients(
        lambda x, weight, bias: _composed(
            x, weight, bias, None, name, parameters, 0.0, factors, TWICE_DIFFERENTIABLE
        ),
        (x, weight, bias),
        needed,
        dy.to(weight.dtype),
    )


def _check(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """Refuse what cannot be computed, naming the argument, what was given and what is allowed."""
    if weight.dim() != 2:
        raise RuntimeError(
            f"weight: expected shape (out_features, in_features), got {tuple(weight.shape)}"
        )
    given, (n_cols, n_inner) = input.shape, weight.shape
    if not given or given[-1] != n_inner:
        raise RuntimeError(
            f"input: expected shape (*, {n_inner}) for a weight of shape {(n_cols, n_inner)}, "
            f"got {tuple(given)}"
        )
    if bias is not None and bias.shape != (n_cols,):
        raise RuntimeError(f"bias: expected shape ({n_cols},), got {tuple(bias.shape)}")
    if residual is not None and residual.shape != (*given[:-1], n_cols):
        expected = (*given[:-1], n_cols)
        raise RuntimeError(f"residual: expected shape {expected}, got {tuple(residual.shape)}")
    dtype, device = input.dtype, input.device
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.dtype != dtype and tensor is not residual:
            raise RuntimeError(f"{name}: expected dtype {dtype}, that of input, got {tensor.dtype}")
        if tensor.device != device:
            raise RuntimeError(
                f"{name}: expected device {device}, that of input, got {tensor.device}"
            )


def _may_be(tensor: object) -> bool:
    return tensor is None or isinstance(tensor, torch.Tensor)


def _special(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """What of torch's linear no kernel covers, and ``_check`` need not know."""
    if input.is_nested:
        return "the input is nested"
    if weight.dim() == 1:
        return "the weight is a vector"
    if bias is not None and (bias.dim() == 0 or bias.shape == (1,) != weight.shape[:1]):
        return "the bias is a scalar"
    return None


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: ActivationName = None,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> torch.Tensor:
    """y = dropout(f(x Wᵀ + b)) + residual, in one kernel.

    Args:
        input: x, of shape (*, K), with any strides.
        weight: W, (N, K); a vector (K,) is left to torch.
        bias: b, (N,), or None; a scalar is left to torch.
        activation: f, by name, or a tuple of the name and its parameters, such as
            ``("leaky_relu", 0.2)``; None is the identity. The names are the keys of
            ``gpunn.kernels.activation.ACTIVATIONS``.
        residual: (*, N), added last; it may be of another dtype, as a residual stream kept in
            float32 is, and the result is then in the wider one.
        dropout_p: the probability with which an element of f(…) is dropped; the others are
            multiplied by 1 / (1 - dropout_p).
        training: whether dropout is applied.

    Returns:
        y, of shape (*, N), in the dtype of input (under autocast, in autocast's), or wider.

    Under ``backend("auto")`` a linear with nothing to fuse is PyTorch's (on a GPU, cuBLAS), and so
    is the product where absorbing the epilogue should cost more than it saves; the trace tells.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other, or a parameter that the
            activation refuses.
        TypeError: an argument is not of its type.
        ValueError: an unknown activation, or a dropout_p outside of [0, 1].

    Source: Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors",
    1986; Srivastava et al. 2014 (dropout).
    """
    name, parameters = resolve_activation(activation)
    is_probability = type(dropout_p) is float and 0 <= dropout_p <= 1
    if not (is_probability and _may_be(bias) and _may_be(residual)):
        check_arguments(weight=weight, bias=bias, residual=residual, dropout_p=dropout_p)
    dropout_p = dropout_p if training else 0.0
    if not (is_tensor("linear", input) and is_tensor("linear", weight, "weight")):
        return _composed(input, weight, bias, residual, name, parameters, dropout_p)
    if autocast_is_on(input):
        input, weight, bias = autocast_to_lower(input, weight, bias)  # type: ignore[assignment]
    if (reason := _special(input, weight, bias)) is not None:
        decline("linear", reason)
        return _composed(input, weight, bias, residual, name, parameters, dropout_p)
    _check(input, weight, bias, residual)
    if not takes("linear", input, weight, bias, residual):
        return _composed(input, weight, bias, residual, name, parameters, dropout_p)
    bare = name == "identity" and residual is None and dropout_p == 0
    if bare and chosen_backend() == "auto":
        record_fallback("linear", "nothing to fuse: PyTorch's product")
        return F.linear(input, weight, bias)
    if math.prod(input.shape[:-1]) > MOST_ROWS:  # asked last: it binds what torch.export exports
        decline("linear", "no kernel for more rows than 32 bits count")
        return _composed(input, weight, bias, residual, name, parameters, dropout_p)
    tensors = (input, weight, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Linear.apply(*distinct(tensors), name, parameters, dropout_p)  # type: ignore[no-any-return]
    seed = draw_seed(input.device) if dropout_p > 0 else None
    y, _ = linear_forward(*tensors, seed, name, parameters, dropout_p, False)
    return y
