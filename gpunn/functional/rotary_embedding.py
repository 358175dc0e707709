"""Rotary position embedding: queries and keys turned by the angles of their positions."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function

from gpunn.functional.dispatch import distinct, is_tensor
from gpunn.kernels import rotary_embedding as kernels
from gpunn.kernels.launch import decline, takes


class _Rotary(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, and so on."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        n_pairs: int,
        interleaved: bool,
        inverse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.options = n_pairs, interleaved, not inverse
        ctx.set_materialize_grads(False)
        return kernels.rotary_embedding(query, key, cos, sin, n_pairs, interleaved, inverse)

    @staticmethod
    def backward(
        ctx: Any, dquery: torch.Tensor | None, dkey: torch.Tensor | None
    ) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[:2]
        given = [d if need else None for d, need in zip((dquery, dkey), needed, strict=True)]
        found: list[torch.Tensor | None] = [None, None]
        present = [i for i in range(2) if given[i] is not None]
        if present:
            first, second = given[present[0]], given[present[1]] if len(present) > 1 else None
            turn: Any = _Rotary.apply if torch.is_grad_enabled() else kernels.rotary_embedding
            turned = turn(first, second, *ctx.saved_tensors, *ctx.options)
            for i, gradient in zip(present, turned, strict=False):
                found[i] = gradient
        return *found, None, None, None, None, None


def _composed(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_pairs: int, interleaved: bool
) -> torch.Tensor:
    """The same in torch's operations, of one tensor."""
    turned, rest = x[..., : 2 * n_pairs], x[..., 2 * n_pairs :]
    if cos.shape[-1] == n_pairs:
        cos, sin = (
            t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)
            for t in (cos, sin)
        )  # fmt: skip
    if interleaved:
        quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        quarter = torch.cat((-turned[..., n_pairs:], turned[..., :n_pairs]), -1)
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    y = (turned * cos + quarter * sin).to(x.dtype)
    return torch.cat((y, rest), -1) if x.shape[-1] > 2 * n_pairs else y


def _check_heads(query: torch.Tensor, key: torch.Tensor) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise RuntimeError(
                f"{name}: rotary_embedding expects floating-point numbers (batch, heads, length, "
                f"head), got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if key.shape[0] != query.shape[0] or key.shape[2:] != query.shape[2:]:
        raise RuntimeError(
            f"key: rotary_embedding expects query's shape but for the number of heads, "
            f"{tuple(query.shape)}, got {tuple(key.shape)}"
        )


def _checked_pairs(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotary_dim: int | None,
) -> int:
    """The number of pairs that turn; what does not fit is refused."""
    _check_heads(query, key)
    batch, _, length, head = query.shape
    n_cols = cos.shape[-1] if cos.dim() else 0
    if rotary_dim is None:
        rotary_dim = head if 2 * n_cols == head else n_cols
    if rotary_dim % 2 or not 0 < rotary_dim <= head:
        raise RuntimeError(
            f"rotary_dim: rotary_embedding expects an even number of a head's {head} elements, "
            f"got {rotary_dim}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() in (2, 3) and table.shape == cos.shape and table.shape[-2] == length
        fits = fits and 2 * n_cols in (rotary_dim, 2 * rotary_dim)
        fits = fits and (table.dim() == 2 or table.shape[0] in (1, batch))
        if not fits or not table.is_floating_point():
            raise RuntimeError(
                f"{name}: rotary_embedding expects floating-point numbers (length, c) or (batch, "
                f"length, c) with length {length}, batch {batch} or 1, and c {rotary_dim} or "
                f"{rotary_dim // 2}, got {table.dtype} {tuple(table.shape)}"
            )
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        if tensor.device != query.device:
            raise RuntimeError(
                f"{name}: rotary_embedding expects a tensor on {query.device}, got {tensor.device}"
            )
    return rotary_dim // 2


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query and key, each pair (x1, x2) turned to (x1 cos - x2 sin, x2 cos + x1 sin).

    Computed in float32; each result has the dtype of its input, and, where that is dense, its
    strides.

    Args:
        query, key: (batch, heads, length, head), of any strides; the numbers of heads may differ.
        cos, sin: (length, c) or (batch, length, c): c is rotary_dim / 2, as ``rotary_tables`` makes
            them; or rotary_dim, with a column for each element, which has its pair's own value.
        interleaved: whether pairs are elements 2j and 2j + 1, as in RoFormer, and not elements j
            and j + rotary_dim / 2, as in GPT-NeoX and Llama.
        rotary_dim: the first elements of a head that turn; the rest passes through. By default all
            of them where c is head or head / 2, and otherwise c.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other.
        TypeError: an argument is no tensor.

    Source: J. Su et al., "RoFormer: Enhanced transformer with rotary position embedding", 2021,
    https://arxiv.org/abs/2104.09864, section 3.4.2.
    """
    given = {"query": query, "key": key, "cos": cos, "sin": sin}
    are_tensors = [is_tensor("rotary_embedding", tensor, name) for name, tensor in given.items()]
    if not all(are_tensors):
        stood_in: tuple[torch.Tensor, torch.Tensor] = handle_torch_function(
            rotary_embedding, tuple(given.values()), *given.values(), interleaved=interleaved,
            rotary_dim=rotary_dim,
        )  # fmt: skip
        return stood_in
    pairs = _checked_pairs(query, key, cos, sin, rotary_dim)
    taken = takes("rotary_embedding", query, key, cos, sin)
    if taken and torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        decline("rotary_embedding", "a gradient for cos or sin")
        taken = False
    if not taken:
        return (
            _composed(query, cos, sin, pairs, interleaved),
            _composed(key, cos, sin, pairs, interleaved),
        )
    tables = (cos[None], sin[None]) if cos.dim() == 2 else (cos, sin)
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    turn: Any = _Rotary.apply if wanted else kernels.rotary_embedding
    turned: tuple[torch.Tensor, torch.Tensor] = turn(
        *distinct((query, key)), *tables, pairs, interleaved, False
    )
    return turned


def rotary_tables(
    positions: int | torch.Tensor,
    dim: int,
    *,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of t / base^(2i / dim), i = 0, …, dim/2 - 1: (*, dim / 2) each.

    Computed in float64 and rounded.

    Args:
        positions: t, of any shape; or a number of them, from 0 on.
        dim: elements of a head that turn.
        base, device, dtype: 10,000 in RoFormer; of the result.

    Raises:
        ValueError: dim is not positive and even.

    Source: J. Su et al., "RoFormer", 2021, section 3.2.2, equation 15.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: expected a positive even number, got {dim}")
    if isinstance(positions, (int, torch.SymInt)):
        positions = torch.arange(positions, device=device)
    even = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angle = positions[..., None].to(torch.float64) * base ** (-even / dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)
