"""The probabilities of attention, to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gpunn.functional.attention_arguments import (
    Alignment,
    Given,
    Rules,
    Window,
    check_mask,
    check_slopes,
    check_tensors,
    leading_shape,
    of_causal_bias,
    of_four_dimensions,
    real_mask,
    rules_of,
    scores,
    softmax,
)
from gpunn.functional.attention_function import refusal_of
from gpunn.functional.dispatch import distinct
from gpunn.kernels.attention import attention_forward
from gpunn.kernels.attention_weights import attention_weights as launch_weights
from gpunn.kernels.launch import decline, record_fallback, takes


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    heads: Sequence[int] | None = None,
    window: Window | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    alignment: Alignment = "upper_left",
) -> torch.Tensor:
    """p_ij = exp(s_ij - lse_i), the matrix that attention multiplies v by, before any dropout.

    Args:
        query, key, attn_mask, is_causal, scale, enable_gqa, window, alibi_slopes, softcap,
            alignment: as ``scaled_dot_product_attention`` was given them.
        lse: (*, L), what that returned with ``return_lse=True``; None: computed again. Where scores
            are large, float32 holds few digits of it, and None gives more of those of p.
        heads: the numbers of the heads that are wanted; None: all.

    Returns:
        (*, L, S), the dimension of heads as long as ``heads``; in query's dtype. Their gradient,
        should one be asked for, is computed by PyTorch's operations, with all of them in memory.

    Raises:
        IndexError, RuntimeError, TypeError, ValueError: as ``scaled_dot_product_attention``; and
            where a head or the shape of lse is none of those.

    Source: Vaswani et al. (2017), https://arxiv.org/abs/1706.03762, equation 1.
    """
    attn_mask, is_causal, corner = of_causal_bias(attn_mask, is_causal, alignment)
    rules = rules_of(query, 0.0, is_causal, scale, window, softcap, corner)
    check_tensors(query, key, key)
    leading = leading_shape(query, key, key, enable_gqa)
    if attn_mask is not None:
        check_mask(attn_mask, query, key.shape[-2], leading)
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, leading, query.device)
    n_heads = leading[-1] if leading else 1
    chosen = _chosen(heads, n_heads)
    if lse is not None and tuple(lse.shape) != (*leading, query.shape[-2]):
        expected = (*leading, query.shape[-2])
        raise RuntimeError(f"lse: expected shape {expected}, got {tuple(lse.shape)}")
    given = of_four_dimensions(query, key, key, attn_mask, alibi_slopes, leading)
    tensors = query, key, alibi_slopes, real_mask(attn_mask)
    if takes("attention_weights", *tensors) and not _declined(given):
        weights = _by_kernel(given, rules, chosen, lse)
    else:
        weights = _by_torch(given, rules)[:, chosen].to(query.dtype)
    shape = (*leading[:-1], len(chosen)) if leading else ()
    return weights.reshape(*shape, *weights.shape[-2:])


def _chosen(heads: Sequence[int] | None, n_heads: int) -> list[int]:
    if heads is None:
        return list(range(n_heads))
    for head in heads:
        if not -n_heads <= head < n_heads:
            raise IndexError(f"heads: expected numbers below {n_heads}, got {head}")
    return [head % n_heads for head in heads]


def _declined(given: Given) -> bool:
    reason = refusal_of(given)
    if reason is not None:
        decline("attention_weights", reason)
    return reason is not None


def _by_kernel(
    given: Given, rules: Rules, chosen: list[int], lse: torch.Tensor | None
) -> torch.Tensor:
    # one column of any values: only the statistics are wanted
    narrow = given._replace(value=given.key[..., :1])
    with torch.no_grad():
        if lse is None:
            forward: Any = attention_forward
            arguments = *narrow[:6], None, None, None, given.n_queries, given.n_keys, *rules
            _, _, maxima, sums = forward(False, *arguments)
        else:
            is_additive = given.mask is not None and given.mask.dtype != torch.uint8
            maxima = lse.reshape(given.query.shape[:3])
            maxima = maxima * (1.0 if is_additive else math.log2(math.e))
            maxima = maxima.to(torch.promote_types(given.query.dtype, torch.float32)).contiguous()
            sums = torch.ones_like(maxima)
    return weights_by_kernel(narrow, rules, chosen, maxima, sums)


def weights_by_kernel(
    given: Given, rules: Rules, chosen: list[int], maxima: torch.Tensor, sums: torch.Tensor
) -> torch.Tensor:
    """The probabilities of the chosen heads, from the statistics of the rows."""
    tensors = *given[:2], *given[3:6]
    numbers = given.n_queries, given.n_keys, *rules
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        weights: torch.Tensor = _Weights.apply(*distinct(tensors), maxima, sums, chosen, numbers)
        return weights
    return _launched(*tensors, maxima, sums, chosen, numbers)


def _launched(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
    mask_batches: torch.Tensor | None,
    maxima: torch.Tensor,
    sums: torch.Tensor,
    chosen: list[int],
    numbers: tuple[Any, ...],
) -> torch.Tensor:
    n_heads, device = query.shape[1], query.device
    if chosen == list(range(n_heads)):  # which no copy from the host has to tell
        heads = torch.arange(n_heads, device=device)
    else:
        heads = torch.tensor(chosen, dtype=torch.int64, device=device)
    launch: Any = launch_weights
    packed = None, None, None
    weights: torch.Tensor = launch(
        heads, maxima, sums, query, key, key[..., :1], mask, slopes, mask_batches, *packed, *numbers
    )
    return weights


class _Weights(torch.autograd.Function):
    """By the kernel, but the gradient, which is rarely asked for, by PyTorch's operations."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        ctx.save_for_backward(*arguments[:5])
        ctx.chosen, ctx.numbers = arguments[7:]
        return _launched(*arguments)

    @staticmethod
    def backward(ctx: Any, dweights: torch.Tensor) -> tuple[Any, ...]:
        record_fallback("attention_weights", "a gradient: PyTorch's operations")
        query, key, mask, slopes, mask_batches = ctx.saved_tensors
        packed = None, None
        given = Given(query, key, key, mask, slopes, mask_batches, *packed, *ctx.numbers[:2])
        gradients = _gradients(given, Rules(*ctx.numbers[2:]), ctx.chosen, dweights)
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(gradient if need else None for gradient, need in needed), *(None,) * 6


