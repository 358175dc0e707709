"""Launching ``implicit_gemm.py`` and ``depthwise.py``: which inputs outputs look up, what tiles.

``convolve`` and ``partial_weights`` are what the launchers of convolution call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from gpunn.kernels.activation import ACTIVATIONS, device_functions
from gpunn.kernels.depthwise import grouped_convolution_kernel, grouped_weight_kernel
from gpunn.kernels.implicit_gemm import convolution_kernel, convolution_weight_kernel
from gpunn.kernels.launch import Launch, cdiv, device_of, run


@dataclass(frozen=True)
class ConvolutionLaunch(Launch):
    """Tile sizes: places by outputs by channels."""

    num_stages: int = 3
    block_rows: int = 128
    block_cols: int = 128
    block_inner: int = 64
    group_rows: int = 8


@dataclass(frozen=True)
class WeightLaunch(Launch):
    """Tile sizes: outputs by channels by places."""

    num_stages: int = 3
    block_rows: int = 64
    block_cols: int = 64
    block_inner: int = 64


@dataclass(frozen=True)
class GroupedLaunch(Launch):
    """Tile sizes: places by outputs of all groups; 16 bytes a thread in 16-bit types."""

    block_rows: int = 16
    block_cols: int = 64


# Largest first; the first that gives every multiprocessor a tile is taken, else the last. The two
# largest are the fastest without spills of thirteen that an H200 was given (3 x 3, 128 images of
# 28² with 128 channels: 114 us; of 56² with 64: 159 us, and 223 us with half as many rows).
TILES_16_BIT = (
    ConvolutionLaunch(8, 3, block_rows=128, block_cols=128, block_inner=64),
    ConvolutionLaunch(8, 3, block_rows=256, block_cols=64, block_inner=64),
    ConvolutionLaunch(4, 3, block_rows=128, block_cols=64, block_inner=64),
    ConvolutionLaunch(8, 3, block_rows=64, block_cols=64, block_inner=64),
    ConvolutionLaunch(4, 3, block_rows=64, block_cols=32, block_inner=64),
)
# Where elements are loaded one by one, each has a pointer in registers.
TILES_PACKED = (
    ConvolutionLaunch(8, 3, block_rows=64, block_cols=64, block_inner=64),
    ConvolutionLaunch(8, 3, block_rows=64, block_cols=32, block_inner=64),
)
# So are channels without a UNIT (see ``unit_of``): larger tiles would spill up to 25 kB a thread.
TILES_UNALIGNED = (
    ConvolutionLaunch(8, 3, block_rows=64, block_cols=64, block_inner=32),
    ConvolutionLaunch(8, 3, block_rows=64, block_cols=32, block_inner=32),
)
TILES_TF32 = (
    ConvolutionLaunch(4, 3, block_rows=64, block_cols=64, block_inner=16),
    ConvolutionLaunch(4, 3, block_rows=32, block_cols=32, block_inner=16),
)
# Without tensor cores the operands stand in registers.
TILES_IEEE = (
    ConvolutionLaunch(8, 3, block_rows=64, block_cols=64, block_inner=16),
    ConvolutionLaunch(4, 3, block_rows=32, block_cols=32, block_inner=16),
)
FEWEST_CHANNELS = 16
"""With fewer, the channels of all taps are put together: ``PACKED``."""
# On an H200, 128 images of 28² with 128 channels: 213, 503 and 663 us. Ampere spills with the first
# two.
WEIGHT_WIDE = WeightLaunch(8, 3, block_rows=128, block_cols=128, block_inner=64)
WEIGHT_DEEP = WeightLaunch(4, 3, block_rows=64, block_cols=64, block_inner=64)
WEIGHT_16_BIT = WeightLaunch(4, 4, block_rows=64, block_cols=64, block_inner=32)
WEIGHT_UNALIGNED = WeightLaunch(8, 4, block_rows=64, block_cols=64, block_inner=32)
WEIGHT_PACKED = WeightLaunch(4, 3, block_rows=64, block_cols=32, block_inner=32)
WEIGHT_32_BIT = WeightLaunch(4, 3, block_rows=32, block_cols=64, block_inner=16)
WEIGHT_32_UNALIGNED = WeightLaunch(8, 3, block_rows=32, block_cols=64, block_inner=16)
GROUPED = GroupedLaunch()
MOST_PARTS = 32
"""Of the sum over places, each a float32 copy of the weight until they are added."""
PROGRAMS = 4
"""For each multiprocessor, where the sum has so many parts; of the widest tiles, one fits."""


class Taps(NamedTuple):
    """Along one dimension, which inputs and which taps of the weight an output's grid looks up."""

    grid: int
    """Outputs."""
    n_taps: int
    stride: int
    origin: int
    spacing: int
    first_tap: int = 0
    tap_step: int = 1
    first_out: int = 0
    out_step: int = 1


def forward_taps(grid: int, kernel: int, stride: int, padding: int, dilation: int) -> Taps:
    """Output p looks up inputs p · stride - padding + i · dilation."""
    return Taps(grid, kernel, stride, -padding, dilation)


