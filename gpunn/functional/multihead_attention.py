"""Multi-head attention: projections, attention of every head, and the projection of the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.attention import scaled_dot_product_attention
from gpunn.functional.attention_arguments import (
    WIDEST_HEAD,
    check_mask,
    leading_shape,
    mask_wants_float32,
    of_four_dimensions,
    real_mask,
    rules_of,
)
from gpunn.functional.attention_function import attend_by_kernels
from gpunn.functional.attention_varlen import attention_varlen
from gpunn.functional.attention_weights import weights_by_kernel
from gpunn.functional.dispatch import (
    autocast_is_on,
    autocast_to_lower,
    check_arguments,
    is_tensor,
    number,
)
from gpunn.functional.linear import linear
from gpunn.functional.multihead_attention_arguments import (
    Call,
    Triple,
    check_call,
    check_jagged,
    merged_mask,
)
from gpunn.kernels.dropout import dropout_factors
from gpunn.kernels.launch import decline, takes


def split_heads(input: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(*, L, num_heads E) as (*, num_heads, L, E), a view: what attention takes.

    Raises:
        IndexError: the input has 1 dimension.
        RuntimeError: it has none, or num_heads does not divide the last.
        TypeError: num_heads is no integer.
    """
    heads: torch.Tensor = input.unflatten(-1, (num_heads, -1))
    return heads.transpose(-3, -2)


def merge_heads(input: torch.Tensor) -> torch.Tensor:
    """(*, num_heads, L, E) as (*, L, num_heads E): a view of what attention gives.

    Raises:
        IndexError: the input has fewer than 3 dimensions.
    """
    return input.transpose(-3, -2).flatten(-2)


def _parts(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n: int
) -> tuple[torch.Tensor, ...]:
    """n projections of one input in one product, each a view; their gradients are stacked once."""
    parts: torch.Tensor = linear(input, weight, bias).unflatten(-1, (n, -1))
    return parts.unbind(-2)


def _projected(tensors: Triple, call: Call) -> Triple:
    """q, k and v: of one tensor in one product, of a memory in one for k and v."""
    (query, key, value), packed, bias = tensors, call.packed, call.bias
    if packed is not None and key is value:
        if query is key:
            q, k, v = _parts(query, packed, bias, 3)
            return q, k, v
        sizes = [call.embed_dim, 2 * call.embed_dim]
        own, others = packed.split(sizes)
        b_own, b_others = (None, None) if bias is None else bias.split(sizes)
        k, v = _parts(key, others, b_others, 2)
        return linear(query, own, b_own), k, v
    w_q, w_k, w_v = call.separate if packed is None else packed.chunk(3)  # type: ignore[misc]
    b_q, b_k, b_v = (None,) * 3 if bias is None else bias.chunk(3)
    return linear(query, w_q, b_q), linear(key, w_k, b_k), linear(value, w_v, b_v)


def _lengthened(input: torch.Tensor, row: torch.Tensor | None, add_zero: bool) -> torch.Tensor:
    """(*, S, E) with the learnt row, and then one of zeros, at the end of each sequence."""
    shape = (*input.shape[:-2], 1, input.shape[-1])
    rows = [] if row is None else [row.view(1, -1).expand(shape)]
    rows += [input.new_zeros(shape)] if add_zero else []
    return torch.cat([input, *rows], -2) if rows else input