def _gradients(
    given: Given, rules: Rules, chosen: list[int], dweights: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Of query, key and mask: ds = p (dp - Σ p dp), of which each takes its part."""
    wide = torch.promote_types(given.query.dtype, torch.float32)
    query, key, mask = given.query.to(wide), given.key.to(wide), given.mask
    group = query.shape[1] // max(key.shape[1], 1)
    repeated = key.repeat_interleave(group, 1)
    p, dp = _by_torch(given, rules), dweights.to(wide)
    if chosen != list(range(p.shape[1])):
        dp = _of_every_head(dp, chosen, p.shape[1])
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dmask = None
    if mask is not None and mask.is_floating_point():
        dmask = ds
        if given.mask_batches is not None:  # each of the mask's has as many
            sharers = given.mask_batches.argsort(stable=True)
            dmask = ds[sharers].unflatten(0, (len(mask), len(ds) // len(mask))).sum(1)
        dmask = dmask.sum_to_size(mask.shape).to(mask.dtype)
    if rules.softcap:
        ds = ds * (1 - torch.tanh((query * rules.scale) @ repeated.mT / rules.softcap).square())
    dkey = (ds.mT @ query).unflatten(1, (-1, group)).sum(2) * rules.scale
    dquery = ds @ repeated * rules.scale
    return dquery.to(given.query.dtype), dkey.to(given.key.dtype), dmask


def _of_every_head(dp: torch.Tensor, chosen: list[int], n_heads: int) -> torch.Tensor:
    """What each head gets from those chosen, added in one order: on a GPU index_add has none."""
    nothing = dp.new_zeros(dp.shape[0], *dp.shape[2:])
    parts = [[dp[:, i] for i, head in enumerate(chosen) if head == each] for each in range(n_heads)]
    return torch.stack([sum(part, nothing) for part in parts], 1)


def _by_torch(given: Given, rules: Rules) -> torch.Tensor:
    wide = torch.promote_types(given.query.dtype, torch.float32)
    query, key = given.query.to(wide), given.key.to(wide)
    return softmax(scores(given._replace(query=query, key=key), rules))
