"""Launchers of linear: y = dropout(f(x Wᵀ + b)) + residual, and its gradients.

Forward is one kernel (``matmul.py``). Backward is one pass over dy for the activation, the dropout
and the bias gradient, then two products: dx = dz W and dW = dzᵀ x.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from gpunn.kernels.activation import ACTIVATIONS, gradient_functions
from gpunn.kernels.launch import cdiv, operator, run
from gpunn.kernels.matmul import epilogue_backward_kernel
from gpunn.kernels.partial_sums import add_up
from gpunn.kernels.philox import dropout_arguments
from gpunn.kernels.product import Epilogue, EpilogueLaunch, product

# 16 elements a thread, so that several programs, with all that they read on its way, share a
# multiprocessor, and the partial sums of a bias are a sixteenth of what is read, or less. Not
# measured; with a program that waited for one tile after the other, the gradients of linear with
# relu, 8192 rows, 1024 features and 4096 columns, took an H200 359 us in auto, PyTorch 250.
BACKWARD_LAUNCHES = tuple(EpilogueLaunch(8, 4096 // n, n) for n in (16, 64, 128))
WIDEST = BACKWARD_LAUNCHES[-1]


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(*, n) as (rows, n): a view where the strides allow one."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def saves(activation: str, parameters: list[float], dropout_p: float, has_residual: bool) -> str:
    """What the forward pass keeps for the backward pass.

    ``"nothing"``: the activation is the identity. ``"y"``: the gradient follows from the result.
    ``"saved"``: a tensor of its own, since the gradient needs the activation's input, or its
    output from before the dropout or the residual.
    """
    if activation == "identity":
        return "nothing"
    changed = dropout_p > 0 or has_residual
    from_y = ACTIVATIONS[activation].from_output(parameters) and not changed
    return "y" if from_y else "saved"


def _linear_forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    parameters: list[float],
    dropout_p: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    kept = keep and saves(activation, parameters, dropout_p, residual is not None) == "saved"
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape if kept else (0,))


@operator(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? seed, "
    "str activation, float[] parameters, float dropout_p, bool keep) -> (Tensor, Tensor)",
    fake=_linear_forward_fake,
)
def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    parameters: list[float],
    dropout_p: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = dropout(f(x Wᵀ + b)) + residual, and, to ``keep``, what ``saves`` calls "saved".

    x (*, K), weight (N, K), bias (N,), residual (*, N), all with any strides; y contiguous, in the
    wider of the dtypes of x and residual.
    """
    y, saved = _linear_forward_fake(
        x, weight, bias, residual, seed, activation, parameters, dropout_p, keep
    )
    epilogue = Epilogue(
        as_matrix(y),
        bias,
        None if residual is None else as_matrix(residual),
        seed,
        as_matrix(saved) if saved.numel() else None,
        activation,
        parameters,
        dropout_p,
    )
    product("linear_forward", as_matrix(x), weight, epilogue)
    return y, saved


def _linear_epilogue_backward_fake(
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    parameters: list[float],
    dropout_p: float,
    dtype: torch.dtype,
    needs_dz: bool,
    needs_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dz = dy.new_empty(dy.shape if needs_dz else (0,), dtype=dtype)
    return dz, dy.new_empty(dy.shape[-1:] if needs_dbias else (0,), dtype=dtype)


@operator(
    "linear_epilogue_backward(Tensor dy, Tensor? saved, Tensor? seed, str activation, "
    "float[] parameters, float dropout_p, ScalarType dtype, bool needs_dz, bool needs_dbias) "
    "-> (Tensor, Tensor)",
    fake=_linear_epilogue_backward_fake,
)
def linear_epilogue_backward(
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    parameters: list[float],
    dropout_p: float,
    dtype: torch.dtype,
    needs_dz: bool,
    needs_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz = f'(saved) dropout(dy) and db = Σ dz over rows, in one pass, in ``dtype``.

    Each is empty where it is not needed.
    """
    dz, dbias = _linear_epilogue_backward_fake(
        dy, saved, seed, activation, parameters, dropout_p, dtype, needs_dz, needs_dbias
    )
    if dy.numel() == 0:
        return dz, dbias.zero_()
    sums = _epilogue_backward(
        as_matrix(dy),
        None if saved is None else as_matrix(saved),
        seed,
        as_matrix(dz) if needs_dz else None,
        needs_dbias,
        dropout_p,
        gradient_functions(activation, parameters),
    )
    return dz, dbias if sums is None else add_up(sums, dbias)


def _epilogue_backward(
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    seed: torch.Tensor | None,
    dz: torch.Tensor | None,
    needs_dbias: bool,
    dropout_p: float,
    functions: dict[str, Any],
) -> torch.Tensor | None:
    """Launch ``epilogue_backward_kernel`` on matrices; the partial sums of dbias, if wanted."""
    n_rows, n_cols = dy.shape
    launch = next((tile for tile in BACKWARD_LAUNCHES if n_cols <= tile.block_cols), WIDEST)
    n_down, n_across = cdiv(n_rows, launch.block_rows), cdiv(n_cols, launch.block_cols)
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    sums = dy.new_empty((n_down, n_cols), dtype=wide) if needs_dbias else None
    run(
        "linear_epilogue_backward",
        epilogue_backward_kernel,
        (n_down * n_across,),
        dy,
        saved,
        seed,
        dz,
        sums,
        n_rows,
        n_cols,
        *dy.stride(),
        *((0, 0) if saved is None else saved.stride()),
        *dropout_arguments(dropout_p or 1.0),
        launch=launch,
        QUADS=n_cols % 4 == 0,
        **{name: value for name, value in functions.items() if name != "ACTIVATION"},
    )
    return sums


@register_flop_formula(torch.ops.gpunn.linear_forward)
def _forward_flops(x: Any, weight: Any, *rest: Any, **keywords: Any) -> int:
    """Of the product alone, as torch counts its own linear; arguments are shapes."""
    return int(2 * math.prod(x) * weight[0])


def _linear_input_gradient_fake(dz: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return dz.new_empty((*dz.shape[:-1], weight.shape[1]))


@operator(
    "linear_input_gradient(Tensor dz, Tensor weight) -> Tensor", fake=_linear_input_gradient_fake
)
def linear_input_gradient(dz: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dx = dz W for dz (*, N) and weight (N, K), with any strides."""
    dx = _linear_input_gradient_fake(dz, weight)
    product("linear_input_gradient", as_matrix(dz), weight.T, Epilogue(as_matrix(dx)))
    return dx


def _linear_weight_gradient_fake(dz: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return dz.new_empty((dz.shape[-1], x.shape[-1]))


@operator(
    "linear_weight_gradient(Tensor dz, Tensor x) -> Tensor", fake=_linear_weight_gradient_fake
)
def linear_weight_gradient(dz: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dW = dzᵀ x, summed over all leading dimensions of dz (*, N) and x (*, K)."""
    dweight = _linear_weight_gradient_fake(dz, x)
    product("linear_weight_gradient", as_matrix(dz).T, as_matrix(x).T, Epilogue(dweight))
    return dweight


@register_flop_formula([torch.ops.gpunn.linear_input_gradient])
def _input_gradient_flops(dz: Any, weight: Any, **keywords: Any) -> int:
    return int(2 * math.prod(dz) * weight[1])


@register_flop_formula([torch.ops.gpunn.linear_weight_gradient])
def _weight_gradient_flops(dz: Any, x: Any, **keywords: Any) -> int:
    return int(2 * math.prod(dz) * x[-1])