def _with_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and the probabilities that v was multiplied by: after the dropout, as torch's.

    As from torch's softmax, rows of which everything is ruled out are NaN, and so are gradients.
    """
    if autocast_is_on(q):
        lowered: Any = autocast_to_lower(q, k, v, mask)
        q, k, v, mask = lowered
    wide_weights = autocast_is_on(q) and q.is_cuda  # as its softmax there
    dtype, leading = q.dtype, leading_shape(q, k, v, False)
    if mask is not None:
        check_mask(mask, q, k.shape[-2], leading)
    if mask_wants_float32(mask, dtype):
        q, k, v = q.float(), k.float(), v.float()
    window = (None, 0) if is_causal else None
    rules = rules_of(q, dropout_p, False, None, window, None, "upper_left")
    given = of_four_dimensions(q, k, v, mask, None, leading)
    y, maxima, sums, seed = attend_by_kernels(given, rules)
    weights = weights_by_kernel(given, rules, list(range(q.shape[-3])), maxima, sums)
    if seed is not None:
        weights = weights * dropout_factors(seed, weights.detach(), dropout_p)
    if k.shape[-2]:
        alive = torch.where(sums == 0, math.nan, 1.0)[..., None].to(y.dtype)
        y, weights = y * alive, weights * alive
    weights = weights.reshape(*leading, *weights.shape[-2:])
    weights = weights.to(torch.float32 if wide_weights else dtype)
    return y.to(dtype).reshape(*leading, *y.shape[-2:]), weights


def rows_of(input: torch.Tensor) -> torch.Tensor:
    """The rows of a jagged nested tensor, (rows, E), and any other tensor itself."""
    jagged: Any = input
    return jagged.values() if input.is_nested else input


def with_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``rows`` in the sequences of ``like``: what ``rows_of`` gave, changed, back as it was."""
    if not like.is_nested:
        return rows
    jagged: Any = like
    nested: torch.Tensor = torch.nested.nested_tensor_from_jagged(
        rows, jagged.offsets(), max_seqlen=int(jagged._get_max_seqlen())
    )
    return nested


def _each_once(change: Callable[[torch.Tensor], torch.Tensor], *tensors: torch.Tensor) -> Triple:
    """Query, key and value changed; one tensor in two places stays one."""
    query, key, value = tensors
    changed = change(query)
    others = changed if key is query else change(key)
    return changed, others, others if value is key else change(value)


def _of_jagged(query: Any, key: Any, value: Any, call: Call) -> torch.Tensor:
    """The heads' results for rows of sequences that are packed: no padding is computed."""
    projected = _projected(_each_once(rows_of, query, key, value), call)
    q, k, v = (tensor.unflatten(-1, (call.num_heads, -1)) for tensor in projected)
    max_q, max_k = (int(tensor._get_max_seqlen()) for tensor in (query, key))
    y: torch.Tensor = attention_varlen(
        q, k, v, query.offsets(), key.offsets(), max_q, max_k, call.dropout_p, call.is_causal
    )
    return y.flatten(-2)


