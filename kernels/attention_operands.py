"""How the kernels of attention read q, k, v and dy: by pointer, or by tensor descriptor (TMA).

A descriptor leaves the addresses of a tile to the hardware: on Hopper, without a mask or a dropout,
the loops have a tenth to a third fewer instructions and 15 to 65 fewer registers a thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from gpunn.kernels.launch import Device

LEAST_FLOPS = 2**36
"""Of a call that is to be worth the time in which the host makes its descriptors.

Forward, on an H200, that many take some 0.15 ms, and the host needs some 0.02 ms a call without.
"""


def block_of(head: int) -> int:
    """The width of a tile for heads of this size: a power of two that a product of tiles takes."""
    return max(16, 1 << (head - 1).bit_length())


def head_block(head: int, dtype: torch.dtype) -> int:
    """``block_of``; of 16-bit types 64 where a head does not fill a tile of 16.

    On an H200, with Triton 3.6, values of 7 and of 8 columns in tiles of 16, beside queries of 40,
    came out wrong, though their code shows no fault; of 16, 40 and 64 columns they are right.
    """
    return 64 if dtype.itemsize == 2 and head < 16 else block_of(head)


def unit_of(*tensors: torch.Tensor) -> int:
    """The kernels' UNIT: how many elements, of 16 bytes at most, rows are apart by multiples of.

    And 1 for multiples of 16 elements, which Triton recognises.
    """
    apart = math.gcd(*(stride for tensor in tensors for stride in tensor.stride()[:-1]))
    return 1 if apart % 16 == 0 else math.gcd(apart, 16 // tensors[0].element_size())


def read_by_descriptor(tensors: Sequence[torch.Tensor], n_flops: int, device: Device) -> bool:
    """Whether a call of so many operations reads all of these by descriptors."""
    return (
        90 <= device.capability < 100
        and n_flops >= LEAST_FLOPS
        and all(tensor.dtype.itemsize == 2 and takes_descriptor(tensor) for tensor in tensors)
    )


def takes_descriptor(tensor: torch.Tensor) -> bool:
    """Whether a descriptor can be made of a (batch, head, row, column)."""
    unit = 16 // tensor.element_size()
    *outer, inner = zip(tensor.shape, tensor.stride(), strict=True)
    if inner[1] != 1 or tensor.numel() == 0 or tensor.data_ptr() % 16:
        return False
    return all(size == 1 or (stride > 0 and stride % unit == 0) for size, stride in outer)


def operand(tensor: torch.Tensor, block_rows: int, by_descriptor: bool) -> Any:
    """A tensor as ``load_tile`` wants it: itself, or a descriptor of tiles of ``block_rows``."""
    if not by_descriptor:
        return tensor
    # the stride of a single batch, head or row is never used, and may be one that none may have
    pairs = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    strides = [stride if size > 1 else 16 for size, stride in pairs]
    block = [1, 1, block_rows, head_block(tensor.shape[3], tensor.dtype)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block)


def repeated_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides, 0 along what has one element and is repeated."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(0 if size == 1 else stride for size, stride in pairs)


def in_order_of(tensor: torch.Tensor, n_cols: int, zeros: bool) -> torch.Tensor:
    """A new (batch, heads, rows, n_cols), its dimensions in memory in the order of tensor's.

    Filled with zeros, or not at all.
    """
    strides, shape = tensor.stride(), (*tensor.shape[:-1], n_cols)
    allocate = tensor.new_zeros if zeros else tensor.new_empty
    if strides[0] >= strides[1] >= strides[2]:
        return allocate(shape)
    order = sorted(range(3), key=lambda d: (-strides[d], d))
    laid_out = allocate([shape[d] for d in (*order, 3)])
    return laid_out.permute(*(order.index(d) for d in range(3)), 3)
