"""Rotation of pairs of elements by the angles of positions: queries and keys in one launch.

    y1 = x1 cos1 - x2 sin1,    y2 = x2 cos2 + x1 sin2

x1 and x2 are elements j and j + r/2 of a head's first r, or, interleaved, 2j and 2j + 1; the rest
of a head passes through. cos1 and cos2 are two columns of a table as wide as r, or one of half of
that. The gradient is the rotation back, by the transposed matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpunn.kernels.attention_operands import repeated_strides
from gpunn.kernels.launch import Launch, cdiv, operator, run
from gpunn.kernels.numeric import widen


@dataclass(frozen=True)
class RotaryLaunch(Launch):
    """Tokens by pairs of a tile, and the heads that a program turns by the angles it has loaded."""

    heads: int = 4
    block_tokens: int = 16
    block_pairs: int = 64


# 1024 pairs a tile, eight a thread, of which one half is a load of 16 bytes in 16-bit types. Four
# heads share 8 bytes of float32 angles a pair, which so are a fifth of what is moved in these
# types. Not measured.
LAUNCHES = tuple(RotaryLaunch(block_tokens=1024 // n, block_pairs=n) for n in (16, 32, 64, 128))
NAME = "rotary_embedding"


@triton.jit
def load_pairs(
    ptr, start, pair, n_pairs, stride_col, is_token,
    INTERLEAVED: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Both elements of pairs, in two tiles, of what begins at ``start`` for each token."""
    if INTERLEAVED:
        cols = 2 * pair + tl.arange(0, 2 * BLOCK_PAIRS)
        inside = is_token[:, None] & (cols < 2 * n_pairs)[None, :]
        at = start[:, None] + cols.to(tl.int64)[None, :] * stride_col
        x = widen(tl.load(ptr + at, mask=inside, other=0.0))
        return tl.split(tl.reshape(x, (BLOCK_TOKENS, BLOCK_PAIRS, 2)))
    cols = pair + tl.arange(0, BLOCK_PAIRS)
    inside = is_token[:, None] & (cols < n_pairs)[None, :]
    at = start[:, None] + cols.to(tl.int64)[None, :] * stride_col
    first = widen(tl.load(ptr + at, mask=inside, other=0.0))
    apart = tl.cast(n_pairs, tl.int64) * stride_col
    return first, widen(tl.load(ptr + at + apart, mask=inside, other=0.0))


