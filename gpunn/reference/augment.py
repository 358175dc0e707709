"""Augmentation in float64: what is drawn, where a pixel comes from, and its colour; the gradient.

Sources: torchvision's documentation of RandomAffine, RandomResizedCrop and ColorJitter (what is
drawn; here contrast is about a fixed grey, and the order of the steps fixed); PyTorch's of
grid_sample with align_corners=False (pixels and padding modes); ITU-R BT.601 (grey); Simard,
Steinkraus and Platt 2003 (elastic distortion); de Boor, "A practical guide to splines", 1978. The
bits are those of ``reference/philox.py``: word k of picture i has the counter (k div 4, i).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpunn.reference.philox import philox

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Range = tuple[float, float]
Tap = tuple[Indices, Indices, Array]
"""Rows, columns and weights of one of the pixels that each pixel of the output is made of."""

WORDS = (
    "horizontal_flip", "vertical_flip", "rotation", "shear_x", "shear_y", "scale",
    "translation_x", "translation_y", "crop_area", "crop_ratio", "crop_x", "crop_y",
    "brightness", "contrast", "saturation",
)  # fmt: skip
FIRST_NODE = 4
"""The counter of the first node, behind those of WORDS: its words are x, y and two more."""
GREY = np.array([0.2989, 0.587, 0.114])


@dataclass(frozen=True)
class Distortion:
    """Probabilities of the flips, ranges of what else is drawn, and what is fixed."""

    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    rotation: Range = (0.0, 0.0)
    shear_x: Range = (0.0, 0.0)
    shear_y: Range = (0.0, 0.0)
    scale: Range = (1.0, 1.0)
    translation_x: Range = (0.0, 0.0)
    translation_y: Range = (0.0, 0.0)
    crop_area: Range | None = None
    crop_ratio: Range = (3 / 4, 4 / 3)
    elastic_amplitude: float = 0.0
    elastic_spacing: float = 32.0
    brightness: Range = (1.0, 1.0)
    contrast: Range = (1.0, 1.0)
    saturation: Range = (1.0, 1.0)
    grey: float = 0.5
    padding_mode: str = "zeros"
    fill: float = 0.0
    clamp: bool = True


def uniform(seed: int, picture: int, counters: Any) -> Array:
    """The four words of each of a picture's counters, (n, 4), as numbers in [0, 1) of 24 bits."""
    low = np.asarray(counters)
    zeros = np.zeros_like(low)
    counter = (low, zeros + picture, zeros, zeros)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return np.stack([word >> np.uint32(8) for word in words], axis=1) / 2.0**24


def drawn(seed: int, picture: int, distortion: Distortion) -> dict[str, float]:
    """Every parameter of a picture, by its name in WORDS; of a flip, whether it happens."""
    found = {}
    words = uniform(seed, picture, range(FIRST_NODE)).ravel().tolist()
    for name, u in zip(WORDS, words, strict=False):
        given = getattr(distortion, name, None)
        if name.endswith("flip"):
            found[name] = float(u < given)
        elif given is None:  # where the crop is; or its area, where there is none
            found[name] = u
        elif name == "crop_ratio":
            found[name] = given[0] * (given[1] / given[0]) ** u
        else:
            found[name] = given[0] + u * (given[1] - given[0])
    return found


def _shift(x: float, y: float) -> Array:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=np.float64)


def _linear(a: float, b: float, d: float, e: float) -> Array:
    return np.array([[a, b, 0], [d, e, 0], [0, 0, 1]], dtype=np.float64)


def way_there(
    chosen: dict[str, float], input_size: Sequence[int], size: Sequence[int], crops: bool
) -> Array:
    """The matrix of a picture's geometry: from (x, y, 1) in the input to (x, y, 1) in the output.

    Pixel centres are whole numbers; y points down.
    """
    height, width = float(input_size[0]), float(input_size[1])
    if crops:
        area = chosen["crop_area"] * height * width
        height = min(math.sqrt(area / chosen["crop_ratio"]), height)
        width = min(math.sqrt(area * chosen["crop_ratio"]), width)
    left = chosen["crop_x"] * (input_size[1] - width)
    top = chosen["crop_y"] * (input_size[0] - height)
    angle, scale = math.radians(chosen["rotation"]), chosen["scale"]
    steps = [
        _shift(-(left + (width - 1) / 2), -(top + (height - 1) / 2)),
        _linear(size[1] / width, 0, 0, size[0] / height),
        _linear(1 - 2 * chosen["horizontal_flip"], 0, 0, 1 - 2 * chosen["vertical_flip"]),
        _linear(1, math.tan(math.radians(chosen["shear_x"])), 0, 1),
        _linear(1, 0, math.tan(math.radians(chosen["shear_y"])), 1),
        _linear(scale, 0, 0, scale),
        _linear(math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)),
        _shift(chosen["translation_x"] * size[1], chosen["translation_y"] * size[0]),
        _shift((size[1] - 1) / 2, (size[0] - 1) / 2),
    ]
    matrix = np.eye(3)
    for step in steps:
        matrix = step @ matrix
    return matrix


def bump(x: float) -> float:
    """The cubic B-spline that is not 0 between -2 and 2."""
    x = abs(x)
    if x < 1:
        return 2 / 3 - x * x + x**3 / 2
    return (2 - x) ** 3 / 6 if x < 2 else 0.0


