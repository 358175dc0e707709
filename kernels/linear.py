"""Launchers of linear: y = dropout(f(x Wᵀ + b)) + residual, and its gradients.

Forward is one kernel (``matmul.py``). Backward is one pass over dy for the activation, the dropout
and the bias gradient, then two products: dx = dz W and dW = dzᵀ x.
"""

from __future__ import annotations

import torch

from gpunn.kernels.activation import ACTIVATIONS, gradient_functions
from gpunn.kernels.launch import cdiv, device_of, operator, run
from gpunn.kernels.matmul import epilogue_backward_kernel
from gpunn.kernels.philox import dropout_arguments
from gpunn.kernels.product import Epilogue, EpilogueLaunch, product


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(*, n) as (rows, n): a view where the strides allow one."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def saves(activation: str, dropout_p: float, has_residual: bool) -> str:
    """What the forward pass keeps for the backward pass.

    ``"nothing"``: the activation is the identity. ``"y"``: the gradient follows from the result.
    ``"saved"``: a tensor of its own, since the gradient needs the activation's input, or its
    output from before the dropout or the residual.
    """
    if activation == "identity":
        return "nothing"
    changed = dropout_p > 0 or has_residual
    return "saved" if changed or ACTIVATIONS[activation].saves == "input" else "y"


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
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    kept = keep and saves(activation, dropout_p, residual is not None) == "saved"
    return y, torch.empty_like(y) if kept else x.new_empty(0)


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

    x (*, K), weight (N, K), bias (N,), residual (*, N), all with any strides; y contiguous.
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
    needs_dz: bool,
    needs_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dz = dy.new_empty(dy.shape if needs_dz else (0,))
    return dz, dy.new_empty(dy.shape[-1:] if needs_dbias else (0,))


@operator(
    "linear_epilogue_backward(Tensor dy, Tensor? saved, Tensor? seed, str activation, "
    "float[] parameters, float dropout_p, bool needs_dz, bool needs_dbias) -> (Tensor, Tensor)",
    fake=_linear_epilogue_backward_fake,
)
def linear_epilogue_backward(
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    parameters: list[float],
    dropout_p: float,
    needs_dz: bool,
    needs_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz = f'(saved) dropout(dy) and db = Σ dz over rows, in one pass; empty where not needed."""
    dz, dbias = _linear_epilogue_backward_fake(
        dy, saved, seed, activation, parameters, dropout_p, needs_dz, needs_dbias
    )
    rows = as_matrix(dy)
    n_rows, n_cols = rows.shape
    if rows.numel() == 0:
        return dz, dbias.zero_()
    launch = EpilogueLaunch()
    n_across = cdiv(n_cols, launch.block_cols)
    # Four programs a multiprocessor keep enough loads in flight; not measured.
    wanted = max(1, 4 * device_of(dy).n_multiprocessors // n_across)
    rows_a_program = cdiv(cdiv(n_rows, wanted), launch.block_rows)
    rows_a_program *= launch.block_rows
    n_down = cdiv(n_rows, rows_a_program)
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    sums = dy.new_empty((n_down, n_cols), dtype=wide) if needs_dbias else None
    saved_rows = None if saved is None else as_matrix(saved)
    constants = gradient_functions(activation, parameters)
    del constants["ACTIVATION"]
    run(
        "linear_epilogue_backward",
        epilogue_backward_kernel,
        (n_down, n_across),
        rows,
        saved_rows,
        seed,
        as_matrix(dz) if needs_dz else None,
        sums,
        n_rows,
        n_cols,
        *rows.stride(),
        *((0, 0) if saved_rows is None else saved_rows.stride()),
        rows_a_program,
        *dropout_arguments(dropout_p or 1.0),
        launch=launch,
        QUADS=n_cols % 4 == 0,
        **constants,
    )
    return dz, dbias if sums is None else dbias.copy_(sums.sum(0))


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
