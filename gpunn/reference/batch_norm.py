"""Batch normalisation and its gradients, written out for one channel after another.

Source: S. Ioffe and C. Szegedy, "Batch Normalization" (2015), algorithm 1 and section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Of each channel, what is subtracted and what is divided by."""

    mean: Array
    std: Array
    """sqrt(var + eps)."""
    of_batch: bool
    """Whether they depend on x."""


def batch_statistics(x: Array, eps: float) -> Statistics:
    """Mean and deviation of x (N, C, *) over all but the channels."""
    others = (0, *range(2, x.ndim))
    return Statistics(x.mean(others), np.sqrt(x.var(others) + eps), True)


def running_statistics(mean: Array, var: Array, eps: float) -> Statistics:
    """Those that were gathered before."""
    return Statistics(mean, np.sqrt(var + eps), False)


def updated(running: Array, batchs: Array, momentum: float) -> Array:
    """A running statistic after a batch."""
    return (1 - momentum) * running + momentum * batchs


def unbiased_variance(x: Array) -> Array:
    """With n - 1 in the denominator, as the running variance is gathered."""
    variance: Array = x.var((0, *range(2, x.ndim)), ddof=1)
    return variance


def batch_norm_forward(
    x: Array, weight: Array | None, bias: Array | None, statistics: Statistics
) -> Array:
    """y = (x - mean) / std weight + bias."""
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        y[:, c] = (x[:, c] - statistics.mean[c]) / statistics.std[c]
        y[:, c] = y[:, c] * (1 if weight is None else weight[c]) + (0 if bias is None else bias[c])
    return y


def batch_norm_backward(
    dy: Array, x: Array, weight: Array | None, statistics: Statistics
) -> tuple[Array, Array, Array]:
    """dx, dweight and dbias.

    Statistics of the batch depend on every x of the channel, which takes the mean and the component
    along the normalised x out of its gradient.
    """
    dx, dweight, dbias = np.empty_like(x), np.empty(x.shape[1]), np.empty(x.shape[1])
    for c in range(x.shape[1]):
        normalised: Any = (x[:, c] - statistics.mean[c]) / statistics.std[c]
        dweight[c], dbias[c] = (dy[:, c] * normalised).sum(), dy[:, c].sum()
        slope = (1 if weight is None else weight[c]) / statistics.std[c]
        dx[:, c] = slope * dy[:, c]
        if statistics.of_batch:
            n = dy[:, c].size
            dx[:, c] -= slope * (dbias[c] + normalised * dweight[c]) / n
    return dx, dweight, dbias
