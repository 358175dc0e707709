"""Gated linear units: y = a f(b), a and b the halves of x along a dimension.

Sources: Dauphin et al. 2017; Shazeer, "GLU variants improve Transformer" (2020).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpunn.reference.activation import ACTIVATIONS, Array


def glu_forward(x: Any, dim: int, gate: str) -> Array:
    """y = a f(b), f the activation called ``gate``."""
    a, b = np.split(np.asarray(x, dtype=np.float64), 2, axis=dim)
    return a * ACTIVATIONS[gate][0](b)


def glu_backward(dy: Any, x: Any, dim: int, gate: str) -> Array:
    """dx = (da, db) with da = dy f(b) and db = dy a f'(b)."""
    a, b = np.split(np.asarray(x, dtype=np.float64), 2, axis=dim)
    dy = np.asarray(dy, dtype=np.float64)
    function, derivative = ACTIVATIONS[gate]
    return np.concatenate([dy * function(b), dy * a * derivative(b)], axis=dim)
