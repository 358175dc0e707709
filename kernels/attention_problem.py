"""What the launchers of attention are told of a call, and what they tell the kernels of it.

q is (batch, heads, queries, E), k (batch, key heads, keys, E), v (batch, key heads, keys, Ev), with
any strides; where sequences are packed, batch is 1 and ``starts`` says where each begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from gpunn.kernels.attention_operands import (
    head_block,
    operand,
    read_by_descriptor,
    repeated_strides,
    unit_of,
)
from gpunn.kernels.attention_tiles import AttentionLaunch, Kind, Shape, launch_for
from gpunn.kernels.launch import device_of
from gpunn.kernels.philox import dropout_arguments
from gpunn.kernels.product import precision_of

SCORE_UNIT = math.log2(math.e)
"""By which scores are multiplied, so that exp is one exp2: see ``flash.py``."""


@dataclass(frozen=True)
class Problem:
    """What every kernel of attention is told. ``before`` and ``after`` are -1 where unbounded.

    ``mask_batches``: for each batch, which of the mask's; None where the mask has one or all.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    slopes: torch.Tensor | None
    mask_batches: torch.Tensor | None
    seed: torch.Tensor | None
    starts_q: torch.Tensor | None
    starts_k: torch.Tensor | None
    n_queries: int
    n_keys: int
    scale: float
    softcap: float
    dropout_p: float
    before: int
    after: int
    lower_right: bool

    @property
    def n_batches(self) -> int:
        """Sequences."""
        return self.q.shape[0] if self.starts_q is None else self.starts_q.shape[0] - 1

    @property
    def n_heads(self) -> int:
        """Of the queries."""
        return self.q.shape[1]

    @property
    def is_natural(self) -> bool:
        """Whether the scores are in units of 1 and not of log2(e): see ``flash.py``."""
        return self.mask is not None and self.mask.dtype != torch.uint8

    @property
    def is_exact(self) -> bool:
        """Whether the backward pass keeps maximum and sum of a row apart."""
        return self.is_natural or self.q.dtype.itemsize > 2

    @property
    def is_scaled_late(self) -> bool:
        """Whether the largest of the products q·k belongs to the largest of the scores."""
        others = self.mask, self.slopes, self.softcap or None
        return self.scale > 0 and all(other is None for other in others)

    @property
    def is_plain(self) -> bool:
        """Whether a score is q·k, and causality all that rules pairs out."""
        others = self.mask, self.seed, self.slopes, self.softcap or None
        return self.before < 0 and all(other is None for other in others)

    def is_by_descriptor(self, *others: torch.Tensor) -> bool:
        """Whether q, k, v and ``others`` are read by descriptors."""
        if self.starts_k is not None or not self.is_plain:
            return False
        pairs = self.n_batches * self.n_heads * self.n_queries * self.n_keys
        n_flops = 2 * pairs * (self.q.shape[-1] + self.v.shape[-1])
        return read_by_descriptor((self.q, self.k, self.v, *others), n_flops, device_of(self.q))

    def inputs(self, launch: AttentionLaunch, by_descriptor: bool) -> tuple[Any, ...]:
        """What comes first: q, k and v, by pointer or by descriptor, and pointers."""
        return (
            operand(self.q, launch.block_queries, by_descriptor),
            operand(self.k, launch.block_keys, by_descriptor),
            operand(self.v, launch.block_keys, by_descriptor),
            self.mask, self.slopes, self.mask_batches, self.seed, self.starts_q, self.starts_k,
        )  # fmt: skip

    def sizes(self) -> tuple[int, ...]:
        """Heads, query heads a key head, queries, keys, and the bounds of the window."""
        group = self.n_heads // self.k.shape[1]
        return self.n_heads, group, self.n_queries, self.n_keys, self.before, self.after

    def strides(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        """Of q, k, v and ``tensors``; then of the mask, 0 where it is repeated, and the slopes.

        Packed sequences are told apart by where they start, and not by a stride.
        """
        found: list[int] = []
        for tensor in (self.q, self.k, self.v, *tensors):
            batch, *others = tensor.stride()
            found += [batch if self.starts_q is None else 0, *others]
        mask = (0,) * 4 if self.mask is None else repeated_strides(self.mask)
        slopes = (0,) * 2 if self.slopes is None else repeated_strides(self.slopes)
        return *found, *mask, *slopes

    def stat_strides(self) -> tuple[int, int]:
        """Of batches and heads in the statistics of the rows."""
        n_rows = self.q.shape[2]
        return (self.n_heads * n_rows if self.starts_q is None else 0), n_rows

    def scalars(self) -> tuple[float, ...]:
        """The scale and the softcap, as ``scores`` takes them, and the dropout's."""
        unit = 1.0 if self.is_natural else SCORE_UNIT
        scale = self.scale / self.softcap if self.softcap else self.scale * unit
        return scale, self.softcap * unit, *dropout_arguments(self.dropout_p or 1.0)

    def constants(self, *others: torch.Tensor) -> dict[str, Any]:
        """The constexpr arguments that the kernels of q, k, v and ``others`` have in common."""
        head, head_v, dtype = self.q.shape[-1], self.v.shape[-1], self.q.dtype
        return dict(
            LOWER_RIGHT=self.lower_right, HAS_SOFTCAP=self.softcap != 0, BEFORE=self.before >= 0,
            AFTER=self.after >= 0, QUADS=self.n_keys % 4 == 0,
            PRECISION=precision_of(dtype), UNIT=unit_of(self.q, self.k, self.v, *others),
            HEAD=head, HEAD_V=head_v,
            BLOCK_HEAD=head_block(head, dtype), BLOCK_HEAD_V=head_block(head_v, dtype),
        )  # fmt: skip

    def launch(self, kind: Kind) -> AttentionLaunch:
        """The configuration of one of the kernels."""
        heads, dtype = (self.q.shape[-1], self.v.shape[-1]), self.q.dtype
        options = 2 if self.mask is not None or self.seed is not None else int(not self.is_plain)
        shape = Shape(kind, heads, dtype, precision_of(dtype), options)
        return launch_for(shape, device_of(self.q))

    @property
    def is_one_loop(self) -> bool:
        """Whether the backward kernels save registers by one loop, in which each pair is looked at.

        Where there is a mask, that has to be done anyway; the others would spill.
        """
        widest = max(self.q.shape[-1], self.v.shape[-1])
        return self.mask is not None or self.q.dtype.itemsize > 2 or widest > 128

    def is_uneven(self, n: int, block: int) -> bool:
        """Whether a tile may reach past the last of n queries or keys."""
        return self.starts_k is not None or n % block != 0
