"""Activation functions and their gradients, for any kernel to call on a tile in registers.

No loads, no stores. Each is stable over the whole range of its type: ``exp`` is only ever given a
number that is not positive, and what would cancel near zero is computed by ``numeric.py``. A
function takes ``(x, p0, p1)`` so that a kernel can be given any of them as a constexpr; ``p0`` and
``p1`` are the function's parameters, in torch's order, and often unused.

``relu_gradient(dy, y, p0, p1)`` is the gradient of the input for a gradient ``dy`` of the output.
It is computed from the activation's *output* where that is as accurate (``saves``), so that a
fused kernel need not keep the input for the backward pass; elu's, for one, is not: where the output
rounds to -1 the gradient exp(x) would be lost.

To add an activation, see CONTRIBUTING.md; here, its two functions and its entry of ``ACTIVATIONS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import triton
import triton.language as tl

from gpunn.kernels.numeric import expm1, log1p_unit, nan_max, nan_min, normal_cdf, tanh_small

SELU_ALPHA = tl.constexpr(1.6732632423543772848170429916717)
SELU_SCALE = tl.constexpr(1.0507009873554804934193349852946)
SELU_ALPHA_SCALE = tl.constexpr(1.7580993408473766)
SQRT_2_OVER_PI = tl.constexpr(0.79788456080286535588)
INV_SQRT_2PI = tl.constexpr(0.39894228040143267794)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def identity(x, p0: tl.constexpr, p1: tl.constexpr):
    return x


@triton.jit
def identity_gradient(dy, y, p0: tl.constexpr, p1: tl.constexpr):
    return dy


@triton.jit
def relu(x, p0: tl.constexpr, p1: tl.constexpr):
    return nan_max(x, 0.0)


@triton.jit
def relu_gradient(dy, y, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def hardtanh(x, p0: tl.constexpr, p1: tl.constexpr):
    """Also relu6, between 0 and 6."""
    return nan_min(nan_max(x, p0), p1)


@triton.jit
def hardtanh_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    """From the output only where its type has both limits: 0.7 in bfloat16 is 0.6992 < 0.7."""
    return tl.where((x <= p0) | (x >= p1), 0.0, dy)


@triton.jit
def leaky_relu(x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(x > 0, x, x * p0)


@triton.jit
def leaky_relu_gradient(dy, y, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(y > 0, dy, dy * p0)


@triton.jit
def elu(x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(x >= 0, x, p0 * expm1(nan_min(x, 0.0)))


@triton.jit
def elu_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(x <= 0, dy * (tl.exp(nan_min(x, 0.0)) * p0), dy)


@triton.jit
def celu(x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(x >= 0, x, p0 * expm1(nan_min(x, 0.0) / p0))


@triton.jit
def celu_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(x <= 0, dy * tl.exp(nan_min(x, 0.0) / p0), dy)


@triton.jit
def selu(x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(x > 0, x, expm1(nan_min(x, 0.0)) * SELU_ALPHA) * SELU_SCALE


@triton.jit
def selu_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(x <= 0, dy * tl.exp(nan_min(x, 0.0)) * SELU_ALPHA_SCALE, dy * SELU_SCALE)


@triton.jit
def sigmoid(x, p0: tl.constexpr, p1: tl.constexpr):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def sigmoid_gradient(dy, y, p0: tl.constexpr, p1: tl.constexpr):
    return dy * (1 - y) * y


@triton.jit
def logsigmoid(x, p0: tl.constexpr, p1: tl.constexpr):
    return nan_min(x, 0.0) - log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def logsigmoid_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    return dy * sigmoid(-x, p0, p1)


@triton.jit
def hardsigmoid(x, p0: tl.constexpr, p1: tl.constexpr):
    return nan_min(nan_max(x + 3, 0.0), 6.0) / 6


@triton.jit
def hardsigmoid_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where((x > -3) & (x < 3), dy / 6, 0.0)


@triton.jit
def tanh(x, p0: tl.constexpr, p1: tl.constexpr):
    small = tanh_small(nan_min(nan_max(x, -0.625), 0.625))
    e = tl.exp(-2 * tl.abs(x))
    large = 1 - 2 * e / (1 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def tanh_gradient(dy, y, p0: tl.constexpr, p1: tl.constexpr):
    return dy * (1 - y * y)


@triton.jit
def tanhshrink(x, p0: tl.constexpr, p1: tl.constexpr):
    return x - tanh(x, p0, p1)


@triton.jit
def tanhshrink_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    t = tanh(x, p0, p1)
    return dy * t * t


@triton.jit
def softplus(x, p0: tl.constexpr, p1: tl.constexpr):
    """log(1 + exp(beta x)) / beta, and x itself where beta x passes the threshold."""
    z = x * p0
    soft = (nan_max(z, 0.0) + log1p_unit(tl.exp(-tl.abs(z)))) / p0
    return tl.where(z > p1, x, soft)


@triton.jit
def softplus_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    z = x * p0
    return tl.where(z > p1, dy, dy * sigmoid(z, p0, p1))


@triton.jit
def softsign(x, p0: tl.constexpr, p1: tl.constexpr):
    return x / (1 + tl.abs(x))


@triton.jit
def softsign_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    d = 1 / (1 + tl.abs(x))
    return dy * d * d


@triton.jit
def softshrink(x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(x > p0, x - p0, tl.where(x < -p0, x + p0, x * 0))


@triton.jit
def shrink_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where((x >= -p0) & (x <= p0), 0.0, dy)


@triton.jit
def hardshrink(x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where((x >= -p0) & (x <= p0), 0.0, x)


@triton.jit
def gelu(x, p0: tl.constexpr, p1: tl.constexpr):
    cdf, _ = normal_cdf(x)
    return x * cdf


@triton.jit
def gelu_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    cdf, bell = normal_cdf(x)
    return dy * (cdf + x * bell * INV_SQRT_2PI)


@triton.jit
def gelu_tanh(x, p0: tl.constexpr, p1: tl.constexpr):
    inner = (x + x * x * x * GELU_CUBIC) * SQRT_2_OVER_PI
    return x * sigmoid(2 * inner, p0, p1)  # = x (1 + tanh(inner)) / 2, without cancellation


@triton.jit
def gelu_tanh_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    u = 2 * (x + x * x * x * GELU_CUBIC) * SQRT_2_OVER_PI
    slope = 2 * (1 + x * x * 3 * GELU_CUBIC) * SQRT_2_OVER_PI
    e = tl.exp(-tl.abs(u))
    d = 1 / (1 + e)
    return dy * (tl.where(u < 0, e, 1.0) * d + x * e * d * d * slope)  # σ(u) + x σ'(u) slope


@triton.jit
def silu(x, p0: tl.constexpr, p1: tl.constexpr):
    return x * sigmoid(x, p0, p1)


@triton.jit
def silu_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    s = sigmoid(x, p0, p1)
    return dy * s * (1 + x * (1 - s))


@triton.jit
def hardswish(x, p0: tl.constexpr, p1: tl.constexpr):
    return x * nan_min(nan_max(x + 3, 0.0), 6.0) / 6


@triton.jit
def hardswish_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    return tl.where(x <= -3, 0.0, tl.where(x < 3, dy * (x / 3 + 0.5), dy))


@triton.jit
def tanh_softplus(x):
    """tanh(log(1 + e^x)) = n / (n + 2) with n = e^x (e^x + 2), written without overflow."""
    e = tl.exp(-tl.abs(x))
    below = e * (e + 2)
    above = 1 + 2 * e
    return tl.where(x < 0, below / (below + 2), above / (above + 2 * e * e))


@triton.jit
def mish(x, p0: tl.constexpr, p1: tl.constexpr):
    return x * tanh_softplus(x)


@triton.jit
def mish_gradient(dy, x, p0: tl.constexpr, p1: tl.constexpr):
    e = tl.exp(-tl.abs(x))
    n = tl.where(x < 0, e * (e + 2), 1 + 2 * e)
    u = tl.where(x < 0, 1.0, e * e)
    d = 1 / (n + 2 * u)  # t = n d, and 1 - t² without cancellation
    return dy * (n * d + x * (4 * u * (n + u) * d * d) * sigmoid(x, p0, p1))


Saves = Literal["input", "output", "either"]


@dataclass(frozen=True)
class Activation:
    """One activation: its device functions, what the gradient is computed from, its defaults."""

    forward: Any
    gradient: Any
    saves: Saves
    """"either": from the input always, from the output where ``output_suffices``."""
    defaults: tuple[float, ...] = ()
    output_suffices: Callable[..., bool] = lambda *parameters: True

    def from_output(self, parameters: Sequence[float]) -> bool:
        """Whether a fused kernel may keep the output, and need not keep the input."""
        return self.saves != "input" and self.output_suffices(*parameters)


def _keeps_sign(slope: float) -> bool:
    return slope >= 0


def _zero_to_six(low: float, high: float) -> bool:
    """Every dtype has both limits; 0.7, say, in bfloat16 is 0.6992, and so within (0, 0.7)."""
    return (low, high) == (0, 6)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(identity, identity_gradient, "output"),
    "relu": Activation(relu, relu_gradient, "output"),
    "relu6": Activation(hardtanh, hardtanh_gradient, "either", (0.0, 6.0), _zero_to_six),
    "leaky_relu": Activation(leaky_relu, leaky_relu_gradient, "either", (0.01,), _keeps_sign),
    "elu": Activation(elu, elu_gradient, "input", (1.0,)),
    "celu": Activation(celu, celu_gradient, "input", (1.0,)),
    "selu": Activation(selu, selu_gradient, "input"),
    "sigmoid": Activation(sigmoid, sigmoid_gradient, "output"),
    "logsigmoid": Activation(logsigmoid, logsigmoid_gradient, "input"),
    "hardsigmoid": Activation(hardsigmoid, hardsigmoid_gradient, "input"),
    "tanh": Activation(tanh, tanh_gradient, "output"),
    "hardtanh": Activation(hardtanh, hardtanh_gradient, "input", (-1.0, 1.0)),
    "tanhshrink": Activation(tanhshrink, tanhshrink_gradient, "input"),
    "softplus": Activation(softplus, softplus_gradient, "input", (1.0, 20.0)),
    "softsign": Activation(softsign, softsign_gradient, "input"),
    "softshrink": Activation(softshrink, shrink_gradient, "input", (0.5,)),
    "hardshrink": Activation(hardshrink, shrink_gradient, "input", (0.5,)),
    "gelu": Activation(gelu, gelu_gradient, "input"),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_gradient, "input"),
    "silu": Activation(silu, silu_gradient, "input"),
    "hardswish": Activation(hardswish, hardswish_gradient, "input"),
    "mish": Activation(mish, mish_gradient, "input"),
}


def device_functions(name: str, parameters: list[float]) -> dict[str, Any]:
    """The constexpr arguments by which a kernel is given an activation."""
    p0, p1 = (*parameters, 0.0, 0.0)[:2]
    return {"ACTIVATION": ACTIVATIONS[name].forward, "P0": p0, "P1": p1}


def gradient_functions(name: str, parameters: list[float]) -> dict[str, Any]:
    """The constexpr arguments by which a kernel is given an activation's gradient."""
    arguments = device_functions(name, parameters)
    arguments["GRADIENT"] = ACTIVATIONS[name].gradient
    return arguments
