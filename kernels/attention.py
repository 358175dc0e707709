"""Launchers of attention: y = dropout(softmax(cap(scale q kᵀ) + bias)) v, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from gpunn.kernels.attention_delta import attention_delta_kernel
from gpunn.kernels.attention_mask_gradient import attention_mask_gradient_kernel
from gpunn.kernels.attention_operands import block_of, in_order_of, operand, unit_of
from gpunn.kernels.attention_problem import Problem
from gpunn.kernels.attention_tiles import DELTA_LAUNCH
from gpunn.kernels.flash import attention_forward_kernel
from gpunn.kernels.flash_backward import (
    attention_key_gradients_kernel,
    attention_query_gradient_kernel,
)
from gpunn.kernels.launch import cdiv, operator, run

NAME, NAME_BACKWARD = "attention_forward", "attention_backward"


def _forward_fake(
    keep: bool,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
    mask_batches: torch.Tensor | None,
    seed: torch.Tensor | None,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    n_queries: int,
    n_keys: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    before: int,
    after: int,
    lower_right: bool,
) -> tuple[torch.Tensor, ...]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    maxima, sums = (q.new_empty(q.shape[:-1], dtype=wide) for _ in range(2))
    y = in_order_of(q, v.shape[-1], starts_q is not None)
    rest = torch.empty_like(y) if keep and q.dtype.itemsize == 2 else y.new_empty((0,))
    return y, rest, maxima, sums


ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? slopes, Tensor? mask_batches, "
    "Tensor? seed, Tensor? starts_q, Tensor? starts_k, SymInt n_queries, SymInt n_keys, "
    "float scale, float softcap, float dropout_p, SymInt before, SymInt after, bool lower_right"
)


@operator(
    f"attention_forward(bool keep, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
def attention_forward(keep: bool, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """y, its rest, and of each row the maximum of its scores and the sum of exp(score - maximum).

    The arguments are the fields of ``Problem``. y has its dimensions in the order of q's. To
    ``keep`` what the backward pass needs, rest is what y lost when it was rounded to 16 bits; else
    it is empty.
    """
    problem = Problem(*arguments)
    y, rest, maxima, sums = _forward_fake(keep, *arguments)
    if problem.starts_q is not None:  # no sequence may own a row
        maxima.fill_(-math.inf)
        sums.zero_()
    by_descriptor = problem.is_by_descriptor()
    launch = problem.launch("forward")
    n_blocks = cdiv(problem.n_queries, launch.block_queries)
    if y.numel() == 0 and maxima.numel() == 0:
        return y, rest, maxima, sums
    run(
        NAME, attention_forward_kernel, (n_blocks * problem.n_batches * problem.n_heads,),
        *problem.inputs(launch, by_descriptor), y, rest if rest.numel() else None, maxima, sums,
        *problem.sizes(),
        *problem.strides(y), *problem.stat_strides(), *problem.scalars(),
        launch=launch, NATURAL=problem.is_natural, SCALED_LATE=problem.is_scaled_late,
        UNEVEN=problem.is_uneven(problem.n_keys, launch.block_keys),
        BY_DESCRIPTOR=by_descriptor, **problem.constants(y),
    )  # fmt: skip
    return y, rest, maxima, sums


def _backward_fake(
    dy: torch.Tensor,
    y: torch.Tensor,
    rest: torch.Tensor,
    maxima: torch.Tensor,
    sums: torch.Tensor,
    needs: Sequence[bool],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
    mask_batches: torch.Tensor | None,
    seed: torch.Tensor | None,
    starts_q: torch.Tensor | None,
    *others: Any,
) -> tuple[torch.Tensor, ...]:
    packed = starts_q is not None  # then no sequence may own a row
    pair = needs[1] or needs[2]
    gradients = [
        in_order_of(tensor, tensor.shape[-1], packed) if needed else tensor.new_empty((0,))
        for tensor, needed in ((q, needs[0]), (k, pair), (v, pair))
    ]
    dmask = q.new_empty((0,)) if mask is None or not needs[3] else mask.new_empty(mask.shape)
    return *gradients, dmask


@operator(
    "attention_backward(Tensor dy, Tensor y, Tensor rest, Tensor maxima, Tensor sums, "
    "bool[] needs, "
    f"{ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)
def attention_backward(
    dy: torch.Tensor,
    y: torch.Tensor,
    rest: torch.Tensor,
    maxima: torch.Tensor,
    sums: torch.Tensor,
    needs: Sequence[bool],
    *arguments: Any,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dmask; each is empty where it is not in ``needs``.

    dk and dv come from one kernel: where one of them is needed, both are computed.
    """
    problem = Problem(*arguments)
    gradients = _backward_fake(dy, y, rest, maxima, sums, needs, *arguments)
    dq, dk, dv, dmask = gradients
    rows = _rows(dy, y, rest, maxima, sums, problem)
    if dq.numel():
        _query_gradient(problem, rows, dq)
    if dk.numel() or dv.numel():
        _key_gradients(problem, rows, dk, dv)
    if dmask.numel():
        _mask_gradient(problem, rows, dmask)
    return gradients


Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]
"""dy, and of each row its statistics as ``row_statistics`` reads them."""


