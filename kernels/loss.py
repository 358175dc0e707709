"""Losses of a number and its target, and their gradients, for a kernel to call on tiles.

No loads, no stores. A function takes ``(x, y, pos_weight, p0)`` so that a kernel can be given any
of them as a constexpr: input, target, bce_with_logits' pos_weight, and the loss's one parameter.
``mse_gradient`` and its like give the gradients of x and of y.

Sources: P. Huber, "Robust Estimation of a Location Parameter", 1964; R. Girshick, "Fast R-CNN",
2015 (smooth_l1); S. Kullback and R. Leibler, "On Information and Sufficiency", 1951; torch's
functions of these names, which say what happens at infinities and at a target of 0.

To add a loss: its two functions and its entry of ``LOSSES``; its function, and torch's in
``TORCH``, in ``gpunn/functional/pointwise_loss.py``; its formulas in
``gpunn/reference/pointwise_loss.py``; its line in ``CALLS`` of ``tests/test_pointwise_loss.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from gpunn.kernels.numeric import log1p_unit, nan_max


@triton.jit
def mse(x, y, pos_weight, p0: tl.constexpr):
    d = x - y
    return d * d


@triton.jit
def mse_gradient(x, y, pos_weight, p0: tl.constexpr):
    d = 2 * (x - y)
    return d, -d


@triton.jit
def l1(x, y, pos_weight, p0: tl.constexpr):
    return tl.abs(x - y)


@triton.jit
def l1_gradient(x, y, pos_weight, p0: tl.constexpr):
    """The sign, 0 of NaN, as torch's."""
    d = x - y
    slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    return slope, -slope


@triton.jit
def smooth_l1(x, y, pos_weight, p0: tl.constexpr):
    d = tl.abs(x - y)
    return tl.where(d < p0, d * d * 0.5 / p0, d - 0.5 * p0)


@triton.jit
def smooth_l1_gradient(x, y, pos_weight, p0: tl.constexpr):
    d = x - y
    slope = tl.where(d <= -p0, -1.0, tl.where(d >= p0, 1.0, d / p0))
    return slope, -slope


@triton.jit
def huber(x, y, pos_weight, p0: tl.constexpr):
    d = tl.abs(x - y)
    return tl.where(d < p0, d * d * 0.5, p0 * (d - 0.5 * p0))


@triton.jit
def huber_gradient(x, y, pos_weight, p0: tl.constexpr):
    d = x - y
    slope = tl.where(d <= -p0, -p0, tl.where(d >= p0, p0, d))
    return slope, -slope


@triton.jit
def bce_sides(x, y, pos_weight, p0: tl.constexpr):
    """What x and log(1 + e^-|x|) are multiplied with: so grouped, nothing cancels for y = 0 or 1.

    p0 is 1 if there is a pos_weight. If there is none, an infinite y meets no 0 in its place.
    """
    below = -y
    both = 1.0
    if p0 != 0:
        below = -y * pos_weight
        both = 1 + (pos_weight - 1) * y
    return tl.where(x < 0, below, 1 - y), both


@triton.jit
def bce_with_logits(x, y, pos_weight, p0: tl.constexpr):
    """(1 - y) log(1 + e^x) + pos_weight y log(1 + e^-x)."""
    side, both = bce_sides(x, y, pos_weight, p0)
    return side * x + both * log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def bce_with_logits_gradient(x, y, pos_weight, p0: tl.constexpr):
    side, both = bce_sides(x, y, pos_weight, p0)
    e = tl.exp(-tl.abs(x))
    small = both * (e / (1 + e))
    dy = -x
    if p0 != 0:
        dy = pos_weight * nan_max(-x, 0.0) - nan_max(x, 0.0) + (pos_weight - 1) * log1p_unit(e)
    return side + tl.where(x < 0, small, -small), dy


@triton.jit
def kl_div(x, y, pos_weight, p0: tl.constexpr):
    """y (log y - x), where y = 0 its limit."""
    return tl.where(y == 0, 0.0, y * tl.log(y)) - y * x


@triton.jit
def kl_div_gradient(x, y, pos_weight, p0: tl.constexpr):
    """Of y, NaN where y is 0 or infinite, as torch's."""
    return -y, tl.where((y > 0) & (y < float("inf")), tl.log(y) + 1 - x, float("nan"))


@triton.jit
def kl_div_log(x, y, pos_weight, p0: tl.constexpr):
    """e^y (y - x): of a target that is given by its logarithm."""
    return tl.exp(y) * (y - x)


@triton.jit
def kl_div_log_gradient(x, y, pos_weight, p0: tl.constexpr):
    p = tl.exp(y)
    return -p, p * (y - x) + p


@dataclass(frozen=True)
class Loss:
    """One loss: its device functions."""

    forward: Any
    gradient: Any


LOSSES: dict[str, Loss] = {
    "mse": Loss(mse, mse_gradient),
    "l1": Loss(l1, l1_gradient),
    "smooth_l1": Loss(smooth_l1, smooth_l1_gradient),
    "huber": Loss(huber, huber_gradient),
    "bce_with_logits": Loss(bce_with_logits, bce_with_logits_gradient),
    "kl_div": Loss(kl_div, kl_div_gradient),
    "kl_div_log": Loss(kl_div_log, kl_div_log_gradient),
}


def first_of(parameters: Sequence[float]) -> float:
    """The constexpr P0 by which a kernel is given a loss's parameter."""
    return (*parameters, 0.0)[0]
