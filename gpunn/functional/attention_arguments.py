"""What the functions of attention make of their arguments, and the same in torch's operations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from gpunn.functional.dispatch import is_tensor, number

Alignment = Literal["upper_left", "lower_right"]
Window = tuple[int | None, int | None]
FARTHEST = 2**30
"""A bound of a window that no sequence reaches; sums of positions and bounds stay below 2^31."""
WIDEST_HEAD = 256


class Rules(NamedTuple):
    """What changes scores: the last arguments of the launchers."""

    scale: float
    softcap: float
    dropout_p: float
    before: int
    after: int
    lower_right: bool


class Given(NamedTuple):
    """Tensors as the launchers take them: four dimensions, a mask of bits as uint8."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    slopes: torch.Tensor | None
    mask_batches: torch.Tensor | None
    """Of each batch, which of the mask's is its own; None where the mask has one or all."""
    starts_q: torch.Tensor | None
    """Where packed sequences begin, and, as its last element, where they end; batch is then 1."""
    starts_k: torch.Tensor | None
    n_queries: int
    """Of the longest sequence."""
    n_keys: int


def rules_of(
    query: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window: Window | None,
    softcap: float | None,
    alignment: str,
) -> Rules:
    """The numbers that the kernels take.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: dropout_p is no probability, softcap is not positive, a bound of the window is
            negative, or the alignment is unknown.
    """
    dropout_p = number("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive number, got {softcap}")
    if alignment not in ("upper_left", "lower_right"):
        raise ValueError(f"alignment: expected 'upper_left' or 'lower_right', got {alignment!r}")
    before, after = bounds_of(window, is_causal)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    return Rules(
        float(scale), float(softcap or 0), dropout_p, before, after,
        alignment == "lower_right",
    )  # fmt: skip


def bounds_of(window: Window | None, is_causal: bool) -> tuple[int, int]:
    """How many keys before and after its own position a query sees; -1: all of them."""
    bounds: Any = (None, None) if window is None else window
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        raise TypeError(f"window: expected two bounds, (before, after), got {window!r}")
    for bound in bounds:
        is_integer = isinstance(bound, (int, torch.SymInt)) and not isinstance(bound, bool)
        if bound is not None and not is_integer:
            raise TypeError(f"window: expected integers or None, got {window!r}")
        if bound is not None and bound < 0:
            raise ValueError(f"window: expected bounds of 0 or more, got {window!r}")
    before, after = (-1 if bound is None else min(bound, FARTHEST) for bound in bounds)
    return before, 0 if is_causal else after


def of_causal_bias(
    mask: Any, is_causal: bool, alignment: str
) -> tuple[torch.Tensor | None, bool, str]:
    """torch's ``CausalBias`` as a rule instead of a mask; other masks as they are."""
    if mask is None or type(mask) is torch.Tensor:
        return mask, is_causal, alignment
    from torch.nn.attention.bias import CausalBias, CausalVariant  # imports the compiler: a second

    if not isinstance(mask, CausalBias):
        return mask, is_causal, alignment
    corner = mask.variant == CausalVariant.UPPER_LEFT
    return None, True, "upper_left" if corner else "lower_right"


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse what does not fit together, as torch does.

    Raises:
        RuntimeError: dimensions, sizes, dtypes or devices differ where they must not.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise RuntimeError(
                f"{name}: attention expects 2 dimensions or more, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise RuntimeError(
                f"{name}: attention expects {query.dtype} on {query.device}, as query is, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            f"key: attention expects heads of size {query.shape[-1]}, got {key.shape[-1]}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"value: attention expects {key.shape[-2]} rows, as key has, got {value.shape[-2]}"
        )


def _heads(tensor: torch.Tensor) -> int:
    return tensor.shape[-3] if tensor.dim() > 2 else 1


def leading_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[int, ...]:
    """Batch dimensions and heads of the result.

    Raises:
        IndexError: enable_gqa with tensors that have no dimension for heads.
        RuntimeError: they do not broadcast, or key heads do not divide query heads.
    """
    given = [tensor.shape[:-2] for tensor in (query, key, value)]
    if given[0] == given[1] == given[2] and (given[0] or not enable_gqa):
        return tuple(given[0])  # what broadcast_shapes takes its time to find
    if not enable_gqa:
        return tuple(torch.broadcast_shapes(*given))
    if min(len(shape) for shape in given) < 1:
        raise IndexError("enable_gqa: attention expects a dimension of heads, the third from last")
    n_heads = query.shape[-3]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[-3] == 0 or n_heads % tensor.shape[-3]:
            raise RuntimeError(
                f"{name}: the number of its heads, {tensor.shape[-3]}, must divide that of query, "
                f"{n_heads}"
            )
    return (*torch.broadcast_shapes(*(shape[:-1] for shape in given)), n_heads)


