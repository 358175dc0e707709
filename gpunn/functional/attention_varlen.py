"""Attention of sequences of different lengths, packed one behind the other."""

from __future__ import annotations

from typing import Any

import torch

from gpunn.functional.attention_arguments import (
    Alignment,
    Given,
    Window,
    check_slopes,
    check_tensors,
    rules_of,
    slopes_of,
)
from gpunn.functional.attention_function import attend
from gpunn.functional.dispatch import autocast_is_on, autocast_to_lower
from gpunn.kernels.launch import takes


def attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: Window | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    alignment: Alignment = "upper_left",
    return_lse: bool = False,
) -> Any:
    """``scaled_dot_product_attention`` of each of several packed sequences.

    Sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]. Rows behind the last sequence give 0.

    Args:
        query: (rows, heads, E), the sequences one behind the other.
        key, value: (rows, key heads, E) and (rows, key heads, Ev); key heads divide heads.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,), int32 or int64, from 0, not decreasing.
        max_q, max_k: rows of the longest sequence, or more. Numbers of the host, which are not
            compared with what is on the device: a sequence's rows beyond them are not computed.
        dropout_p: the bits are those of ``dropout_mask`` for (heads, rows, max_k) probabilities.
        is_causal, scale, window, softcap, alignment: as ``scaled_dot_product_attention``'s.
        alibi_slopes: (heads,) or (sequences, heads); a gradient, as there, is PyTorch's.
        return_lse: also log Σ_j exp(s_ij), (heads, rows), float32, without a gradient.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other.
        TypeError: an argument is not of its type.
        ValueError: a number that is none of those allowed.

    Sources: Vaswani et al. (2017), https://arxiv.org/abs/1706.03762; Dao (2023),
    https://arxiv.org/abs/2307.08691, whose code packs sequences so.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if autocast_is_on(query):
        lowered: Any = autocast_to_lower(query, key, value)
        query, key, value = lowered
    rules = rules_of(query, dropout_p, is_causal, scale, window, softcap, alignment)
    _check_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    n_sequences, n_heads = cu_seqlens_q.shape[0] - 1, query.shape[1]
    if alibi_slopes is not None:
        leading = (n_sequences, n_heads)
        check_slopes(alibi_slopes, leading, query.device)
        alibi_slopes = slopes_of(alibi_slopes, leading, query.dtype)
    packed = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    starts = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    given = Given(packed[0], packed[1], packed[2], None, alibi_slopes, None, *starts, max_q, max_k)
    y, lse = attend(given, rules, takes("attention_varlen", query, key, value, alibi_slopes))
    y = y[0].transpose(0, 1)
    return (y, lse()[0]) if return_lse else y


def attention_jagged(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **keywords: Any
) -> torch.Tensor:
    """``attention_varlen`` of jagged nested tensors (batch, heads, length, E), and of no others.

    Raises:
        RuntimeError: they are not that.
    """
    packed, starts, longest = [], [], []
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        jagged: Any = tensor
        if not tensor.is_nested or tensor.layout != torch.jagged or tensor.dim() != 4:
            raise RuntimeError(
                f"{name}: attention expects three jagged nested tensors of 4 dimensions, "
                f"got {tuple(tensor.shape)} in {tensor.layout}"
            )
        if jagged.lengths() is not None:
            raise RuntimeError(f"{name}: attention expects a nested tensor without holes")
        packed.append(jagged.transpose(1, 2).values())
        starts.append(jagged.offsets())
        longest.append(int(jagged._get_max_seqlen()))
    y = attention_varlen(
        packed[0], packed[1], packed[2], *starts[:2], *longest[:2], *arguments, **keywords
    )
    nested: torch.Tensor = torch.nested.nested_tensor_from_jagged(
        y, starts[0], max_seqlen=longest[0]
    )
    return nested.transpose(1, 2)


def _check_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
) -> None:
    """Refuse what no packed sequences are."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise RuntimeError(
                f"{name}: attention_varlen expects (rows, heads, head size), "
                f"got {tuple(tensor.shape)}"
            )
    check_tensors(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
    n_key_heads = key.shape[1]
    if value.shape[1] != n_key_heads or n_key_heads == 0 or query.shape[1] % n_key_heads:
        raise RuntimeError(
            f"key, value: their heads, {n_key_heads} and {value.shape[1]}, must be equal and "
            f"divide those of query, {query.shape[1]}"
        )
    for name, longest in (("max_q", max_q), ("max_k", max_k)):
        if isinstance(longest, bool) or not isinstance(longest, int):
            raise TypeError(f"{name}: expected an integer, got {type(longest).__name__}")
        if longest < 0:
            raise ValueError(f"{name}: expected 0 or more, got {longest}")
    _check_starts(query.device, cu_seqlens_q, cu_seqlens_k)


def _check_starts(
    device: torch.device, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> None:
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(starts, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(starts).__name__}")
        if starts.dtype not in (torch.int32, torch.int64) or starts.device != device:
            raise RuntimeError(
                f"{name}: attention_varlen expects int32 or int64 on {device}, "
                f"got {starts.dtype} on {starts.device}"
            )
        if starts.dim() != 1 or len(starts) < 1 or len(starts) != len(cu_seqlens_q):
            raise RuntimeError(
                f"{name}: attention_varlen expects one dimension, as long as cu_seqlens_q, "
                f"got {tuple(starts.shape)}"
            )
