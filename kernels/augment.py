"""Launchers of augmentation: pictures distorted by parameters that are drawn for each.

Word k of picture i is that of Philox with the counter (k div 4, i) and the seed as the key: so the
parameters of a picture depend on the seed and its number alone. ``PARAMETERS`` names the words in
order; behind them, two words of a counter of its own move each node of the elastic field.

A picture is read by its strides, in any layout. The result, and the gradient, are channels_last
where the pictures are, and else contiguous.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gpunn.kernels.cuda import CudaKernel, CudaLaunch
from gpunn.kernels.launch import cdiv, device_of, operator, run
from gpunn.kernels.pooling import format_of, is_channels_last

PARAMETERS = (
    "horizontal_flip", "vertical_flip", "rotation", "shear_x", "shear_y", "scale",
    "translation_x", "translation_y", "crop_area", "crop_ratio", "crop_x", "crop_y",
    "brightness", "contrast", "saturation",
)  # fmt: skip
ANGLES = ("rotation", "shear_x", "shear_y")
COLOURS = ("brightness", "contrast", "saturation")
PADDING_MODES = ("zeros", "border", "reflection")
FINEST = 4
"""The least distance of two nodes of the elastic field, in pixels, as in ``augment.h``."""
LARGEST_BYTE = 255


@dataclass(frozen=True)
class TileLaunch(CudaLaunch):
    """A block owns a tile of pixels, which stand in shared memory before they are written."""

    tile_width: int = 64
    tile_height: int = 32


# What is drawn for a picture, a block draws once: 2048 pixels share it. A warp has 32 neighbours of
# a row, so that what they fetch lies together. 24 KiB for three channels of float32. Not measured.
WIDE_LAUNCH = TileLaunch()
# For rows of up to 32 pixels, where half of the threads would otherwise have none.
NARROW_LAUNCH = TileLaunch(tile_width=32)
# 16-bit or 32-bit gradients of eight pixels a thread, whose marks are one word. Not measured.
GRADIENT_LAUNCH = CudaLaunch()
EXPONENT_LAUNCH = CudaLaunch()
BLOCKS_A_MULTIPROCESSOR = 8
"""All threads that a multiprocessor holds, to look for the largest gradient."""
SUMS_AT_ONCE = 2**22
"""Gradients that are added up at once, in 8 bytes each: they stand in the L2 cache, 40 MB on sm_80.

