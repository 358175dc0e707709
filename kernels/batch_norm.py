"""Launchers of batch normalisation: y = f((x - mean) / sqrt(var + eps) weight + bias + residual).

x is (N, C, *), contiguous or with the channels last. Statistics are computed in float32 (of
float64, in float64) in a pass of their own; all that follows is one more pass. Source of the
formulas: S. Ioffe and C. Szegedy (2015), https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from gpunn.kernels.activation import ACTIVATIONS, gradient_functions
from gpunn.kernels.channels import (
    batch_statistics_kernel,
    gradient_sums_kernel,
    input_gradient_kernel,
    normalise_kernel,
)
from gpunn.kernels.elementwise import in_memory_order_of
from gpunn.kernels.launch import Launch, cdiv, device_of, operator, run


@dataclass(frozen=True)
class ChannelsLaunch(Launch):
    """Tile sizes: positions by channels."""

    num_warps: int = 8
    block_positions: int = 128
    block_channels: int = 64


@dataclass(frozen=True)
class StagedLaunch(ChannelsLaunch):
    """How many tiles of each operand are on their way, with the one that is computed with."""

    stages: int = 1


# Of sums one or two programs run on a multiprocessor, so that few chunks are to be added up, and
# tiles of each operand are read ahead into shared memory, 32 KiB or more in 16-bit types. Of
# gradients, of which up to three operands are read, larger ones spill; wider types have as many
# fewer positions to a tile, which then fills the same memory. Where channels are last, a row of a
# tile is 128 bytes in 16-bit types. What follows has no sums to hold: several programs share a
# multiprocessor. Of 206 MB in bfloat16 an H200 took 51 to 55 us for the statistics, and 65 to 82
# without reading ahead; with one program of 16 warps, gradients by bits took 127 and 147 us for
# what takes 111 (channels last) and 107.
STATISTICS_LAST = StagedLaunch(16, stages=4)
STATISTICS_FIRST = StagedLaunch(16, block_positions=1024, block_channels=8, stages=4)
SUMS_LAST = StagedLaunch(block_positions=64, stages=4)
SUMS_FIRST = StagedLaunch(16, block_positions=512, block_channels=8, stages=3)
WHOLE_LAST = StagedLaunch(block_positions=64)
WHOLE_FIRST = StagedLaunch(block_positions=512, block_channels=8)
STATISTICS_PROGRAMS, SUMS_PROGRAMS, WHOLE_PROGRAMS = 1, 2, 4
"""Of a multiprocessor, for statistics, for sums of gradients and for what follows."""
MOST_CHUNKS = 128
"""Each program of the pass after the sums reads those of all chunks of its channels."""


@dataclass(frozen=True)
class Share:
    """How the positions are shared out to the programs of a pass."""

    launch: StagedLaunch
    n_parts: int
    grid: tuple[int]
    sizes: tuple[int, ...]
    """What every kernel takes: sizes, strides and the positions of a part."""


@dataclass(frozen=True)
class Plan:
    """Where the elements of a batch are, and how its two passes go through them.

    The parts of ``sums`` are called chunks.
    """

    sums: Share
    whole: Share
    channels_last: bool


def has_channels_last(x: torch.Tensor) -> bool:
    """Whether the elements of a position, not of a channel, lie together."""
    return x.movedim(1, -1).is_contiguous()


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where it is contiguous or has its channels last, else a contiguous copy."""
    return x if has_channels_last(x) else x.contiguous()


