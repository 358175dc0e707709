"""Passes over a batch by channels: the device code of ``batch_norm.py``.

A batch is n_positions (image, place) by n_channels. A program owns BLOCK_CHANNELS channels and a
part of the positions, which it goes through BLOCK_POSITIONS at a time. Whichever of the two lies
contiguous in memory is the last dimension of its tiles. The parts over which is summed are called
chunks: what is summed over a channel is left as a number a chunk, and added up by whoever needs it,
always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.numeric import widen


@triton.jit
def by_channel(values, CHANNELS_LAST: tl.constexpr):
    """A number for each channel as a row or a column, to be broadcast over a tile."""
    return values[None, :] if CHANNELS_LAST else values[:, None]


@triton.jit
def over_positions(tile, CHANNELS_LAST: tl.constexpr):
    """The sum of a tile for each channel."""
    return tl.sum(tile, axis=0 if CHANNELS_LAST else 1)


@triton.jit
def tile_at(
    first, end, channel, n_channels, n_inner, stride_n, stride_c, stride_inner,
    CHANNELS_LAST: tl.constexpr, BLOCK_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of the positions from ``first`` on, as far as ``end``."""
    position = first + tl.arange(0, BLOCK_POSITIONS)
    if CHANNELS_LAST:  # the same tile further on: all but its start need be known once
        row = tl.arange(0, BLOCK_POSITIONS).to(tl.int64) * stride_inner
        at = row[:, None] + channel.to(tl.int64)[None, :] + tl.cast(first, tl.int64) * stride_inner
        mask = (position < end)[:, None] & (channel < n_channels)[None, :]
    else:
        image = (position // n_inner).to(tl.int64)
        at_position = image * stride_n + (position % n_inner).to(tl.int64)
        at = (channel.to(tl.int64) * stride_c)[:, None] + at_position[None, :]
        mask = (channel < n_channels)[:, None] & (position < end)[None, :]
    return at, mask


@triton.jit
def load_or(ptr, channel, n_channels, otherwise: tl.constexpr):
    """A number for each channel; where there is no such parameter, ``otherwise``."""
    if ptr is None:
        values = tl.full(channel.shape, otherwise, tl.float32)
    else:
        values = widen(tl.load(ptr + channel, mask=channel < n_channels, other=0.0))
    return values


@triton.jit
def all_partial(partial_ptr, channel, n_channels, n_chunks, N_CHUNKS: tl.constexpr):
    """Two numbers of each chunk, 0 from n_chunks up to N_CHUNKS, and the chunks' numbers."""
    chunk = tl.arange(0, N_CHUNKS)
    at = chunk[:, None] * n_channels + channel[None, :]
    mask = (chunk < n_chunks)[:, None] & (channel < n_channels)[None, :]
    first = tl.load(partial_ptr + at, mask=mask, other=0.0)
    second = tl.load(partial_ptr + n_chunks * n_channels + at, mask=mask, other=0.0)
    return first, second, chunk


@triton.jit
def whole_statistics(
    partial_ptr, channel, n_channels, n_positions, positions_a_chunk, n_chunks,
    N_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of all chunks (Chan, Golub and LeVeque 1979)."""
    means, squares, chunk = all_partial(partial_ptr, channel, n_channels, n_chunks, N_CHUNKS)
    left = n_positions - chunk.to(tl.int64) * positions_a_chunk
    counts = tl.minimum(tl.maximum(left, 0), positions_a_chunk).to(means.dtype)[:, None]
    mean = tl.sum(counts * means, axis=0) / n_positions
    apart = means - mean[None, :]
    return mean, tl.sum(squares + counts * apart * apart, axis=0)


@triton.jit
def bits_at(first, end, first_channel, n_channels, n_positions, CHANNELS_LAST: tl.constexpr,
            BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):  # fmt: skip
    """Offsets and mask of a tile's bits: a byte for eight neighbours of its last dimension."""
    if CHANNELS_LAST:
        row = first + tl.arange(0, BLOCK_POSITIONS)
        byte = first_channel // 8 + tl.arange(0, BLOCK_CHANNELS // 8)
        n_rows, n_bytes = end, tl.cdiv(n_channels, 8)
    else:
        row = first_channel + tl.arange(0, BLOCK_CHANNELS)
        byte = first // 8 + tl.arange(0, BLOCK_POSITIONS // 8)
        n_rows, n_bytes = n_channels, tl.cdiv(n_positions, 8)
    mask = (row < n_rows)[:, None] & (byte < n_bytes)[None, :]
    return row.to(tl.int64)[:, None] * n_bytes + byte[None, :], mask


@triton.jit
def packed(bits, N_ROWS: tl.constexpr, N_COLS: tl.constexpr):
    """Eight neighbouring truth values as a byte, the first as its lowest bit."""
    eights = tl.reshape(bits.to(tl.int32), (N_ROWS, N_COLS // 8, 8))
    return tl.sum(eights << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpacked(byte, N_ROWS: tl.constexpr, N_COLS: tl.constexpr):
    """The truth values that ``packed`` took."""
    bits = byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, (N_ROWS, N_COLS)) != 0


@triton.jit
def gradient_tile(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, first, end, first_channel, mean, scale, bias,
    n_positions, n_channels, n_inner, stride_n, stride_c, stride_inner,
    CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """dz = f'(z + residual) dy, by the bits where there are any; x - mean; offsets and mask."""
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    at, mask = tile_at(first, end, channel, n_channels, n_inner, stride_n, stride_c, stride_inner,
                       CHANNELS_LAST, BLOCK_POSITIONS)  # fmt: skip
    dy = widen(tl.load(dy_ptr + at, mask=mask, other=0.0))
    apart = widen(tl.load(x_ptr + at, mask=mask, other=0.0)) - by_channel(mean, CHANNELS_LAST)
    if bits_ptr is not None:
        at_bits, mask_bits = bits_at(first, end, first_channel, n_channels, n_positions,
                                     CHANNELS_LAST, BLOCK_POSITIONS, BLOCK_CHANNELS)  # fmt: skip
        byte = tl.load(bits_ptr + at_bits, mask=mask_bits, other=0)
        rows: tl.constexpr = BLOCK_POSITIONS if CHANNELS_LAST else BLOCK_CHANNELS
        cols: tl.constexpr = BLOCK_CHANNELS if CHANNELS_LAST else BLOCK_POSITIONS
        dz = tl.where(unpacked(byte, rows, cols), dy, 0.0)
    else:
        z = apart * scale + bias
        if residual_ptr is not None:
            z += widen(tl.load(residual_ptr + at, mask=mask, other=0.0))
        dz = GRADIENT(dy, ACTIVATION(z, P0, P1) if FROM_OUTPUT else z, P0, P1)
    return dz, apart, at, mask


@triton.jit
def chunk_statistics(
    x_ptr, start, end, channel, n_channels, n_inner, stride_n, stride_c, stride_inner,
    CHANNELS_LAST: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over the positions from start to end.

    Sums are of differences from the mean of the chunk's first tile. What that mean is off by is
    also part of the squared deviations, so little is lost when its square is taken from them.
    """
    count = tl.maximum(end - start, 1)
    at, mask = tile_at(start, end, channel, n_channels, n_inner, stride_n, stride_c, stride_inner,
                       CHANNELS_LAST, BLOCK_POSITIONS)  # fmt: skip
    x = widen(tl.load(x_ptr + at, mask=mask, other=0.0))
    pivot = over_positions(x, CHANNELS_LAST) / tl.minimum(count, BLOCK_POSITIONS)
    sums, squares = tl.zeros_like(x), tl.zeros_like(x)
    for first in tl.range(start, end, BLOCK_POSITIONS, num_stages=STAGES):
        at, mask = tile_at(first, end, channel, n_channels, n_inner, stride_n, stride_c,
                           stride_inner, CHANNELS_LAST, BLOCK_POSITIONS)  # fmt: skip
        x = widen(tl.load(x_ptr + at, mask=mask, other=0.0))
        apart = tl.where(mask, x - by_channel(pivot, CHANNELS_LAST), 0.0)
        sums += apart
        squares += apart * apart
    total = over_positions(sums, CHANNELS_LAST)
    deviations = over_positions(squares, CHANNELS_LAST) - total * (total / count)
    return pivot + total / count, tl.where(deviations < 0, 0.0, deviations)


@triton.jit
def batch_statistics_kernel(
    x_ptr, partial_ptr, n_positions, n_channels, n_inner, stride_n, stride_c, stride_inner,
    positions_a_chunk,
    CHANNELS_LAST: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Of each chunk, mean and sum of squared deviations: partial (2, chunks, n_channels)."""
    tiles_across = tl.cdiv(n_channels, BLOCK_CHANNELS)
    chunk = tl.program_id(0) // tiles_across
    channel = tl.program_id(0) % tiles_across * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    start = chunk * positions_a_chunk
    end = tl.minimum(start + positions_a_chunk, n_positions)
    mean, deviations = chunk_statistics(x_ptr, start, end, channel, n_channels, n_inner, stride_n,
                                        stride_c, stride_inner, CHANNELS_LAST,
                                        BLOCK_POSITIONS, STAGES)  # fmt: skip
    out = partial_ptr + chunk * n_channels + channel
    tl.store(out, mean, mask=channel < n_channels)
    n_chunks = tl.num_programs(0) // tiles_across
    tl.store(out + n_chunks * n_channels, deviations, mask=channel < n_channels)


@triton.jit
def normalise_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, partial_ptr, running_mean_ptr, running_var_ptr,
    y_ptr, bits_ptr, mean_ptr, invstd_ptr,
    n_positions, n_channels, n_inner, stride_n, stride_c, stride_inner, positions_a_part,
    positions_a_chunk, n_chunks, momentum, eps,
    N_CHUNKS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = f((x - mean) invstd weight + bias + residual), and f' as bits where they are wanted.

    With partial statistics, mean and variance are the batch's, and the running ones move towards
    them by ``momentum``; else they are the running ones. Mean and invstd are kept for the backward.
    """
    tiles_across = tl.cdiv(n_channels, BLOCK_CHANNELS)
    part = tl.program_id(0) // tiles_across
    first_channel = tl.program_id(0) % tiles_across * BLOCK_CHANNELS
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    known = (channel < n_channels) & (part == 0)
    if partial_ptr is not None:
        mean, deviations = whole_statistics(
            partial_ptr, channel, n_channels, n_positions, positions_a_chunk, n_chunks, N_CHUNKS
        )
        var = deviations / n_positions
        if running_mean_ptr is not None:
            unbiased = deviations / (n_positions - 1)
            old = load_or(running_mean_ptr, channel, n_channels, 0.0)
            new = (old + (mean - old) * momentum).to(running_mean_ptr.dtype.element_ty)
            tl.store(running_mean_ptr + channel, new, mask=known)
            old = load_or(running_var_ptr, channel, n_channels, 0.0)
            new = (old + (unbiased - old) * momentum).to(running_var_ptr.dtype.element_ty)
            tl.store(running_var_ptr + channel, new, mask=known)
    else:
        mean = load_or(running_mean_ptr, channel, n_channels, 0.0)
        var = load_or(running_var_ptr, channel, n_channels, 0.0)
    invstd = 1 / tl.sqrt(var + eps)
    tl.store(mean_ptr + channel, mean.to(mean_ptr.dtype.element_ty), mask=known)
    tl.store(invstd_ptr + channel, invstd.to(invstd_ptr.dtype.element_ty), mask=known)
    scale = by_channel(invstd * load_or(weight_ptr, channel, n_channels, 1.0), CHANNELS_LAST)
    bias = by_channel(load_or(bias_ptr, channel, n_channels, 0.0), CHANNELS_LAST)
    start = part * positions_a_part
    end = tl.minimum(start + positions_a_part, n_positions)
    for first in tl.range(start, end, BLOCK_POSITIONS, num_stages=STAGES):
        at, mask = tile_at(first, end, channel, n_channels, n_inner, stride_n, stride_c,
                           stride_inner, CHANNELS_LAST, BLOCK_POSITIONS)  # fmt: skip
        x = widen(tl.load(x_ptr + at, mask=mask, other=0.0))
        z = (x - by_channel(mean, CHANNELS_LAST)) * scale + bias
        if residual_ptr is not None:
            z += widen(tl.load(residual_ptr + at, mask=mask, other=0.0))
        y = ACTIVATION(z, P0, P1)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
        if bits_ptr is not None:
            at, mask = bits_at(first, end, first_channel, n_channels, n_positions, CHANNELS_LAST,
                               BLOCK_POSITIONS, BLOCK_CHANNELS)  # fmt: skip
            rows: tl.constexpr = BLOCK_POSITIONS if CHANNELS_LAST else BLOCK_CHANNELS
            cols: tl.constexpr = BLOCK_CHANNELS if CHANNELS_LAST else BLOCK_POSITIONS
            passes = GRADIENT(tl.full(y.shape, 1.0, y.dtype), y if FROM_OUTPUT else z, P0, P1) != 0
            tl.store(bits_ptr + at, packed(passes, rows, cols), mask=mask)


@triton.jit
def chunk_sums(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, start, end, first_channel, mean, scale, bias,
    n_positions, n_channels, n_inner, stride_n, stride_c, stride_inner,
    CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz (x - mean) of each channel over the positions from start to end."""
    shape: tl.constexpr = (
        (BLOCK_POSITIONS, BLOCK_CHANNELS) if CHANNELS_LAST else (BLOCK_CHANNELS, BLOCK_POSITIONS)
    )
    sums, products = tl.zeros(shape, mean.dtype), tl.zeros(shape, mean.dtype)
    for first in tl.range(start, end, BLOCK_POSITIONS, num_stages=STAGES):
        dz, apart, _, _ = gradient_tile(
            dy_ptr, x_ptr, residual_ptr, bits_ptr, first, end, first_channel, mean, scale, bias,
            n_positions, n_channels, n_inner, stride_n, stride_c, stride_inner, CHANNELS_LAST,
            ACTIVATION, GRADIENT, P0, P1, FROM_OUTPUT, BLOCK_POSITIONS, BLOCK_CHANNELS,
        )  # fmt: skip
        sums += dz  # past the end, dy is 0
        products += dz * apart
    return over_positions(sums, CHANNELS_LAST), over_positions(products, CHANNELS_LAST)


@triton.jit
def gradient_sums_kernel(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, partial_ptr,
    n_positions, n_channels, n_inner, stride_n, stride_c, stride_inner, positions_a_chunk,
    CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of each chunk, Σ dz and Σ dz (x - mean) invstd: partial (2, chunks, n_channels)."""
    tiles_across = tl.cdiv(n_channels, BLOCK_CHANNELS)
    chunk = tl.program_id(0) // tiles_across
    first_channel = tl.program_id(0) % tiles_across * BLOCK_CHANNELS
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    mean = load_or(mean_ptr, channel, n_channels, 0.0)
    invstd = load_or(invstd_ptr, channel, n_channels, 0.0)
    scale = by_channel(invstd * load_or(weight_ptr, channel, n_channels, 1.0), CHANNELS_LAST)
    bias = by_channel(load_or(bias_ptr, channel, n_channels, 0.0), CHANNELS_LAST)
    start = chunk * positions_a_chunk
    end = tl.minimum(start + positions_a_chunk, n_positions)
    sums, products = chunk_sums(
        dy_ptr, x_ptr, residual_ptr, bits_ptr, start, end, first_channel, mean, scale, bias,
        n_positions, n_channels, n_inner, stride_n, stride_c, stride_inner, CHANNELS_LAST,
        ACTIVATION, GRADIENT, P0, P1, FROM_OUTPUT, BLOCK_POSITIONS, BLOCK_CHANNELS, STAGES,
    )  # fmt: skip
    out = partial_ptr + chunk * n_channels + channel
    tl.store(out, sums, mask=channel < n_channels)
    n_chunks = tl.num_programs(0) // tiles_across
    tl.store(out + n_chunks * n_channels, products * invstd, mask=channel < n_channels)


@triton.jit
def input_gradient_kernel(
    dy_ptr, x_ptr, residual_ptr, bits_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, partial_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    n_positions, n_channels, n_inner, stride_n, stride_c, stride_inner, positions_a_part, n_total,
    n_chunks, N_CHUNKS: tl.constexpr, TRAINING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    FROM_OUTPUT: tl.constexpr, BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx = weight invstd (dz - (Σ dz + (x - mean) invstd Σ dz (x - mean) invstd) / n_total).

    Where the statistics were not the batch's, dx = weight invstd dz. dresidual is dz; dweight and
    dbias are the two sums, of partial (2, n_chunks, n_channels).
    """
    tiles_across = tl.cdiv(n_channels, BLOCK_CHANNELS)
    part = tl.program_id(0) // tiles_across
    first_channel = tl.program_id(0) % tiles_across * BLOCK_CHANNELS
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    known = (channel < n_channels) & (part == 0)
    mean = load_or(mean_ptr, channel, n_channels, 0.0)
    invstd = load_or(invstd_ptr, channel, n_channels, 0.0)
    scale = by_channel(invstd * load_or(weight_ptr, channel, n_channels, 1.0), CHANNELS_LAST)
    bias = by_channel(load_or(bias_ptr, channel, n_channels, 0.0), CHANNELS_LAST)
    if partial_ptr is not None:
        sums, products, _ = all_partial(partial_ptr, channel, n_channels, n_chunks, N_CHUNKS)
        total, product = tl.sum(sums, axis=0), tl.sum(products, axis=0)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + channel, product.to(dweight_ptr.dtype.element_ty), mask=known)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + channel, total.to(dbias_ptr.dtype.element_ty), mask=known)
    start = part * positions_a_part
    end = tl.minimum(start + positions_a_part, n_positions)
    for first in tl.range(start, end, BLOCK_POSITIONS, num_stages=STAGES):
        dz, apart, at, mask = gradient_tile(
            dy_ptr, x_ptr, residual_ptr, bits_ptr, first, end, first_channel, mean, scale, bias,
            n_positions, n_channels, n_inner, stride_n, stride_c, stride_inner, CHANNELS_LAST,
            ACTIVATION, GRADIENT, P0, P1, FROM_OUTPUT, BLOCK_POSITIONS, BLOCK_CHANNELS,
        )  # fmt: skip
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            if TRAINING:
                slope = by_channel(product * invstd / n_total, CHANNELS_LAST)
                dz = dz - by_channel(total / n_total, CHANNELS_LAST) - apart * slope
            tl.store(dx_ptr + at, (dz * scale).to(dx_ptr.dtype.element_ty), mask=mask)
