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
from gpunn.kernels.attention import attention_forward
from gpunn.kernels.attention_weights import attention_weights as launch_weights
from gpunn.kernels.launch import decline, takes


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
        (*, L, S), the dimension of heads as long as ``heads``; in query's dtype. Where query, key,
        mask or slopes require a gradient, by PyTorch's operations, which have one.

    Raises:
        IndexError, RuntimeError, TypeError, ValueError: as ``scaled_dot_product_attention``; and
            where a head or the shape of lse is none of those.
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
    tensors = given.query, given.key, given.mask, given.slopes
    reason = refusal_of(given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        reason = "a gradient: PyTorch's operations"
    if reason is not None:
        decline("attention_weights", reason)
    return reason is not None


def _by_kernel(
    given: Given, rules: Rules, chosen: list[int], lse: torch.Tensor | None
) -> torch.Tensor:
    # one column of any values: only the statistics are wanted
    narrow = given._replace(value=given.key[..., :1])
    arguments = *narrow[:6], None, None, None, given.n_queries, given.n_keys, *rules
    if lse is None:
        forward: Any = attention_forward
        _, _, maxima, sums = forward(False, *arguments)
    else:
        is_additive = given.mask is not None and given.mask.dtype != torch.uint8
        maxima = lse.reshape(given.query.shape[:3]) * (1.0 if is_additive else math.log2(math.e))
        maxima = maxima.to(torch.promote_types(given.query.dtype, torch.float32)).contiguous()
        sums = torch.ones_like(maxima)
    launch: Any = launch_weights
    numbers = torch.tensor(chosen, dtype=torch.int64, device=given.query.device)
    weights: torch.Tensor = launch(numbers, maxima, sums, *arguments)
    return weights


def _by_torch(given: Given, rules: Rules) -> torch.Tensor:
    wide = torch.promote_types(given.query.dtype, torch.float32)
    query, key = given.query.to(wide), given.key.to(wide)
    return softmax(scores(given._replace(query=query, key=key), rules))
