"""What multi-head attention makes of its arguments: what it refuses, and the mask of the scores."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gpunn.functional.dispatch import autocast_is_on

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value."""


class Call(NamedTuple):
    """The arguments of a call beside query, key and value; dropout_p as it applies."""

    embed_dim: int
    num_heads: int
    packed: torch.Tensor | None
    """The weights of query, key and value, one below the other; None where they are separate."""
    separate: tuple[Any, Any, Any] | None
    bias: torch.Tensor | None
    """Of all three."""
    bias_k: torch.Tensor | None
    bias_v: torch.Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_weight: torch.Tensor
    out_bias: torch.Tensor | None
    key_padding_mask: torch.Tensor | None
    attn_mask: torch.Tensor | None
    need_weights: bool
    is_causal: bool
    batch_first: bool

    def parameters(self) -> tuple[torch.Tensor | None, ...]:
        """Weights and biases."""
        projections = (self.packed,) if self.separate is None else self.separate
        return (*projections, self.bias, self.bias_k, self.bias_v, self.out_weight, self.out_bias)

    @property
    def n_more(self) -> int:
        """Keys that are added to those given."""
        return (self.bias_k is not None) + bool(self.add_zero_attn)


def check_call(tensors: Triple, call: Call) -> None:
    """Refuse what does not fit, before anything is computed, as torch's module does.

    Raises:
        AssertionError: dimensions or shapes that torch asserts.
        RuntimeError: is_causal without a mask; other shapes, dtypes or devices.
        TypeError: a mask is no tensor.
    """
    _check_shapes(tensors, call)
    _check_parameters(tensors, call)
    _check_masks(tensors, call)
    if call.is_causal and call.attn_mask is None:
        raise RuntimeError("is_causal: multi-head attention expects the attn_mask that is causal")


def batch_of(query: torch.Tensor, call: Call) -> int | None:
    """Sequences; None where there is no such dimension."""
    return None if query.dim() == 2 else query.shape[0 if call.batch_first else 1]


def _length_of(tensor: torch.Tensor, call: Call) -> int:
    return tensor.shape[1 if tensor.dim() == 3 and call.batch_first else 0]


def _check_shapes(tensors: Triple, call: Call) -> None:
    query, key, value = tensors
    if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
        raise AssertionError(
            "query, key, value: multi-head attention expects 2 dimensions each or, with a batch, "
            f"3, got {query.dim()}, {key.dim()} and {value.dim()}"
        )
    if query.shape[-1] != call.embed_dim or call.embed_dim % call.num_heads:
        raise AssertionError(
            f"query: multi-head attention expects {call.embed_dim} features, a multiple of "
            f"{call.num_heads} heads, got {query.shape[-1]}"
        )
    n_compared = 3 if call.separate is None else query.dim() - 1
    if key.shape[:n_compared] != value.shape[:n_compared]:
        raise AssertionError(
            f"value: multi-head attention expects the shape of key, {tuple(key.shape)}, "
            f"got {tuple(value.shape)}"
        )
    if batch_of(query, call) != batch_of(key, call):
        raise RuntimeError(
            f"key: multi-head attention expects {batch_of(query, call)} sequences, as query has, "
            f"got {batch_of(key, call)}"
        )


def _check_parameters(tensors: Triple, call: Call) -> None:
    query, width = tensors[0], call.embed_dim
    names, wanted = ["in_proj_weight"], [(3 * width, width)]
    if call.separate is not None:
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        wanted = [(width, tensor.shape[-1]) for tensor in tensors]
    for name, weight, shape in zip(names, call.parameters(), wanted, strict=False):
        found = None if weight is None else tuple(weight.shape)
        if found != shape:
            raise AssertionError(f"{name}: multi-head attention expects {shape}, got {found}")
    if (call.bias_k is None) != (call.bias_v is None):
        raise AssertionError("bias_k, bias_v: multi-head attention expects both or neither")
    names += ["in_proj_bias", "bias_k", "bias_v", "out_proj_weight", "out_proj_bias"]
    names = ["query", "key", "value", *names]
    for name, tensor in zip(names, (*tensors, *call.parameters()), strict=True):
        if tensor is None:
            continue
        other_type = tensor.dtype != query.dtype and not autocast_is_on(query)
        if other_type or tensor.device != query.device:
            raise RuntimeError(
                f"{name}: multi-head attention expects {query.dtype} on {query.device}, "
                f"as query is, got {tensor.dtype} on {tensor.device}"
            )


