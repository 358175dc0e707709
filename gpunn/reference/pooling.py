"""Pooling in float64, from the definition: lists of the inputs that each window covers.

Every function takes images (N, C, H, W); rows and columns of the output are given by their windows,
so plain and adaptive pooling are the same thing. Source: the documentation of
``torch.nn.MaxPool2d``, ``AvgPool2d``, ``AdaptiveAvgPool2d`` and ``MaxUnpool2d`` (which inputs and
how many windows); Boureau et al. 2010 (the averages and maxima); Zeiler and Fergus 2014 (undoing
them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Windows = list[list[int]]
"""For each output along one axis, the inputs that its window covers."""


def starts(
    size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False
) -> list[int]:
    """Where the windows along an axis start; the input is 0 … size - 1.

    A window must end inside of the padded input. With ``ceil_mode`` it is enough that the one a
    stride before it does and leaves something over, and that it starts left of the input's end.
    """
    extent, end, found, start = dilation * (kernel - 1) + 1, size + padding, [], -padding
    while start - stride + extent < end and start < size if ceil_mode else start + extent <= end:
        found.append(start)
        start += stride
    return found


def windows(
    size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False
) -> Windows:
    """The inputs of each window of a plain pooling."""
    return [
        [i for i in range(start, start + dilation * kernel, dilation) if 0 <= i < size]
        for start in starts(size, kernel, stride, padding, dilation, ceil_mode)
    ]


def adaptive_windows(size: int, n_outputs: int) -> Windows:
    """The inputs from floor(o size / n) to ceil((o + 1) size / n), for each output o of n."""
    return [
        list(range(o * size // n_outputs, -(-(o + 1) * size // n_outputs)))
        for o in range(n_outputs)
    ]


def lengths(
    size: int, kernel: int, stride: int, padding: int, ceil_mode: bool = False
) -> list[int]:
    """How many elements of the padded input each window covers: what an average counts."""
    found = starts(size, kernel, stride, padding, 1, ceil_mode)
    return [min(start + kernel, size + padding) - start for start in found]


def max_pool_forward(x: Any, rows: Windows, columns: Windows) -> tuple[Array, Indices]:
    """The maximum of each window, and its place ih W + iw.

    A NaN counts as larger than all before it, so of NaNs the last is taken, of equals the first.
    """
    x = np.asarray(x, dtype=np.float64)
    shape = (*x.shape[:2], len(rows), len(columns))
    y, indices = np.empty(shape), np.empty(shape, dtype=np.int64)
    for oh, row in enumerate(rows):
        for ow, column in enumerate(columns):
            places = [ih * x.shape[3] + iw for ih in row for iw in column]
            best, where = x[:, :, row[0], column[0]], np.full(shape[:2], places[0])
            for place in places:
                value = x[:, :, place // x.shape[3], place % x.shape[3]]
                better = (value > best) | np.isnan(value)
                best, where = np.where(better, value, best), np.where(better, place, where)
            y[:, :, oh, ow], indices[:, :, oh, ow] = best, where
    return y, indices


def max_pool_backward(dy: Any, indices: Indices, input_size: Sequence[int]) -> Array:
    """dx: each input gets the gradients of the windows that it is the maximum of."""
    return _scatter(np.asarray(dy, dtype=np.float64), indices, input_size, add=True)


def avg_pool_forward(x: Any, rows: Windows, columns: Windows, divisors: Any = None) -> Array:
    """The sum of each window over its divisor (OH, OW), or a number; None: the window's size."""
    x = np.asarray(x, dtype=np.float64)
    y = np.empty((*x.shape[:2], len(rows), len(columns)))
    for oh, row in enumerate(rows):
        for ow, column in enumerate(columns):
            y[:, :, oh, ow] = x[:, :, row][:, :, :, column].sum(axis=(2, 3))
    return y / _divisors(rows, columns, divisors)


def avg_pool_backward(
    dy: Any, rows: Windows, columns: Windows, input_size: Sequence[int], divisors: Any = None
) -> Array:
    """dx: each input gets its share dy / divisor of every window that covers it."""
    shares = np.asarray(dy, dtype=np.float64) / _divisors(rows, columns, divisors)
    dx = np.zeros(tuple(input_size))
    for oh, row in enumerate(rows):
        for ow, column in enumerate(columns):
            for ih in row:
                for iw in column:
                    dx[:, :, ih, iw] += shares[:, :, oh, ow]
    return dx


def _divisors(rows: Windows, columns: Windows, divisors: Any) -> Array:
    if divisors is None:
        divisors = np.outer([len(row) for row in rows], [len(column) for column in columns])
    return np.asarray(divisors, dtype=np.float64)


def max_unpool_forward(x: Any, indices: Indices, output_size: Sequence[int]) -> Array:
    """y is 0, except that it has each input at its index; of several for one place, the last."""
    x = np.asarray(x, dtype=np.float64)
    return _scatter(x, indices, (*x.shape[:2], *output_size), add=False)


def max_unpool_backward(dy: Any, indices: Indices) -> Array:
    """dx: the gradient of where the input went, also if another went there after it (as torch)."""
    dy = np.asarray(dy, dtype=np.float64)
    dx = np.empty(indices.shape)
    for n, c in np.ndindex(indices.shape[:2]):
        dx[n, c] = dy[n, c].ravel()[indices[n, c]]
    return dx


def _scatter(values: Array, indices: Indices, size: Sequence[int], add: bool) -> Array:
    """Zeros of ``size``, to which each value is added, or in whose place it is put, in order."""
    result = np.zeros(tuple(size))
    for n, c in np.ndindex(values.shape[:2]):
        plane = result[n, c].ravel()
        for value, index in zip(values[n, c].ravel(), indices[n, c].ravel(), strict=True):
            plane[index] = plane[index] + value if add else value
        result[n, c] = plane.reshape(result.shape[2:])
    return result
