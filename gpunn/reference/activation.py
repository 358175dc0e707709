"""Activation functions and their derivatives, y = f(x) and f'(x), in float64.

Formulas: those of the documentation of torch.nn, whose conventions are kept at the kinks
(relu'(0) = 0). A function takes ``(x, *parameters)``, the parameters in torch's order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Function = Callable[..., Array]

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), with exp of a number that is never positive."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x < 0, e, 1.0) / (1 + e))


def sigmoid_derivative(x: Array) -> Array:
    """σ(x) σ(-x): symmetric, and without the cancellation of σ (1 - σ)."""
    return sigmoid(x) * sigmoid(-x)


def softplus(x: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """log(1 + exp(beta x)) / beta, and x where beta x > threshold. Dugas et al. 2001."""
    return np.where(x * beta > threshold, x, np.logaddexp(0.0, x * beta) / beta)


def softplus_derivative(x: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """σ(beta x), and 1 where beta x > threshold."""
    return np.where(x * beta > threshold, 1.0, sigmoid(x * beta))


def elu(x: Array, alpha: float = 1.0) -> Array:
    """x, or alpha (exp(x) - 1) for x <= 0. Clevert et al. 2016."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


def elu_derivative(x: Array, alpha: float = 1.0) -> Array:
    """1, or alpha exp(x) for x <= 0."""
    return np.where(x > 0, 1.0, alpha * np.exp(np.minimum(x, 0.0)))


def celu(x: Array, alpha: float = 1.0) -> Array:
    """x, or alpha (exp(x / alpha) - 1) for x <= 0. Barron 2017."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0) / alpha))


def celu_derivative(x: Array, alpha: float = 1.0) -> Array:
    """1, or exp(x / alpha) for x <= 0."""
    return np.where(x > 0, 1.0, np.exp(np.minimum(x, 0.0) / alpha))


def tanhshrink(x: Array) -> Array:
    """x - tanh(x); near zero by its series, x³/3 - 2x⁵/15 + 17x⁷/315 - 62x⁹/2835 + …"""
    small = np.clip(x, -0.03, 0.03)
    z = small * small
    series = (
        small * z * (1 / 3 - z * (2 / 15 - z * (17 / 315 - z * (62 / 2835 - z * 1382 / 155925))))
    )
    return np.where(small == x, series, x - np.tanh(x))


def softsign_derivative(x: Array) -> Array:
    """1 / (1 + |x|)²."""
    return 1 / (1 + np.abs(x)) ** 2


def softshrink(x: Array, lambd: float = 0.5) -> Array:
    """x - lambd above lambd, x + lambd below -lambd, else 0. Donoho 1995."""
    return np.asarray(np.sign(x) * np.maximum(np.abs(x) - lambd, 0.0))


def shrink_derivative(x: Array, lambd: float = 0.5) -> Array:
    """1 outside of [-lambd, lambd], else 0: of softshrink and of hardshrink."""
    return np.where(np.abs(x) > lambd, 1.0, 0.0)


def normal_distribution(x: Array) -> Array:
    """Φ(x) = erfc(-x / √2) / 2, accurate also where it is tiny."""
    return np.asarray(0.5 * _erfc(-x / math.sqrt(2)))


def gelu_derivative(x: Array) -> Array:
    """Φ(x) + x φ(x)."""
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return normal_distribution(x) + np.asarray(x * density)


def _gelu_tanh_inner(x: Array) -> Array:
    return SQRT_2_OVER_PI * (x + GELU_CUBIC * x**3)


def gelu_tanh(x: Array) -> Array:
    """x (1 + tanh(u)) / 2 = x σ(2u), u = √(2/π) (x + 0.044715 x³). Hendrycks and Gimpel 2016."""
    return x * sigmoid(2 * _gelu_tanh_inner(x))


def gelu_tanh_derivative(x: Array) -> Array:
    """σ(2u) + 2 x σ'(2u) u'."""
    u = _gelu_tanh_inner(x)
    slope = SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * x * x)
    return sigmoid(2 * u) + 2 * x * sigmoid_derivative(2 * u) * slope


def silu_derivative(x: Array) -> Array:
    """σ(x) + x σ'(x). Elfwing et al. 2018."""
    return sigmoid(x) + x * sigmoid_derivative(x)


