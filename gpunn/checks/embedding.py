"""The checks of lookups: plain, with positions, and with a row that most tokens look up."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, compare, drawn
from gpunn.reference.embedding import embedding_backward, embedding_forward


@dataclass(frozen=True)
class Case:
    """Sequences of tokens, of which three quarters are one of ``frequent`` rows."""

    shape: tuple[int, int]
    rows: int
    columns: int
    frequent: int
    scale: float = 1.0
    positional: bool = False
    padding_idx: int | None = None


CASES: dict[str, Case] = {
    "embedding": Case((3, 17), 40, 37, 40),
    "embedding, scale, sinusoidal_encoding, padding": Case((3, 17), 40, 260, 2, 4.0, True, 1),
    "embedding, runs of several pieces": Case((2, 150), 40, 20, 1),
}


def check_embedding(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradients of its tables."""
    case, length = CASES[name], CASES[name].shape[1]
    tokens = torch.randint(case.rows, case.shape)
    frequent = torch.randint(case.frequent, case.shape)
    tokens = torch.where(torch.rand(case.shape) < 0.75, frequent, tokens)
    indices = tokens.to(device)

    def ours(weight: torch.Tensor, *positional: torch.Tensor) -> torch.Tensor:
        table = positional[0] if positional else None
        return GF.embedding(
            indices, weight, case.padding_idx, scale=case.scale, positional=table
        )  # fmt: skip

    def theirs(weight: torch.Tensor, *positional: torch.Tensor) -> torch.Tensor:
        y = F.embedding(indices, weight, case.padding_idx)
        return y * case.scale + positional[0][:length] if positional else y

    def exact(dy: Array, weight: Array, *positional: Array) -> dict[str, Array]:
        places = np.broadcast_to(np.arange(length), case.shape)
        table = positional[0] if positional else None
        looked_up = tokens.numpy()
        found = {
            "y": embedding_forward(looked_up, weight, case.scale, table, places),
            "dweight": embedding_backward(dy, looked_up, case.rows, case.scale, case.padding_idx),
        }
        if table is not None:
            found["dpositional"] = embedding_backward(dy, places, len(table), 1.0)
        return found

    inputs = [drawn((case.rows, case.columns), dtype, device)]
    if case.positional:
        inputs += [GF.sinusoidal_encoding(length + 2, case.columns, device=device, dtype=dtype)]
    return compare(ours, theirs, exact, inputs)


CHECKS = [Check("embedding", name, functools.partial(check_embedding, name)) for name in CASES]
