"""Cross-entropy of rows of logits, and the gradient of the logits.

Source: C. Bishop, "Pattern Recognition and Machine Learning", 2006, section 4.3.4; C. Szegedy et
al., "Rethinking the Inception Architecture", 2016, section 7 (smoothing).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def shares(target: NDArray[np.int64], n_classes: int, ignore_index: int, smoothing: float) -> Array:
    """What each class counts for, (rows, classes): one-hot, smoothed, 0 in ignored rows."""
    found = np.zeros((len(target), n_classes))
    for row, y in enumerate(target):
        if y != ignore_index:
            found[row] = smoothing / n_classes
            found[row, y] += 1 - smoothing
    return found


def cross_entropy_forward(x: Array, share: Array, weight: Array) -> Array:
    """Σ_c w_c t_c (log Σ_k exp(x_k) - x_c) of each row."""
    losses = np.zeros(len(x))
    for row, logits in enumerate(x):
        highest = logits.max()
        lse = highest + np.log(np.exp(logits - highest).sum())
        losses[row] = (weight * share[row] * (lse - logits)).sum()
    return losses


def cross_entropy_backward(dloss: Array, x: Array, share: Array, weight: Array) -> Array:
    """dx, through softmax's p: p_c Σ_k w_k t_k - w_c t_c."""
    dx = np.zeros_like(x)
    for row, logits in enumerate(x):
        e = np.exp(logits - logits.max())
        wanted = weight * share[row]
        dx[row] = dloss[row] * (e / e.sum() * wanted.sum() - wanted)
    return dx