def _rows(
    dy: torch.Tensor,
    y: torch.Tensor,
    rest: torch.Tensor,
    maxima: torch.Tensor,
    sums: torch.Tensor,
    problem: Problem,
) -> Rows:
    """With delta: Σ dy y, of 16 bits with y's rest; wider, as ``_query_gradient`` finds it."""
    delta, launch = torch.empty_like(maxima), DELTA_LAUNCH
    shifts = None if problem.is_exact else torch.empty_like(maxima)
    rows = (dy, maxima, sums, delta) if shifts is None else (dy, shifts, None, delta)
    if delta.numel() == 0:
        return rows
    if dy.dtype.itemsize > 2:
        _query_gradient(problem, rows, None)
        return rows
    n_rows, head_v = y.shape[2:]
    run(
        NAME_BACKWARD, attention_delta_kernel,
        (cdiv(n_rows, launch.block_queries) * y.shape[0] * y.shape[1],),
        dy, y, rest if rest.numel() else None, maxima, sums, delta, shifts, problem.n_heads,
        n_rows, *dy.stride(), *y.stride(),
        launch=launch, UNIT=unit_of(dy, y), HEAD_V=head_v, BLOCK_HEAD_V=block_of(head_v),
    )  # fmt: skip
    return rows


def _query_gradient(problem: Problem, rows: Rows, dq: torch.Tensor | None) -> None:
    """dq; without one, the delta of ``rows``."""
    dy, *statistics = rows
    others = dy, dy if dq is None else dq
    by_descriptor = problem.is_by_descriptor(dy)
    launch = problem.launch("query_gradient")
    n_blocks = cdiv(problem.n_queries, launch.block_queries)
    run(
        NAME_BACKWARD, attention_query_gradient_kernel,
        (n_blocks * problem.n_batches * problem.n_heads,),
        *problem.inputs(launch, by_descriptor), operand(dy, launch.block_queries, by_descriptor),
        *statistics, dq, *problem.sizes(), *problem.strides(*others), *problem.stat_strides(),
        *problem.scalars(), problem.scale,
        launch=launch, NATURAL=problem.is_natural,
        UNEVEN=problem.is_uneven(problem.n_keys, launch.block_keys),
        ONE_LOOP=problem.is_one_loop, BY_DESCRIPTOR=by_descriptor, **problem.constants(*others),
    )  # fmt: skip


def _key_gradients(problem: Problem, rows: Rows, dk: torch.Tensor, dv: torch.Tensor) -> None:
    dy, *statistics = rows
    by_descriptor = problem.is_by_descriptor(dy)
    launch = problem.launch("key_gradients")
    n_blocks = cdiv(problem.n_keys, launch.block_keys)
    run(
        NAME_BACKWARD, attention_key_gradients_kernel,
        (n_blocks * problem.n_batches * problem.k.shape[1],),
        *problem.inputs(launch, by_descriptor), operand(dy, launch.block_queries, by_descriptor),
        *statistics, dk, dv, *problem.sizes(), *problem.strides(dy, dk, dv),
        *problem.stat_strides(), *problem.scalars(), problem.scale,
        launch=launch, NATURAL=problem.is_natural,
        UNEVEN=problem.is_uneven(problem.n_queries, launch.block_queries),
        ONE_LOOP=problem.is_one_loop, BY_DESCRIPTOR=by_descriptor,
        **problem.constants(dy, dk, dv),
    )  # fmt: skip


def _mask_gradient(problem: Problem, rows: Rows, dmask: torch.Tensor) -> None:
    launch, q, k, v = problem.launch("mask_gradient"), problem.q, problem.k, problem.v
    sharers = None if problem.mask_batches is None else problem.mask_batches.argsort(stable=True)
    full = problem.n_heads, problem.n_queries, problem.n_keys
    has = [size > 1 or extent == 1 for size, extent in zip(dmask.shape[1:], full, strict=True)]
    blocks = 1, 1, launch.block_queries, launch.block_keys
    tiles = [cdiv(size, block) for size, block in zip(dmask.shape, blocks, strict=True)]
    run(
        NAME_BACKWARD, attention_mask_gradient_kernel, (math.prod(tiles),),
        q, k, v, problem.mask, problem.slopes, sharers, problem.seed, *rows, dmask,
        problem.n_batches // dmask.shape[0], *problem.sizes(), *problem.strides(rows[0]),
        *problem.scalars(), launch=launch,
        MASK_HEADS=has[0], MASK_ROWS=has[1], MASK_COLS=has[2],
        **problem.constants(rows[0]),
    )  # fmt: skip


def _flops(n_products: int, q: Any, k: Any, v: Any) -> int:
    """Of products over all pairs, as torch counts its own attention; arguments are shapes."""
    return int(n_products * math.prod(q[:3]) * k[2] * (q[3] + v[3]))


@register_flop_formula(torch.ops.gpunn.attention_forward)
def _forward_flops(keep: Any, q: Any, k: Any, v: Any, *others: Any, **keywords: Any) -> int:
    return _flops(2, q, k, v)


@register_flop_formula(torch.ops.gpunn.attention_backward)
def _backward_flops(
    dy: Any, y: Any, rest: Any, maxima: Any, sums: Any, needs: Any, q: Any, k: Any, v: Any,
    *others: Any, **keywords: Any,
) -> int:  # fmt: skip
    return _flops(5, q, k, v)
