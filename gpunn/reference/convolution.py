"""Convolution and its gradients, from the definition: slide, multiply, sum.

Source: LeCun et al., "Gradient-based learning applied to document recognition" (1998); Dumoulin and
Visin, "A guide to convolution arithmetic for deep learning" (2016), for the transposed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Geometry:
    """How a weight (K, C / groups, R, S) slides over images (N, C, H, W)."""

    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0, 0, 0)
    """Top, bottom, left, right."""
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    def output_size(self, input_size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Places of the kernel below each other and beside each other."""
        return [
            (input_size[d] + sum(self.padding[2 * d : 2 * d + 2])
             - self.dilation[d] * (kernel[d] - 1) - 1) // self.stride[d] + 1
            for d in (0, 1)
        ]  # fmt: skip

    def slide(
        self, padded: Array, weight: Array, size: Sequence[int]
    ) -> Iterator[tuple[Array, Any]]:
        """For each tap, a view (N, groups, C / groups, *size) of what it is over, and its place."""
        n, channels = padded.shape[:2]
        for r in range(weight.shape[2]):
            for s in range(weight.shape[3]):
                first = r * self.dilation[0], s * self.dilation[1]
                rows, columns = (
                    slice(first[d], first[d] + self.stride[d] * (size[d] - 1) + 1, self.stride[d])
                    for d in (0, 1)
                )
                seen = padded[:, :, rows, columns]
                yield seen.reshape(n, self.groups, channels // self.groups, *size), (rows, columns)

    def padded(self, x: Array) -> Array:
        """x with zeros around it."""
        top, bottom, left, right = self.padding
        return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))

    def cropped(self, padded: Array) -> Array:
        """What ``padded`` has been made of."""
        top, bottom, left, right = self.padding
        height, width = padded.shape[2:]
        return padded[:, :, top : height - bottom, left : width - right]

    def by_group(self, weight: Array) -> Array:
        """(groups, K / groups, C / groups, R, S)."""
        return weight.reshape(self.groups, -1, *weight.shape[1:])


def conv_forward(x: Any, weight: Any, geometry: Geometry) -> Array:
    """y[n, k, oh, ow] = Σ over c, r, s of x[n, c, oh sh - top + r dh, …] weight[k, c, r, s]."""
    x, weight = np.asarray(x, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    size = geometry.output_size(x.shape[2:], weight.shape[2:])
    taps = geometry.by_group(weight).reshape(
        geometry.groups, -1, *weight.shape[1:2], weight[0, 0].size
    )
    y = np.zeros((x.shape[0], geometry.groups, taps.shape[1], *size))
    for tap, (seen, _) in enumerate(geometry.slide(geometry.padded(x), weight, size)):
        y += np.einsum("ngchw,gkc->ngkhw", seen, taps[..., tap])
    return y.reshape(x.shape[0], -1, *size)


def conv_input_gradient(
    dy: Any, weight: Any, input_size: Sequence[int], geometry: Geometry
) -> Array:
    """dx (N, C, *input_size): each dy times the weight, added where the weight was.

    It is the transposed convolution of dy, too.
    """
    dy, weight = np.asarray(dy, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    n, size = dy.shape[0], dy.shape[2:]
    n_channels = weight.shape[1] * geometry.groups
    padded = geometry.padded(np.zeros((n, n_channels, *input_size)))
    taps = geometry.by_group(weight).reshape(
        geometry.groups, -1, weight.shape[1], weight[0, 0].size
    )
    upstream = dy.reshape(n, geometry.groups, -1, *size)
    for tap, (_, (rows, columns)) in enumerate(geometry.slide(padded, weight, size)):
        share = np.einsum("ngkhw,gkc->ngchw", upstream, taps[..., tap])
        padded[:, :, rows, columns] += share.reshape(n, n_channels, *size)
    return geometry.cropped(padded)


def conv_weight_gradient(dy: Any, x: Any, weight_size: Sequence[int], geometry: Geometry) -> Array:
    """dweight, of shape ``weight_size``: for each tap the sum of dy times what it was over."""
    dy, x = np.asarray(dy, dtype=np.float64), np.asarray(x, dtype=np.float64)
    size, dweight = dy.shape[2:], np.zeros(tuple(weight_size))
    upstream = dy.reshape(dy.shape[0], geometry.groups, -1, *size)
    flat = dweight.reshape(*weight_size[:2], -1)
    for tap, (seen, _) in enumerate(geometry.slide(geometry.padded(x), dweight, size)):
        share = np.einsum("ngkhw,ngchw->gkc", upstream, seen)
        flat[..., tap] = share.reshape(*weight_size[:2])
    return dweight
