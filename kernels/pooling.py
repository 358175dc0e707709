"""Launchers of pooling: maxima and averages over windows, given or adaptive.

Every gradient is gathered: an input looks at the windows that cover it, in ascending order, so that
the result does not depend on who came first. A tensor is taken as it lies in memory, contiguous or
channels_last, and the result lies as its input does.

``window`` is [kernel height, kernel width, and so on for stride, padding and dilation], or [] for
an adaptive pooling.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from gpunn.kernels.cuda import CudaKernel, CudaLaunch
from gpunn.kernels.launch import cdiv, device_of, operator, run

MOST_BYTE_TAPS = 256
"""The taps of a window that a byte can number."""


@dataclass(frozen=True)
class TileLaunch(CudaLaunch):
    """Bytes of the larger side's tile in shared memory; the other's has half as many elements."""

    tile_bytes: int = 16384


LAUNCH = CudaLaunch(num_warps=4)  # 16 bytes of channels a thread; not measured
# At most 40 KiB with the taps of the maxima, so that five blocks and more share a multiprocessor of
# sm_90, and no block needs more than the 48 KiB that need not be asked for. Not measured.
TILE_LAUNCH = TileLaunch(num_warps=8)
MARGIN = 32
"""Elements of a tile that may be lost to alignment."""
BLOCKS_A_MULTIPROCESSOR = 4
"""Planes are put together in a block only where so many blocks are left."""

KERNELS = {
    name: CudaKernel("pooling.cu", f"{name}_kernel")
    for name in (
        "max_pool_forward", "max_pool_backward", "avg_pool_forward", "avg_pool_backward",
        "max_pool_backward_patch", "max_pool_forward_tile", "max_pool_backward_tile",
        "avg_pool_forward_tile", "avg_pool_backward_tile",
    )
}  # fmt: skip


class Axis(NamedTuple):
    """One dimension of a pooling, as ``Axis`` in ``pooling.h``; kernel 0 where it is adaptive."""

    n_in: int
    n_out: int
    kernel: int = 0
    stride: int = 0
    padding: int = 0
    dilation: int = 0

    def rows_in(self, rows: int) -> int:
        """Most inputs that so many neighbouring windows meet."""
        if not self.kernel:
            return cdiv(rows * self.n_in, self.n_out) + 1
        return (rows - 1) * self.stride + (self.kernel - 1) * self.dilation + 1

    def rows_out(self, rows: int) -> int:
        """Most windows that so many neighbouring inputs are met by."""
        if not self.kernel:
            return cdiv(rows * self.n_out, self.n_in) + 1
        return (rows - 1 + (self.kernel - 1) * self.dilation) // self.stride + 1

    def patches(self, step: int) -> int:
        """Inputs by ``step``, as windows that are ``step`` apart begin; of ``Patches``."""
        return (self.n_in - 1 + self.padding) // step + 1 - self.padding // step


def widest(n_in: int, n_out: int) -> int:
    """No fewer than the inputs of an adaptive pooling's widest window; at most one more."""
    return (n_in + 2 * n_out - 2) // n_out if n_out else 0


class Pool(NamedTuple):
    """The geometry of a pooling, as ``Pool`` in ``pooling.h``."""

    h: Axis
    w: Axis

    @property
    def columns(self) -> int:
        """Columns of a window, to number its taps by."""
        return self.w.kernel or widest(self.w.n_in, self.w.n_out)


def pool_of(input_size: Sequence[int], output_size: Sequence[int], window: Sequence[int]) -> Pool:
    """The geometry for inputs (…, H, W) and outputs (…, OH, OW)."""
    axes = [Axis(input_size[d], output_size[d], *window[d % 2 :: 2]) for d in (-2, -1)]
    return Pool(*axes)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether torch's own op would give a channels_last result: as the order of strides says."""
    least = x.stride(1)
    if least == 0 or (x.shape[0] > 1 and x.stride(0) == least):
        return False
    for d in (1, 3, 2, 0):
        if x.shape[d] == 0 or x.stride(d) < least:
            return False
        least = x.stride(d) * max(x.shape[d], 1)
    return True


