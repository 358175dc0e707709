"""Lookups in a table of vectors, with what a transformer's input adds to them in the same pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import has_torch_function_unary

from gpunn.functional.dispatch import AGAIN, check_arguments, is_tensor, number, record_fallback
from gpunn.kernels.dropout import dropout_factors
from gpunn.kernels.embedding import embedding_backward, embedding_forward
from gpunn.kernels.launch import decline, takes
from gpunn.kernels.philox import draw_seed


class Options(NamedTuple):
    """How vectors are looked up: positions repeat after ``length``; -1 is no padding."""

    length: int
    padding_idx: int
    scale: float
    dropout_p: float


class _Embedding(torch.autograd.Function):
    """Keeps the indices, and neither of the tables: their gradients do not depend on them."""

    @staticmethod
    def forward(
        ctx: Any,
        indices: torch.Tensor,
        weight: torch.Tensor,
        positions: torch.Tensor | None,
        positional: torch.Tensor | None,
        seed: torch.Tensor | None,
        options: Options,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        length, _, scale, dropout_p = options
        ctx.save_for_backward(indices, positions, seed)
        ctx.options = options
        ctx.tables = [None if t is None else (t.shape[0], t.dtype) for t in (weight, positional)]
        return embedding_forward(
            indices, weight, positions, positional, seed, length, scale, dropout_p, dtype
        )

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        indices, positions, seed = ctx.saved_tensors
        gradient = _differentiable if torch.is_grad_enabled() else _by_kernels
        bare = ctx.options._replace(padding_idx=-1, scale=1.0)
        dweight, dpositional = (
            gradient(dy, which, seed, options, *table) if needed else None
            for needed, which, options, table in zip(
                ctx.needs_input_grad[1:4:2], (indices, positions), (ctx.options, bare), ctx.tables,
                strict=True,
            )
        )  # fmt: skip
        return None, dweight, None, dpositional, None, None, None


def _by_kernels(
    dy: torch.Tensor,
    indices: torch.Tensor | None,
    seed: torch.Tensor | None,
    options: Options,
    n_rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of a table of ``n_rows``."""
    length, padding_idx, scale, dropout_p = options
    return embedding_backward(
        dy.contiguous(), indices, seed, length, n_rows, padding_idx, scale, dropout_p, dtype
    )


