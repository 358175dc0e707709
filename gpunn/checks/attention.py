"""The checks of attention: every function, with the scores that its kernels tell apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import (
    SEED,
    Array,
    Check,
    Comparison,
    as_numpy,
    compare,
    drawn,
    named,
)
from gpunn.kernels.philox import draw_seed
from gpunn.reference.attention import (
    Rules,
    attention_backward,
    attention_forward,
    attention_probabilities,
)
from gpunn.reference.dropout import kept_elements

FORWARD = "attention_forward_kernel"
GRADIENTS = ("attention_query_gradient_kernel", "attention_key_gradients_kernel")
OF_MASK = "attention_mask_gradient_kernel"


@dataclass(frozen=True)
class Case:
    """An attention of q (batch, heads, queries, E) to k (batch, key heads, keys, E)."""

    q: tuple[int, int, int, int]
    k: tuple[int, int, int, int]
    value_head: int | None = None
    """E if None."""
    mask: tuple[int, ...] | None = None
    """The shape of an additive mask, which has a gradient."""
    kept: tuple[int, ...] | None = None
    """The shape of a mask of booleans."""
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    alibi: bool = False
    softcap: float | None = None
    alignment: Literal["upper_left", "lower_right"] = "upper_left"
    dropout_p: float = 0.0

    @property
    def rules(self) -> Rules:
        """As the reference takes them."""
        before, after = self.window or (None, None)
        after = 0 if self.causal else after
        lower_right = self.alignment == "lower_right"
        return Rules(self.q[3] ** -0.5, self.softcap, before, after, lower_right)

    @property
    def pairs(self) -> tuple[int, int, int, int]:
        """The shape of the scores."""
        return *self.q[:3], self.k[2]

    def inputs(self, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        """Query, key and value, and the additive mask where there is one."""
        shapes = [self.q, self.k, (*self.k[:3], self.value_head or self.k[3])]
        shapes += [] if self.mask is None else [self.mask]  # type: ignore[list-item]
        return [drawn(shape, dtype, device) for shape in shapes]

    def slopes(self, device: str) -> torch.Tensor | None:
        """Those of the ALiBi paper."""
        n_heads = self.q[1]
        slopes = 2.0 ** (-8 * torch.arange(1, n_heads + 1, device=device) / n_heads)
        return slopes if self.alibi else None

    def kept_pairs(self, device: str) -> torch.Tensor | None:
        """A mask of booleans that rules out about a third."""
        return None if self.kept is None else torch.rand(self.kept).to(device) < 0.67

    def kernels(self) -> tuple[str, ...]:
        """Those that must run."""
        return FORWARD, *GRADIENTS, *([] if self.mask is None else [OF_MASK])


CASES: dict[str, Case] = {
    "scaled_dot_product_attention": Case((2, 2, 37, 20), (2, 2, 45, 20)),
    "scaled_dot_product_attention, causal": Case((1, 2, 65, 16), (1, 2, 65, 16), causal=True),
    "scaled_dot_product_attention, grouped heads": Case((1, 4, 33, 16), (1, 2, 40, 16)),
    "scaled_dot_product_attention, value heads of another size": Case(
        (1, 2, 20, 40), (1, 2, 36, 40), value_head=9
    ),
    "scaled_dot_product_attention, mask of booleans": Case(
        (2, 2, 20, 16), (2, 2, 44, 16), kept=(2, 1, 20, 44)
    ),
    "scaled_dot_product_attention, additive mask, broadcast": Case(
        (2, 2, 19, 16), (2, 2, 41, 16), mask=(1, 2, 1, 41)
    ),
    "scaled_dot_product_attention, window, ALiBi, softcap, lower right": Case(
        (1, 2, 40, 16), (1, 2, 71, 16), window=(19, 3), alibi=True, softcap=2.0,
        alignment="lower_right",
    ),
    "scaled_dot_product_attention, dropout": Case(
        (1, 2, 34, 16), (1, 2, 43, 16), dropout_p=0.25
    ),
}  # fmt: skip


def bias_of(case: Case, slopes: torch.Tensor | None, device: str) -> torch.Tensor:
    """What window, causality and ALiBi add to the scores, in PyTorch's operations."""
    rules, (n_queries, n_keys) = case.rules, case.pairs[2:]
    own = torch.arange(n_queries, device=device)[:, None]
    own = own + (n_keys - n_queries if rules.lower_right else 0)
    distance = torch.arange(n_keys, device=device) - own
    bias = torch.zeros(distance.shape, device=device)
    if rules.before is not None:
        bias.masked_fill_(distance < -rules.before, -math.inf)
    if rules.after is not None:
        bias.masked_fill_(distance > rules.after, -math.inf)
    return bias if slopes is None else bias - slopes[:, None, None] * distance.abs()


