"""Launchers of group normalisation: y = f((x - mean) / sqrt(var + eps) weight + bias) by groups.

x is (N, C, *), contiguous or with the channels last; a group is C / num_groups channels of an
image, and its statistics are float32 (of float64, float64). Source of the formulas: Y. Wu and
K. He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpunn.kernels.activation import device_functions
from gpunn.kernels.batch_norm import (
    ChannelsLaunch,
    constants,
    dense,
    wide,
)
from gpunn.kernels.elementwise import in_memory_order_of
from gpunn.kernels.groups import (
    group_input_gradient_kernel,
    group_norm_gradient_kernel,
    group_norm_kernel,
    group_normalise_kernel,
    group_statistics_kernel,
    group_sums_kernel,
    plane_statistics_kernel,
    plane_sums_kernel,
)
from gpunn.kernels.launch import Launch, cdiv, device_of, operator, run


@dataclass(frozen=True)
class PartsLaunch(Launch):
    """How many parts of a group a program adds up at once: few groups have more."""

    num_warps: int = 1
    block: int = 256


# Tiles for groups that are read once, the smallest first: eight or sixteen elements a thread, so
# that they stay in registers. A program of several groups compares each channel's with each: 64
# channels are the most. Not measured.
TILES = tuple(
    ChannelsLaunch(n_warps, block_positions=n_positions, block_channels=n_channels)
    for n_positions, n_channels, n_warps in (
        (16, 64, 4), (64, 64, 8), (256, 16, 8), (1024, 4, 8), (256, 32, 16), (1024, 8, 16),
        (4096, 2, 16), (256, 64, 32), (16384, 1, 32),
    )
)  # fmt: skip
LONGEST, LONGEST_NARROW = 16384, 8192
"""Elements of a tile; where gradients are held, or memory is not read by 128 bits, more spill."""
FEWEST_CHANNELS = 32
"""Of a tile with the channels last: 64 bytes in 16-bit types are read together."""
# Longer groups are read twice, by tiles of 16 elements a thread; of planes that would leave most of
# such a tile empty, by a squarer one.
CHANNELS_LAST = ChannelsLaunch(block_positions=128, block_channels=32)
CHANNELS_FIRST = ChannelsLaunch(block_positions=512, block_channels=8)
FEW_POSITIONS = ChannelsLaunch(block_positions=64, block_channels=64)
PARTS = PartsLaunch()
NAME, NAME_BACKWARD = "group_norm_forward", "group_norm_backward"


@dataclass(frozen=True)
class Plan:
    """How groups are shared out to programs, and where their elements are."""

    launch: ChannelsLaunch
    grid: tuple[int]
    channels_last: bool
    n_channels: int
    channels_a_group: int
    n_positions: int
    n_planes: int
    """Planes that lie a stride apart: of all images, or, with the channels last, of one."""
    n_all: int
    """Planes of all images."""
    strides: tuple[int, int, int]
    """Of runs of planes, of planes and of positions."""
    planes_a_program: int = 0
    """Those of the groups in a tile; 0 where none holds a group."""
    n_chunks: int = 0
    """Of a plane, each of another program, where groups are read twice; else 0."""
    positions_a_chunk: int = 0

    @property
    def count(self) -> int:
        """Elements of a group."""
        return self.channels_a_group * self.n_positions

    @property
    def eights(self) -> bool:
        """Whether the programs' planes begin and end at multiples of 8."""
        return self.planes_a_program % 8 == self.n_planes % 8 == 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """What the kernels that read the input take: sizes and strides."""
        parts = (
            (self.planes_a_program, self.count)
            if self.planes_a_program
            else (self.n_chunks, self.positions_a_chunk)
        )
        of_planes = self.n_channels, self.channels_a_group, self.n_positions, self.n_planes
        return *of_planes, *parts, self.n_all, *self.strides


def tile_for(
    channels_a_group: int, n_positions: int, channels_last: bool, most: int
) -> ChannelsLaunch | None:
    """The smallest tile that holds a group, of up to ``most`` elements."""
    for tile in TILES:
        fits = channels_a_group <= tile.block_channels and n_positions <= tile.block_positions
        fits &= tile.block_channels * tile.block_positions <= most
        if fits and (not channels_last or tile.block_channels >= FEWEST_CHANNELS):
            return tile
    return None


def groups_for(n_channels: int, channels_a_group: int) -> int:
    """Groups of a tile: as many as fit, or fewer if their channels are then a multiple of 8."""
    most = n_channels // channels_a_group
    eights = 8 // math.gcd(channels_a_group, 8)
    return most // eights * eights or most


