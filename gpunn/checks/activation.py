"""The checks of the activation functions."""

from __future__ import annotations

import functools

import torch

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, as_numpy, compare, drawn, named
from gpunn.functional.activation import TORCH
from gpunn.kernels.activation import ACTIVATIONS
from gpunn.kernels.elementwise import activation_backward, activation_forward
from gpunn.reference import activation


def check_activation(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One function of ``gpunn.functional``; identity, which is none, by its launchers."""
    x, parameters = 3 * drawn((5, 67), dtype, device), ACTIVATIONS[name].defaults

    def exact(dy: Array, x: Array) -> dict[str, Array]:
        return {
            "y": activation.activation_forward(x, name, *parameters),
            "dx": activation.activation_backward(dy, x, name, *parameters),
        }

    if name == "identity":
        dy = drawn(x.shape, dtype, device)
        got = [activation_forward(x, name, []), activation_backward(dy, x, name, [])]
        return named(got, exact(as_numpy(dy), as_numpy(x)), [x, dy])
    if name == "gelu_tanh":
        ours = functools.partial(GF.gelu, approximate="tanh")
    else:
        ours = getattr(GF, name)
    return compare(ours, lambda x: TORCH[name](x, *parameters), exact, [x])


CHECKS = [Check("activation", n, functools.partial(check_activation, n)) for n in ACTIVATIONS]
