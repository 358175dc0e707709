"""Layer and root mean square normalisation of rows, and their gradients, by the chain rule.

Sources: J. Ba et al., "Layer Normalization", 2016, section 3; B. Zhang and R. Sennrich, "Root Mean
Square Layer Normalization", 2019, section 4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def row_norm_forward(
    s: Array, weight: Array | None, bias: Array | None, eps: float, centred: bool
) -> Array:
    """y of each row of s (rows, columns); without ``centred``, the mean is left where it is."""
    y = np.empty_like(s)
    for i, row in enumerate(s):
        z = row - row.mean() if centred else row
        y[i] = z / np.sqrt((z**2).mean() + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def row_norm_backward(
    dy: Array, s: Array, weight: Array | None, eps: float, centred: bool
) -> tuple[Array, Array, Array]:
    """ds, dweight and dbias."""
    hat = row_norm_forward(s, None, None, eps, centred)
    ds = np.empty_like(s)
    for i, row in enumerate(s):
        z = row - row.mean() if centred else row
        deviation = np.sqrt((z**2).mean() + eps)
        g = dy[i] if weight is None else dy[i] * weight
        # through z / deviation, whose derivative by z has two parts, then through z
        dz = g / deviation - z * (g * z).mean() / deviation**3
        ds[i] = dz - dz.mean() if centred else dz
    return ds, (dy * hat).sum(0), dy.sum(0)