def plan_for(x: torch.Tensor, num_groups: int, backward: bool) -> Plan:
    """Whole groups a program where a tile holds them; else two programs a multiprocessor or more.

    x is dense, and has elements.
    """
    n_images, n_channels = x.shape[:2]
    n_all, per_group, last = n_images * n_channels, n_channels // num_groups, not x.is_contiguous()
    n_positions, n_planes = x.numel() // n_all, n_channels if last else n_all
    strides = (n_channels * n_positions, 1, n_channels) if last else (0, n_positions, 1)
    sizes = last, n_channels, per_group, n_positions, n_planes, n_all, strides
    vectors = per_group % 8 == n_channels % 16 == 0 if last else n_positions % 16 == 0
    most = LONGEST_NARROW if backward or not vectors else LONGEST
    tile = tile_for(per_group, n_positions, last, most)
    if tile is not None:
        here = groups_for(tile.block_channels, per_group) * per_group
        return Plan(tile, (n_all // n_planes * cdiv(n_planes, here),), *sizes, here)
    launch = CHANNELS_LAST if last else CHANNELS_FIRST
    launch = FEW_POSITIONS if n_positions <= FEW_POSITIONS.block_positions else launch
    n_programs = n_all // n_planes * cdiv(n_planes, launch.block_channels)
    tiles = cdiv(n_positions, launch.block_positions)
    tiles_a_chunk = cdiv(tiles, cdiv(2 * device_of(x).n_multiprocessors, n_programs))
    n_chunks = cdiv(tiles, tiles_a_chunk)
    positions_a_chunk = tiles_a_chunk * launch.block_positions
    return Plan(launch, (n_programs * n_chunks,), *sizes, 0, n_chunks, positions_a_chunk)


def _forward_fake(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
    parameters: list[float],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    y = torch.empty_like(dense(x), dtype=dtype)
    return y, *(x.new_empty((x.shape[0], num_groups), dtype=wide(x)) for _ in range(3))


@operator(
    "group_norm_forward(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, "
    "str activation, float[] parameters, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
def group_norm_forward(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
    parameters: list[float],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """y = f((x - mean) / sqrt(var + eps) weight + bias), mean, 1 / sqrt(var + eps) and var.

    weight and bias (C,), contiguous; the statistics are (N, num_groups).
    """
    x = dense(x)
    y, *statistics = _forward_fake(x, num_groups, weight, bias, eps, activation, parameters, dtype)
    mean, invstd, var = statistics
    if x.numel() == 0:
        return y, mean.zero_(), invstd.fill_(torch.nan), var.zero_()
    plan, function = plan_for(x, num_groups, False), device_functions(activation, parameters)
    if plan.planes_a_program:
        run(
            NAME, group_norm_kernel, plan.grid, x, weight, bias, y, mean, invstd, var, *plan.sizes,
            eps, launch=plan.launch, CHANNELS_LAST=plan.channels_last,
            EIGHTS=plan.eights, **function,
        )  # fmt: skip
        return y, mean, invstd, var
    partial = mean.new_empty((2, plan.n_chunks, plan.n_all))
    run(
        NAME, plane_statistics_kernel, plan.grid, x, partial, *plan.sizes[2:], launch=plan.launch,
        CHANNELS_LAST=plan.channels_last,
    )  # fmt: skip
    run(
        NAME, group_statistics_kernel, (mean.numel(),), partial, mean, invstd, var,
        plan.channels_a_group, plan.n_positions, plan.n_chunks, plan.positions_a_chunk, plan.n_all,
        plan.count, eps, launch=PARTS,
    )  # fmt: skip
    run(
        NAME, group_normalise_kernel, plan.grid, x, weight, bias, mean, invstd, y, *plan.sizes,
        launch=plan.launch, CHANNELS_LAST=plan.channels_last, **function,
    )  # fmt: skip
    return y, mean, invstd, var


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    activation: str,
    parameters: list[float],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    dx = torch.empty_like(dense(x)) if needs[0] else x.new_empty((0,))
    dweight, dbias = (
        x.new_empty((x.shape[1] if needed else 0,), dtype=x.dtype if like is None else like.dtype)
        for needed, like in zip(needs[1:], (weight, bias), strict=True)
    )
    return dx, dweight, dbias


@operator(
    "group_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor invstd, str activation, float[] parameters, bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)
def group_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    activation: str,
    parameters: list[float],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """dx, dweight and dbias; each is empty where it is not in ``needs``."""
    x = dense(x)
    gradients = _backward_fake(dy, x, weight, bias, mean, invstd, activation, parameters, needs)
    dx, dweight, dbias = gradients
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    plan = plan_for(x, mean.shape[1], True)
    given = in_memory_order_of(dy, x), x, weight, bias
    options = {"CHANNELS_LAST": plan.channels_last, **constants(activation, parameters)}
    partial = mean.new_empty((2, max(plan.n_chunks, 1), plan.n_all))
    if plan.planes_a_program:
        run(
            NAME_BACKWARD, group_norm_gradient_kernel, plan.grid,
            *given, mean, invstd, dx if needs[0] else None, partial if any(needs[1:]) else None,
            *plan.sizes, launch=plan.launch, EIGHTS=plan.eights, **options,
        )  # fmt: skip
    else:
        run(
            NAME_BACKWARD, plane_sums_kernel, plan.grid,
            *given, mean, invstd, partial, *plan.sizes, launch=plan.launch, **options,
        )  # fmt: skip
        if needs[0]:
            _input_gradient(plan, given, mean, invstd, partial, dx, options)
    if any(needs[1:]):
        total, product = partial.view(2, -1, plan.n_channels).sum(1)
        if needs[1]:
            dweight.copy_(product)
        if needs[2]:
            dbias.copy_(total)
    return gradients


def _input_gradient(
    plan: Plan,
    given: tuple[torch.Tensor | None, ...],
    mean: torch.Tensor,
    invstd: torch.Tensor,
    partial: torch.Tensor,
    dx: torch.Tensor,
    options: dict[str, Any],
) -> None:
    """Writes dx of groups that are read twice, from the sums of their planes."""
    sums = mean.new_empty((2, mean.numel()))
    run(
        NAME_BACKWARD, group_sums_kernel, (mean.numel(),), partial, given[2], invstd, sums,
        plan.n_channels, plan.channels_a_group, plan.n_chunks, plan.n_all, plan.count, launch=PARTS,
    )  # fmt: skip
    run(
        NAME_BACKWARD, group_input_gradient_kernel, plan.grid, *given, mean, invstd, sums, dx,
        *plan.sizes, launch=plan.launch, **options,
    )  # fmt: skip
