"""Attention of one query a sequence to a cache of keys and values."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from gpunn.functional.attention_arguments import (
    WIDEST_HEAD,
    Given,
    Rules,
    check_slopes,
    composed,
    rules_of,
    slopes_of,
)
from gpunn.kernels.attention_decode import attention_decode as launch_decode
from gpunn.kernels.launch import decline, takes


def attention_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """y = softmax(cap(scale q kᵀ) + b) v over the first keys of a cache: a step of decoding.

    The query stands at the last of its sequence's keys, which must be in the cache already.

    Args:
        query: (batch, heads, E).
        key_cache, value_cache: (batch, key heads, positions, E) and (…, Ev); or, paged,
            (pages, key heads, positions of a page, E) and (…, Ev). Key heads divide heads.
        cache_lengths: (batch,), int32 or int64: how many keys each sequence has. Of 0 the result is
            0. They are not compared with the size of the cache, which would wait for the device.
        block_table: (batch, pages of the longest sequence), int32 or int64: the pages that hold its
            keys, in order; None: the cache is not paged.
        scale: 1 / √E if None.
        window: how many keys before its own position the query sees; None: all.
        alibi_slopes: (heads,) or (batch, heads).
        softcap: cap(z) = softcap tanh(z / softcap).

    Returns:
        (batch, heads, Ev). Where an argument requires a gradient, by PyTorch's operations.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other.
        TypeError: an argument is not of its type.
        ValueError: a number that is none of those allowed.

    Sources: Vaswani et al. (2017), https://arxiv.org/abs/1706.03762; Kwon et al. (2023),
    https://arxiv.org/abs/2309.06180 (pages).
    """
    _check(query, key_cache, value_cache, cache_lengths, block_table)
    bounds = None if window is None else (window, None)
    rules = rules_of(query, 0.0, False, scale, bounds, softcap, "lower_right")
    leading = tuple(query.shape[:2])
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, leading, query.device)
        alibi_slopes = slopes_of(alibi_slopes, leading, query.dtype)
    tensors = query, key_cache, value_cache, alibi_slopes
    if not takes("attention_decode", *tensors) or _declined(*tensors):
        return _by_torch(
            query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes, rules
        )
    launch: Any = launch_decode
    y: torch.Tensor = launch(
        query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes,
        rules.scale, rules.softcap, rules.before,
    )  # fmt: skip
    return y


def _declined(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: Any) -> bool:
    widest, reason = max(query.shape[-1], value.shape[-1]), None
    if widest > WIDEST_HEAD:
        reason = f"no kernel for heads of size {widest}, over {WIDEST_HEAD}"
    tensors = query, key, value, slopes
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        reason = "a gradient: PyTorch's operations"
    if reason is not None:
        decline("attention_decode", reason)
    return reason is not None


def _by_torch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    block_table: torch.Tensor | None,
    slopes: torch.Tensor | None,
    rules: Rules,
) -> torch.Tensor:
    """Sequences of one length together; the host waits for the device to learn the lengths."""
    of_length: dict[int, list[int]] = {}
    for i, length in enumerate(cache_lengths.tolist()):
        of_length.setdefault(length, []).append(i)
    found = [query.new_empty(0, query.shape[1], value_cache.shape[-1])]
    for length, sequences in of_length.items():
        rows = torch.tensor(sequences, device=query.device)
        parts = []
        for cache in (key_cache, value_cache):
            if block_table is None:
                parts.append(cache[:, :, :length][rows])
            else:
                pages = cache[block_table[rows].long()]
                parts.append(pages.transpose(1, 2).flatten(2, 3)[:, :, :length])
        own = slopes if slopes is None or len(slopes) == 1 else slopes[rows]
        given = Given(
            query[rows, :, None], parts[0], parts[1], None, own, None, None, None, 1, length
        )
        found.append(composed(given, rules, None)[:, :, 0])
    order = torch.tensor([*chain(*of_length.values())], dtype=torch.int64, device=query.device)
    return torch.cat(found)[order.argsort()]


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    """Refuse what does not fit together."""
    _check_each(query, key, value, lengths, table)
    n_batches, n_heads, head = query.shape
    if key.shape[-1] != head or key.shape[:3] != value.shape[:3]:
        raise RuntimeError(
            f"key_cache, value_cache: attention_decode expects heads of size {head} and one shape "
            f"but for those, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if key.shape[1] == 0 or n_heads % key.shape[1]:
        raise RuntimeError(
            f"key_cache: the number of its heads, {key.shape[1]}, must divide that of query, "
            f"{n_heads}"
        )
    for name, tensor in (("cache_lengths", lengths), ("block_table", table)):
        if tensor is not None and len(tensor) != n_batches:
            raise RuntimeError(f"{name}: expected {n_batches} rows, got {len(tensor)}")
    if table is None and len(key) != n_batches:
        raise RuntimeError(f"key_cache: expected {n_batches} sequences, got {len(key)}")


def _check_each(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    for name, tensor, n_dims in (
        ("query", query, 3), ("key_cache", key, 4), ("value_cache", value, 4),
        ("cache_lengths", lengths, 1), ("block_table", table, 2),
    ):  # fmt: skip
        if tensor is None and name == "block_table":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != n_dims or tensor.device != query.device:
            raise RuntimeError(
                f"{name}: attention_decode expects {n_dims} dimensions on {query.device}, "
                f"got {tuple(tensor.shape)} on {tensor.device}"
            )
        integers = (torch.int32, torch.int64)
        allowed = integers if name in ("cache_lengths", "block_table") else (query.dtype,)
        if tensor.dtype not in allowed:
            raise RuntimeError(
                f"{name}: attention_decode expects {' or '.join(map(str, allowed))}, "
                f"got {tensor.dtype}"
            )
