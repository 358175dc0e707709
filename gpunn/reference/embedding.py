"""Lookups of vectors with positions added, their gradients, and sinusoidal encodings.

Source: A. Vaswani et al., "Attention is all you need", 2017, sections 3.4 and 3.5.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def embedding_forward(
    indices: Indices,
    weight: Array,
    scale: float,
    positional: Array | None,
    positions: Indices | None,
    factors: Array | None = None,
) -> Array:
    """factors (scale weight[indices] + positional[positions]), indices of any shape.

    ``positions`` are of the shape of indices; ``factors``, of the result, are a dropout's.
    """
    y = np.empty((*indices.shape, weight.shape[1]))
    for place, index in np.ndenumerate(indices):
        y[place] = scale * weight[index]
        if positional is not None and positions is not None:
            y[place] += positional[positions[place]]
    return y if factors is None else y * factors


def embedding_backward(
    dy: Array, indices: Indices, n_rows: int, scale: float, padding_idx: int | None = None
) -> Array:
    """The gradient of a table of ``n_rows``: scale times the sum of dy over each row's places."""
    dtable = np.zeros((n_rows, dy.shape[-1]))
    for place, index in np.ndenumerate(indices):
        if index != padding_idx:
            dtable[index] += scale * dy[place]
    return dtable


def sinusoidal_encoding(length: int, d_model: int, base: float = 10000.0) -> Array:
    """PE[t, 2i] = sin(t / base^(2i / d_model)), PE[t, 2i + 1] = cos of the same."""
    table = np.empty((length, d_model))
    for t in range(length):
        for column in range(d_model):
            angle = t / base ** ((column - column % 2) / d_model)
            table[t, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table
