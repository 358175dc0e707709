"""Lookups in a table, with scale, positional table and dropout, and the tables' gradients.

    y_n = dropout(scale weight[i_n] + positional[t_n])

The gradient of a row is the sum of dy over the tokens that looked it up. Tokens are sorted by
index; a run of equal ones is cut into pieces of at most ``piece``, so that no program walks along a
frequent one. What the pieces of a run add up to is added in a second launch. Where tokens look up
their positions, a row's are known without sorting. The order is fixed: no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpunn.kernels.launch import Launch, cdiv, operator, run
from gpunn.kernels.numeric import widen
from gpunn.kernels.philox import dropout_arguments, dropout_factor


@dataclass(frozen=True)
class LookupLaunch(Launch):
    """Tokens by columns of a tile."""

    block_rows: int = 8
    block_cols: int = 256


@dataclass(frozen=True)
class SumsLaunch(Launch):
    """Rows by columns of a tile, and the rows that a program sums at most."""

    piece: int = 128
    block_rows: int = 8
    block_cols: int = 256


# 16 elements a thread, which are two loads of 16 bytes in 16-bit types; 256 columns of these are
# four lines of 128 bytes. Sums of 32 a thread spill, with dropout. Not measured.
LOOKUPS = tuple(LookupLaunch(block_rows=2048 // n, block_cols=n) for n in (16, 64, 256))
SUMS = tuple(SumsLaunch(block_rows=2048 // n, block_cols=n) for n in (16, 64, 256))
NAME, NAME_BACKWARD = "embedding_forward", "embedding_backward"


@triton.jit
def row_tile(table_ptr, rows, cols, n_rows, n_cols, stride_row, stride_col):
    """Rows of a table, NaN where there is no such row."""
    exists = ((rows >= 0) & (rows < n_rows))[:, None]
    at = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    tile = widen(tl.load(table_ptr + at, mask=exists & (cols < n_cols)[None, :], other=0.0))
    return tl.where(exists, tile, float("nan"))


@triton.jit
def embedding_forward_kernel(
    index_ptr, weight_ptr, position_ptr, positional_ptr, seed_ptr, y_ptr,
    n_tokens, n_rows, n_positions, n_cols, length,
    stride_weight_row, stride_weight_col, stride_positional_row, stride_positional_col,
    scale, threshold, dropout_scale,
    QUADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y = dropout(scale weight[index] + positional[position]); a program owns a tile of y.

    Without ``position_ptr``, token n is at position n mod ``length``.
    """
    across = tl.cdiv(n_cols, BLOCK_COLS)
    tokens = (tl.program_id(0) // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(0) % across * BLOCK_COLS
    cols, is_token = col + tl.arange(0, BLOCK_COLS), tokens < n_tokens
    index = tl.load(index_ptr + tokens, mask=is_token, other=0)
    y = row_tile(weight_ptr, index, cols, n_rows, n_cols, stride_weight_row, stride_weight_col)
    y *= scale
    if positional_ptr is not None:
        if position_ptr is None:
            position = tokens % length
        else:
            position = tl.load(position_ptr + tokens, mask=is_token, other=0)
        y += row_tile(positional_ptr, position, cols, n_positions, n_cols, stride_positional_row,
                      stride_positional_col)  # fmt: skip
    if seed_ptr is not None:
        y *= dropout_factor(seed_ptr, tokens, col, n_cols, threshold, dropout_scale, QUADS,
                            BLOCK_ROWS, BLOCK_COLS)  # fmt: skip
    at = tokens[:, None] * n_cols + cols[None, :]
    inside = is_token[:, None] & (cols < n_cols)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def embedding_backward_kernel(
    dy_ptr, key_ptr, order_ptr, seed_ptr, dtable_ptr, partial_ptr,
    n_tokens, n_rows, n_cols, padding_idx, scale, threshold, dropout_scale,
    QUADS: tl.constexpr, PIECE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Sums of dy over pieces: runs of equal keys, cut where the place is a multiple of PIECE.

    ``key`` are the indices in order, ``order`` their tokens. A program owns a place, and columns;
    it sums where a piece begins. A whole run is a row of dtable; other pieces are in ``partial``
    (n pieces, 2, n_cols): the one that begins with a multiple of PIECE, and the one that ends so.
    """
    across = tl.cdiv(n_cols, BLOCK_COLS)
    first = (tl.program_id(0) // across).to(tl.int64)
    col = tl.program_id(0) % across * BLOCK_COLS
    cols, rows = col + tl.arange(0, BLOCK_COLS), tl.arange(0, BLOCK_ROWS)
    key = tl.load(key_ptr + first)
    begins = tl.load(key_ptr + first - 1, mask=first > 0, other=-1) != key
    at_cut, end = first % PIECE == 0, (first // PIECE + 1) * PIECE
    counts = (key >= 0) & (key < n_rows) & (key != padding_idx)
    owns = counts & (begins | at_cut)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=partial_ptr.dtype.element_ty)
    place, more = first, owns
    while more:
        within = (place + rows < end) & (place + rows < n_tokens)
        same = within & (tl.load(key_ptr + place + rows, mask=within, other=-1) == key)
        token = tl.load(order_ptr + place + rows, mask=same, other=0)
        inside = same[:, None] & (cols < n_cols)[None, :]
        at = token[:, None] * n_cols + cols[None, :]
        dy = widen(tl.load(dy_ptr + at, mask=inside, other=0.0))
        if seed_ptr is not None:
            dy *= dropout_factor(seed_ptr, token, col, n_cols, threshold, dropout_scale, QUADS,
                                 BLOCK_ROWS, BLOCK_COLS)  # fmt: skip
        sums += dy
        place += BLOCK_ROWS
        more = tl.sum(same.to(tl.int32), 0) == BLOCK_ROWS
    total = tl.sum(sums, 0)
    goes_on = tl.load(key_ptr + end, mask=end < n_tokens, other=-1) == key
    whole = begins & (goes_on == 0)
    to_table = owns & whole & (cols < n_cols)
    row = (total * scale).to(dtable_ptr.dtype.element_ty)
    tl.store(dtable_ptr + key.to(tl.int64) * n_cols + cols, row, mask=to_table)
    slot = first // PIECE * 2 + tl.where(at_cut, 0, 1)
    to_partial = owns & (whole == 0) & (cols < n_cols)
    tl.store(partial_ptr + slot * n_cols + cols, total, mask=to_partial)


@triton.jit
def embedding_join_kernel(
    key_ptr, partial_ptr, dtable_ptr, n_tokens, n_rows, n_cols, padding_idx, scale,
    PIECE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The rows of dtable whose runs have several pieces: the sums of these.

    A program owns the run that passes from PIECE places to the next, if it begins in them.
    """
    across = tl.cdiv(n_cols, BLOCK_COLS)
    block = (tl.program_id(0) // across).to(tl.int64)
    cols = tl.program_id(0) % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    start, rows = block * PIECE, tl.arange(0, BLOCK_ROWS)
    key = tl.load(key_ptr + start + PIECE - 1)
    goes_on = tl.load(key_ptr + start + PIECE) == key
    begins = tl.load(key_ptr + start - 1, mask=block > 0, other=-1) != key
    owns = (key >= 0) & (key < n_rows) & (key != padding_idx) & goes_on & begins
    slot = block * 2 + tl.where(tl.load(key_ptr + start) == key, 0, 1)
    head = tl.load(partial_ptr + slot * n_cols + cols, mask=owns & (cols < n_cols), other=0.0)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=partial_ptr.dtype.element_ty)
    place, more = block + 1, owns
    while more:
        blocks = place + rows
        within = blocks * PIECE < n_tokens
        same = within & (tl.load(key_ptr + blocks * PIECE, mask=within, other=-1) == key)
        at = blocks[:, None] * 2 * n_cols + cols[None, :]
        sums += tl.load(partial_ptr + at, mask=same[:, None] & (cols < n_cols)[None, :], other=0.0)
        place += BLOCK_ROWS
        more = tl.sum(same.to(tl.int32), 0) == BLOCK_ROWS
    row = ((head + tl.sum(sums, 0)) * scale).to(dtable_ptr.dtype.element_ty)
    at = key.to(tl.int64) * n_cols + cols
    tl.store(dtable_ptr + at, row, mask=owns & (cols < n_cols))


@triton.jit
def embedding_positions_kernel(
    dy_ptr, seed_ptr, dtable_ptr,
    n_sequences, length, n_rows, n_cols, padding_idx, scale, threshold, dropout_scale,
    QUADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dtable where token n looked up row n mod ``length``: sums over sequences.

    A program owns a tile of dtable.
    """
    across = tl.cdiv(n_cols, BLOCK_COLS)
    rows = (tl.program_id(0) // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(0) % across * BLOCK_COLS
    cols = col + tl.arange(0, BLOCK_COLS)
    counts = (rows < length) & (rows < n_rows) & (rows != padding_idx)
    inside = counts[:, None] & (cols < n_cols)[None, :]
    wide: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=wide)
    for sequence in tl.range(n_sequences):
        tokens = rows + sequence * tl.cast(length, tl.int64)
        at = tokens[:, None] * n_cols + cols[None, :]
        dy = widen(tl.load(dy_ptr + at, mask=inside, other=0.0))
        if seed_ptr is not None:
            dy *= dropout_factor(seed_ptr, tokens, col, n_cols, threshold, dropout_scale, QUADS,
                                 BLOCK_ROWS, BLOCK_COLS)  # fmt: skip
        sums += dy
    at = rows[:, None] * n_cols + cols[None, :]
    tl.store(dtable_ptr + at, (sums * scale).to(dtable_ptr.dtype.element_ty), mask=inside)


def refuse_strangers(indices: torch.Tensor, n_rows: int) -> None:
    """Refuse an index of no row, where the host need not wait for a GPU to know it.

    Raises:
        IndexError: there is one, on a CPU.
    """
    if indices.is_cpu and ((indices < 0) | (indices >= n_rows)).any():
        raise IndexError(f"index out of range: embedding expects indices from 0 to {n_rows - 1}")


def _forward_fake(
    indices: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor | None,
    positional: torch.Tensor | None,
    seed: torch.Tensor | None,
    length: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]), dtype=dtype)


@operator(
    "embedding_forward(Tensor indices, Tensor weight, Tensor? positions, Tensor? positional, "
    "Tensor? seed, SymInt length, float scale, float dropout_p, ScalarType dtype) -> Tensor",
    fake=_forward_fake,
)
def embedding_forward(
    indices: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor | None,
    positional: torch.Tensor | None,
    seed: torch.Tensor | None,
    length: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """dropout(scale weight[indices] + positional[positions]), (*, columns), in ``dtype``.

    indices (*), and positions, if given, contiguous; else token n is at n mod ``length``. The
    tables have any strides. On a GPU, an index of no row gives NaN.
    """
    refuse_strangers(indices, weight.shape[0])
    y = _forward_fake(indices, weight, positions, positional, seed, length, scale, dropout_p, dtype)
    n_tokens, n_cols = indices.numel(), y.shape[-1]
    if positions is not None and positional is not None:
        refuse_strangers(positions, positional.shape[0])
    if y.numel():
        launch, n_programs = _lookup(n_tokens, n_cols)
        n_positions = 0 if positional is None else positional.shape[0]
        strides = (0, 0) if positional is None else positional.stride()
        run(
            NAME, embedding_forward_kernel, (n_programs,),
            indices, weight, positions, positional, seed, y,
            n_tokens, weight.shape[0], n_positions, n_cols, length, *weight.stride(), *strides,
            scale, *dropout_arguments(dropout_p or 1.0), launch=launch, QUADS=n_cols % 4 == 0,
        )  # fmt: skip
    return y


def _lookup(n_rows: int, n_cols: int) -> tuple[LookupLaunch, int]:
    """The tiles of a (n_rows, n_cols), and how many there are."""
    launch = next((tile for tile in LOOKUPS if n_cols <= tile.block_cols), LOOKUPS[-1])
    return launch, cdiv(n_rows, launch.block_rows) * cdiv(n_cols, launch.block_cols)


def _backward_fake(
    dy: torch.Tensor,
    indices: torch.Tensor | None,
    seed: torch.Tensor | None,
    length: int,
    n_rows: int,
    padding_idx: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    return dy.new_empty((n_rows, dy.shape[-1]), dtype=dtype)


@operator(
    "embedding_backward(Tensor dy, Tensor? indices, Tensor? seed, SymInt length, SymInt n_rows, "
    "int padding_idx, float scale, float dropout_p, ScalarType dtype) -> Tensor",
    fake=_backward_fake,
)
def embedding_backward(
    dy: torch.Tensor,
    indices: torch.Tensor | None,
    seed: torch.Tensor | None,
    length: int,
    n_rows: int,
    padding_idx: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of a table of ``n_rows``: scale Σ dropout(dy) over the tokens of each row.

    dy (*, columns), contiguous. Without ``indices``, token n looked up row n mod ``length``.
    The row ``padding_idx``, if it is not negative, has none.
    """
    dtable = _backward_fake(
        dy, indices, seed, length, n_rows, padding_idx, scale, dropout_p, dtype
    ).zero_()
    if dy.numel() == 0 or n_rows == 0:
        return dtable
    n_tokens, n_cols = dy.shape[:-1].numel(), dy.shape[-1]
    rules = scale, *dropout_arguments(dropout_p or 1.0)
    if indices is None:
        tiles, n_programs = _lookup(min(length, n_rows), n_cols)
        run(
            NAME_BACKWARD, embedding_positions_kernel, (n_programs,), dy, seed, dtable,
            n_tokens // length, length, n_rows, n_cols, padding_idx, *rules, launch=tiles,
            QUADS=n_cols % 4 == 0,
        )  # fmt: skip
        return dtable
    key, order = indices.flatten().sort(stable=True)
    launch = next((tile for tile in SUMS if n_cols <= tile.block_cols), SUMS[-1])
    n_pieces, across = cdiv(n_tokens, launch.piece), cdiv(n_cols, launch.block_cols)
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    partial = dy.new_empty((n_pieces, 2, n_cols), dtype=wide)
    run(
        NAME_BACKWARD, embedding_backward_kernel, (n_tokens * across,),
        dy, key, order, seed, dtable, partial, n_tokens, n_rows, n_cols, padding_idx, *rules,
        launch=launch, QUADS=n_cols % 4 == 0,
    )  # fmt: skip
    if n_pieces > 1:
        run(
            NAME_BACKWARD, embedding_join_kernel, ((n_pieces - 1) * across,),
            key, partial, dtable, n_tokens, n_rows, n_cols, padding_idx, scale, launch=launch,
        )  # fmt: skip
    return dtable
