"""The checks of batch normalisation: by the batch and by running statistics, in each layout."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, as_numpy, compare, drawn
from gpunn.functional.activation import TORCH
from gpunn.reference import activation as activations
from gpunn.reference.batch_norm import (
    batch_norm_backward,
    batch_norm_forward,
    batch_statistics,
    running_statistics,
)

EPS = 1e-5
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A normalisation of x (N, C, *)."""

    shape: tuple[int, ...]
    training: bool = True
    activation: str = "identity"
    affine: bool = True
    residual: bool = False
    channels_last: bool = False

    def inputs(self, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        """x, then weight and bias, and the residual, where the case has them."""
        x = drawn(self.shape, dtype, device) + 0.5
        found = [x.movedim(1, -1).contiguous().movedim(-1, 1) if self.channels_last else x]
        n_channels = self.shape[1]
        found += [drawn((n_channels,), dtype, device) for _ in range(2)] if self.affine else []
        if self.residual:
            residual = drawn(self.shape, dtype, device)
            if self.activation == "relu":  # away from its kink, where roundings decide
                residual = residual + 4 * residual.sign()
                found[1] = found[1] / 2
            found.append(residual)
        return found

    def parts(self, rest: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        """weight, bias and residual."""
        affine = rest[:2] if self.affine else (None, None)
        return *affine, rest[-1] if self.residual else None


def exact(case: Case, running: Tensors, dy: Array, x: Array, *rest: Array) -> dict[str, Array]:
    """Value and gradients by the reference."""
    weight, bias, residual = case.parts(rest)
    statistics = batch_statistics(x, EPS)
    if not case.training:
        mean, var = map(as_numpy, running)
        statistics = running_statistics(mean, var, EPS)
    z = batch_norm_forward(x, weight, bias, statistics)
    z = z if residual is None else z + residual
    dz = activations.activation_backward(dy, z, case.activation)
    dx, dweight, dbias = batch_norm_backward(dz, x, weight, statistics)
    found = {"y": activations.activation_forward(z, case.activation), "dx": dx}
    found |= {"dweight": dweight, "dbias": dbias} if case.affine else {}
    return found | ({"dresidual": dz} if case.residual else {})


def check_batch_norm(case: Case, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradients of all that it is given; the running statistics stay."""
    n_channels = case.shape[1]
    mean, var = drawn((n_channels,), dtype, device), drawn((n_channels,), dtype, device) ** 2 + 0.5
    given: tuple[Any, Any] = (None, None) if case.training else (mean, var)

    def ours(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        weight, bias, residual = case.parts(rest)
        arguments: Any = (*given, weight, bias, case.training, 0.1, EPS)
        return GF.batch_norm(x, *arguments, activation=case.activation, residual=residual)

    def theirs(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        weight, bias, residual = case.parts(rest)
        arguments: Any = (*given, weight, bias, case.training, 0.1, EPS)
        z = F.batch_norm(x, *arguments)
        return TORCH[case.activation](z if residual is None else z + residual)

    return compare(
        ours, theirs, functools.partial(exact, case, (mean, var)), case.inputs(dtype, device)
    )


CASES: dict[str, Case] = {
    "batch_norm, training, images": Case((3, 10, 5, 7)),
    "batch_norm, training, channels_last, ReLU, residual": Case(
        (4, 40, 6, 5), activation="relu", residual=True, channels_last=True
    ),
    "batch_norm, training, GELU, residual": Case((2, 6, 5, 8), activation="gelu", residual=True),
    "batch_norm, training, rows, SiLU": Case((30, 12), activation="silu"),
    "batch_norm, training, volumes, without parameters": Case((2, 3, 4, 3, 5), affine=False),
    "batch_norm, eval, images": Case((2, 5, 4, 6), training=False),
    "batch_norm, eval, channels_last, ReLU, residual": Case(
        (2, 24, 4, 6), training=False, activation="relu", residual=True, channels_last=True
    ),
    "batch_norm, eval, signals, tanh": Case((3, 4, 9), training=False, activation="tanh"),
}
CHECKS = [
    Check("batch_norm", name, functools.partial(check_batch_norm, case))
    for name, case in CASES.items()
]
