"""The checks of linear, with all that it can fuse."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

import gpunn.functional as GF
from gpunn.checks.comparison import SEED, Array, Check, Comparison, compare, drawn
from gpunn.functional.activation import TORCH
from gpunn.kernels.activation import ACTIVATIONS
from gpunn.kernels.philox import draw_seed
from gpunn.reference import linear
from gpunn.reference.philox import dropout_factors


def check_linear(
    sizes: tuple[int, int, int],
    name: str,
    extras: Sequence[str],
    dtype: torch.dtype,
    device: str,
) -> list[Comparison]:
    """linear of (rows, outputs, inputs) with an activation, and ``extras`` of what it can fuse."""
    n_rows, n_cols, n_inner = sizes
    shapes: dict[str, tuple[int, ...]] = {"x": (n_rows, n_inner), "weight": (n_cols, n_inner)}
    shapes |= {"bias": (n_cols,)} if "bias" in extras else {}
    shapes |= {"residual": (n_rows, n_cols)} if "residual" in extras else {}
    inputs = {n: drawn(shape, dtype, device) for n, shape in shapes.items()}
    inputs["weight"] = inputs["weight"] / n_inner**0.5
    parameters, dropout_p, factors = ACTIVATIONS[name].defaults, 0.0, None
    if "dropout" in extras:
        dropout_p = 0.25
        torch.manual_seed(SEED)
        seed = int(draw_seed(torch.device(device)).item())
        factors = dropout_factors(seed, (n_rows, n_cols), dropout_p)

    def ours(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = dict(zip(list(shapes)[2:], rest, strict=True))
        torch.manual_seed(SEED)  # so that it draws the seed that the factors were made of
        return GF.linear(x, weight, **given, activation=name, dropout_p=dropout_p)

    def theirs(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        given = dict(zip(list(shapes)[2:], rest, strict=True))
        y = torch.nn.functional.linear(x, weight, given.get("bias"))
        y = TORCH[name](y, *parameters)
        y = y if factors is None else y * torch.from_numpy(factors).to(y)
        return y + given["residual"] if "residual" in given else y

    def exact(dy: Array, x: Array, weight: Array, *rest: Array) -> dict[str, Array]:
        given = dict(zip(list(shapes)[2:], rest, strict=True))
        bias, residual = given.get("bias"), given.get("residual")
        fused: dict[str, Any] = {"activation": name, "parameters": parameters, "factors": factors}
        y = linear.linear_forward(x, weight, bias, residual, **fused)
        gradients = linear.linear_backward(dy, x, weight, bias, **fused)._asdict()
        return {"y": y, **{f"d{input}": gradients[f"d{input}"] for input in shapes}}

    return compare(ours, theirs, exact, list(inputs.values()))


CASES: list[tuple[str, tuple[int, int, int], str, tuple[str, ...], tuple[str, ...]]] = [
    ("plain", (32, 48, 64), "identity", (), ()),
    ("bias, gelu", (32, 48, 64), "gelu", ("bias",), ("epilogue_backward_kernel",)),
    ("bias, relu, dropout", (32, 48, 64), "relu", ("bias", "dropout"), ()),
    ("silu, residual", (32, 48, 64), "silu", ("residual",), ()),
    ("all of them", (33, 50, 72), "tanh", ("bias", "residual", "dropout"), ()),
    ("odd sizes", (37, 51, 29), "elu", ("bias",), ()),
    ("one of each", (1, 1, 1), "softplus", ("bias",), ()),
    ("split inner dimension", (8, 16, 1040), "gelu", ("bias",), ("epilogue_kernel",)),
]
CHECKS = [
    Check("linear", case, functools.partial(check_linear, sizes, name, extras), kernels)
    for case, sizes, name, extras, kernels in CASES
]
