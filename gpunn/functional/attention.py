"""Attention: softmax(scale q kᵀ + bias) v, without a matrix of scores in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.attention_arguments import (
    WIDEST_HEAD,
    Alignment,
    Window,
    check_mask,
    check_slopes,
    check_tensors,
    leading_shape,
    mask_wants_float32,
    of_causal_bias,
    of_four_dimensions,
    real_mask,
    rules_of,
)
from gpunn.functional.attention_function import attend
from gpunn.functional.attention_varlen import attention_jagged
from gpunn.functional.dispatch import autocast_is_on, autocast_to_lower, is_tensor
from gpunn.kernels.launch import chosen_backend, record_fallback, takes


def _is_torchs(query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether torch's fused kernels should be the faster ones: 16-bit types without a mask.

    On an H200 cuDNN took 0.65 to 0.85 of the time of ours forward, and 0.33 to 0.43 for the
    gradients; that was before ours read by descriptors, and has not been measured since.
    """
    same = query.shape[-1] == value.shape[-1]
    return query.dtype.itemsize == 2 and mask is None and same and query.shape[-1] <= WIDEST_HEAD


def _checked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> tuple[int, ...]:
    """Batch dimensions and heads of the result; what does not fit together is refused."""
    check_tensors(query, key, value)
    leading = leading_shape(query, key, value, enable_gqa)
    if mask is not None:
        if is_causal:
            raise RuntimeError("attn_mask: expected None beside is_causal=True")
        check_mask(mask, query, key.shape[-2], leading)
    if slopes is not None:
        check_slopes(slopes, leading, query.device)
    return leading


def _of_jagged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    return_lse: bool,
    *arguments: Any,
    **rules: Any,
) -> torch.Tensor:
    """Of nested tensors; with torch's arguments alone, and no kernel to take them, torch's own."""
    if mask is not None or return_lse:
        raise RuntimeError("attn_mask, return_lse: none with nested tensors")
    extra = {name for name, value in rules.items() if value not in (None, "upper_left")}
    is_jagged = query.layout == torch.jagged
    if not extra and not (is_jagged and takes("attention", query.values())):
        dropout_p, is_causal, scale = arguments
        return F.scaled_dot_product_attention(
            query, key, value, None, dropout_p, is_causal, scale=scale
        )
    return attention_jagged(query, key, value, *arguments, **rules)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    alignment: Alignment = "upper_left",
    return_lse: bool = False,
) -> Any:
    """y_i = Σ_j p_ij v_j with p_i = dropout(softmax_j(s_ij)) and s_ij = cap(scale q_i·k_j) + b_ij.

    cap(z) = c tanh(z / c) for a softcap c, else z; b is the mask, minus ALiBi's slope times the
    distance |j - i|. A row of which everything is ruled out gives 0. Memory is linear in the
    lengths, forward and backward; gradients have the same bits from run to run.

    Jagged nested tensors (batch, heads, length, E) go to ``attention_varlen``.

    Args:
        query: (*, L, E); its third dimension from last counts heads.
        key, value: (*, S, E) and (*, S, Ev); leading dimensions broadcast.
        attn_mask: broadcasts to (*, L, S), where it is not repeated in memory. Booleans: True
            keeps. Numbers are added to the scores, and have a gradient (in float32, beside a query
            of 16 bits, for which all is computed in float32). Or torch's ``CausalBias``.
        dropout_p: applied whatever the mode, as torch's; the bits are those that ``dropout_mask``
            gives for the (batch, heads, L, S) probabilities.
        is_causal: query i sees keys up to its own position; not with a mask.
        scale: 1 / √E if None.
        enable_gqa: heads of key and value divide those of query, and each serves so many of them.
        window: keys (before, after) its own position that a query sees; None: no bound.
        alibi_slopes: (heads,) or (*, heads) (Press et al., 2022). Where they require a gradient,
            all is computed by PyTorch's operations.
        softcap: c above.
        alignment: which corner of (L, S) the positions of queries and keys share: key i
            ("upper_left", torch's is_causal) or key i + S - L ("lower_right").
        return_lse: also log Σ_j exp(s_ij), (*, L), float32, without a gradient.

    Raises:
        IndexError: a mask of fewer than 2 dimensions, or grouped heads without a dimension.
        RuntimeError: shapes, dtypes or devices do not fit each other; a mask beside is_causal.
        TypeError: an argument is not of its type.
        ValueError: a probability, softcap, window or alignment that is none.

    Sources: Vaswani et al. (2017), https://arxiv.org/abs/1706.03762; Dao (2023),
    https://arxiv.org/abs/2307.08691.
    """
    attn_mask, is_causal, corner = of_causal_bias(attn_mask, is_causal, alignment)
    if not (
        is_tensor("attention", query, "query")
        and is_tensor("attention", key, "key")
        and is_tensor("attention", value, "value")
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if query.is_nested:
        return _of_jagged(
            query, key, value, attn_mask, return_lse, dropout_p, is_causal, scale,
            window=window, alibi_slopes=alibi_slopes, softcap=softcap, alignment=corner,
        )  # fmt: skip
    if autocast_is_on(query):
        lowered: Any = autocast_to_lower(query, key, value, attn_mask)
        query, key, value, attn_mask = lowered
    rules = rules_of(query, dropout_p, is_causal, scale, window, softcap, corner)
    leading = _checked(query, key, value, attn_mask, alibi_slopes, is_causal, enable_gqa)
    ours = takes("attention", query, key, value, alibi_slopes, real_mask(attn_mask))
    extra = (window, alibi_slopes, softcap) != (None,) * 3 or rules.lower_right
    plain = not (extra or return_lse)
    by_choice = ours and plain and chosen_backend() == "auto"
    if by_choice and _is_torchs(query, value, attn_mask):
        record_fallback("attention", "16 bits, no mask: PyTorch's fused attention")
        ours = False
    if plain and not ours:
        y: torch.Tensor = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return y
    dtype = query.dtype
    if mask_wants_float32(attn_mask, dtype):
        query, key, value = query.float(), key.float(), value.float()
    given = of_four_dimensions(query, key, value, attn_mask, alibi_slopes, leading)
    y, lse = attend(given, rules, ours)
    y = y if y.dtype == dtype else y.to(dtype)
    y = y if len(leading) == 2 else y.reshape(*leading, *y.shape[-2:])
    return (y, lse().reshape(y.shape[:-1])) if return_lse else y