def composed(
    case: Case, q: Any, k: Any, v: Any, slopes: torch.Tensor | None, factors: torch.Tensor | None
) -> torch.Tensor:
    """In float32 what PyTorch's function lacks: a softcap, and a dropout by known factors."""
    s = case.rules.scale * q.float() @ k.float().mT
    if case.softcap is not None:
        s = case.softcap * torch.tanh(s / case.softcap)
    p = torch.softmax(s + bias_of(case, slopes, str(s.device)), -1)
    p = p if factors is None else p * factors
    y: torch.Tensor = p @ v.float()
    return y.to(q.dtype)


def exact(
    case: Case, mask: Any, slopes: Any, factors: Any, dy: Array, *inputs: Array
) -> dict[str, Array]:
    """Value and gradients by the reference; ``inputs`` are query, key, value and perhaps a mask."""
    q, k, v, *rest = inputs
    given: Any = (q, k, v, rest[0] if rest else mask, slopes, factors, case.rules)
    dq, dk, dv, dmask = attention_backward(dy, *given)
    found = {"y": attention_forward(*given), "dquery": dq, "dkey": dk, "dvalue": dv}
    return found | ({"dmask": dmask} if rest and dmask is not None else {})


def factors_of(case: Case, device: str) -> Array | None:
    """Those of the dropout whose seed is drawn first after ``torch.manual_seed``."""
    if not case.dropout_p:
        return None
    torch.manual_seed(SEED)
    seed = int(draw_seed(torch.device(device)).item())
    return kept_elements(seed, case.pairs, case.dropout_p) / (1 - case.dropout_p)