def _check_masks(tensors: Triple, call: Call) -> None:
    padding, mask, batch = call.key_padding_mask, call.attn_mask, batch_of(tensors[0], call)
    for name, given in (("key_padding_mask", padding), ("attn_mask", mask)):
        if given is not None and not isinstance(given, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
        if given is not None and not (given.dtype == torch.bool or given.is_floating_point()):
            raise AssertionError(f"{name}: expected booleans or real numbers, got {given.dtype}")
    n_queries, n_keys = (_length_of(tensor, call) for tensor in tensors[:2])
    wanted = (n_keys,) if batch is None else (batch, n_keys)
    if padding is not None and tuple(padding.shape) != wanted:
        raise AssertionError(
            f"key_padding_mask: expected shape {wanted}, got {tuple(padding.shape)}"
        )
    if mask is None:
        return
    pairs = n_queries, n_keys
    each = (call.num_heads if batch is None else batch * call.num_heads, *pairs)
    if tuple(mask.shape) not in (pairs, each):
        asserted = mask.dim() not in (2, 3) or (batch is None and mask.dim() == 3)
        error = AssertionError if asserted else RuntimeError
        raise error(f"attn_mask: expected shape {pairs} or {each}, got {tuple(mask.shape)}")
    if padding is not None and padding.dtype != mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. "
            "Use same type for both instead.",
            stacklevel=4,
        )


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Of booleans, where True rules out, -inf there and 0 elsewhere; numbers as they are."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def merged_mask(query: torch.Tensor, call: Call) -> torch.Tensor | None:
    """Both masks as one that attention takes, broadcasting to (batch, heads, queries, keys).

    Of booleans, it is one, in which True keeps; else a sum of numbers, as it is where weights are
    wanted, since -inf and not False makes NaN of the gradients of a row that sees nothing. It is no
    larger than the two make it: where each head sees the same, it has one. Added keys are seen.
    """
    masks, batch = [], batch_of(query, call)
    if call.attn_mask is not None:
        is_each = call.attn_mask.dim() == 3 and batch is not None
        shape = batch, call.num_heads
        masks.append(call.attn_mask.unflatten(0, shape) if is_each else call.attn_mask)
    if call.key_padding_mask is not None:
        masks.append(call.key_padding_mask[..., None, None, :])
    if not masks:
        return None
    masks = [F.pad(mask, (0, call.n_more)) for mask in masks] if call.n_more else masks
    if not call.need_weights and all(mask.dtype == torch.bool for mask in masks):
        kept = [~mask for mask in masks]
        return kept[0] if len(kept) == 1 else kept[0] & kept[1]
    added: list[Any] = [additive_mask(mask, query.dtype) for mask in masks]
    total: torch.Tensor = added[0] if len(added) == 1 else added[0] + added[1]
    return total


def check_jagged(tensors: Triple, call: Call) -> None:
    """Refuse nested tensors that are not jagged, or come with what only padded ones can have.

    Raises:
        AssertionError: as torch's module does, outside of its path for inference.
        RuntimeError: dtypes or devices differ.
    """
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        jagged: Any = tensor
        packed = tensor.is_nested and tensor.layout == torch.jagged and jagged.lengths() is None
        if not packed or tensor.dim() != 3:
            raise AssertionError(
                f"{name}: multi-head attention expects three jagged nested tensors "
                "(batch, length, features) without holes, or none that is nested"
            )
    if tensors[1].shape[1] != tensors[2].shape[1]:
        raise AssertionError("value: multi-head attention expects the sequences of key")
    masks = call.key_padding_mask, call.attn_mask
    if any(t is not None for t in masks) or call.n_more or call.need_weights:
        raise AssertionError(
            "query: multi-head attention of nested tensors takes no masks, returns no weights, and "
            "adds no keys"
        )
    if not call.batch_first:
        raise AssertionError("query: multi-head attention of nested tensors expects batch_first")
    _check_parameters(tensors, call)