@lru_cache(maxsize=1024)
def transposed_taps(
    size: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[Taps, ...]:
    """For outputs o = phase + p · stride, the inputs (o + padding - r · dilation) / stride.

    Those taps r for which that is a whole number are the same for a phase, and as far apart as
    stride and dilation have no factor in common.
    """
    common, phases = math.gcd(stride, dilation), []
    step = stride // common
    for phase in range(min(stride, size)):
        start = phase + padding
        fitting = [r for r in range(min(step, kernel)) if (start - r * dilation) % stride == 0]
        first = fitting[0] if fitting else kernel
        phases.append(
            Taps(
                grid=cdiv(size - phase, stride),
                n_taps=cdiv(kernel - first, step),
                stride=1,
                origin=(start - first * dilation) // stride,
                spacing=-dilation // common,
                first_tap=first,
                tap_step=step,
                first_out=phase,
                out_step=stride,
            )
        )
    return tuple(phases)


def precision_of(dtype: torch.dtype) -> str:
    """How ``tl.dot`` treats float32: as torch's convolution settings say."""
    if dtype != torch.float32:
        return "ieee"
    setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "ieee"


def tiles_for(
    y: torch.Tensor, n_channels: int, n_outputs: int, unit: int
) -> tuple[ConvolutionLaunch, ...]:
    """The tile sizes among which a convolution is launched, of channels and outputs of a group.

    Where results are stored one by one, the three largest of 16 bits spill on one chip or another,
    and the larger of 32; so does that of IEEE's where elements are loaded one by one. On Blackwell
    256 rows spill.
    """
    packed = n_channels < FEWEST_CHANNELS
    if y.element_size() > 2:
        tf32 = precision_of(y.dtype) == "tf32"
        tiles = TILES_TF32 if tf32 else TILES_IEEE
        return tiles[1:] if y.stride(1) != 1 or (packed and not tf32) else tiles
    if packed:
        return TILES_PACKED
    if n_channels % 16 and unit == 1:
        return TILES_UNALIGNED
    if y.stride(1) != 1 or (n_outputs % 16 and unit == 1):
        return TILES_16_BIT[3:]
    most_rows = 256 if device_of(y).capability < 100 else 128
    return tuple(tile for tile in TILES_16_BIT if tile.block_rows <= most_rows)


def unit_of(n_channels: int, n_outputs: int, *images: torch.Tensor) -> int:
    """The kernels' UNIT: elements of 16 bytes, if all that places differ by are multiples, else 1.

    And 1 for multiples of 16 elements, which Triton recognises, and without tensor cores, where
    what is loaded together would spill. A dimension of one place has a stride that counts for
    nothing.
    """
    dtype = images[0].dtype
    by_cores = dtype.itemsize == 2 or precision_of(dtype) == "tf32"
    if not by_cores or n_channels < FEWEST_CHANNELS or n_channels % 16 == n_outputs % 16 == 0:
        return 1
    strides = [
        image.stride(dimension)
        for image in images
        for dimension in (0, 2, 3)
        if image.shape[dimension] > 1
    ]
    unit = 16 // dtype.itemsize
    return 1 if any(n % unit for n in (n_channels, n_outputs, *strides)) else unit


def choose_launch(
    y: torch.Tensor, n_places: int, n_channels: int, n_outputs: int, groups: int, unit: int
) -> ConvolutionLaunch:
    """The largest tile that outputs fill to more than half, and that fills the chip.

    Else the smallest.
    """
    tiles = tiles_for(y, n_channels, n_outputs, unit)
    n_multiprocessors = device_of(y).n_multiprocessors
    for launch in tiles:
        n_tiles = cdiv(n_places, launch.block_rows) * cdiv(n_outputs, launch.block_cols) * groups
        if n_tiles >= n_multiprocessors and launch.block_cols < 2 * n_outputs:
            return launch
    return tiles[-1]


@dataclass
class Outputs:
    """What a convolution writes, and what it does before: y = f(sum + bias) + residual."""

    y: torch.Tensor
    saved: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    activation: str
    parameters: list[float]

    def constants(self) -> dict[str, Any]:
        """The constexpr arguments of the kernels."""
        return {
            "SAVES_OUTPUT": ACTIVATIONS[self.activation].from_output(self.parameters),
            **device_functions(self.activation, self.parameters),
        }


def are_small(groups: int, n_channels: int, n_outputs: int) -> bool:
    """Whether the channels or outputs of a group would not fill a tile of a matrix product."""
    return groups > 1 and min(n_channels, n_outputs) < FEWEST_CHANNELS


def convolve(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    outputs: Outputs,
    taps: tuple[Taps, Taps],
) -> None:
    """Launch a kernel for x and weight (groups, outputs, channels, height, width)."""
    groups, n_outputs, n_channels, _, _ = weight.shape
    rows, cols = taps
    n_places = x.shape[0] * rows.grid * cols.grid
    small, packed = are_small(groups, n_channels, n_outputs), n_channels < FEWEST_CHANNELS
    if small or not packed:  # so that 16 bytes of channels can be loaded together
        x = x.contiguous(memory_format=torch.channels_last)
    if not small and not packed:
        weight = weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    arguments = (
        x, weight, outputs.bias, outputs.residual, outputs.y, outputs.saved,
        x.shape[0], rows.grid, cols.grid, x.shape[2], x.shape[3], groups, n_channels, n_outputs,
        *(number for pair in zip(rows[1:], cols[1:], strict=True) for number in pair),
        *x.stride(), *weight.stride(), *outputs.y.stride(),
    )  # fmt: skip
    if small:
        n_tiles = cdiv(n_places, GROUPED.block_rows) * cdiv(groups * n_outputs, GROUPED.block_cols)
        kernel, constants = grouped_convolution_kernel, outputs.constants()
        run(name, kernel, (n_tiles,), *arguments, launch=GROUPED, **constants)
        return
    unit = unit_of(n_channels, n_outputs, x, outputs.y)
    launch = choose_launch(outputs.y, n_places, n_channels, n_outputs, groups, unit)
    n_tiles = cdiv(n_places, launch.block_rows) * cdiv(n_outputs, launch.block_cols) * groups
    n_programs = min(n_tiles, device_of(x).n_multiprocessors)
    run(
        name, convolution_kernel, (n_programs,), *arguments,
        launch=launch, PRECISION=precision_of(x.dtype), PACKED=packed, UNIT=unit,
        **outputs.constants(),
    )  # fmt: skip


def weight_launch(dz: torch.Tensor, n_channels: int, n_outputs: int, unit: int) -> WeightLaunch:
    """The tiles of a weight's gradient, of the channels and outputs of one group."""
    packed = n_channels < FEWEST_CHANNELS
    unaligned = not packed and unit == 1 and (n_channels % 16 or n_outputs % 16)
    if dz.element_size() > 2:
        return WEIGHT_32_UNALIGNED if unaligned else WEIGHT_32_BIT
    if packed:
        return WEIGHT_PACKED
    if unaligned:
        return WEIGHT_UNALIGNED
    if device_of(dz).capability < 90:
        return WEIGHT_16_BIT
    return WEIGHT_WIDE if min(n_channels, n_outputs) >= 128 else WEIGHT_DEEP


def partial_weights(
    dz: torch.Tensor, x: torch.Tensor, weight_size: list[int], taps: tuple[Taps, Taps], groups: int
) -> torch.Tensor:
    """Launch a kernel that sums over parts of the places: (parts, K, R · S · C / groups)."""
    n_outputs, n_channels, *kernel = weight_size
    rows, cols = taps
    n_taps, n_places = math.prod(kernel), dz.shape[0] * rows.grid * cols.grid
    small = are_small(groups, n_channels, n_outputs // groups)
    packed = n_channels < FEWEST_CHANNELS
    launch: GroupedLaunch | WeightLaunch = GROUPED
    unit = unit_of(n_channels, n_outputs // groups, dz, x)
    if not small:
        launch = weight_launch(dz, n_channels, n_outputs // groups, unit)
    if isinstance(launch, GroupedLaunch):
        n_tiles = cdiv(n_outputs, launch.block_cols) * n_taps * n_channels
        steps, constants = cdiv(n_places, launch.block_rows), {}
    else:
        across = cdiv(n_channels, launch.block_cols) * n_taps
        if packed:
            across = cdiv(n_taps * n_channels, launch.block_cols)
        n_tiles = cdiv(n_outputs // groups, launch.block_rows) * across * groups
        steps = cdiv(n_places, launch.block_inner)
        constants = {"PRECISION": precision_of(dz.dtype), "PACKED": packed, "UNIT": unit}
    programs = device_of(x).n_multiprocessors * (1 if launch is WEIGHT_WIDE else PROGRAMS)
    wide = torch.float64 if dz.dtype == torch.float64 else torch.float32
    size_of_part = wide.itemsize * n_outputs * n_taps * n_channels
    fitting = max(MOST_PARTS // 8, dz.nbytes // size_of_part)  # into less memory than dz takes
    most = max(1, min(programs // n_tiles, steps // 4, MOST_PARTS, fitting))
    n_parts = most - most % 2 if most > 4 else most  # each number of parts is a kernel of its own
    partials = dz.new_empty((n_parts, n_outputs, n_taps * n_channels), dtype=wide)
    run(
        "conv_weight_gradient",
        grouped_weight_kernel if small else convolution_weight_kernel,
        (n_tiles * n_parts,),
        dz, x, partials,
        dz.shape[0], rows.grid, cols.grid, x.shape[2], x.shape[3], groups, n_channels,
        n_outputs // groups,
        *(number for pair in zip(rows[1:5], cols[1:5], strict=True) for number in pair),
        *dz.stride(), *x.stride(),
        launch=launch, N_PARTS=n_parts, **constants,
    )  # fmt: skip
    return partials