def _differentiable(
    dy: torch.Tensor,
    indices: torch.Tensor | None,
    seed: torch.Tensor | None,
    options: Options,
    n_rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same in torch's operations, which can be differentiated."""
    record_fallback("embedding", AGAIN)
    if indices is None:
        shape = dy.shape[:-1]
        place = torch.arange(shape.numel(), device=dy.device) % max(options.length, 1)
        indices = place.view(shape)
    g = dy.to(torch.promote_types(dy.dtype, torch.float32)) * options.scale
    if seed is not None:
        g = g * dropout_factors(seed, g, options.dropout_p)
    gradient: torch.Tensor = torch.ops.aten.embedding_dense_backward(
        g, indices, n_rows, options.padding_idx, False
    )
    return gradient.to(dtype)


def _composed(
    input: torch.Tensor,
    weight: torch.Tensor,
    settings: tuple[Any, ...],
    scale: float,
    positional: torch.Tensor | None,
    positions: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """What torch computes; ``settings`` are those that its function has."""
    y = F.embedding(input, weight, *settings)
    y = y if scale == 1 else y * scale
    if positional is not None:
        here = positional[: input.shape[-1]] if positions is None else F.embedding(
            positions, positional
        )  # fmt: skip
        y = y + here
    return F.dropout(y, dropout_p) if dropout_p > 0 else y


def _check_indices(name: str, indices: torch.Tensor, device: torch.device) -> None:
    if indices.dtype not in (torch.int32, torch.int64) or indices.device != device:
        raise RuntimeError(
            f"{name}: embedding expects int32 or int64 on {device}, "
            f"got {indices.dtype} on {indices.device}"
        )


def _check(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None,
    positional: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> None:
    """Refuse what does not fit, as torch does."""
    if weight.dim() != 2:
        raise RuntimeError(f"weight: embedding expects 2 dimensions, got {tuple(weight.shape)}")
    n_rows, n_cols = weight.shape
    if padding_idx is not None and not -n_rows <= padding_idx < max(n_rows, 1):
        raise AssertionError(
            f"padding_idx: expected a row of weight, from {-n_rows} to {n_rows - 1}, "
            f"got {padding_idx}"
        )
    _check_indices("input", input, weight.device)
    if positional is None:
        if positions is not None:
            raise ValueError("positions: embedding expects positional, too, and got none")
        return
    if positional.dim() != 2 or positional.shape[1] != n_cols:
        raise RuntimeError(
            f"positional: embedding expects (positions, {n_cols}), got {tuple(positional.shape)}"
        )
    if positional.device != weight.device:
        raise RuntimeError(
            f"positional: embedding expects a tensor on {weight.device}, "
            f"got one on {positional.device}"
        )
    if positions is not None:
        _check_indices("positions", positions, weight.device)
        if torch.broadcast_shapes(positions.shape, input.shape) != input.shape:
            raise RuntimeError(
                f"positions: embedding expects a shape that broadcasts to {tuple(input.shape)}, "
                f"got {tuple(positions.shape)}"
            )
    elif input.dim() == 0 or input.shape[-1] > positional.shape[0]:
        raise RuntimeError(
            f"positional: embedding expects a row for every position along the last dimension of "
            f"input, {tuple(input.shape)}, got {positional.shape[0]}"
        )


def _unsupported(
    input: torch.Tensor,
    weight: torch.Tensor,
    max_norm: float | None,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> str | None:
    """Why torch computes these arguments; None where a kernel can."""
    if max_norm is not None:
        return "max_norm changes the weight"
    if torch.is_grad_enabled() and weight.requires_grad:
        if sparse:
            return "a sparse gradient"
        if scale_grad_by_freq:
            return "a gradient that is scaled by frequency"
    if has_torch_function_unary(input) or input.is_nested or input.layout != torch.strided:
        return f"an input of type {type(input).__name__}, {input.layout}"
    return None


def embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    scale: float = 1.0,
    positional: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """y = dropout(scale weight[input] + positional[t]): a transformer's input in one pass.

    The gradients of both tables are sums in float32 of a fixed order, bit for bit the same in every
    run; rows that were not looked up have zeros.

    Args:
        input: indices, int32 or int64, of any shape. One that is no row of weight is refused on a
            CPU; on a GPU, where torch stops it, gives NaN and has no gradient, since the host would
            have to wait to refuse it.
        weight: (rows, d), of any strides.
        padding_idx: a row that gets no gradient; counted from the end, if negative.
        max_norm, norm_type, scale_grad_by_freq, sparse: torch's; torch computes with them.
        scale: a number, such as sqrt(d) of Vaswani et al. 2017, section 3.4.
        positional: (n, d), n at least the length of a sequence: a vector for each position, as
            ``sinusoidal_encoding`` makes, or learned, with a gradient. The result has the dtype
            that torch promotes both tables to.
        positions: t, int32 or int64, of a shape that broadcasts to input's; by default 0, 1, …
            along input's last dimension.
        dropout_p: applied whatever the mode; the bits are those of ``gpunn.functional.dropout``.

    Raises:
        AssertionError: padding_idx is no row, as in torch.
        IndexError: an index is no row, on a CPU.
        RuntimeError: shapes, dtypes or devices do not fit each other.
        TypeError: an argument is not of its type.
        ValueError: dropout_p is no probability; or positions without positional.

    Source: A. Vaswani et al., "Attention is all you need", 2017, https://arxiv.org/abs/1706.03762.
    """
    settings = padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
    check_arguments(dropout_p, weight=weight, positional=positional, positions=positions)
    scale = number("scale", scale)
    plain = is_tensor("embedding", input) and is_tensor("embedding", weight, "weight")
    fused = scale, positional, positions, dropout_p
    if not plain:
        return _composed(input, weight, settings, *fused)
    _check(input, weight, padding_idx, positional, positions)
    if not takes("embedding", weight, positional):
        return _composed(input, weight, settings, *fused)
    reason = _unsupported(input, weight, max_norm, scale_grad_by_freq, sparse)
    if reason is not None:
        decline("embedding", reason)
        return _composed(input, weight, settings, *fused)
    return _looked_up(input, weight, padding_idx, *fused)


def _looked_up(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None,
    scale: float,
    positional: torch.Tensor | None,
    positions: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """By the kernels."""
    padding = -1 if padding_idx is None else padding_idx
    if padding_idx is not None and padding_idx < 0:
        padding += weight.shape[0]
    length = input.shape[-1] if input.dim() else 1
    dtype = weight.dtype
    if positional is not None:
        dtype = torch.promote_types(dtype, positional.dtype)
    indices = input.contiguous()
    if positions is not None:
        positions = positions.expand(input.shape).contiguous()
    seed = draw_seed(weight.device) if dropout_p > 0 else None
    tables = weight, positions, positional
    wanted = weight.requires_grad or (positional is not None and positional.requires_grad)
    if torch.is_grad_enabled() and wanted:
        options = Options(length, padding, float(scale), float(dropout_p))
        y: torch.Tensor = _Embedding.apply(indices, *tables, seed, options, dtype)
    else:
        y = embedding_forward(indices, *tables, seed, length, scale, dropout_p, dtype)
    return y


def sinusoidal_encoding(
    length: int,
    d_model: int,
    *,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """PE[t, 2i] = sin(t / base^(2i / d_model)), PE[t, 2i+1] = cos of the same: (length, d_model).

    Computed in float64 and rounded to ``dtype``, torch's default. A table for ``embedding``'s
    ``positional``; the last of an odd number of columns is a sine.

    Raises:
        ValueError: length is negative, or d_model not positive.

    Source: A. Vaswani et al., "Attention is all you need", 2017, section 3.5.
    """
    if length < 0 or d_model < 1:
        raise ValueError(
            f"length, d_model: expected a table of no negative size, got {length} × {d_model}"
        )
    even = torch.arange(0, d_model, 2, dtype=torch.float64, device=device)
    position = torch.arange(length, dtype=torch.float64, device=device)
    angle = position[:, None] * base ** (-even / d_model)
    both = torch.stack((angle.sin(), angle.cos()), 2).flatten(1)[:, :d_model]
    return both.to(torch.get_default_dtype() if dtype is None else dtype).contiguous()
