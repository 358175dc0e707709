"""Passes over groups of channels: the device code of ``group_norm.py``.

A plane is the positions of one channel of one image; a group is channels_a_group planes of an
image. Planes are counted through all images, and what is kept of planes or groups lies in that
order. In memory, planes lie stride_c apart in runs of n_planes, and runs stride_n: all images are
one run where they are contiguous, and each is its own where the channels are last. Groups that fit
into a tile are read once; of longer ones each plane, or a chunk of it, is summed by a program, and
what is summed is added up group by group, always in the same order, before the second reading.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.channels import (
    by_channel,
    chunk_statistics,
    chunk_sums,
    gradient_tile,
    load_or,
    over_positions,
    tile_at,
)
from gpunn.kernels.numeric import widen


@triton.jit
def over_groups(values, group):
    """The sum over each group of a tile's planes, at each of its planes."""
    same = group[:, None] == group[None, :]
    return tl.sum(tl.where(same, values[None, :], 0.0), axis=1)


@triton.jit
def load_parameters(weight_ptr, bias_ptr, first, n_channels, BLOCK_CHANNELS: tl.constexpr):
    """weight and bias of the channels of the planes from ``first`` on, or 1 and 0."""
    channel = ((first % n_channels).to(tl.int32) + tl.arange(0, BLOCK_CHANNELS)) % n_channels
    weight = load_or(weight_ptr, channel, n_channels, 1.0)
    return weight, load_or(bias_ptr, channel, n_channels, 0.0)