def _of_padded(tensors: Triple, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The heads' results, in the layout of query, and each head's probabilities or None."""
    # As torch does: where its hint would hide the keys that are added, the mask is read.
    masked = call.key_padding_mask is not None or call.need_weights
    follows = call.is_causal and not (call.n_more and masked)
    mask = merged_mask(tensors[0], call._replace(attn_mask=None) if follows else call)
    q, k, v = _projected(tensors, call)
    swap = q.dim() == 3 and not call.batch_first
    if swap:
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    k = _lengthened(k, call.bias_k, call.add_zero_attn)
    v = _lengthened(v, call.bias_v, call.add_zero_attn)
    q, k, v = (split_heads(tensor, call.num_heads) for tensor in (q, k, v))
    weights = None
    if call.need_weights:
        y, weights = _with_weights(q, k, v, mask, call.dropout_p, follows)
    else:
        by_window = follows and mask is not None
        y = scaled_dot_product_attention(
            q, k, v, mask, call.dropout_p, follows and not by_window,
            window=(None, 0) if by_window else None,
        )  # fmt: skip
    y = merge_heads(y)
    return y.transpose(0, 1) if swap else y, weights


def _takes(tensors: Triple, call: Call) -> bool:
    masks = real_mask(call.key_padding_mask), real_mask(call.attn_mask)
    return takes("multihead_attention", *tensors, *call.parameters(), *masks)


def _declined(call: Call, static: bool) -> bool:
    reason, head = "static keys or values" if static else None, call.embed_dim // call.num_heads
    if head > WIDEST_HEAD:
        reason = f"no kernel for heads of size {head}, over {WIDEST_HEAD}"
    if reason is not None:
        decline("multihead_attention", reason)
    return reason is not None


def _by_torch(
    tensors: Triple, batch_first: bool, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not (batch_first and tensors[0].dim() == 3):
        return F.multi_head_attention_forward(*tensors, *arguments)
    swapped = _each_once(lambda tensor: tensor.transpose(0, 1), *tensors)
    y, weights = F.multi_head_attention_forward(*swapped, *arguments)
    return y.transpose(0, 1), weights


def multi_head_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: torch.Tensor | None,
    in_proj_bias: torch.Tensor | None,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    training: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: torch.Tensor | None = None,
    k_proj_weight: torch.Tensor | None = None,
    v_proj_weight: torch.Tensor | None = None,
    static_k: torch.Tensor | None = None,
    static_v: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    batch_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y = [head_1 … head_h] W_oᵀ + b_o, with head_i the attention of q_i, k_i and v_i.

    These are the parts, of embed_dim / num_heads columns each, of query W_qᵀ + b_q, key W_kᵀ + b_k
    and value W_vᵀ + b_v: in one product where the three are one tensor, in two where key is value.
    No scores are in memory, and no layout is copied on the way.

    Args:
        query, key, value: (L, N, E), (S, N, E) and (S, N, Ev), or without N; or, with
            ``batch_first``, jagged nested tensors (N, ·, E), which have no masks.
        embed_dim_to_check, num_heads: features of query, and what they are divided among.
        in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight: W_q, W_k and W_v as one
            (3 E, E), or, with ``use_separate_proj_weight``, alone.
        in_proj_bias: (3 E,), or None.
        bias_k, bias_v: (1, 1, E), another key and value at the end of each sequence, or None.
        add_zero_attn: whether a key and a value of zeros follow.
        dropout_p, training: of the probabilities, in training.
        out_proj_weight, out_proj_bias: W_o and b_o.
        key_padding_mask: (N, S), or (S,); of booleans, True rules a key out, numbers are added.
        attn_mask: (L, S), or (N num_heads, L, S); likewise.
        need_weights, average_attn_weights: whether the probabilities are returned, (N, L, S) or,
            not averaged, (N, num_heads, L, S): those that v was multiplied by, after the dropout.
            With them, rows of which everything is ruled out are NaN, as torch's; else 0.
        static_k, static_v: left to torch.
        is_causal: says that ``attn_mask`` is the causal one. It is then not read, but where
            bias_k or add_zero_attn stand beside need_weights or key_padding_mask.
        batch_first: (N, L, E) instead of (L, N, E).

    Raises:
        AssertionError: dimensions or shapes do not fit.
        RuntimeError: is_causal without attn_mask; or other shapes, dtypes or devices do not fit.
        TypeError: an argument is not of its type.
        ValueError: dropout_p is no probability.

    Source: Vaswani et al. (2017), https://arxiv.org/abs/1706.03762, section 3.2.2.
    """
    tensors = query, key, value
    given = (
        embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
        dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights,
        attn_mask, use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k,
        static_v, average_attn_weights, is_causal,
    )  # fmt: skip
    named = zip(("query", "key", "value"), tensors, strict=True)
    if not all(is_tensor("multi-head attention", tensor, name) for name, tensor in named):
        return _by_torch(tensors, batch_first, *given)
    check_arguments(dropout_p := number("dropout_p", dropout_p))
    alone, separate = use_separate_proj_weight, (q_proj_weight, k_proj_weight, v_proj_weight)
    call = Call(
        embed_dim_to_check, num_heads, None if alone else in_proj_weight,
        separate if alone else None, in_proj_bias, bias_k, bias_v, add_zero_attn,
        dropout_p if training else 0.0, out_proj_weight, out_proj_bias, key_padding_mask,
        attn_mask, need_weights, is_causal, batch_first,
    )  # fmt: skip
    weights = None
    if any(tensor.is_nested for tensor in tensors):
        check_jagged(tensors, call)
        y = _of_jagged(*tensors, call)
    else:
        check_call(tensors, call)
        static = static_k is not None or static_v is not None
        if not _takes(tensors, call) or _declined(call, static):
            return _by_torch(tensors, batch_first, *given)
        y, weights = _of_padded(tensors, call)
    y = with_rows(linear(y, out_proj_weight, out_proj_bias), query)
    return y, weights.mean(-3) if weights is not None and average_attn_weights else weights