def format_of(channels_last: bool) -> torch.memory_format:
    """The memory format of inputs and results."""
    return torch.channels_last if channels_last else torch.contiguous_format


def vector_length(item_size: int, n: int, aligned: bool) -> int:
    """Elements of 16 bytes; 1 where ``n`` is no multiple of them, or tensors are not aligned."""
    length = 16 // item_size
    return length if aligned and n % length == 0 else 1


def are_aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether all begin at a multiple of 16 bytes."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors if tensor is not None)


class Share(NamedTuple):
    """What a block of a tile kernel owns, whole planes or rows of one; the number of blocks."""

    planes: int
    rows: int
    n_blocks: int


def share_of(
    pool: Pool, backward: bool, n_planes: int, item_size: int, n_multiprocessors: int
) -> Share | None:
    """As much as fits in the tiles; None where not even one row does."""
    most_in = TILE_LAUNCH.tile_bytes // item_size
    most_out = most_in // 2 - MARGIN
    most_in -= MARGIN
    plane_in, plane_out = pool.h.n_in * pool.w.n_in, pool.h.n_out * pool.w.n_out
    if max(plane_in, plane_out) >= 2**30:  # in a plane, band.h counts in 32 bits
        return None
    height = pool.h.n_in if backward else pool.h.n_out
    planes = min(most_in // plane_in, most_out // plane_out)
    if planes:
        enough = cdiv(n_planes, BLOCKS_A_MULTIPROCESSOR * n_multiprocessors)
        planes = min(planes, enough)
        return Share(planes, height, cdiv(n_planes, planes))

    def overflows(rows: int) -> bool:
        rows_in = rows if backward else pool.h.rows_in(rows)
        rows_out = pool.h.rows_out(rows) if backward else rows
        return rows_in * pool.w.n_in > most_in or rows_out * pool.w.n_out > most_out

    rows = bisect_left(range(1, height + 1), True, key=overflows)
    return Share(1, rows, n_planes * cdiv(height, rows)) if rows else None


def known_window(window: tuple[int, ...]) -> tuple[int, int]:
    """Size and step of a square window that kernels are compiled for; 0, 0 of others.

    With divisions, and loops, an H200 took four times as long for a gradient as for its memory
    where channels are last, and fifteen to nineteen where they are not.
    """
    if not window:  # adaptive
        return 0, 0
    (size, width, step, step_across), dilation = window[:4], window[6:]
    usual = size == width <= 3 and step == step_across <= min(size, 2) and dilation == (1, 1)
    return (size, step) if usual else (0, 0)


class Plan(NamedTuple):
    """How a pooling is launched."""

    kernel: CudaKernel
    n_blocks: int
    launch: CudaLaunch
    pool: bytes
    sizes: tuple[int, ...]
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def plan_of(
    name: str,
    input_size: tuple[int, ...],
    output_size: tuple[int, ...],
    window: tuple[int, ...],
    item_size: int,
    channels_last: bool,
    aligned: bool,
    n_multiprocessors: int,
) -> Plan:
    """A tile kernel for contiguous tensors whose bands fit; else 16 bytes of channels a thread."""
    pool, backward = pool_of(input_size, output_size, window), name.endswith("backward")
    # A window of one element has no use for a dilation, and a large one leads beyond 32 bits.
    pool = Pool(*(a._replace(dilation=1) if a.kernel == 1 else a for a in pool))
    content = struct.pack("13i", *pool.h, *pool.w, pool.columns)
    n_planes, n_channels = input_size[0] * input_size[1], input_size[1] if channels_last else 1
    size, step = known_window(window)
    known = {"SIZE": size, "STEP": step} if name.startswith("max") else {}
    constants: dict[str, Any] = {"ADAPTIVE": not window}
    if n_channels == 1 and aligned:
        share = share_of(pool, backward, n_planes, item_size, n_multiprocessors)
        if share is not None:
            sizes = n_planes, share.planes, share.rows
            kernel, constants = KERNELS[f"{name}_tile"], constants | known
            return Plan(kernel, share.n_blocks, TILE_LAUNCH, content, sizes, constants)
    length = vector_length(item_size, n_channels, aligned)
    n_vectors = n_planes * math.prod(input_size[2:] if backward else output_size) // length
    constants |= {"N": length} | (known if name == "max_pool_forward" else {})
    if name == "max_pool_backward" and size:
        n_vectors = n_planes * pool.h.patches(step) * pool.w.patches(step) // length
        constants = {"N": length, **known}
        name = "max_pool_backward_patch"
    n_blocks = cdiv(n_vectors, LAUNCH.n_threads)
    return Plan(KERNELS[name], n_blocks, LAUNCH, content, (n_vectors, n_channels), constants)


def pool(
    name: str,
    tensors: tuple[torch.Tensor | None, ...],
    input_size: Sequence[int],
    output_size: Sequence[int],
    window: list[int],
    channels_last: bool,
    *average: bytes,
    **constants: Any,
) -> None:
    """Launch a pooling kernel on tensors that lie as ``channels_last`` says."""
    if 0 in input_size or 0 in output_size:
        return
    first = tensors[0]
    assert first is not None
    plan = plan_of(
        name, tuple(input_size), tuple(output_size), tuple(window), first.element_size(),
        channels_last, are_aligned(*tensors), device_of(first).n_multiprocessors,
    )  # fmt: skip
    run(
        name, plan.kernel, (plan.n_blocks,), *tensors, plan.pool, *average, *plan.sizes,
        launch=plan.launch, T=first.dtype, **plan.constants, **constants,
    )  # fmt: skip


def _max_pool_forward_fake(
    x: torch.Tensor, output_size: list[int], window: list[int], keeps_positions: bool,
    keeps_indices: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    shape, memory_format = (*x.shape[:2], *output_size), format_of(is_channels_last(x))

    def allocated(wanted: bool, dtype: torch.dtype) -> torch.Tensor:
        if not wanted:
            return x.new_empty((0,), dtype=dtype)
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)

    n_taps = (
        window[0] * window[1]
        if window
        else widest(x.shape[2], output_size[0]) * widest(x.shape[3], output_size[1])
    )
    positions = allocated(keeps_positions, torch.uint8 if n_taps <= MOST_BYTE_TAPS else torch.int32)
    return allocated(True, x.dtype), positions, allocated(keeps_indices, torch.int64)


@operator(
    "max_pool_forward(Tensor x, SymInt[] output_size, SymInt[] window, bool keeps_positions, "
    "bool keeps_indices) -> (Tensor, Tensor, Tensor)",
    fake=_max_pool_forward_fake,
)
def max_pool_forward(
    x: torch.Tensor,
    output_size: list[int],
    window: list[int],
    keeps_positions: bool,
    keeps_indices: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y (N, C, OH, OW) = the maxima of x (N, C, H, W); their taps; their indices in the plane.

    A tap is numbered row · columns + column in its window, in a byte where those suffice; an
    adaptive window has as many columns as the widest has. An index is ih · W + iw, in int64. What
    is not kept has the shape (0,).
    """
    y, positions, indices = _max_pool_forward_fake(
        x, output_size, window, keeps_positions, keeps_indices
    )
    channels_last = is_channels_last(x)
    x = x.contiguous(memory_format=format_of(channels_last))
    kept = positions if keeps_positions else None, indices if keeps_indices else None
    pool(
        "max_pool_forward", (x, y, *kept), x.shape, output_size, window, channels_last,
        P=positions.dtype, HAS_POSITIONS=keeps_positions, HAS_INDICES=keeps_indices,
    )  # fmt: skip
    return y, positions, indices


def _like_input(dy: torch.Tensor, input_size: list[int], channels_last: bool) -> torch.Tensor:
    memory_format = format_of(channels_last)
    return torch.empty(input_size, dtype=dy.dtype, device=dy.device, memory_format=memory_format)


def _max_pool_backward_fake(
    dy: torch.Tensor, positions: torch.Tensor, input_size: list[int], window: list[int]
) -> torch.Tensor:
    return _like_input(dy, input_size, is_channels_last(positions))


@operator(
    "max_pool_backward(Tensor dy, Tensor positions, SymInt[] input_size, SymInt[] window) "
    "-> Tensor",
    fake=_max_pool_backward_fake,
)
def max_pool_backward(
    dy: torch.Tensor, positions: torch.Tensor, input_size: list[int], window: list[int]
) -> torch.Tensor:
    """dx (N, C, H, W): the sum of dy over the windows whose maximum an input is."""
    dx = _max_pool_backward_fake(dy, positions, input_size, window)
    if not dy.numel():
        return dx.zero_()
    channels_last = is_channels_last(positions)
    dy = dy.contiguous(memory_format=format_of(channels_last))
    positions = positions.contiguous(memory_format=format_of(channels_last))
    pool(
        "max_pool_backward", (dy, positions, dx), input_size, dy.shape[2:], window, channels_last,
        P=positions.dtype,
    )  # fmt: skip
    return dx


def _avg_pool_forward_fake(
    x: torch.Tensor, output_size: list[int], window: list[int], count_include_pad: bool, divisor:
    int,
) -> torch.Tensor:  # fmt: skip
    return _like_input(x, [*x.shape[:2], *output_size], is_channels_last(x))


@operator(
    "avg_pool_forward(Tensor x, SymInt[] output_size, SymInt[] window, bool count_include_pad, "
    "int divisor) -> Tensor",
    fake=_avg_pool_forward_fake,
)
def avg_pool_forward(
    x: torch.Tensor,
    output_size: list[int],
    window: list[int],
    count_include_pad: bool,
    divisor: int,
) -> torch.Tensor:
    """y (N, C, OH, OW) = the sums over the windows of x (N, C, H, W), divided by their sizes.

    ``count_include_pad`` counts padding in; a ``divisor`` other than 0 is taken for the size.
    """
    y = _avg_pool_forward_fake(x, output_size, window, count_include_pad, divisor)
    channels_last = is_channels_last(x)
    x = x.contiguous(memory_format=format_of(channels_last))
    average = struct.pack("qq", count_include_pad, divisor)
    pool("avg_pool_forward", (x, y), x.shape, output_size, window, channels_last, average)
    return y


def _avg_pool_backward_fake(
    dy: torch.Tensor,
    input_size: list[int],
    window: list[int],
    count_include_pad: bool,
    divisor: int,
    channels_last: bool,
) -> torch.Tensor:
    return _like_input(dy, input_size, channels_last)


@operator(
    "avg_pool_backward(Tensor dy, SymInt[] input_size, SymInt[] window, bool count_include_pad, "
    "int divisor, bool channels_last) -> Tensor",
    fake=_avg_pool_backward_fake,
)
def avg_pool_backward(
    dy: torch.Tensor,
    input_size: list[int],
    window: list[int],
    count_include_pad: bool,
    divisor: int,
    channels_last: bool,
) -> torch.Tensor:
    """dx (N, C, H, W): the sum over the windows that cover an input of dy, divided as before."""
    dx = _like_input(dy, input_size, channels_last)
    if not dy.numel():
        return dx.zero_()
    dy = dy.contiguous(memory_format=format_of(channels_last))
    average = struct.pack("qq", count_include_pad, divisor)
    pool("avg_pool_backward", (dy, dx), input_size, dy.shape[2:], window, channels_last, average)
    return dx
