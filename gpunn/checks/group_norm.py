"""The checks of group and instance normalisation: read once and twice, in each layout."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, compare, drawn
from gpunn.functional.activation import TORCH
from gpunn.reference import activation as activations
from gpunn.reference.group_norm import group_norm_backward, group_norm_forward

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A normalisation of x (N, C, *); by instances without ``num_groups``."""

    shape: tuple[int, ...]
    num_groups: int | None
    activation: str = "identity"
    affine: bool = True
    channels_last: bool = False

    def call(self, module: Any, x: torch.Tensor, *parameters: Any, **fused: Any) -> torch.Tensor:
        """F's or GF's function."""
        weight, bias = parameters or (None, None)
        if self.num_groups is None:
            y: torch.Tensor = module.instance_norm(x, None, None, weight, bias, eps=EPS, **fused)
        else:
            y = module.group_norm(x, self.num_groups, weight, bias, EPS, **fused)
        return y


def check_group_norm(case: Case, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradients of all that it is given."""
    n_channels = case.shape[1]
    n_groups = n_channels if case.num_groups is None else case.num_groups

    def ours(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return case.call(GF, x, *parameters, activation=case.activation)

    def theirs(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return TORCH[case.activation](case.call(F, x, *parameters))

    def exact(dy: Array, x: Array, *parameters: Array) -> dict[str, Array]:
        weight, bias = parameters or (None, None)
        z = group_norm_forward(x, n_groups, weight, bias, EPS)
        dz = activations.activation_backward(dy, z, case.activation)
        dx, dweight, dbias = group_norm_backward(dz, x, n_groups, weight, EPS)
        found = {"y": activations.activation_forward(z, case.activation), "dx": dx}
        return found | ({"dweight": dweight, "dbias": dbias} if case.affine else {})

    x = drawn(case.shape, dtype, device) + 0.5
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if case.channels_last else x
    parameters = [drawn((n_channels,), dtype, device) for _ in range(2 * case.affine)]
    return compare(ours, theirs, exact, [x, *parameters])


CASES: dict[str, Case] = {
    "group_norm, images": Case((3, 12, 5, 7), 4),
    "group_norm, channels_last, SiLU": Case((2, 24, 4, 6), 6, "silu", channels_last=True),
    "group_norm, rows, without parameters": Case((9, 20), 5, affine=False),
    "group_norm, read twice, GELU": Case((1, 12, 30, 30), 2, "gelu"),
    "group_norm, read twice, channels_last, SiLU": Case(
        (2, 36, 18, 17), 3, "silu", channels_last=True
    ),
    "group_norm, read twice, many channels": Case((2, 140, 3, 3), 2),
    "instance_norm, images, SiLU": Case((2, 5, 6, 6), None, "silu"),
    "instance_norm, volumes, read twice": Case((1, 2, 5, 30, 30), None),
}
CHECKS = [
    Check("group_norm", name, functools.partial(check_group_norm, case))
    for name, case in CASES.items()
]