def _with_heads(tensor: torch.Tensor, leading: tuple[int, ...], n_heads: int) -> torch.Tensor:
    """(batch, n_heads, rows, columns), a view where the strides allow one."""
    batches = leading[:-1]
    if tensor.dim() == 4 and tensor.shape[:2] == (*batches, n_heads):
        return tensor
    if tensor.dim() == 2:
        tensor = tensor[None]
    wide = tensor.expand(*batches, n_heads, *tensor.shape[-2:])
    return wide.reshape(math.prod(batches), n_heads, *tensor.shape[-2:])


def of_four_dimensions(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
    leading: tuple[int, ...],
) -> Given:
    """What the launchers take; key heads that several query heads share are not copied."""
    n_heads = leading[-1] if leading else 1
    shared = _heads(key) if _heads(key) == _heads(value) else n_heads
    if n_heads % max(shared, 1):
        shared = n_heads
    pair = []
    for tensor in (key, value):
        if _heads(tensor) != shared and _heads(tensor) > 1:
            tensor = tensor.repeat_interleave(shared // _heads(tensor), dim=-3)
        pair.append(_with_heads(tensor, leading, shared))
    return Given(
        _with_heads(query, leading, n_heads), pair[0], pair[1],
        None if mask is None else _mask_of(mask, leading),
        None if slopes is None else slopes_of(slopes, leading, query.dtype),
        None if mask is None else _mask_batches(mask, leading[:-1]),
        None, None, query.shape[-2], key.shape[-2],
    )  # fmt: skip


def _mask_of(mask: torch.Tensor, leading: tuple[int, ...]) -> torch.Tensor:
    """(batches of its own, heads or 1, queries or 1, keys or 1)."""
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    mask = mask[(None,) * (max(len(leading), 1) + 2 - mask.dim())]
    return mask.reshape(math.prod(mask.shape[:-3]), *mask.shape[-3:])


def _mask_batches(mask: torch.Tensor, batches: tuple[int, ...]) -> torch.Tensor | None:
    """Which batch of the mask each batch has; None where it has one, or all of them."""
    own = mask.shape[:-3]
    n_own, n_all = math.prod(own), math.prod(batches)
    if n_own in (1, n_all):
        return None
    return torch.arange(n_own, device=mask.device).view(own).expand(batches).reshape(n_all)


def slopes_of(slopes: torch.Tensor, leading: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """(batch or 1, heads), in float32, or float64 for queries of that dtype."""
    wide = slopes.to(torch.promote_types(dtype, torch.float32))
    if slopes.dim() == 1:
        return wide[None]
    return wide.expand(leading).reshape(-1, leading[-1])


def check_mask(mask: Any, query: torch.Tensor, n_keys: int, leading: tuple[int, ...]) -> None:
    """Refuse a mask that does not broadcast, as torch does.

    Raises:
        IndexError: the mask has fewer than 2 dimensions.
        RuntimeError: its shape, dtype or device does not fit.
        TypeError: it is no tensor.
    """
    if not is_tensor("attention", mask, "attn_mask"):
        return
    if mask.dim() < 2:
        raise IndexError(
            f"attn_mask: attention expects 2 dimensions or more, got {tuple(mask.shape)}"
        )
    full = (*leading, query.shape[-2], n_keys)
    fits = mask.dim() <= len(full) and all(
        size in (1, wanted) for size, wanted in zip(mask.shape[::-1], full[::-1], strict=False)
    )
    if not fits:
        raise RuntimeError(
            f"attn_mask: attention expects a shape that broadcasts to {full}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.device != query.device:
        raise RuntimeError(
            f"attn_mask: attention expects bool, float32 or {query.dtype} on {query.device}, "
            f"got {mask.dtype} on {mask.device}"
        )


def check_slopes(slopes: Any, leading: tuple[int, ...], device: torch.device) -> None:
    """Refuse slopes that are not one a head.

    Raises:
        RuntimeError: their shape, dtype or device does not fit.
        TypeError: they are no tensor.
    """
    if not is_tensor("attention", slopes, "alibi_slopes"):
        return
    n_heads = leading[-1] if leading else 1
    if tuple(slopes.shape) not in ((n_heads,), tuple(leading)) or slopes.dim() < 1:
        raise RuntimeError(
            f"alibi_slopes: attention expects shape ({n_heads},) or {tuple(leading)}, "
            f"got {tuple(slopes.shape)}"
        )
    if not slopes.is_floating_point() or slopes.device != device:
        raise RuntimeError(
            f"alibi_slopes: attention expects floating-point numbers on {device}, "
            f"got {slopes.dtype} on {slopes.device}"
        )


def real_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that is added to the scores; None for one of booleans."""
    return None if mask is None or mask.dtype == torch.bool else mask


def mask_wants_float32(mask: torch.Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the mask has a gradient that is finer than what products of 16-bit numbers give."""
    if mask is None or not (mask.requires_grad and torch.is_grad_enabled()):
        return False
    return dtype.itemsize < mask.dtype.itemsize


def natural_logarithm(maxima: torch.Tensor, sums: torch.Tensor, given: Given) -> torch.Tensor:
    """log Σ exp(score) from what the kernel keeps, in the units that it computes in."""
    is_additive = given.mask is not None and given.mask.dtype != torch.uint8
    return maxima * (1.0 if is_additive else math.log(2)) + sums.log()


def scores(given: Given, rules: Rules) -> torch.Tensor:
    """The scores, -inf where a pair is ruled out, in torch's operations: (batch, heads, L, S)."""
    query, key, mask, slopes = given.query, given.key, given.mask, given.slopes
    if mask is not None and given.mask_batches is not None:
        mask = mask[given.mask_batches]
    group = query.shape[1] // max(key.shape[1], 1)
    s = (query * rules.scale) @ key.repeat_interleave(group, 1).mT
    if rules.softcap:
        s = rules.softcap * torch.tanh(s / rules.softcap)
    n_queries, n_keys = s.shape[-2:]
    offset = n_keys - n_queries if rules.lower_right else 0
    own = torch.arange(n_queries, device=s.device)[:, None] + offset
    distance = torch.arange(n_keys, device=s.device) - own
    if slopes is not None:
        s = s - slopes[..., None, None].to(s.dtype) * distance.abs()
    if mask is not None:
        is_boolean = mask.dtype == torch.uint8
        s = s.masked_fill(mask == 0, -math.inf) if is_boolean else s + mask.to(s.dtype)
    if rules.before >= 0:
        s = s.masked_fill(distance < -rules.before, -math.inf)
    if rules.after >= 0:
        s = s.masked_fill(distance > rules.after, -math.inf)
    return s


def softmax(s: torch.Tensor) -> torch.Tensor:
    """softmax over the last dimension, 0 where all of it is -inf."""
    if s.shape[-1] == 0:
        return s
    alive = (s != -math.inf).any(-1, keepdim=True)
    return torch.softmax(s.where(alive, 0.0), -1).where(alive, 0.0)


def composed(given: Given, rules: Rules, factors: torch.Tensor | None) -> torch.Tensor:
    """Attention in torch's operations, which can be differentiated twice.

    ``factors``: the dropout's; where there are none and dropout_p is above 0, torch draws them.
    """
    if given.starts_q is not None:
        return _composed_by_sequence(given, rules, factors)
    wide = torch.promote_types(given.query.dtype, torch.float32)
    query, key, value = (tensor.to(wide) for tensor in given[:3])
    p = softmax(scores(given._replace(query=query, key=key), rules))
    if factors is not None:
        p = p * factors.to(wide)
    elif rules.dropout_p > 0:
        p = F.dropout(p, rules.dropout_p)
    group = query.shape[1] // max(value.shape[1], 1)
    return (p @ value.repeat_interleave(group, 1)).to(given.query.dtype)


def log_sums(given: Given, rules: Rules) -> torch.Tensor:
    """log Σ exp(score) of each row in torch's operations, without a gradient."""
    with torch.no_grad():
        if given.starts_q is None:
            wide = torch.promote_types(given.query.dtype, torch.float32)
            query, key = given.query.to(wide), given.key.to(wide)
            return torch.logsumexp(scores(given._replace(query=query, key=key), rules), -1)
        parts = [log_sums(one, rules) for one, _ in _sequences(given)]
        rest = given.query.shape[2] - sum(part.shape[2] for part in parts)
        return torch.cat([*parts, parts[0].new_full((*parts[0].shape[:2], rest), -math.inf)], 2)


def _sequences(given: Given) -> Iterator[tuple[Given, slice]]:
    """Each packed sequence by itself, and its rows; the host waits to learn where they are."""
    assert given.starts_q is not None
    assert given.starts_k is not None
    spans = zip(pairwise(given.starts_q.tolist()), pairwise(given.starts_k.tolist()), strict=True)
    for i, (own, other) in enumerate(spans):
        rows, keys = slice(*own), slice(*other)
        yield (
            given._replace(
                query=given.query[:, :, rows],
                key=given.key[:, :, keys],
                value=given.value[:, :, keys],
                slopes=None if given.slopes is None else given.slopes[i % len(given.slopes)][None],
                starts_q=None,
                starts_k=None,
                n_keys=other[1] - other[0],
            ),
            rows,
        )


def _composed_by_sequence(given: Given, rules: Rules, factors: torch.Tensor | None) -> torch.Tensor:
    parts = [
        composed(one, rules, None if factors is None else factors[:, :, rows, : one.n_keys])
        for one, rows in _sequences(given)
    ]
    rest = given.query.shape[2] - sum(part.shape[2] for part in parts)
    zeros = given.query.new_zeros((*given.query.shape[:2], rest, given.value.shape[3]))
    return torch.cat([*parts, zeros], 2)
