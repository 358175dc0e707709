"""Which tiles the kernels of attention are launched with: one place for every architecture.

A faster kernel for one architecture is put beside the general one where its launcher asks
``launch_for``: the kernel and the configuration that ran are in the trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from gpunn.kernels.launch import Device, Launch

Kind = Literal["forward", "key_gradients", "query_gradient", "mask_gradient", "weights"]


@dataclass(frozen=True)
class AttentionLaunch(Launch):
    """Tile sizes: queries by keys."""

    num_warps: int = 4
    num_stages: int = 2
    block_queries: int = 64
    block_keys: int = 64


@dataclass(frozen=True)
class RowsLaunch(Launch):
    """Rows a program."""

    block_queries: int = 64


Tile = AttentionLaunch
DELTA_LAUNCH = RowsLaunch()
SMALLEST = Tile(8, 1, 16, 16)

# By arithmetic, the widest head that is meant, and kernel: for calls without and with a mask or a
# dropout, which take registers. For each the first of a list of candidates, from large to small,
# that compiles with every option at once, without spills, with WGMMA not serialised, and with
# tensor cores. In float32, heads over 128 spill with a mask or a dropout, and the query gradient's
# tiles are those that compile for the sweep that finds delta, too.
#
# Measured are those of 16 bits without a mask, heads of 64 and 128, but for mask_gradient: on an
# H200, bfloat16, causal, 4 x 4096, 32 heads of 64 or 16 of 128, the fastest of 8 to 10 a kernel
# that do not spill. The kernels read by pointers then, and the loops of the backward pass were two
# to three times as long: with the present ones, which were not measured, others may be faster.
Pairs = dict[tuple[str, int, str], tuple[AttentionLaunch, AttentionLaunch]]
HOPPER: Pairs = {
    ("16 bits", 64, "forward"): (Tile(8, 3, 128, 64), Tile(8, 2, 128, 64)),
    ("16 bits", 64, "key_gradients"): (Tile(4, 2, 32, 64), Tile(4, 2, 32, 64)),
    ("16 bits", 64, "query_gradient"): (Tile(4, 2, 64, 64), Tile(8, 2, 128, 64)),
    ("16 bits", 64, "mask_gradient"): (Tile(8, 1, 64, 64), Tile(8, 1, 64, 64)),
    ("16 bits", 128, "forward"): (Tile(8, 3, 128, 128), Tile(8, 2, 64, 64)),
    ("16 bits", 128, "key_gradients"): (Tile(4, 2, 32, 64), Tile(8, 1, 16, 64)),
    ("16 bits", 128, "query_gradient"): (Tile(4, 2, 64, 64), Tile(8, 2, 64, 32)),
    ("16 bits", 128, "mask_gradient"): (Tile(8, 1, 64, 64), Tile(8, 1, 64, 64)),
    ("16 bits", 256, "forward"): (Tile(8, 2, 64, 64), Tile(8, 1, 32, 32)),
    ("16 bits", 256, "key_gradients"): (Tile(8, 2, 16, 64), Tile(8, 1, 32, 32)),
    ("16 bits", 256, "query_gradient"): (Tile(8, 2, 64, 32), Tile(8, 1, 32, 32)),
    ("16 bits", 256, "mask_gradient"): (Tile(8, 1, 16, 32), Tile(8, 1, 16, 32)),
    ("tf32", 64, "forward"): (Tile(8, 2, 128, 64), Tile(8, 2, 128, 64)),
    ("tf32", 64, "key_gradients"): (Tile(8, 2, 64, 64), Tile(8, 1, 32, 32)),
    ("tf32", 64, "query_gradient"): (Tile(4, 2, 64, 64), Tile(8, 1, 64, 32)),
    ("tf32", 64, "mask_gradient"): (Tile(8, 1, 64, 64), Tile(8, 1, 64, 64)),
    ("tf32", 128, "forward"): (Tile(8, 2, 128, 64), Tile(8, 1, 64, 32)),
    ("tf32", 128, "key_gradients"): (Tile(4, 1, 32, 32), Tile(4, 1, 32, 32)),
    ("tf32", 128, "query_gradient"): (Tile(8, 2, 64, 64), Tile(4, 1, 32, 16)),
    ("tf32", 128, "mask_gradient"): (Tile(4, 1, 16, 32), Tile(4, 1, 16, 32)),
    ("tf32", 256, "forward"): (Tile(8, 1, 32, 32), Tile(8, 1, 32, 32)),
    ("tf32", 256, "key_gradients"): (Tile(8, 1, 32, 32), Tile(8, 1, 32, 32)),
    ("tf32", 256, "query_gradient"): (Tile(8, 1, 16, 32), Tile(8, 1, 16, 32)),
    ("tf32", 256, "mask_gradient"): (Tile(8, 1, 16, 32), Tile(8, 1, 16, 32)),
    ("ieee", 64, "forward"): (Tile(4, 1, 32, 32), Tile(8, 1, 32, 32)),
    ("ieee", 64, "key_gradients"): (Tile(8, 1, 32, 32), Tile(8, 1, 32, 32)),
    ("ieee", 64, "query_gradient"): (Tile(8, 1, 32, 32), Tile(8, 1, 32, 32)),
    ("ieee", 64, "mask_gradient"): (Tile(8, 1, 32, 32), Tile(8, 1, 32, 32)),
    ("ieee", 128, "forward"): (Tile(8, 1, 32, 32), Tile(8, 1, 16, 16)),
    ("ieee", 128, "key_gradients"): (Tile(8, 1, 32, 32), Tile(8, 1, 16, 16)),
    ("ieee", 128, "query_gradient"): (Tile(8, 1, 32, 32), Tile(8, 1, 16, 16)),
    ("ieee", 128, "mask_gradient"): (Tile(8, 1, 32, 32), Tile(8, 1, 32, 32)),
    ("ieee", 256, "forward"): (Tile(4, 1, 16, 32), Tile(8, 1, 16, 16)),
    ("ieee", 256, "key_gradients"): (Tile(8, 1, 32, 32), Tile(8, 1, 16, 16)),
    ("ieee", 256, "query_gradient"): (Tile(8, 1, 32, 32), Tile(8, 1, 16, 16)),
    ("ieee", 256, "mask_gradient"): (Tile(8, 1, 32, 32), Tile(8, 1, 32, 32)),
}
# Where another chip needs others.
AMPERE: Pairs = {
    ("16 bits", 64, "forward"): (Tile(8, 2, 128, 64), Tile(8, 2, 64, 64)),
    ("16 bits", 64, "key_gradients"): (Tile(4, 2, 64, 32), Tile(4, 2, 32, 64)),
    ("16 bits", 64, "query_gradient"): (Tile(8, 2, 128, 64), Tile(4, 2, 64, 32)),
    ("16 bits", 64, "mask_gradient"): (Tile(4, 2, 64, 32), Tile(4, 2, 64, 32)),
    ("16 bits", 128, "forward"): (Tile(8, 2, 64, 64), Tile(8, 2, 64, 32)),
    ("16 bits", 128, "key_gradients"): (Tile(8, 2, 64, 64), Tile(8, 1, 16, 64)),
    ("16 bits", 128, "query_gradient"): (Tile(8, 2, 64, 64), Tile(8, 2, 64, 32)),
    ("16 bits", 128, "mask_gradient"): (Tile(4, 1, 16, 32), Tile(4, 1, 16, 32)),
    ("16 bits", 256, "forward"): (Tile(8, 2, 64, 32), Tile(8, 1, 32, 32)),
    ("16 bits", 256, "key_gradients"): (Tile(8, 2, 32, 64), Tile(8, 1, 32, 32)),
    ("tf32", 64, "forward"): (Tile(8, 2, 128, 64), Tile(4, 2, 64, 32)),
    ("tf32", 64, "key_gradients"): (Tile(4, 2, 64, 32), Tile(4, 1, 32, 32)),
    ("tf32", 64, "query_gradient"): (Tile(8, 2, 64, 32), Tile(8, 1, 64, 32)),
    ("tf32", 64, "mask_gradient"): (Tile(8, 1, 16, 16), Tile(8, 1, 16, 16)),
    ("tf32", 128, "forward"): (Tile(8, 2, 64, 64), Tile(8, 1, 64, 32)),
    ("ieee", 64, "key_gradients"): (Tile(4, 1, 16, 32), Tile(8, 1, 32, 32)),
    ("ieee", 256, "forward"): (Tile(4, 1, 16, 16), Tile(8, 1, 16, 16)),
}
BLACKWELL: Pairs = {
    ("16 bits", 64, "forward"): (Tile(4, 2, 64, 64), Tile(8, 2, 128, 64)),
    ("16 bits", 64, "key_gradients"): (Tile(8, 2, 64, 64), Tile(4, 2, 32, 64)),
    ("16 bits", 64, "query_gradient"): (Tile(8, 2, 128, 64), Tile(8, 2, 128, 64)),
    ("16 bits", 128, "forward"): (Tile(8, 2, 128, 64), Tile(8, 2, 64, 64)),
    ("16 bits", 128, "key_gradients"): (Tile(8, 2, 64, 64), Tile(8, 2, 64, 64)),
    ("16 bits", 128, "query_gradient"): (Tile(8, 2, 64, 64), Tile(8, 2, 64, 32)),
    ("16 bits", 256, "key_gradients"): (Tile(8, 2, 32, 64), Tile(8, 1, 32, 32)),
    ("tf32", 64, "key_gradients"): (Tile(8, 2, 64, 64), Tile(4, 1, 32, 32)),
    ("ieee", 64, "forward"): (Tile(8, 1, 32, 32), Tile(8, 1, 32, 32)),
    ("ieee", 64, "mask_gradient"): (Tile(4, 1, 32, 32), Tile(4, 1, 32, 32)),
    ("ieee", 128, "key_gradients"): (Tile(4, 1, 16, 32), Tile(8, 1, 16, 16)),
}
OTHERS = {80: AMPERE, 100: BLACKWELL}
# Where a head is of none of the three widths, its loads have masks of columns, which take
# registers: these are for calls without any option but causality, with others, and with a mask or
# a dropout. Found as the above; not measured.
PARTIAL: dict[int, dict[tuple[str, int, str], tuple[AttentionLaunch, ...]]] = {
    80: {
        ("16 bits", 64, "forward"): (Tile(8, 2, 128, 64), Tile(8, 2, 128, 32), Tile(8, 2, 64, 64)),
        ("16 bits", 64, "key_gradients"): (
            Tile(4, 2, 64, 32), Tile(8, 2, 64, 32), Tile(4, 2, 32, 64)),
        ("16 bits", 256, "key_gradients"): (
            Tile(8, 2, 16, 64), Tile(8, 2, 16, 64), Tile(8, 1, 32, 32)),
    },
    90: {
        ("16 bits", 64, "query_gradient"): (
            Tile(4, 2, 64, 64), Tile(4, 2, 64, 64), Tile(8, 2, 128, 32)),
        ("16 bits", 128, "forward"): (
            Tile(8, 3, 128, 128), Tile(8, 2, 128, 64), Tile(8, 2, 64, 64)),
        ("16 bits", 128, "key_gradients"): (
            Tile(4, 2, 32, 64), Tile(8, 2, 32, 64), Tile(8, 1, 16, 64)),
        ("16 bits", 256, "key_gradients"): (
            Tile(8, 2, 16, 64), Tile(8, 2, 16, 64), Tile(8, 1, 16, 32)),
        ("tf32", 64, "forward"): (Tile(8, 2, 128, 64), Tile(8, 2, 128, 64), Tile(8, 2, 128, 32)),
        ("tf32", 128, "forward"): (Tile(8, 2, 128, 64), Tile(8, 2, 128, 64), Tile(8, 1, 64, 16)),
        ("ieee", 64, "key_gradients"): (
            Tile(8, 1, 32, 32), Tile(8, 1, 32, 32), Tile(8, 1, 32, 16)),
        ("ieee", 128, "forward"): (Tile(8, 1, 32, 32), Tile(8, 1, 32, 16), Tile(8, 1, 16, 16)),
    },
    100: {
        ("16 bits", 64, "forward"): (Tile(4, 2, 64, 64), Tile(4, 2, 64, 64), Tile(8, 2, 64, 64)),
        ("16 bits", 64, "query_gradient"): (
            Tile(8, 2, 128, 64), Tile(8, 2, 64, 64), Tile(8, 2, 64, 64)),
        ("16 bits", 128, "key_gradients"): (
            Tile(8, 2, 32, 64), Tile(8, 2, 64, 64), Tile(8, 2, 64, 64)),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What the choice of tiles depends on."""

    kind: Kind
    heads: tuple[int, int]
    """The widths of the heads of queries and of values."""
    dtype: torch.dtype
    precision: str
    options: int
    """0: none but causality. 1: slopes, a softcap or a window, too. 2: also a mask or a dropout."""