def displacements(seed: int, picture: int, size: Sequence[int], distortion: Distortion) -> Array:
    """By how much each output pixel is moved, (OH, OW, 2): x and y.

    Node (r, c), with the number r columns + c, stands at ((r - 1) spacing, (c - 1) spacing).
    """
    spacing = distortion.elastic_spacing
    rows, columns = (int((length - 1) / spacing) + 5 for length in size)
    down, across = (
        np.array([[bump(i / spacing - (k - 1)) for k in range(n)] for i in range(length)])
        for length, n in ((size[0], rows), (size[1], columns))
    )
    words = uniform(seed, picture, FIRST_NODE + np.arange(rows * columns))
    grid = (2 * words[:, :2] - 1).reshape(rows, columns, 2)
    moved: Array = distortion.elastic_amplitude * np.einsum("ir,jc,rcd->ijd", down, across, grid)
    return moved


def looked_up(at: Array, size: int, padding_mode: str) -> Array:
    """Where inside of a line of ``size`` pixels a place is looked up."""
    if padding_mode == "border":
        at = at.clip(0, size - 1)
    if padding_mode == "reflection":  # at -1/2 and size - 1/2, and again
        period = np.mod(at + 0.5, 2 * size)
        at = (np.minimum(period, 2 * size - period) - 0.5).clip(0, size - 1)
    return at


def places(
    seed: int,
    picture: int,
    input_size: Sequence[int],
    size: Sequence[int],
    distortion: Distortion,
) -> tuple[Array, Array]:
    """Where in the input each output pixel comes from, x and y, (OH, OW) each."""
    chosen = drawn(seed, picture, distortion)
    matrix = way_there(chosen, input_size, size, distortion.crop_area is not None)
    back = np.linalg.inv(matrix)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    if distortion.elastic_amplitude:
        moved = displacements(seed, picture, size, distortion)
        x, y = x + moved[..., 0], y + moved[..., 1]
    return (
        back[0, 0] * x + back[0, 1] * y + back[0, 2],
        back[1, 0] * x + back[1, 1] * y + back[1, 2],
    )


def taps_of(
    seed: int,
    picture: int,
    input_size: Sequence[int],
    size: Sequence[int],
    distortion: Distortion,
) -> tuple[list[Tap], Array]:
    """The four pixels, and the weight of the fill."""
    x, y = places(seed, picture, input_size, size, distortion)
    from_x = looked_up(x, input_size[1], distortion.padding_mode)
    from_y = looked_up(y, input_size[0], distortion.padding_mode)
    taps: list[Tap] = []
    filled = np.ones(tuple(size))
    for row in (np.floor(from_y), np.floor(from_y) + 1):
        for column in (np.floor(from_x), np.floor(from_x) + 1):
            weight = (1 - abs(from_y - row)) * (1 - abs(from_x - column))
            inside = (row >= 0) & (row < input_size[0]) & (column >= 0) & (column < input_size[1])
            weight = np.where(inside, weight, 0.0)
            at_row, at_column = (np.where(inside, k, 0).astype(np.int64) for k in (row, column))
            taps.append((at_row, at_column, weight))
            filled = filled - weight
    return taps, filled


def recolour(
    values: Array, chosen: dict[str, float], distortion: Distortion, bound: float
) -> tuple[Array, list[tuple[str, NDArray[np.bool_]]]]:
    """(C, OH, OW) with new colours; and of each step its name, and where it did not clamp."""
    steps = []
    for name in ("brightness", "contrast", "saturation"):
        if getattr(distortion, name) == (1, 1):
            continue
        f = chosen[name]
        if name == "brightness":
            values = f * values
        elif name == "contrast":
            values = f * values + (1 - f) * distortion.grey * bound
        else:
            values = f * values + (1 - f) * np.tensordot(GREY, values, 1)
        free = ((values >= 0) & (values <= bound)) | (not distortion.clamp)
        steps.append((name, free))
        values = values.clip(0, bound) if distortion.clamp else values
    return values, steps


def _sampled(image: Array, taps: list[Tap], filled: Array, fill: float) -> Array:
    values = fill * filled * np.ones((image.shape[0], 1, 1))
    for row, column, weight in taps:
        values = values + weight * image[:, row, column]
    return values


def augment_forward(
    images: Any, seed: int, size: Sequence[int], distortion: Distortion, bound: float = 1.0
) -> Array:
    """y (N, C, OH, OW) of images (N, C, H, W), whose largest colour is ``bound``; not rounded."""
    images = np.asarray(images, dtype=np.float64)
    y = np.empty((*images.shape[:2], *size))
    for i, image in enumerate(images):
        taps, filled = taps_of(seed, i, image.shape[1:], size, distortion)
        values = _sampled(image, taps, filled, distortion.fill)
        y[i] = recolour(values, drawn(seed, i, distortion), distortion, bound)[0]
    return y


def augment_backward(
    dy: Any, images: Any, seed: int, distortion: Distortion, bound: float = 1.0
) -> Array:
    """dx (N, C, H, W): each pixel gets dy, back through the colours, times its weights."""
    images, dy = np.asarray(images, dtype=np.float64), np.asarray(dy, dtype=np.float64)
    dx = np.zeros(images.shape)
    for i, image in enumerate(images):
        chosen = drawn(seed, i, distortion)
        taps, filled = taps_of(seed, i, image.shape[1:], dy.shape[2:], distortion)
        values = _sampled(image, taps, filled, distortion.fill)
        gradient = dy[i]
        for name, free in reversed(recolour(values, chosen, distortion, bound)[1]):
            gradient = np.where(free, gradient, 0.0)
            f = chosen[name]
            if name == "saturation":
                own = (1 - f) * GREY[:, None, None] * gradient.sum(0)
                gradient = f * gradient + own
            else:
                gradient = f * gradient
        for row, column, weight in taps:
            for c in range(image.shape[0]):
                np.add.at(dx[i, c], (row, column), weight * gradient[c])
    return dx
