"""Rotation of the pairs of a head by the angles of positions, and the rotation back.

Source: J. Su et al., "RoFormer: Enhanced transformer with rotary position embedding", 2021, section
3.2.2, equations 14 and 15.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _places(j: int, n_pairs: int, interleaved: bool) -> tuple[int, int]:
    """The elements of pair j."""
    return (2 * j, 2 * j + 1) if interleaved else (j, j + n_pairs)


def _whole(table: Array, batch: int, n_pairs: int, interleaved: bool) -> Array:
    """(batch, length, 2 n_pairs) of a table that may be half as wide, or the same for all."""
    table = np.broadcast_to(table, (batch, *table.shape[-2:]))
    if table.shape[-1] == 2 * n_pairs:
        return table
    both = np.empty((*table.shape[:-1], 2 * n_pairs))
    for j in range(n_pairs):
        for place in _places(j, n_pairs, interleaved):
            both[..., place] = table[..., j]
    return both


def rotary_forward(x: Array, cos: Array, sin: Array, n_pairs: int, interleaved: bool) -> Array:
    """Pairs (a, b) to (a cos - b sin, b cos + a sin); x is (batch, heads, length, head)."""
    c, s = (_whole(t, x.shape[0], n_pairs, interleaved)[:, None] for t in (cos, sin))
    y: Array = x.copy()
    for j in range(n_pairs):
        a, b = _places(j, n_pairs, interleaved)
        y[..., a] = x[..., a] * c[..., a] - x[..., b] * s[..., a]
        y[..., b] = x[..., b] * c[..., b] + x[..., a] * s[..., b]
    return y


def rotary_backward(dy: Array, cos: Array, sin: Array, n_pairs: int, interleaved: bool) -> Array:
    """dx, by the transposed matrix of each pair."""
    c, s = (_whole(t, dy.shape[0], n_pairs, interleaved)[:, None] for t in (cos, sin))
    dx: Array = dy.copy()
    for j in range(n_pairs):
        a, b = _places(j, n_pairs, interleaved)
        dx[..., a] = dy[..., a] * c[..., a] + dy[..., b] * s[..., b]
        dx[..., b] = dy[..., b] * c[..., b] - dy[..., a] * s[..., a]
    return dx


def rotary_tables(positions: Array, dim: int, base: float = 10000.0) -> tuple[Array, Array]:
    """cos and sin of t / base^(2i / dim), (positions, dim / 2)."""
    angles = np.empty((len(positions), dim // 2))
    for i in range(dim // 2):
        angles[:, i] = positions / base ** (2 * i / dim)
    return np.cos(angles), np.sin(angles)