@lru_cache(maxsize=4096)
def launch_for(shape: Shape, device: Device) -> AttentionLaunch:
    """The configuration for a kernel; smaller tiles where those of the table do not fit."""
    arithmetic = "16 bits" if shape.dtype.itemsize == 2 else shape.precision
    widest = max(shape.heads)
    head = 64 if widest <= 64 else 128 if widest <= 128 else 256
    kind = "query_gradient" if shape.kind == "weights" else shape.kind
    chip = 80 if device.capability < 90 else 90 if device.capability < 100 else 100
    light, heavy = {**HOPPER, **OTHERS.get(chip, {})}[arithmetic, head, kind]
    tiles: tuple[AttentionLaunch, ...] = light, light, heavy
    if any(width not in (64, 128, 256) for width in shape.heads):
        tiles = PARTIAL[chip].get((arithmetic, head, kind), tiles)
    for tile in tiles[shape.options :]:
        # forward one operand stays and two stream past it; backward two stay
        rows = tile.block_queries, tile.block_keys
        own, other = rows[::-1] if kind == "key_gradients" else rows
        n_rows = (1 if kind == "forward" else 2) * own + tile.num_stages * 2 * other
        needed = n_rows * head * shape.dtype.itemsize
        if needed <= device.shared_memory:
            return tile
    return SMALLEST