def plan_for(x: torch.Tensor, backward: bool) -> Plan:
    """As many parts as give each multiprocessor its programs; of sums, up to MOST_CHUNKS."""
    n_channels, n_positions = x.shape[1], x.numel() // x.shape[1]
    last = has_channels_last(x)
    n_inner = n_positions if last else n_positions // x.shape[0]
    strides = (0, 1, n_channels) if last else (n_channels * n_inner, n_inner, 1)
    sizes = n_positions, n_channels, n_inner, *strides
    n_multiprocessors = device_of(x).n_multiprocessors

    def share(launch: StagedLaunch, n_programs: int, most_parts: int) -> Share:
        n_across = cdiv(n_channels, launch.block_channels)
        tiles = cdiv(n_positions, launch.block_positions)
        most = max(min(n_programs * n_multiprocessors // n_across, most_parts), 1)
        positions = cdiv(tiles, most) * launch.block_positions
        n_parts = cdiv(n_positions, positions)
        return Share(launch, n_parts, (n_parts * n_across,), (*sizes, positions))

    if backward:
        launch = (SUMS_FIRST, SUMS_LAST)[last]
        positions = launch.block_positions * 2 // x.element_size()
        launch = replace(launch, block_positions=positions)
        sums = share(launch, SUMS_PROGRAMS, MOST_CHUNKS)
    else:
        sums = share((STATISTICS_FIRST, STATISTICS_LAST)[last], STATISTICS_PROGRAMS, MOST_CHUNKS)
    whole = share((WHOLE_FIRST, WHOLE_LAST)[last], WHOLE_PROGRAMS, n_positions)
    return Plan(sums, whole, last)


def at_most(n_chunks: int) -> int:
    """n_chunks, or the next power of two: each is a kernel of its own."""
    return 1 << (n_chunks - 1).bit_length()


def constants(activation: str, parameters: list[float]) -> dict[str, Any]:
    """The constexpr arguments that the kernels have in common."""
    from_output = ACTIVATIONS[activation].saves != "input"
    return {**gradient_functions(activation, parameters), "FROM_OUTPUT": from_output}


def wide(x: torch.Tensor) -> torch.dtype:
    """The type of statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def batch_statistics(name: str, x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Of each chunk, mean and sum of squared deviations: (2, n_chunks, C). x is dense."""
    share = plan.sums
    partial = x.new_empty((2, share.n_parts, x.shape[1]), dtype=wide(x))
    run(
        name, batch_statistics_kernel, share.grid, x, partial, *share.sizes,
        launch=share.launch, CHANNELS_LAST=plan.channels_last,
    )  # fmt: skip
    return partial


def _contiguous(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _bits_size(x: torch.Tensor) -> tuple[int, int]:
    n_channels, n_positions = x.shape[1], x.numel() // x.shape[1]
    if has_channels_last(x):
        return n_positions, cdiv(n_channels, 8)
    return n_channels, cdiv(n_positions, 8)


def unpacked_bits(bits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The bits that ``batch_norm_forward`` kept for x, as truth values of x's shape."""
    each = (bits[..., None] >> torch.arange(8, device=bits.device)) & 1
    rows = each.flatten(1).bool()
    if has_channels_last(dense(x)):
        return rows[:, : x.shape[1]].view(x.shape[0], *x.shape[2:], -1).movedim(-1, 1)
    n_positions = x.numel() // x.shape[1]
    return rows[:, :n_positions].view(-1, x.shape[0], *x.shape[2:]).movedim(0, 1)


def _forward_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    parameters: list[float],
    keep_bits: bool,
) -> tuple[torch.Tensor, ...]:
    y = torch.empty_like(dense(x))
    mean = x.new_empty((x.shape[1],), dtype=wide(x))
    bits = x.new_empty(_bits_size(y) if keep_bits else (0,), dtype=torch.uint8)
    return y, mean, torch.empty_like(mean), bits


@operator(
    "batch_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, float momentum, float eps, "
    "str activation, float[] parameters, bool keep_bits) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
def batch_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    parameters: list[float],
    keep_bits: bool,
) -> tuple[torch.Tensor, ...]:
    """y, mean, 1 / sqrt(var + eps), and, to ``keep_bits``, where f' is not 0.

    In training, mean and variance are the batch's, and the running ones, if there are any, are
    moved towards them (the variance with n - 1 in its denominator) by ``momentum``. Else they are
    the running ones. f' must be 0 or 1 if its bits are wanted.
    """
    x = dense(x)
    y, mean, invstd, bits = _forward_fake(
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation,
        parameters, keep_bits,
    )  # fmt: skip
    plan = plan_for(x, False)
    partial = batch_statistics("batch_norm_forward", x, plan) if training else None
    running = _contiguous(running_mean), _contiguous(running_var)
    run(
        "batch_norm_forward", normalise_kernel, plan.whole.grid,
        x, None if residual is None else in_memory_order_of(residual, x),
        _contiguous(weight), _contiguous(bias), partial,
        *running, y, bits if keep_bits else None, mean, invstd,
        *plan.whole.sizes, plan.sums.sizes[-1], plan.sums.n_parts, momentum, eps,
        launch=plan.whole.launch, N_CHUNKS=at_most(plan.sums.n_parts) if training else 1,
        CHANNELS_LAST=plan.channels_last, **constants(activation, parameters),
    )  # fmt: skip
    for given, moved in zip((running_mean, running_var), running, strict=True):
        if training and given is not None and moved is not None and moved is not given:
            given.copy_(moved)
    return y, mean, invstd, bits


def _statistics_fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((2, x.shape[1]), dtype=wide(x))


@operator("batch_norm_statistics(Tensor x) -> Tensor", fake=_statistics_fake)
def batch_norm_statistics(x: torch.Tensor) -> torch.Tensor:
    """Mean and sum of squared deviations of each channel, (2, C)."""
    x = dense(x)
    plan = plan_for(x, False)
    means, squares = batch_statistics("batch_norm_statistics", x, plan)
    n_positions, per_chunk = plan.sums.sizes[0], plan.sums.sizes[-1]
    starts = torch.arange(plan.sums.n_parts, device=x.device) * per_chunk
    counts = (n_positions - starts).clamp(0, per_chunk).to(means.dtype)[:, None]
    mean = (counts * means).sum(0) / n_positions
    return torch.stack([mean, (squares + counts * (means - mean) ** 2).sum(0)])


Operands = tuple[torch.Tensor | None, ...]
"""What both passes of the backward read: residual, bits, weight, bias, mean and invstd."""


def _operands(x: torch.Tensor, dy: torch.Tensor, operands: Operands) -> Operands:
    residual, bits, weight, bias, mean, invstd = operands
    laid_out = None if residual is None else in_memory_order_of(residual, x)
    parameters = _contiguous(weight), _contiguous(bias)
    return in_memory_order_of(dy, x), x, laid_out, bits, *parameters, mean, invstd


def _sums(
    name: str, given: Operands, plan: Plan, activation: str, parameters: list[float]
) -> torch.Tensor:
    """Of each chunk, Σ dz and Σ dz (x - mean) invstd: (2, n_chunks, C)."""
    mean = given[-2]
    assert mean is not None
    share = plan.sums
    partial = mean.new_empty((2, share.n_parts, mean.shape[0]))
    run(
        name, gradient_sums_kernel, share.grid, *given, partial, *share.sizes,
        launch=share.launch, CHANNELS_LAST=plan.channels_last, **constants(activation, parameters),
    )  # fmt: skip
    return partial


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bits: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    sums: torch.Tensor | None,
    n_total: int,
    training: bool,
    activation: str,
    parameters: list[float],
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    dx, dresidual = (
        torch.empty_like(dense(x)) if needed else x.new_empty((0,)) for needed in needs[:2]
    )
    dweight, dbias = (
        mean.new_empty(
            (x.shape[1] if needed else 0,), dtype=like.dtype if like is not None else x.dtype
        )
        for needed, like in zip(needs[2:], (weight, bias), strict=True)
    )
    return dx, dresidual, dweight, dbias


@operator(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor invstd, Tensor? sums, SymInt n_total, bool training, "
    "str activation, float[] parameters, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)
def batch_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bits: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    sums: torch.Tensor | None,
    n_total: int,
    training: bool,
    activation: str,
    parameters: list[float],
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    """dx, dresidual, dweight and dbias; each is empty where it is not in ``needs``.

    ``training``: mean and invstd were those of the batch, of n_total positions. ``sums`` (2, C), if
    given, take the place of what this batch sums: they are those of ``batch_norm_sums``, of all
    processes.
    """
    x = dense(x)
    gradients = _backward_fake(
        dy, x, residual, bits, weight, bias, mean, invstd, sums, n_total, training, activation,
        parameters, needs,
    )  # fmt: skip
    plan, name = plan_for(x, True), "batch_norm_backward"
    given = _operands(x, dy, (residual, bits, weight, bias, mean, invstd))
    partial = None if sums is None else sums[:, None]
    if partial is None and ((training and needs[0]) or any(needs[2:])):
        partial = _sums(name, given, plan, activation, parameters)
    # for the parameters' gradients alone, the first part's programs suffice
    share = plan.whole
    n_programs = share.grid[0] if any(needs[:2]) else share.grid[0] // share.n_parts
    n_chunks = 1 if partial is None else partial.shape[1]
    written = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    run(
        name, input_gradient_kernel, (n_programs,),
        *given, partial, *written, *share.sizes, n_total,
        n_chunks, launch=share.launch, N_CHUNKS=at_most(n_chunks), TRAINING=training,
        CHANNELS_LAST=plan.channels_last, **constants(activation, parameters),
    )  # fmt: skip
    return gradients


def _sums_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bits: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    activation: str,
    parameters: list[float],
) -> torch.Tensor:
    return mean.new_empty((2, x.shape[1]))


@operator(
    "batch_norm_sums(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor invstd, str activation, float[] parameters) -> Tensor",
    fake=_sums_fake,
)
def batch_norm_sums(
    dy: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bits: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    activation: str,
    parameters: list[float],
) -> torch.Tensor:
    """Σ dz and Σ dz (x - mean) invstd of each channel, (2, C): dbias and dweight."""
    x = dense(x)
    given = _operands(x, dy, (residual, bits, weight, bias, mean, invstd))
    return _sums("batch_norm_sums", given, plan_for(x, True), activation, parameters).sum(1)
