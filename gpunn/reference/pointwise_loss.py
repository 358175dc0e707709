"""Losses of elements, and their gradients by input and target.

Sources: P. Huber, "Robust Estimation of a Location Parameter", 1964; R. Girshick, "Fast R-CNN",
2015, equation 3 (smooth_l1); C. Bishop, "Pattern Recognition and Machine Learning", 2006, sections
1.6.1 (relative entropy) and 4.3.2 (cross-entropy of two classes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Both = tuple[Array, Array]


def _opposite(dx: Array) -> Both:
    """The gradients of what depends on x - y alone."""
    return dx, -dx


def _smooth_l1(x: Array, y: Array, beta: float) -> Array:
    d = abs(x - y)
    return np.where(d < beta, d**2 / (2 * beta), d - beta / 2)


def _huber(x: Array, y: Array, delta: float) -> Array:
    d = abs(x - y)
    return np.where(d < delta, d**2 / 2, delta * (d - delta / 2))


def _sigmoid(x: Array) -> Array:
    found: Array = np.exp(-np.logaddexp(0, -x))
    return found


def _bce(x: Array, y: Array, pos_weight: Any = 1.0) -> Array:
    """-pos_weight y log σ(x) - (1 - y) log(1 - σ(x))."""
    found: Array = pos_weight * y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
    return found


def _bce_gradients(x: Array, y: Array, pos_weight: Any = 1.0) -> Both:
    dx = (1 - y) * _sigmoid(x) - pos_weight * y * _sigmoid(-x)
    return dx, pos_weight * np.logaddexp(0, -x) - np.logaddexp(0, x)


def _kl_div(x: Array, y: Array) -> Array:
    found: Array = np.where(y == 0, 0.0, y * np.log(np.where(y == 0, 1.0, y)))
    found -= y * x
    return found


# Each loss of x, y and its parameter, and the gradients by x and y.
LOSSES: dict[str, tuple[Callable[..., Array], Callable[..., Both]]] = {
    "mse": (lambda x, y: (x - y) ** 2, lambda x, y: _opposite(2 * (x - y))),
    "l1": (lambda x, y: abs(x - y), lambda x, y: _opposite(np.sign(x - y))),
    "smooth_l1": (_smooth_l1, lambda x, y, beta: _opposite(np.clip((x - y) / beta, -1, 1))),
    "huber": (_huber, lambda x, y, delta: _opposite(np.clip(x - y, -delta, delta))),
    "bce_with_logits": (_bce, _bce_gradients),
    "kl_div": (_kl_div, lambda x, y: (-y, np.log(y) + 1 - x)),
    "kl_div_log": (
        lambda x, y: np.exp(y) * (y - x), lambda x, y: (-np.exp(y), np.exp(y) * (y - x + 1))
    ),
}  # fmt: skip


def pointwise_loss_forward(
    x: Array, y: Array, loss: str, *parameters: Any, weight: Any = 1.0
) -> Array:
    """weight l(x, y) of each element; ``parameters``: beta, delta or pos_weight."""
    found: Array = weight * LOSSES[loss][0](x, y, *parameters)
    return found


def pointwise_loss_backward(
    dloss: Any, x: Array, y: Array, loss: str, *parameters: Any, weight: Any = 1.0
) -> Both:
    """dx and dy for the gradients ``dloss`` of the elements' losses."""
    dx, dy = LOSSES[loss][1](x, y, *parameters)
    return dloss * weight * dx, dloss * weight * dy
