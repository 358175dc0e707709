"""What is benchmarked of rotary embedding: the heads of Llama 2 and 3."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import gpunn.functional as GF
from gpunn.profiling.case import Case, Mode, Tensors, normal


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) turned by a quarter: (-x2, x1)."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


@dataclass(frozen=True)
class Rotary:
    """Queries and keys, cos and sin as wide as a head, as models make them, and two dy.

    Queries and keys are views of (batch, length, heads, head), as a projection leaves them.
    """

    batch: int
    length: int
    heads: int
    key_heads: int
    head: int = 128
    mode: Mode = "forward"

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        shapes = [(self.batch, self.length, n, self.head) for n in (self.heads, self.key_heads)]
        both = normal(*shapes * (1 if self.mode == "forward" else 2))(device, dtype, seed)
        query, key, *dy = (tensor.transpose(1, 2) for tensor in both)
        tables = GF.rotary_tables(self.length, self.head, device=device)
        cos, sin = (torch.cat((table, table), -1).to(dtype) for table in tables)
        return query, key, cos, sin, *dy

    def bytes(self) -> int:
        """In bfloat16; forward and backward move as much."""
        heads = self.batch * self.length * (self.heads + self.key_heads) * self.head
        return 2 * (2 * heads + 2 * self.length * self.head)

    def case(self) -> Case:
        suffix = "" if self.mode == "forward" else ": gradients"
        ours: Any = GF.rotary_embedding
        return Case(
            op="rotary_embedding",
            name=f"rotary_embedding{suffix}",
            shapes=f"{self.batch} × {self.length}, {self.heads} + {self.key_heads} heads",
            make=self.make,
            ours=ours,
            theirs=turned_by_torch,
            bytes=self.bytes(),
            flops=0,
            small=lambda: replace(
                self, batch=1, length=min(self.length, 7), heads=5, key_heads=2
            ).case(),
            mode=self.mode,
            wanted=(0, 1) if self.mode != "forward" else (),
            n_results=2,
            launch_bound=self.length == 1,
        )


def turned_by_torch(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> Any:
    """As models write it."""
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def rotary_embedding_cases() -> list[Case]:
    """Sequences of Llama 3 with 8 billion parameters, of Llama 2 with 7; a step of decoding."""
    modes: tuple[Mode, ...] = ("forward", "backward")
    specs = [Rotary(2, 8192, 32, 8, mode=mode) for mode in modes]
    specs += [Rotary(4, 4096, 32, 32, mode=mode) for mode in modes]
    return [spec.case() for spec in (*specs, Rotary(64, 1, 32, 8))]
