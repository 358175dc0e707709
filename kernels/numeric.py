"""Numerical building blocks for any kernel: types to compute in, NaN, accuracy near zero.

Device functions on a tile in registers: no loads, no stores, no parameters of an op. The hardware's
maximum drops NaN, and ``exp(x) - 1`` and ``log(1 + x)`` lose every digit near zero; these do not.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def widen(x):
    """The type to compute in: float32, or float64 for float64."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def multiple(number, UNIT: tl.constexpr):
    """A multiple of UNIT as such: by itself, Triton finds out which numbers are multiples of 16."""
    return number // UNIT * UNIT


@triton.jit
def nan_max(x, low):
    """max(x, low) that keeps NaN, which the hardware's maximum drops."""
    return tl.where(x < low, low, x)


@triton.jit
def nan_min(x, high):
    """min(x, high) that keeps NaN."""
    return tl.where(x > high, high, x)


@triton.jit
def tanh_small(x):
    """tanh(x) for |x| <= 5/8: its continued fraction x/(1 + x²/(3 + x²/(5 + …))), 7 levels.

    As what it is less than x, whose rounding then is almost all of the error.
    """
    z = x * x
    numerator = z * (45045 + z * (2772 + z * 27))
    return x - x * (numerator / (135135 + z * (62370 + z * (3150 + z * 28))))


@triton.jit
def expm1(x):
    """exp(x) - 1; near zero as 2 t / (1 - t) with t = tanh(x / 2)."""
    t = tanh_small(nan_min(nan_max(x, -1.0), 1.0) * 0.5)
    return tl.where(tl.abs(x) < 1, 2 * t / (1 - t), tl.exp(x) - 1)


@triton.jit
def normal_cdf(x):
    """Φ(x), the standard normal distribution, and exp(-x²/2).

    Below 0 as exp(-x²/2) times a polynomial in t = 1 / (1 + 0.305 |x|), the form of Abramowitz and
    Stegun's 7.1.26, its eight coefficients fitted for the least relative error from -13.5 to 0:
    1e-7, so that the tail keeps its digits, in two thirds of the instructions that erf takes.
    """
    if x.dtype == tl.float64:
        cdf, bell = 0.5 * (1 + tl.erf(x * 0.70710678118654752440)), tl.exp(x * x * -0.5)
    else:
        bell = tl.exp2(x * x * -0.72134752044448170)
        t = 1 / (1 + 0.305 * tl.abs(x))
        tail = 0.185713628 + t * (-0.152986367 + t * 0.0366987109)
        tail = 0.103421329 + t * (0.121020138 + t * (-0.0379738736 + t * tail))
        tail = bell * (t * (0.121639738 + t * (0.122466743 + t * tail)))
        cdf = tl.where(x < 0, tail, 1 - tail)
    return cdf, bell


@triton.jit
def artanh_small(x, N_TERMS: tl.constexpr):
    """artanh(x) = x + x³ / 3 + x⁵ / 5 + …"""
    z = x * x
    series = z * 0 + 1.0 / (2 * N_TERMS - 1)
    for k in tl.static_range(1, N_TERMS):
        series = 1.0 / (2 * (N_TERMS - k) - 1) + z * series
    return x * series


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x)); in float64 only below 1/2.

    What the seven terms leave out is a quarter of what float32 rounds off.
    """
    s = x / (2 + x)
    if x.dtype == tl.float64:
        return tl.where(x < 0.5, 2 * artanh_small(s, 12), tl.log(1 + x))
    return 2 * artanh_small(s, 7)


@triton.jit
def exp_or_0(x):
    """exp(x), 0 where that is less than 2^-126 in float32: tl.exp spends three instructions on it.

    The difference from a maximum is to be taken before: the product rounds it relatively.
    """
    return tl.exp2(x * LOG2E)
