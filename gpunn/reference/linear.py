"""Linear with what follows it: y = factors · f(x Wᵀ + b) + residual, and its gradients.

Source: Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors"
(1986), for the gradients; Srivastava et al. 2014 for the factors, 0 or 1 / (1 - p), of a dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpunn.reference.activation import ACTIVATIONS, Array


class LinearGradients(NamedTuple):
    """The gradients of linear's inputs, in the inputs' shapes."""

    dx: Array
    dweight: Array
    dbias: Array
    dresidual: Array


def _pre_activation(x: Array, weight: Array, bias: Any) -> Array:
    """z = x Wᵀ + b for x (*, K), W (N, K), b (N,)."""
    z: Array = np.einsum("...k,nk->...n", x, weight)
    return z if bias is None else z + np.asarray(bias, dtype=np.float64)


def linear_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    residual: Any = None,
    activation: str = "identity",
    parameters: Sequence[float] = (),
    factors: Any = None,
) -> Array:
    """y = factors · f(x Wᵀ + b) + residual, of shape (*, N)."""
    x, weight = np.asarray(x, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    y = ACTIVATIONS[activation][0](_pre_activation(x, weight, bias), *parameters)
    if factors is not None:
        y = y * np.asarray(factors, dtype=np.float64)
    return y if residual is None else y + np.asarray(residual, dtype=np.float64)


def linear_backward(
    dy: Any,
    x: Any,
    weight: Any,
    bias: Any = None,
    activation: str = "identity",
    parameters: Sequence[float] = (),
    factors: Any = None,
) -> LinearGradients:
    """dx = dz W, dW = dzᵀ x and db = Σ dz with dz = factors · f'(z) · dy; dresidual = dy."""
    x, weight = np.asarray(x, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    dy = np.asarray(dy, dtype=np.float64)
    dz = dy * ACTIVATIONS[activation][1](_pre_activation(x, weight, bias), *parameters)
    if factors is not None:
        dz = dz * np.asarray(factors, dtype=np.float64)
    return LinearGradients(
        dx=np.einsum("...n,nk->...k", dz, weight),
        dweight=dz.reshape(-1, dz.shape[-1]).T @ x.reshape(-1, x.shape[-1]),
        dbias=dz.sum(axis=tuple(range(dz.ndim - 1))),
        dresidual=dy,
    )
