"""The negative log-likelihood of rows of log-probabilities, and its gradient.

Source: C. Bishop, "Pattern Recognition and Machine Learning", 2006, section 4.3.4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Classes = NDArray[np.int64]


def row_weights(target: Classes, weight: Array, ignore_index: int) -> Array:
    """w_y of each row, 0 in rows that are ignored."""
    return np.array([0.0 if y == ignore_index else weight[y] for y in target])


def nll_loss_forward(x: Array, target: Classes, weight: Array, ignore_index: int) -> Array:
    """-w_y x_y of each row of x (rows, classes)."""
    scale = row_weights(target, weight, ignore_index)
    return np.array([-w * row[y] if w else 0.0 for w, row, y in zip(scale, x, target, strict=True)])


def nll_loss_backward(
    dloss: Array, x: Array, target: Classes, weight: Array, ignore_index: int
) -> Array:
    """dx: -w_y dloss at each row's class."""
    dx = np.zeros_like(x)
    scale = row_weights(target, weight, ignore_index)
    for row, (w, y) in enumerate(zip(scale, target, strict=True)):
        if w:
            dx[row, y] = -w * dloss[row]
    return dx
