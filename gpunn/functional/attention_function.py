"""The kernels of attention as a function that autograd knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gpunn.functional.attention_arguments import (
    WIDEST_HEAD,
    Given,
    Rules,
    composed,
    log_sums,
    natural_logarithm,
)
from gpunn.functional.dispatch import differentiable_gradients, distinct
from gpunn.kernels.attention import attention_backward, attention_forward
from gpunn.kernels.dropout import dropout_factors
from gpunn.kernels.launch import decline
from gpunn.kernels.philox import draw_seed


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        slopes: torch.Tensor | None,
        mask_batches: torch.Tensor | None,
        seed: torch.Tensor | None,
        starts_q: torch.Tensor | None,
        starts_k: torch.Tensor | None,
        numbers: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given = query, key, value, mask, slopes, mask_batches, seed, starts_q, starts_k
        forward: Any = attention_forward
        y, rest, maxima, sums = forward(True, *given, *numbers)
        ctx.mark_non_differentiable(maxima, sums)
        ctx.save_for_backward(*given, y, rest, maxima, sums)
        ctx.numbers = numbers
        return y, maxima, sums

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *of_statistics: Any) -> tuple[Any, ...]:
        *given, y, rest, maxima, sums = ctx.saved_tensors
        needs, numbers, others = ctx.needs_input_grad[:4], ctx.numbers, (None,) * 6
        if torch.is_grad_enabled():
            whole = Given._make([*given[:6], *given[7:], *numbers[:2]])
            return *_differentiable(whole, given[6], Rules(*numbers[2:]), needs, dy), *others
        backward: Any = attention_backward
        found = backward(dy, y, rest, maxima, sums, list(needs), *given, *numbers)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), *others


def _differentiable(
    given: Given,
    seed: torch.Tensor | None,
    rules: Rules,
    needs: Sequence[bool],
    dy: torch.Tensor,
) -> list[torch.Tensor | None]:
    """The gradients of query, key, value and mask, able to be differentiated again."""
    factors = None
    if seed is not None:
        pairs = dy.new_empty((*given.query.shape[:3], given.n_keys))
        factors = dropout_factors(seed, pairs, rules.dropout_p)

    def attention(query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        now = given._replace(query=query, key=key, value=value, mask=mask)
        return composed(now, rules, factors)

    return differentiable_gradients(attention, given[:4], needs, dy)


def refusal_of(given: Given) -> str | None:
    """Why no kernel takes these arguments; None when one does."""
    widest = max(given.query.shape[-1], given.value.shape[-1])
    if widest > WIDEST_HEAD:
        return f"no kernel for heads of size {widest}, over {WIDEST_HEAD}"
    slopes = given.slopes
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        return "a gradient for alibi_slopes: PyTorch's operations"
    return None


class Attended(NamedTuple):
    """What the kernels give: y, the statistics of its rows, and the seed of its dropout."""

    y: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor
    seed: torch.Tensor | None


def attend_by_kernels(given: Given, rules: Rules) -> Attended:
    """Attention by the kernels, which must take it."""
    seed = draw_seed(given.query.device) if rules.dropout_p > 0 else None
    tensors = *given[:6], seed, given.starts_q, given.starts_k
    numbers = given.n_queries, given.n_keys, *rules
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given[:4]):
        y, maxima, sums = _Attention.apply(*distinct(tensors), numbers)
    else:
        forward: Any = attention_forward
        y, _, maxima, sums = forward(False, *tensors, *numbers)
    return Attended(y, maxima, sums, seed)


def attend(
    given: Given, rules: Rules, ours: bool
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """y, and a function that gives the logarithms of the sums, by the kernels or by torch."""
    reason = refusal_of(given) if ours else None
    if reason is not None:
        decline("attention", reason)
    if not ours or reason is not None:
        y = composed(given, rules, None)
        return y, lambda: log_sums(given, rules)
    y, maxima, sums, _ = attend_by_kernels(given, rules)
    return y, lambda: natural_logarithm(maxima, sums, given)
