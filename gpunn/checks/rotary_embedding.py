"""The checks of rotary embedding: both kinds of pairs, grouped heads, heads turned in part."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, as_numpy, compare, drawn
from gpunn.reference.rotary_embedding import rotary_backward, rotary_forward


@dataclass(frozen=True)
class Case:
    """Two sequences; ``rotary_dim`` of a head's elements turn."""

    heads: tuple[int, int]
    length: int
    head: int
    rotary_dim: int
    interleaved: bool = False


CASES: dict[str, Case] = {
    "rotary_embedding by rotary_tables": Case((5, 2), 20, 64, 64),
    "rotary_embedding, interleaved": Case((2, 2), 7, 20, 20, True),
    "rotary_embedding, heads in part": Case((2, 1), 9, 80, 32),
}


def turned_by_torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """As models write it, by tables of x's type, half as wide as what turns."""
    n_pairs = cos.shape[-1]
    turning = x[..., : 2 * n_pairs]
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((y, x[..., 2 * n_pairs :]), -1)


def check_rotary_embedding(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradients of queries and keys."""
    case = CASES[name]
    n_pairs, split = case.rotary_dim // 2, case.heads[0]
    cos, sin = GF.rotary_tables(case.length, case.rotary_dim, dtype=dtype, device=device)
    angles = as_numpy(cos), as_numpy(sin), n_pairs, case.interleaved

    def ours(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        turned = GF.rotary_embedding(
            query, key, cos, sin, interleaved=case.interleaved, rotary_dim=case.rotary_dim
        )
        return torch.cat(turned, 1)

    def theirs(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return turned_by_torch(torch.cat((query, key), 1), cos, sin, case.interleaved)

    def exact(dy: Array, query: Array, key: Array) -> dict[str, Array]:
        y = [rotary_forward(x, *angles) for x in (query, key)]
        dx = rotary_backward(dy, *angles)
        return {
            "query": torch.cat([torch.from_numpy(part) for part in y], 1).numpy(),
            "dquery": dx[:, :split],
            "dkey": dx[:, split:],
        }

    shapes = [(2, n_heads, case.length, case.head) for n_heads in case.heads]
    return compare(ours, theirs, exact, [drawn(shape, dtype, device) for shape in shapes])


CHECKS = [
    Check("rotary_embedding", name, functools.partial(check_rotary_embedding, name))
    for name in CASES
]
