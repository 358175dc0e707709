"""Attention and its gradients, one query after another, by the definition.

Sources: Vaswani et al., "Attention is all you need", 2017, equation 1; Press et al., "Train short,
test long", 2022 (ALiBi); Gemma Team, "Gemma 2", 2024, section 2 (soft-capping); Beltagy et al.,
"Longformer", 2020 (windows); Ainslie et al., "GQA", 2023 (grouped heads).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rules:
    """What the score of a query and a key is made of, besides their product."""

    scale: float
    softcap: float | None = None
    before: int | None = None
    """How many keys before its own position a query sees; None: all."""
    after: int | None = None
    lower_right: bool = False
    """Whether query i stands at key i + keys - queries, and not at key i."""


@dataclass(frozen=True)
class Head:
    """One query head and what it attends to; views of the whole arrays."""

    at: tuple[int, int]
    """Batch and query head."""
    key_at: tuple[int, int]
    """Batch and key head."""
    bias: Array
    """(L, S): mask and ALiBi, -inf where a pair is ruled out."""


def bias_of(n_queries: int, n_keys: int, mask: Array | None, slope: float, rules: Rules) -> Array:
    """What is added to the scores of one head."""
    bias = np.zeros((n_queries, n_keys)) if mask is None else mask.copy()
    for i in range(n_queries):
        own = i + (n_keys - n_queries if rules.lower_right else 0)
        for j in range(n_keys):
            too_early = rules.before is not None and j < own - rules.before
            too_late = rules.after is not None and j > own + rules.after
            bias[i, j] = -np.inf if too_early or too_late else bias[i, j] - slope * abs(own - j)
    return bias


def _heads(
    q: Array, k: Array, mask: Array | None, slopes: Array | None, rules: Rules
) -> Iterator[Head]:
    n_batches, n_heads, n_queries, _ = q.shape
    n_keys, group = k.shape[2], n_heads // k.shape[1]
    whole = None if mask is None else np.broadcast_to(mask, (n_batches, n_heads, n_queries, n_keys))
    for batch in range(n_batches):
        for head in range(n_heads):
            own = None if whole is None else whole[batch, head]
            slope = 0.0
            if slopes is not None:
                slope = float(np.broadcast_to(slopes, (n_batches, n_heads))[batch, head])
            bias = bias_of(n_queries, n_keys, own, slope, rules)
            yield Head((batch, head), (batch, head // group), bias)


def _probabilities(q: Array, k: Array, bias: Array, rules: Rules) -> tuple[Array, Array, Array]:
    """softmax of the scores, 0 in a row of which nothing is left; log Σ exp; and cap'."""
    z = rules.scale * (q @ k.T)
    slope = np.ones_like(z)
    if rules.softcap is not None:
        t = np.tanh(z / rules.softcap)
        z, slope = rules.softcap * t, 1 - t**2
    s = z + bias
    p, lse = np.zeros_like(s), np.full(len(s), -np.inf)
    for i, row in enumerate(s):
        if row.size and not np.all(row == -np.inf):
            highest = row.max()
            e = np.exp(row - highest)
            p[i], lse[i] = e / e.sum(), highest + np.log(e.sum())
    return p, lse, slope


def attention_probabilities(
    q: Array, k: Array, mask: Array | None, slopes: Array | None, rules: Rules
) -> tuple[Array, Array]:
    """p (batch, heads, L, S), and log Σ exp(score) of each row.

    Args:
        q, k: (batch, heads, L, E) and (batch, key heads, S, E).
        mask: added; broadcasts to (batch, heads, L, S), -inf where a pair is ruled out.
        slopes: (heads,) or (batch, heads).
        rules: the rest.
    """
    p, lse = np.zeros((*q.shape[:3], k.shape[2])), np.zeros(q.shape[:3])
    for head in _heads(q, k, mask, slopes, rules):
        found = _probabilities(q[head.at], k[head.key_at], head.bias, rules)
        p[head.at], lse[head.at] = found[:2]
    return p, lse


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    slopes: Array | None,
    factors: Array | None,
    rules: Rules,
) -> Array:
    """y = (p d) v; ``factors`` d (batch, heads, L, S) are those of a dropout, 0 or 1 / (1 - p)."""
    y = np.zeros((*q.shape[:3], v.shape[3]))
    for head in _heads(q, k, mask, slopes, rules):
        p, _, _ = _probabilities(q[head.at], k[head.key_at], head.bias, rules)
        y[head.at] = (p if factors is None else p * factors[head.at]) @ v[head.key_at]
    return y


def attention_backward(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    slopes: Array | None,
    factors: Array | None,
    rules: Rules,
) -> tuple[Array, Array, Array, Array | None]:
    """dq, dk, dv, and the gradient of the mask where there is one, in its own shape."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dmask = None if mask is None else np.zeros(mask.shape)
    for head in _heads(q, k, mask, slopes, rules):
        p, _, slope = _probabilities(q[head.at], k[head.key_at], head.bias, rules)
        d = np.ones_like(p) if factors is None else factors[head.at]
        dv[head.key_at] += (p * d).T @ dy[head.at]
        dp = d * (dy[head.at] @ v[head.key_at].T)
        ds = p * (dp - (p * dp).sum(1, keepdims=True))
        dz = ds * slope
        dq[head.at] = rules.scale * dz @ k[head.key_at]
        dk[head.key_at] += rules.scale * dz.T @ q[head.at]
        if dmask is not None:
            dmask += _sum_to(ds, head.at, dmask.shape)
    return dq, dk, dv, dmask


def _sum_to(ds: Array, at: tuple[int, int], given: tuple[int, ...]) -> Array:
    """What one head adds to the gradient of a mask of a given shape."""
    shape = (1,) * (4 - len(given)) + given
    rows = ds if shape[2] > 1 or ds.shape[0] == 1 else ds.sum(0, keepdims=True)
    part = rows if shape[3] > 1 or ds.shape[1] == 1 else rows.sum(1, keepdims=True)
    found = np.zeros(shape)
    found[at[0] if shape[0] > 1 else 0, at[1] if shape[1] > 1 else 0] = part
    return found.reshape(given)


def varlen_forward(
    q: Array, k: Array, v: Array, starts_q: list[int], starts_k: list[int], rules: Rules
) -> Array:
    """Of packed sequences, q (total, heads, E): sequence i from starts[i] to starts[i + 1]."""
    y = np.zeros((*q.shape[:2], v.shape[2]))
    for own, other in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        one_q, one_k, one_v = (
            t[slice(*span)].swapaxes(0, 1)[None] for t, span in ((q, own), (k, other), (v, other))
        )
        found = attention_forward(one_q, one_k, one_v, None, None, None, rules)
        y[slice(*own)] = found[0].swapaxes(0, 1)
    return y