def hardswish_derivative(x: Array) -> Array:
    """0 up to -3, 1 from 3 on, between them (2x + 3) / 6. Howard et al. 2019."""
    return np.where(x <= -3, 0.0, np.where(x < 3, (2 * x + 3) / 6, 1.0))


def _tanh_softplus(x: Array) -> tuple[Array, Array]:
    """t = tanh(log(1 + eˣ)) = n / (n + 2) and 1 - t² = 4 (n + 1) / (n + 2)², n = eˣ (eˣ + 2)."""
    e = np.exp(-np.abs(x))
    numerator = np.where(x < 0, e * (e + 2), 1 + 2 * e)
    unit = np.where(x < 0, 1.0, e * e)  # n is numerator / unit
    below = numerator + 2 * unit
    return numerator / below, 4 * unit * (numerator + unit) / below**2


def mish(x: Array) -> Array:
    """x tanh(log(1 + eˣ)). Misra 2020."""
    return x * _tanh_softplus(x)[0]


def mish_derivative(x: Array) -> Array:
    """t + x (1 - t²) σ(x), t = tanh(log(1 + eˣ))."""
    t, rest = _tanh_softplus(x)
    return t + x * rest * sigmoid(x)


def hardtanh_derivative(x: Array, low: float = -1.0, high: float = 1.0) -> Array:
    """1 between the limits, 0 at and outside of them."""
    return np.where((x > low) & (x < high), 1.0, 0.0)


# Name: (function, derivative).
ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "identity": (lambda x: x, np.ones_like),
    "relu": (lambda x: np.maximum(x, 0.0), lambda x: np.where(x > 0, 1.0, 0.0)),
    "relu6": (
        lambda x, low=0.0, high=6.0: np.clip(x, low, high),
        lambda x, low=0.0, high=6.0: hardtanh_derivative(x, low, high),
    ),
    "leaky_relu": (
        lambda x, slope=0.01: np.where(x > 0, x, slope * x),
        lambda x, slope=0.01: np.where(x > 0, 1.0, slope),
    ),
    "elu": (elu, elu_derivative),
    "celu": (celu, celu_derivative),
    "selu": (
        lambda x: SELU_SCALE * elu(x, SELU_ALPHA),
        lambda x: SELU_SCALE * elu_derivative(x, SELU_ALPHA),
    ),
    "sigmoid": (sigmoid, sigmoid_derivative),
    "logsigmoid": (lambda x: -np.logaddexp(0.0, -x), lambda x: sigmoid(-x)),
    "hardsigmoid": (
        lambda x: np.clip(x + 3, 0, 6) / 6,
        lambda x: hardtanh_derivative(x, -3, 3) / 6,
    ),
    "tanh": (np.tanh, lambda x: 4 * sigmoid_derivative(2 * x)),
    "hardtanh": (lambda x, low=-1.0, high=1.0: np.clip(x, low, high), hardtanh_derivative),
    "tanhshrink": (tanhshrink, lambda x: np.tanh(x) ** 2),
    "softplus": (softplus, softplus_derivative),
    "softsign": (lambda x: x / (1 + np.abs(x)), softsign_derivative),
    "softshrink": (softshrink, shrink_derivative),
    "hardshrink": (lambda x, lambd=0.5: np.where(np.abs(x) > lambd, x, 0.0), shrink_derivative),
    "gelu": (lambda x: x * normal_distribution(x), gelu_derivative),
    "gelu_tanh": (gelu_tanh, gelu_tanh_derivative),
    "silu": (lambda x: x * sigmoid(x), silu_derivative),
    "hardswish": (lambda x: x * np.clip(x + 3, 0, 6) / 6, hardswish_derivative),
    "mish": (mish, mish_derivative),
}


def activation_forward(x: Any, name: str, *parameters: float) -> Array:
    """y = f(x)."""
    return ACTIVATIONS[name][0](np.asarray(x, dtype=np.float64), *parameters)


def activation_backward(dy: Any, x: Any, name: str, *parameters: float) -> Array:
    """dx = dy f'(x)."""
    slope = ACTIVATIONS[name][1](np.asarray(x, dtype=np.float64), *parameters)
    return np.asarray(dy, dtype=np.float64) * slope
