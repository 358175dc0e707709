"""softmax, its logarithm, and their gradients, one slice after another.

Source: J. Bridle, "Probabilistic interpretation of feedforward classification network outputs",
1990.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax_forward(s: Array, dim: int, logarithm: bool = False) -> Array:
    """exp(s_i) / Σ_j exp(s_j) along a dimension, or its logarithm."""
    rows = np.moveaxis(s, dim, -1)
    y = np.empty_like(rows)
    for index in np.ndindex(*rows.shape[:-1]):
        shifted = rows[index] - rows[index].max()
        total = np.exp(shifted).sum()
        y[index] = shifted - np.log(total) if logarithm else np.exp(shifted) / total
    return np.moveaxis(y, -1, dim)


def softmax_backward(dy: Array, s: Array, dim: int, logarithm: bool = False) -> Array:
    """The gradient of s: y_i (dy_i - Σ_j dy_j y_j), or, of the logarithm, dy_i - y_i Σ_j dy_j."""
    p = np.moveaxis(softmax_forward(s, dim), dim, -1)
    upstream = np.moveaxis(dy, dim, -1)
    ds = np.empty_like(p)
    for index in np.ndindex(*p.shape[:-1]):
        y, dz = p[index], upstream[index]
        ds[index] = dz - y * dz.sum() if logarithm else y * (dz - np.dot(dz, y))
    return np.moveaxis(ds, -1, dim)