@triton.jit
def store_pairs(
    ptr, first, second, start, pair, n_pairs, stride_col, is_token,
    INTERLEAVED: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """The counterpart of ``load_pairs``."""
    if INTERLEAVED:
        cols = 2 * pair + tl.arange(0, 2 * BLOCK_PAIRS)
        inside = is_token[:, None] & (cols < 2 * n_pairs)[None, :]
        at = start[:, None] + cols.to(tl.int64)[None, :] * stride_col
        both = tl.reshape(tl.join(first, second), (BLOCK_TOKENS, 2 * BLOCK_PAIRS))
        tl.store(ptr + at, both.to(ptr.dtype.element_ty), mask=inside)
    else:
        cols = pair + tl.arange(0, BLOCK_PAIRS)
        inside = is_token[:, None] & (cols < n_pairs)[None, :]
        at = start[:, None] + cols.to(tl.int64)[None, :] * stride_col
        apart = tl.cast(n_pairs, tl.int64) * stride_col
        tl.store(ptr + at, first.to(ptr.dtype.element_ty), mask=inside)
        tl.store(ptr + at + apart, second.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def table_pairs(
    ptr, start, pair, n_pairs, stride_col, is_token, WHOLE: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """The factors of both elements: of their own columns in a WHOLE table, else of one."""
    if WHOLE:
        return load_pairs(ptr, start, pair, n_pairs, stride_col, is_token, INTERLEAVED,
                          BLOCK_TOKENS, BLOCK_PAIRS)  # fmt: skip
    cols = pair + tl.arange(0, BLOCK_PAIRS)
    inside = is_token[:, None] & (cols < n_pairs)[None, :]
    at = start[:, None] + cols.to(tl.int64)[None, :] * stride_col
    factor = widen(tl.load(ptr + at, mask=inside, other=0.0))
    return factor, factor


@triton.jit
def turn_heads(
    x_ptr, y_ptr, cos1, cos2, sin1, sin2, batch, group, tokens, pair, n_heads, n_tokens, n_pairs,
    n_cols, stride_x_batch, stride_x_head, stride_x_token, stride_x_col,
    stride_y_batch, stride_y_head, stride_y_token, stride_y_col,
    REST: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Turn the pairs of a group of heads; a program of the first pairs copies the REST of each."""
    is_token = tokens < n_tokens
    x_ptr += batch * stride_x_batch
    y_ptr += batch * stride_y_batch
    for head in tl.range(group * HEADS, tl.minimum(group * HEADS + HEADS, n_heads)):
        from_x = tl.cast(head, tl.int64) * stride_x_head + tokens * stride_x_token
        to_y = tl.cast(head, tl.int64) * stride_y_head + tokens * stride_y_token
        x1, x2 = load_pairs(x_ptr, from_x, pair, n_pairs, stride_x_col, is_token, INTERLEAVED,
                            BLOCK_TOKENS, BLOCK_PAIRS)  # fmt: skip
        store_pairs(y_ptr, x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2, to_y, pair, n_pairs,
                    stride_y_col, is_token, INTERLEAVED, BLOCK_TOKENS, BLOCK_PAIRS)  # fmt: skip
        if REST:
            last = tl.where(pair == 0, n_cols, 0)
            for col in tl.range(2 * n_pairs, last, BLOCK_PAIRS):
                cols = (col + tl.arange(0, BLOCK_PAIRS)).to(tl.int64)
                inside = is_token[:, None] & (cols < n_cols)[None, :]
                at = from_x[:, None] + cols[None, :] * stride_x_col
                rest = tl.load(x_ptr + at, mask=inside, other=0.0)
                at = to_y[:, None] + cols[None, :] * stride_y_col
                tl.store(y_ptr + at, rest, mask=inside)


@triton.jit
def rotary_embedding_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr,
    n_query_heads, n_key_heads, n_tokens, n_pairs, n_cols,
    stride_q_batch, stride_q_head, stride_q_token, stride_q_col,
    stride_k_batch, stride_k_head, stride_k_token, stride_k_col,
    stride_cos_batch, stride_cos_token, stride_cos_col,
    stride_yq_batch, stride_yq_head, stride_yq_token, stride_yq_col,
    stride_yk_batch, stride_yk_head, stride_yk_token, stride_yk_col,
    WHOLE: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Pairs of queries' and keys' heads, turned by the angles of tokens, or, INVERSE, turned back.

    A program owns BLOCK_TOKENS tokens, BLOCK_PAIRS pairs and HEADS heads, of queries or of keys.
    """
    program = tl.program_id(0)
    across = tl.cdiv(n_pairs, BLOCK_PAIRS)
    pair, program = program % across * BLOCK_PAIRS, program // across
    query_groups = tl.cdiv(n_query_heads, HEADS)
    groups = query_groups + tl.cdiv(n_key_heads, HEADS)
    group, program = program % groups, program // groups
    blocks = tl.cdiv(n_tokens, BLOCK_TOKENS)
    tokens = (program % blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    batch = tl.cast(program // blocks, tl.int64)
    angles = batch * stride_cos_batch + tokens * stride_cos_token
    cos1, cos2 = table_pairs(cos_ptr, angles, pair, n_pairs, stride_cos_col, tokens < n_tokens,
                             WHOLE, INTERLEAVED, BLOCK_TOKENS, BLOCK_PAIRS)  # fmt: skip
    sin1, sin2 = table_pairs(sin_ptr, angles, pair, n_pairs, stride_cos_col, tokens < n_tokens,
                             WHOLE, INTERLEAVED, BLOCK_TOKENS, BLOCK_PAIRS)  # fmt: skip
    if INVERSE:
        sin1, sin2 = -sin2, -sin1
    if group < query_groups:
        turn_heads(
            query_ptr, query_out_ptr, cos1, cos2, sin1, sin2, batch, group, tokens, pair,
            n_query_heads, n_tokens, n_pairs, n_cols,
            stride_q_batch, stride_q_head, stride_q_token, stride_q_col,
            stride_yq_batch, stride_yq_head, stride_yq_token, stride_yq_col,
            REST, INTERLEAVED, HEADS, BLOCK_TOKENS, BLOCK_PAIRS,
        )  # fmt: skip
    else:
        if key_ptr is not None:
            turn_heads(
                key_ptr, key_out_ptr, cos1, cos2, sin1, sin2, batch, group - query_groups, tokens,
                pair, n_key_heads, n_tokens, n_pairs, n_cols,
                stride_k_batch, stride_k_head, stride_k_token, stride_k_col,
                stride_yk_batch, stride_yk_head, stride_yk_token, stride_yk_col,
                REST, INTERLEAVED, HEADS, BLOCK_TOKENS, BLOCK_PAIRS,
            )  # fmt: skip


def _fake(
    query: torch.Tensor,
    key: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_pairs: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty((0,)) if key is None else torch.empty_like(key)


@operator(
    "rotary_embedding(Tensor query, Tensor? key, Tensor cos, Tensor sin, SymInt n_pairs, "
    "bool interleaved, bool inverse) -> (Tensor, Tensor)",
    fake=_fake,
)
def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_pairs: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query and key with their first 2 n_pairs columns turned, or, ``inverse``, turned back.

    query and key (batch, heads, tokens, columns) of any strides, key None for none; cos and sin
    (batch or 1, tokens, n_pairs or 2 n_pairs).
    """
    outs = _fake(query, key, cos, sin, n_pairs, interleaved, inverse)
    batch, n_heads, n_tokens, n_cols = query.shape
    n_key_heads = 0 if key is None else key.shape[1]
    launch = next((tile for tile in LAUNCHES if n_pairs <= tile.block_pairs), LAUNCHES[-1])
    groups = cdiv(n_heads, launch.heads) + cdiv(n_key_heads, launch.heads)
    blocks = cdiv(n_tokens, launch.block_tokens)
    n_programs = batch * blocks * groups * cdiv(n_pairs, launch.block_pairs)
    if n_programs:
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        nothing = (0,) * 4
        run(
            NAME, rotary_embedding_kernel, (n_programs,),
            query, key, cos, sin, outs[0], None if key is None else outs[1],
            n_heads, n_key_heads, n_tokens, n_pairs, n_cols, *query.stride(),
            *(nothing if key is None else key.stride()), *repeated_strides(cos),
            *outs[0].stride(), *(nothing if key is None else outs[1].stride()),
            launch=launch, WHOLE=cos.shape[-1] == 2 * n_pairs, REST=n_cols > 2 * n_pairs,
            INTERLEAVED=interleaved, INVERSE=inverse,
        )  # fmt: skip
    return outs