def check_attention(case: Case, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradients of all that it is given."""
    inputs, grouped = case.inputs(dtype, device), case.q[1] != case.k[1]
    kept, slopes, factors = case.kept_pairs(device), case.slopes(device), factors_of(case, device)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> Any:
        torch.manual_seed(SEED)  # so that a dropout draws that seed
        return GF.scaled_dot_product_attention(
            q, k, v, rest[0] if rest else kept, case.dropout_p, case.causal, enable_gqa=grouped,
            window=case.window, alibi_slopes=slopes, softcap=case.softcap,
            alignment=case.alignment,
        )  # fmt: skip

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> Any:
        if case.softcap is not None or factors is not None:
            known = None if factors is None else torch.from_numpy(factors).to(q.device, torch.float)
            return composed(case, q, k, v, slopes, known)
        mask = rest[0] if rest else kept
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=case.causal, enable_gqa=grouped
        )

    added = None if kept is None else np.where(kept.cpu().numpy(), 0.0, -np.inf)
    by_head = None if slopes is None else as_numpy(slopes)
    return compare(ours, theirs, functools.partial(exact, case, added, by_head, factors), inputs)


STARTS_Q, STARTS_K = (0, 5, 5, 38, 47), (0, 20, 23, 60, 69)
"""Of packed sequences; the second has no queries."""
SPANS = [
    (slice(*own), slice(*other))
    for own, other in zip(pairwise(STARTS_Q), pairwise(STARTS_K), strict=True)
    if own[0] < own[1]
]
PACKED = Case((1, 4, 33, 16), (1, 2, 37, 16), causal=True, alignment="lower_right")
"""The longest of them."""


def exact_packed(dy: Array, q: Array, k: Array, v: Array) -> dict[str, Array]:
    """Value and gradients by the reference, one sequence after another."""
    names = ("y", "dquery", "dkey", "dvalue")
    found = {name: np.zeros(t.shape) for name, t in zip(names, (q, q, k, v), strict=True)}
    for own, other in SPANS:
        one = [t.swapaxes(0, 1)[None] for t in (dy[own], q[own], k[other], v[other])]
        for name, values in exact(PACKED, None, None, None, one[0], *one[1:]).items():
            rows = own if name in ("y", "dquery") else other
            found[name][rows] = values[0].swapaxes(0, 1)
    return found


def check_varlen(dtype: torch.dtype, device: str) -> list[Comparison]:
    """Packed sequences of grouped heads, causal from the lower right."""
    (_, n_heads, longest_q, head), (_, n_key_heads, longest_k, _) = PACKED.q, PACKED.k
    keys = (STARTS_K[-1], n_key_heads, head)
    inputs = [drawn(s, dtype, device) for s in ((STARTS_Q[-1], n_heads, head), keys, keys)]
    starts = [torch.tensor(s, dtype=torch.int32, device=device) for s in (STARTS_Q, STARTS_K)]

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return GF.attention_varlen(
            q, k, v, starts[0], starts[1], longest_q, longest_k, is_causal=True,
            alignment="lower_right",
        )  # fmt: skip

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = []
        for own, other in SPANS:
            one = [t.transpose(0, 1)[None] for t in (q[own], k[other], v[other])]
            pairs = torch.ones(one[0].shape[2], one[1].shape[2], dtype=torch.bool, device=device)
            kept = pairs.tril(pairs.shape[1] - pairs.shape[0])
            y = F.scaled_dot_product_attention(one[0], one[1], one[2], kept, enable_gqa=True)
            parts.append(y[0].transpose(0, 1))
        return torch.cat(parts)

    return compare(ours, theirs, exact_packed, inputs)


def check_decode(page: int | None, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One query a sequence to a cache, whole, or of pages and with a window."""
    n_heads, n_keys, window = 6, 80, None if page is None else 30
    lengths = torch.tensor([80, 1, 53], dtype=torch.int32, device=device)
    q = drawn((3, n_heads, 16), dtype, device)
    k, v = (drawn((3, 2, n_keys, head), dtype, device) for head in (16, 24))
    table, caches = None, [k, v]
    if page is not None:
        places = torch.randperm(3 * n_keys // page).to(device)
        table = places.view(3, -1).to(torch.int32)
        for i, whole in enumerate((k, v)):
            pages = whole.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
            caches[i] = torch.empty_like(pages).index_copy_(0, places, pages)
    got = GF.attention_decode(q, caches[0], caches[1], lengths, block_table=table, window=window)
    distance = torch.arange(n_keys, device=device) - (lengths[:, None] - 1)
    kept = (distance <= 0) & (distance >= -(n_keys if window is None else window))
    kept = kept[:, None, None]
    torchs = F.scaled_dot_product_attention(q[:, :, None], k, v, kept, enable_gqa=True)
    mask = np.where(kept.cpu().numpy(), 0.0, -np.inf)
    inputs = [as_numpy(t) for t in (q[:, :, None], k, v)]
    true = attention_forward(inputs[0], inputs[1], inputs[2], mask, None, None, Rules(0.25))
    return named([got], {"y": true[:, :, 0]}, [torchs[:, :, 0]])


def check_weights(dtype: torch.dtype, device: str) -> list[Comparison]:
    """The probabilities of some heads, by the logarithms that attention returns."""
    case, heads = Case((2, 4, 35, 16), (2, 2, 40, 16), causal=True), [3, 0]
    q, k, v = case.inputs(dtype, device)
    _, lse = GF.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, return_lse=True
    )
    got = GF.attention_weights(q, k, lse, is_causal=True, enable_gqa=True, heads=heads)
    s = case.rules.scale * q.float() @ k.float().repeat_interleave(2, 1).mT
    s = s + bias_of(case, None, device)
    torchs = torch.softmax(s, -1)[:, heads].to(dtype)
    p, true_lse = attention_probabilities(as_numpy(q), as_numpy(k), None, None, case.rules)
    truth = {"weights": p[:, heads], "lse": true_lse}
    return named([got, lse], truth, [torchs, torch.logsumexp(s, -1)])


def _check(case: str, run: Callable[..., list[Comparison]], *kernels: str) -> Check:
    return Check("attention", case, run, kernels)


DECODE = ("attention_decode_kernel", "attention_combine_kernel")
CHECKS = [
    *(_check(name, functools.partial(check_attention, case), *case.kernels())
      for name, case in CASES.items()),
    _check("attention_varlen, grouped heads, lower right", check_varlen, FORWARD, *GRADIENTS),
    _check("attention_decode, grouped heads", functools.partial(check_decode, None), *DECODE),
    _check("attention_decode, pages, window", functools.partial(check_decode, 16), *DECODE),
    _check("attention_weights, causal, lse", check_weights, FORWARD, "attention_weights_kernel"),
]  # fmt: skip