@triton.jit
def groups_here(
    n_planes, channels_a_group, planes_a_program, EIGHTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Of a program with whole groups: run, first plane in it and end, first group; planes' groups.

    Planes of the tile that are past the end belong to none of the program's groups. EIGHTS:
    n_planes and planes_a_program are multiples of 8, so that memory can be read by 128 bits.
    """
    across = tl.cdiv(n_planes, planes_a_program)
    run = (tl.program_id(0) // across).to(tl.int64)
    first = (tl.program_id(0) % across).to(tl.int64) * planes_a_program
    end = tl.minimum(first + planes_a_program, n_planes)
    if EIGHTS:
        first, end = tl.multiple_of(first, 8), tl.multiple_of(end, 8)
    group = tl.arange(0, BLOCK_CHANNELS) // channels_a_group
    return run, first, end, (run * n_planes + first) // channels_a_group, group


@triton.jit
def group_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, invstd_ptr, var_ptr,
    n_channels, channels_a_group, n_positions, n_planes, planes_a_program, count, n_all, stride_n,
    stride_c, stride_inner, eps,
    CHANNELS_LAST: tl.constexpr, EIGHTS: tl.constexpr, ACTIVATION: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = f((x - mean) / sqrt(var + eps) weight + bias), and mean, 1 / sqrt(var + eps) and var.

    A program owns the groups of planes_a_program planes, of which every element is in its tile.
    """
    run, first, end, first_group, group = groups_here(n_planes, channels_a_group, planes_a_program,
                                                      EIGHTS, BLOCK_CHANNELS)  # fmt: skip
    plane = first + tl.arange(0, BLOCK_CHANNELS)
    weight, bias = load_parameters(weight_ptr, bias_ptr, run * n_planes + first, n_channels,
                                   BLOCK_CHANNELS)  # fmt: skip
    at, mask = tile_at(0, n_positions, plane, end, n_positions, 0, stride_c, stride_inner,
                       CHANNELS_LAST, BLOCK_POSITIONS)  # fmt: skip
    at += run * stride_n
    x = widen(tl.load(x_ptr + at, mask=mask, other=0.0))
    mean = over_groups(over_positions(x, CHANNELS_LAST), group) / count
    apart = tl.where(mask, x - by_channel(mean, CHANNELS_LAST), 0.0)
    var = over_groups(over_positions(apart * apart, CHANNELS_LAST), group) / count
    invstd = 1 / tl.sqrt(var + eps)
    z = apart * by_channel(invstd * weight, CHANNELS_LAST) + by_channel(bias, CHANNELS_LAST)
    y = ACTIVATION(z, P0, P1)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    leads = (plane < end) & (tl.arange(0, BLOCK_CHANNELS) % channels_a_group == 0)
    tl.store(mean_ptr + first_group + group, mean, mask=leads)
    tl.store(invstd_ptr + first_group + group, invstd, mask=leads)
    tl.store(var_ptr + first_group + group, var, mask=leads)


@triton.jit
def group_norm_gradient_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, dx_ptr, partial_ptr,
    n_channels, channels_a_group, n_positions, n_planes, planes_a_program, count, n_all, stride_n,
    stride_c, stride_inner,
    CHANNELS_LAST: tl.constexpr, EIGHTS: tl.constexpr, ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = invstd (weight dz - hat mean(weight dz hat) - mean(weight dz)), hat = (x - mean) invstd.

    And Σ dz and Σ dz hat of each plane, partial (2, n_all). Programs as in the forward pass.
    """
    run, first, end, first_group, group = groups_here(n_planes, channels_a_group, planes_a_program,
                                                      EIGHTS, BLOCK_CHANNELS)  # fmt: skip
    plane = first + tl.arange(0, BLOCK_CHANNELS)
    weight, bias = load_parameters(weight_ptr, bias_ptr, run * n_planes + first, n_channels,
                                   BLOCK_CHANNELS)  # fmt: skip
    mean = tl.load(mean_ptr + first_group + group, mask=plane < end, other=0.0)
    invstd = tl.load(invstd_ptr + first_group + group, mask=plane < end, other=0.0)
    dz, apart, at, mask = gradient_tile(
        dy_ptr + run * stride_n, x_ptr + run * stride_n, None, None, 0, n_positions, first, mean,
        by_channel(invstd * weight, CHANNELS_LAST), by_channel(bias, CHANNELS_LAST), n_positions,
        end, n_positions, 0, stride_c, stride_inner, CHANNELS_LAST, ACTIVATION, GRADIENT, P0, P1,
        FROM_OUTPUT, BLOCK_POSITIONS, BLOCK_CHANNELS,
    )  # fmt: skip
    sums = over_positions(dz, CHANNELS_LAST)
    products = over_positions(dz * apart, CHANNELS_LAST) * invstd
    if partial_ptr is not None:
        out = partial_ptr + run * n_planes + plane
        tl.store(out, sums, mask=plane < end)
        tl.store(out + n_all, products, mask=plane < end)
    if dx_ptr is not None:
        level = over_groups(weight * sums, group) / count * invstd
        slope = over_groups(weight * products, group) / count * invstd * invstd
        dx = dz * by_channel(invstd * weight, CHANNELS_LAST) - by_channel(level, CHANNELS_LAST)
        dx -= apart * by_channel(slope, CHANNELS_LAST)
        tl.store(dx_ptr + run * stride_n + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def chunk_here(n_positions, n_planes, n_chunks, positions_a_chunk, BLOCK_CHANNELS: tl.constexpr):
    """Of a program with chunks of planes: their run, first plane in it, chunk, start and end."""
    across = tl.cdiv(n_planes, BLOCK_CHANNELS)
    run = (tl.program_id(0) // (across * n_chunks)).to(tl.int64)
    first = (tl.program_id(0) % across).to(tl.int64) * BLOCK_CHANNELS
    chunk = tl.program_id(0) // across % n_chunks
    start = chunk * positions_a_chunk
    return run, first, chunk, start, tl.minimum(start + positions_a_chunk, n_positions)


@triton.jit
def load_of_groups(ptr, first, n_left, channels_a_group, BLOCK_CHANNELS: tl.constexpr):
    """What is kept of the groups of the n_left planes from ``first`` on, 0 for others."""
    block = tl.arange(0, BLOCK_CHANNELS)
    group = first // channels_a_group + (first % channels_a_group + block) // channels_a_group
    return tl.load(ptr + group, mask=block < n_left, other=0.0)


@triton.jit
def plane_statistics_kernel(
    x_ptr, partial_ptr,
    n_positions, n_planes, n_chunks, positions_a_chunk, n_all, stride_n, stride_c, stride_inner,
    CHANNELS_LAST: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each chunk of a plane: partial (2, n_chunks, n_all)."""
    run, first, chunk, start, end = chunk_here(n_positions, n_planes, n_chunks, positions_a_chunk,
                                               BLOCK_CHANNELS)  # fmt: skip
    plane = first + tl.arange(0, BLOCK_CHANNELS)
    mean, deviations = chunk_statistics(
        x_ptr + run * stride_n, start, end, plane, n_planes, n_positions, 0, stride_c, stride_inner,
        CHANNELS_LAST, BLOCK_POSITIONS, 1,
    )  # fmt: skip
    out = partial_ptr + chunk.to(tl.int64) * n_all + run * n_planes + plane
    tl.store(out, mean, mask=plane < n_planes)
    tl.store(out + n_chunks * n_all, deviations, mask=plane < n_planes)


@triton.jit
def parts_at(first, part, n_parts, channels_a_group, n_all):
    """Offsets of the chunks of a group's planes, and their mask: plane after plane, by chunks."""
    chunk = (part // channels_a_group).to(tl.int64)
    return chunk * n_all + first + part % channels_a_group, part < n_parts


@triton.jit
def group_statistics_kernel(
    partial_ptr, mean_ptr, invstd_ptr, var_ptr,
    channels_a_group, n_positions, n_chunks, positions_a_chunk, n_all, count, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean, 1 / sqrt(var + eps) and var of a group from those of its parts, by Chan's formula.

    Sums are of differences from the mean of the first part, so that a large mean costs no digits.
    """
    first = tl.program_id(0).to(tl.int64) * channels_a_group
    n_parts = n_chunks * channels_a_group
    pivot = tl.load(partial_ptr + first)
    sums = tl.zeros((BLOCK,), pivot.dtype)
    for start in tl.range(0, n_parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        at, mask = parts_at(first, part, n_parts, channels_a_group, n_all)
        left = n_positions - part // channels_a_group * positions_a_chunk
        here = tl.where(mask, tl.minimum(left, positions_a_chunk), 0).to(pivot.dtype)
        sums += here * (tl.load(partial_ptr + at, mask=mask, other=0.0) - pivot)
    mean = pivot + tl.sum(sums, axis=0) / count
    squares = tl.zeros((BLOCK,), pivot.dtype)
    for start in tl.range(0, n_parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        at, mask = parts_at(first, part, n_parts, channels_a_group, n_all)
        left = n_positions - part // channels_a_group * positions_a_chunk
        here = tl.where(mask, tl.minimum(left, positions_a_chunk), 0).to(pivot.dtype)
        apart = tl.load(partial_ptr + at, mask=mask, other=0.0) - mean
        squares += here * apart * apart
        squares += tl.load(partial_ptr + n_chunks * n_all + at, mask=mask, other=0.0)
    var = tl.sum(squares, axis=0) / count
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(invstd_ptr + tl.program_id(0), 1 / tl.sqrt(var + eps))
    tl.store(var_ptr + tl.program_id(0), var)


@triton.jit
def group_sums_kernel(
    partial_ptr, weight_ptr, invstd_ptr, sums_ptr,
    n_channels, channels_a_group, n_chunks, n_all, count, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a group's dx takes off: invstd mean(weight dz), and invstd² mean(weight dz hat) a unit.

    From partial (2, n_chunks, n_all), Σ dz and Σ dz hat of the planes, to sums (2, n_groups).
    """
    first = tl.program_id(0).to(tl.int64) * channels_a_group
    channel = (first % n_channels).to(tl.int32)
    n_parts = n_chunks * channels_a_group
    invstd = tl.load(invstd_ptr + tl.program_id(0))
    level, slope = tl.zeros((BLOCK,), invstd.dtype), tl.zeros((BLOCK,), invstd.dtype)
    for start in tl.range(0, n_parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        at, mask = parts_at(first, part, n_parts, channels_a_group, n_all)
        weight = load_or(weight_ptr, channel + part % channels_a_group, n_channels, 1.0)
        level += weight * tl.load(partial_ptr + at, mask=mask, other=0.0)
        slope += weight * tl.load(partial_ptr + n_chunks * n_all + at, mask=mask, other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(level, axis=0) / count * invstd)
    slope_of_group = tl.sum(slope, axis=0) / count * invstd * invstd
    tl.store(sums_ptr + n_all // channels_a_group + tl.program_id(0), slope_of_group)


@triton.jit
def group_normalise_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, y_ptr,
    n_channels, channels_a_group, n_positions, n_planes, n_chunks, positions_a_chunk, n_all,
    stride_n, stride_c, stride_inner,
    CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = f((x - mean) invstd weight + bias), of chunks of planes, with what is known of groups."""
    run, first, _, start, end = chunk_here(n_positions, n_planes, n_chunks, positions_a_chunk,
                                           BLOCK_CHANNELS)  # fmt: skip
    plane, counted = first + tl.arange(0, BLOCK_CHANNELS), run * n_planes + first
    weight, bias = load_parameters(weight_ptr, bias_ptr, counted, n_channels, BLOCK_CHANNELS)
    mean = load_of_groups(mean_ptr, counted, n_planes - first, channels_a_group, BLOCK_CHANNELS)
    invstd = load_of_groups(invstd_ptr, counted, n_planes - first, channels_a_group, BLOCK_CHANNELS)
    scale = by_channel(invstd * weight, CHANNELS_LAST)
    for position in tl.range(start, end, BLOCK_POSITIONS):
        at, mask = tile_at(position, end, plane, n_planes, n_positions, 0, stride_c, stride_inner,
                           CHANNELS_LAST, BLOCK_POSITIONS)  # fmt: skip
        at += run * stride_n
        x = widen(tl.load(x_ptr + at, mask=mask, other=0.0))
        z = (x - by_channel(mean, CHANNELS_LAST)) * scale + by_channel(bias, CHANNELS_LAST)
        tl.store(y_ptr + at, ACTIVATION(z, P0, P1).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def plane_sums_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, partial_ptr,
    n_channels, channels_a_group, n_positions, n_planes, n_chunks, positions_a_chunk, n_all,
    stride_n, stride_c, stride_inner,
    CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, FROM_OUTPUT: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of each chunk of a plane, Σ dz and Σ dz (x - mean) invstd: partial (2, n_chunks, n_all)."""
    run, first, chunk, start, end = chunk_here(n_positions, n_planes, n_chunks, positions_a_chunk,
                                               BLOCK_CHANNELS)  # fmt: skip
    plane, counted = first + tl.arange(0, BLOCK_CHANNELS), run * n_planes + first
    weight, bias = load_parameters(weight_ptr, bias_ptr, counted, n_channels, BLOCK_CHANNELS)
    mean = load_of_groups(mean_ptr, counted, n_planes - first, channels_a_group, BLOCK_CHANNELS)
    invstd = load_of_groups(invstd_ptr, counted, n_planes - first, channels_a_group, BLOCK_CHANNELS)
    sums, products = chunk_sums(
        dy_ptr + run * stride_n, x_ptr + run * stride_n, None, None, start, end, first, mean,
        by_channel(invstd * weight, CHANNELS_LAST), by_channel(bias, CHANNELS_LAST), n_positions,
        n_planes, n_positions, 0, stride_c, stride_inner, CHANNELS_LAST, ACTIVATION, GRADIENT, P0,
        P1, FROM_OUTPUT, BLOCK_POSITIONS, BLOCK_CHANNELS, 1,
    )  # fmt: skip
    out = partial_ptr + chunk.to(tl.int64) * n_all + run * n_planes + plane
    tl.store(out, sums, mask=plane < n_planes)
    tl.store(out + n_chunks * n_all, products * invstd, mask=plane < n_planes)


@triton.jit
def group_input_gradient_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, sums_ptr, dx_ptr,
    n_channels, channels_a_group, n_positions, n_planes, n_chunks, positions_a_chunk, n_all,
    stride_n, stride_c, stride_inner,
    CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, FROM_OUTPUT: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = invstd weight dz - level - (x - mean) slope, with a group's two of ``sums``."""
    run, first, _, start, end = chunk_here(n_positions, n_planes, n_chunks, positions_a_chunk,
                                           BLOCK_CHANNELS)  # fmt: skip
    counted, n_left = run * n_planes + first, n_planes - first
    weight, bias = load_parameters(weight_ptr, bias_ptr, counted, n_channels, BLOCK_CHANNELS)
    mean = load_of_groups(mean_ptr, counted, n_left, channels_a_group, BLOCK_CHANNELS)
    invstd = load_of_groups(invstd_ptr, counted, n_left, channels_a_group, BLOCK_CHANNELS)
    level = load_of_groups(sums_ptr, counted, n_left, channels_a_group, BLOCK_CHANNELS)
    slope = load_of_groups(sums_ptr + n_all // channels_a_group, counted, n_left, channels_a_group,
                           BLOCK_CHANNELS)  # fmt: skip
    scale = by_channel(invstd * weight, CHANNELS_LAST)
    for position in tl.range(start, end, BLOCK_POSITIONS):
        dz, apart, at, mask = gradient_tile(
            dy_ptr + run * stride_n, x_ptr + run * stride_n, None, None, position, end, first, mean,
            scale, by_channel(bias, CHANNELS_LAST), n_positions, n_planes, n_positions, 0, stride_c,
            stride_inner, CHANNELS_LAST, ACTIVATION, GRADIENT, P0, P1, FROM_OUTPUT,
            BLOCK_POSITIONS, BLOCK_CHANNELS,
        )  # fmt: skip
        dx = (
            dz * scale - by_channel(level, CHANNELS_LAST) - apart * by_channel(slope, CHANNELS_LAST)
        )
        tl.store(dx_ptr + run * stride_n + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
