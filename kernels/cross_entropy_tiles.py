"""Device functions of cross-entropy, on tiles (rows, columns) of logits; a column is a class."""

from __future__ import annotations

import triton
import triton.language as tl

from gpunn.kernels.numeric import exp_or_0, widen
from gpunn.kernels.softmax import run_along, sums_of_parts


@triton.jit
def class_weights(weight_ptr, cols, n_cols, like):
    """w_c of a tile's columns, 1 where there are none."""
    if weight_ptr is None:
        weights = tl.full(cols.shape, 1.0, like.dtype)
    else:
        weights = widen(tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0))
    return weights[None, :]


@triton.jit
def target_of(target_ptr, weight_ptr, rows, is_row, n_classes, ignore_index):
    """The class of each row, whether it counts, and its weight; NaN of a class that is none."""
    y = tl.load(target_ptr + rows, mask=is_row, other=0)
    counts = is_row & (y != ignore_index)
    is_class = (y >= 0) & (y < n_classes)
    weight = tl.where(is_class, 1.0, float("nan"))
    if weight_ptr is not None:
        weight *= widen(tl.load(weight_ptr + y, mask=counts & is_class, other=0.0))
    return y, counts, is_class, tl.where(counts, weight, 0.0)


@triton.jit
def logits_tile(x_ptr, first, is_row, cols, n_cols, stride):
    """The logits of a tile, 0 outside of it; where they stand, and which there are."""
    at = first[:, None] + cols.to(tl.int64)[None, :] * stride
    inside = is_row[:, None] & (cols < n_cols)[None, :]
    return widen(tl.load(x_ptr + at, mask=inside, other=0.0)), at, inside


@triton.jit
def wanted_of(
    target_ptr, weight_ptr, at, inside, cols, n_cols, smoothing, like, PROBABILITIES: tl.constexpr
):
    """w_c t'_c of a tile of probabilities, else w_c."""
    share = class_weights(weight_ptr, cols, n_cols, like)
    if PROBABILITIES:
        t = widen(tl.load(target_ptr + at, mask=inside, other=0.0))
        share = share * ((1 - smoothing) * t + smoothing / n_cols)
    return share


@triton.jit
def statistics(
    x, target_ptr, weight_ptr, at, inside, cols, n_cols, smoothing, peak, total, weights, weighted,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """What runs along parts of rows, after one more tile of them.

    The maximum, Σ exp(x - maximum) and, of probabilities or with smoothing, Σ and Σ x of
    ``wanted_of``.
    """
    parts: tl.constexpr = peak.shape[1]
    s = tl.where(inside, x, -float("inf"))
    peak, total = run_along(s, peak, total, parts)
    if PROBABILITIES or SMOOTH:
        share = wanted_of(target_ptr, weight_ptr, at, inside, cols, n_cols, smoothing, x,
                          PROBABILITIES)  # fmt: skip
        share = tl.where(inside, share, 0.0)
        weights += sums_of_parts(share, parts)
        weighted += sums_of_parts(share * x, parts)
    return peak, total, weights, weighted


@triton.jit
def loss_of_class(
    lse, own, row_weight, weights, weighted, counts, n_classes, smoothing, SMOOTH: tl.constexpr
):
    """The loss of rows whose target is a class of logit ``own``; 0 of those that do not count."""
    loss = row_weight * (lse - own)
    if SMOOTH:
        loss = (1 - smoothing) * loss + smoothing * ((weights * lse - weighted) / n_classes)
    return tl.where(counts, loss, 0.0)


@triton.jit
def store_gradient(
    x, target_ptr, weight_ptr, dx_ptr, at, inside, cols, scale, y, counts, lse, row_weight,
    weight_sum, n_cols, first_class, n_classes, smoothing,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Store p Σ w t' - w t' of a tile times each row's scale, and 0 in rows that do not count.

    ``weight_sum``, of classes with smoothing, is Σ w_c. The columns are the classes from
    ``first_class`` on, of ``n_classes``.
    """
    p = exp_or_0(x - lse[:, None])
    if PROBABILITIES:
        dx = p * row_weight[:, None] - wanted_of(target_ptr, weight_ptr, at, inside, cols, n_cols,
                                                 smoothing, x, PROBABILITIES)  # fmt: skip
    else:
        one_hot = tl.where((cols + first_class)[None, :] == y[:, None], 1.0, 0.0)
        dx = row_weight[:, None] * (p - one_hot)
        if SMOOTH:
            even = (p * weight_sum - class_weights(weight_ptr, cols, n_cols, x)) / n_classes
            dx = (1 - smoothing) * dx + smoothing * even
    dx = tl.where(counts[:, None], dx * scale[:, None], 0.0)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
