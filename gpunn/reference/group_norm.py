"""Group normalisation and its gradients, written out for one group of one image after another.

Sources: Y. Wu and K. He, "Group Normalization", 2018, section 3; D. Ulyanov et al., "Instance
Normalization: The Missing Ingredient for Fast Stylization", 2016, equation 3: one channel a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def groups_of(x: Array, num_groups: int) -> Iterator[tuple[int, slice]]:
    """Each group of x (N, C, *): its image and its channels."""
    per_group = x.shape[1] // num_groups
    for image in range(x.shape[0]):
        for group in range(num_groups):
            yield image, slice(group * per_group, (group + 1) * per_group)


def by_channel(values: Array, x: Array) -> Array:
    """A number for each channel, to be broadcast over x."""
    return values.reshape(-1, *[1] * (x.ndim - 2))


def group_norm_forward(
    x: Array, num_groups: int, weight: Array | None, bias: Array | None, eps: float
) -> Array:
    """y = (x - mean) / sqrt(var + eps) weight + bias."""
    y = np.empty_like(x)
    for at in groups_of(x, num_groups):
        y[at] = (x[at] - x[at].mean()) / np.sqrt(x[at].var() + eps)
    y = y if weight is None else y * by_channel(weight, x)
    return y if bias is None else y + by_channel(bias, x)


def group_norm_backward(
    dy: Array, x: Array, num_groups: int, weight: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    """dx, dweight and dbias."""
    hat = group_norm_forward(x, num_groups, None, None, eps)
    gradient = dy if weight is None else dy * by_channel(weight, x)
    dx = np.empty_like(x)
    for at in groups_of(x, num_groups):
        # through z / deviation, whose derivative by z has two parts, then through z = x - mean
        z, g = x[at] - x[at].mean(), gradient[at]
        deviation = np.sqrt((z**2).mean() + eps)
        dz = g / deviation - z * (g * z).mean() / deviation**3
        dx[at] = dz - dz.mean()
    others = (0, *range(2, x.ndim))
    return dx, (dy * hat).sum(others), dy.sum(others)


def instance_statistics(x: Array) -> tuple[Array, Array]:
    """What running statistics move towards: the images' means and variances, of all images.

    A variance has n - 1 in its denominator.
    """
    places = tuple(range(2, x.ndim))
    return x.mean(places).mean(0), x.var(places, ddof=1).mean(0)