A picture with more is added up alone.
"""
PIXELS_A_THREAD = 8
NO_EXPONENT = -10_000

FORWARD = CudaKernel("augment.cu", "augment_forward_kernel")
EXPONENT = CudaKernel("augment.cu", "augment_exponent_kernel")
GATHER = CudaKernel("augment.cu", "augment_gather_kernel")
SCATTER = CudaKernel("augment.cu", "augment_scatter_kernel")
GRADIENT = CudaKernel("augment.cu", "augment_gradient_kernel")


class Settings(NamedTuple):
    """What the pictures are distorted by; as an operator takes it, in numbers."""

    ranges: list[float]
    """For each of PARAMETERS, what is drawn for u = 0 and for u = 1.

    Flips are drawn in [-p, 1 - p), and happen below 0; a crop_area of 0 is no crop.
    """
    field: list[float]
    """Of the elastic field, the amplitude in pixels, or 0, and the distance of its nodes."""
    colours: list[float]
    """The fill outside of a picture, and the grey about which contrast is changed, a share of 1."""
    padding_mode: str
    clamp: bool

    def range_of(self, parameter: str) -> tuple[float, float]:
        """What is drawn for u = 0, and for u = 1."""
        i = 2 * PARAMETERS.index(parameter)
        return self.ranges[i], self.ranges[i + 1]

    @property
    def recolours(self) -> list[bool]:
        """Whether each of COLOURS is changed."""
        return [self.range_of(name) != (1, 1) for name in COLOURS]

    @property
    def clamps(self) -> bool:
        """Whether a colour may be clamped, so that the gradient depends on the picture."""
        return self.clamp and any(self.recolours)

    @property
    def is_gathered(self) -> bool:
        """Whether a pixel finds those that it was a tap of, by the way forth.

        A field has no such way, at borders many pixels are tap of as many, and what was clamped is
        known to the pixels of the output alone.
        """
        return self.field[0] == 0 and self.padding_mode == "zeros" and not self.clamps

    def gain(self) -> float:
        """What a gradient grows by at most on its way back through the colours."""
        brightness, contrast, saturation = (self.range_of(name) for name in COLOURS)
        beside = max(abs(1 - factor) for factor in saturation)  # times 3 shares of at most 0.587
        return max(brightness) * max(contrast) * (max(saturation) + 1.8 * beside)


def bound_of(dtype: torch.dtype) -> int:
    """The largest colour."""
    return LARGEST_BYTE if dtype == torch.uint8 else 1


def n_node_columns(width: int, spacing: float) -> int:
    """Nodes in a row of the elastic field; those of the next row have the numbers behind."""
    return int((width - 1) / spacing) + 5


def _drawn(name: str, least: float, greatest: float) -> tuple[float, float]:
    """Least and extent as the kernels want them: half turns, logarithms of ratios."""
    if name in ANGLES:
        least, greatest = least / 180, greatest / 180
    elif name == "crop_ratio":
        least, greatest = math.log(least), math.log(greatest)
    return least, greatest - least


def packed(settings: Settings, width: int, given: torch.dtype, wanted: torch.dtype) -> bytes:
    """``Settings`` of ``augment.h``, for pictures of one dtype in, and one out."""
    numbers = [n for name in PARAMETERS for n in _drawn(name, *settings.range_of(name))]
    bound, (fill, grey), (amplitude, spacing) = bound_of(given), settings.colours, settings.field
    divisor = float(LARGEST_BYTE) if given == torch.uint8 != wanted else 1.0
    mode = PADDING_MODES.index(settings.padding_mode)
    whole = mode, settings.clamp, *settings.recolours, n_node_columns(width, spacing)
    return struct.pack(
        "36d6i", *numbers, fill, grey * bound, bound, divisor, amplitude, 1 / spacing, *whole
    )


def _extent(channels: int, size: Sequence[int], out: Sequence[int]) -> bytes:
    return struct.pack("q4i", channels, *size, *out)


def _strides(tensor: torch.Tensor) -> bytes:
    return struct.pack("4q", *tensor.stride())


def _launch_for(width: int) -> TileLaunch:
    return NARROW_LAUNCH if width <= NARROW_LAUNCH.tile_width else WIDE_LAUNCH


def _tiles(launch: TileLaunch, n_planes: int, size: Sequence[int]) -> int:
    """Tiles of so many planes, each a block."""
    return n_planes * cdiv(size[0], launch.tile_height) * cdiv(size[1], launch.tile_width)


def _channels_a_block(n_channels: int) -> int:
    """Three, whose saturation needs them together, or one of any other number."""
    return 3 if n_channels == 3 else 1


def _lines(written: torch.Tensor) -> tuple[bool, bool]:
    """Whether channels lie side by side, and whether lines can be written by 16 bytes."""
    n_channels, width = written.shape[1], written.shape[3]
    last = n_channels > 1 and is_channels_last(written)
    line = width * (n_channels if last else 1) * written.element_size()
    return last, line % 16 == 0 and not (last and _channels_a_block(n_channels) < n_channels)


def _augment_forward_fake(
    images: torch.Tensor,
    seed: torch.Tensor,
    size: list[int],
    ranges: list[float],
    field: list[float],
    colours: list[float],
    padding_mode: str,
    clamp: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    shape, memory_format = (*images.shape[:2], *size), format_of(is_channels_last(images))
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=memory_format)


@operator(
    "augment_forward(Tensor images, Tensor seed, SymInt[] size, float[] ranges, float[] field, "
    "float[] colours, str padding_mode, bool clamp, ScalarType dtype) -> Tensor",
    fake=_augment_forward_fake,
)
def augment_forward(
    images: torch.Tensor,
    seed: torch.Tensor,
    size: list[int],
    ranges: list[float],
    field: list[float],
    colours: list[float],
    padding_mode: str,
    clamp: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y (N, C, OH, OW) of ``dtype``, from images (N, C, H, W) and one int64, by ``Settings``."""
    settings = Settings(ranges, field, colours, padding_mode, clamp)
    y = _augment_forward_fake(images, seed, size, *settings, dtype)
    if not y.numel():
        return y
    n, n_channels, launch = images.shape[0], images.shape[1], _launch_for(size[1])
    channels = _channels_a_block(n_channels)
    last, wide = _lines(y)
    run(
        "augment_forward", FORWARD, (_tiles(launch, n * n_channels // channels, size),),
        images, seed, y, packed(settings, size[1], images.dtype, dtype),
        _extent(n_channels, images.shape[2:], size), _strides(images), int(wide),
        launch=launch, S=images.dtype, T=dtype, CHANNELS=channels, LAST=last,
    )  # fmt: skip
    return y


def _augment_backward_fake(
    dy: torch.Tensor,
    images: torch.Tensor | None,
    seed: torch.Tensor,
    input_size: list[int],
    ranges: list[float],
    field: list[float],
    colours: list[float],
    padding_mode: str,
    clamp: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    shape, memory_format = (*dy.shape[:2], *input_size), format_of(channels_last)
    return torch.empty(shape, dtype=dtype, device=dy.device, memory_format=memory_format)


@operator(
    "augment_backward(Tensor dy, Tensor? images, Tensor seed, SymInt[] input_size, "
    "float[] ranges, float[] field, float[] colours, str padding_mode, bool clamp, "
    "ScalarType dtype, bool channels_last) -> Tensor",
    fake=_augment_backward_fake,
)
def augment_backward(
    dy: torch.Tensor,
    images: torch.Tensor | None,
    seed: torch.Tensor,
    input_size: list[int],
    ranges: list[float],
    field: list[float],
    colours: list[float],
    padding_mode: str,
    clamp: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    """dx (N, C, H, W) of ``dtype``; the images are needed where the settings ``clamps``.

    Where gradients are gathered, sums are in float32, or float64. Others are exact but for their
    terms, each rounded to 2^-60 P of the largest |dy|, with P pixels of the output and what the
    colours multiply a gradient by.
    """
    settings = Settings(ranges, field, colours, padding_mode, clamp)
    dx = _augment_backward_fake(dy, images, seed, input_size, *settings, dtype, channels_last)
    if not dy.numel():
        return dx
    if settings.is_gathered:
        _gather(dy, seed, dx, settings)
        return dx
    seen = images if settings.clamps else None
    at_once = max(SUMS_AT_ONCE // dx[0].numel(), 1)
    exponent = _largest_exponent(dy)
    room = max(settings.gain(), 1.0) * dy.shape[2] * dy.shape[3]
    shift = 61 - math.ceil(math.log2(room))
    sums = dx.new_zeros(min(at_once, dx.shape[0]) * dx[0].numel(), dtype=torch.int64)
    marks = dx.new_zeros(cdiv(dx.numel(), PIXELS_A_THREAD), dtype=torch.int32)
    content = packed(settings, dy.shape[3], dtype, dy.dtype)
    for first in range(0, dx.shape[0], at_once):
        n = min(at_once, dx.shape[0] - first)
        _scatter(dy, seen, seed, exponent, sums, marks, dx, content, first, n, shift)
        _finish(exponent, sums, marks, dx, first * dx[0].numel(), n * dx[0].numel(), shift)
    return dx


def _gather(dy: torch.Tensor, seed: torch.Tensor, dx: torch.Tensor, settings: Settings) -> None:
    """Let each pixel of the input find those of the output that it was a tap of."""
    (n, n_channels, *size), launch = dx.shape, _launch_for(dx.shape[3])
    channels = _channels_a_block(n_channels)
    last, wide = _lines(dx)
    run(
        "augment_backward", GATHER, (_tiles(launch, n * n_channels // channels, size),),
        dy, seed, dx, packed(settings, dy.shape[3], dx.dtype, dy.dtype),
        _extent(n_channels, size, dy.shape[2:]), _strides(dy), int(wide),
        launch=launch, S=dx.dtype, T=dy.dtype, CHANNELS=channels, LAST=last,
    )  # fmt: skip


def _largest_exponent(dy: torch.Tensor) -> torch.Tensor:
    """One int32: the least e with |dy| < 2^e for all that is finite."""
    exponent = dy.new_full((1,), NO_EXPONENT, dtype=torch.int32)
    most = BLOCKS_A_MULTIPROCESSOR * device_of(dy).n_multiprocessors
    run(
        "augment_backward", EXPONENT, (min(cdiv(dy.numel(), EXPONENT_LAUNCH.n_threads), most),),
        dy, exponent, _extent(dy.shape[1], dy.shape[2:], dy.shape[2:]), _strides(dy), dy.numel(),
        launch=EXPONENT_LAUNCH, T=dy.dtype,
    )  # fmt: skip
    return exponent


def _scatter(
    dy: torch.Tensor,
    images: torch.Tensor | None,
    seed: torch.Tensor,
    exponent: torch.Tensor,
    sums: torch.Tensor,
    marks: torch.Tensor,
    dx: torch.Tensor,
    content: bytes,
    first: int,
    n: int,
    shift: int,
) -> None:
    """Add up the gradients of n pictures from the first on."""
    launch, channels = _launch_for(dy.shape[3]), _channels_a_block(dy.shape[1])
    n_planes = n * dy.shape[1] // channels
    arguments: tuple[Any, ...] = (
        dy, images, seed, exponent, sums, marks, content,
        _extent(dy.shape[1], dx.shape[2:], dy.shape[2:]), _strides(dy),
        _strides(dx if images is None else images), _strides(dx), first, shift,
    )  # fmt: skip
    run(
        "augment_backward", SCATTER, (_tiles(launch, n_planes, dy.shape[2:]),), *arguments,
        launch=launch, S=dx.dtype, T=dy.dtype, CHANNELS=channels,
    )  # fmt: skip


def _finish(
    exponent: torch.Tensor,
    sums: torch.Tensor,
    marks: torch.Tensor,
    dx: torch.Tensor,
    first: int,
    n: int,
    shift: int,
) -> None:
    """Turn n sums into the gradients from element ``first`` of dx on."""
    length = PIXELS_A_THREAD if (first | n) % PIXELS_A_THREAD == 0 else 1
    run(
        "augment_backward", GRADIENT, (cdiv(n, length * GRADIENT_LAUNCH.n_threads),),
        exponent, sums, marks, dx, first, n, shift,
        launch=GRADIENT_LAUNCH, T=dx.dtype, N=length,
    )  # fmt: skip
