"""Dropout of elements and of channels, by a mask, and alpha dropout: value and gradient.

Sources: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
2014; Tompson et al., "Efficient object localization using convolutional networks", 2015 (channels);
Klambauer et al., "Self-normalizing neural networks", 2017 (alpha). The bits are those of
``reference/philox.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpunn.reference.philox import element_bits

Array = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Bytes = NDArray[np.uint8]

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
LIMIT = -SELU_ALPHA * SELU_SCALE


def kept_elements(
    seed: int, shape: tuple[int, ...], p: float, order: Sequence[int] | None = None
) -> Booleans:
    """Which elements a dropout keeps, for 0 < p <= 1.

    ``order`` names the dimensions from the one that varies slowest in memory to the fastest;
    element i in that order has the bits i. By default they are in row-major order.
    """
    order = range(len(shape)) if order is None else order
    bits = element_bits(seed, math.prod(shape)).astype(np.uint64)
    kept = bits >= np.uint64(max(round(p * 2**32), 1))
    places = [list(order).index(i) for i in range(len(shape))]
    result: Booleans = kept.reshape([shape[i] for i in order]).transpose(places)
    return result


def kept_channels(seed: int, shape: tuple[int, ...], p: float, channel: int) -> Booleans:
    """Which elements a dropout of whole channels, numbered by dimension ``channel``, keeps."""
    outer, inner = shape[: channel + 1], shape[channel + 1 :]
    kept = kept_elements(seed, outer, p).reshape(*outer, *[1] * len(inner))
    return np.broadcast_to(kept, shape)


def packed(kept: Booleans) -> Bytes:
    """Element i, in row-major order, as bit i % 8 of byte i // 8."""
    flat = kept.reshape(-1)
    mask = np.zeros(-(-flat.size // 8), dtype=np.uint8)
    for i in np.flatnonzero(flat):
        mask[i // 8] |= np.uint8(1 << (i % 8))
    return mask


def dropout_forward(x: Array, kept: Booleans, p: float) -> Array:
    """y = x / (1 - p) where kept, else 0 x."""
    return x * _factors(kept, p)


def dropout_backward(dy: Array, kept: Booleans, p: float) -> Array:
    """dx = dy / (1 - p) where kept, else 0 dy."""
    return dy * _factors(kept, p)


def _factors(kept: Booleans, p: float) -> Array:
    return np.where(kept, 0.0 if p == 1 else 1 / (1 - p), 0.0)


def alpha_dropout_forward(x: Array, kept: Booleans, p: float) -> Array:
    """y = a x + b where kept, else a LIMIT + b: mean 0 and variance 1 stay what they are. p < 1.

    a = ((1 - p) (1 + p LIMIT²))^(-1/2), b = -a p LIMIT.
    """
    a, b = _affine(p)
    return a * (x * kept + LIMIT * ~kept) + b


def alpha_dropout_backward(dy: Array, kept: Booleans, p: float) -> Array:
    """dx = a dy where kept, else 0 dy."""
    a, _ = _affine(p)
    return a * (dy * kept)


def _affine(p: float) -> tuple[float, float]:
    a = ((1 - p) * (1 + p * LIMIT**2)) ** -0.5
    return a, -a * p * LIMIT
