"""The checks of the gated linear units."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, compare, drawn
from gpunn.functional.activation import TORCH
from gpunn.functional.glu import GATES
from gpunn.reference import glu

# Every gated linear unit: the function, and the activation that is its gate.
GATED: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    **{name: (getattr(GF, name), gate) for name, gate in GATES.items()},
    "geglu, tanh": (functools.partial(GF.geglu, approximate="tanh"), "gelu_tanh"),
}


def check_glu(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One gated linear unit, along a dimension in the middle."""
    function, gate = GATED[name]

    def theirs(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, 1)
        return a * TORCH[gate](b)

    def exact(dy: Array, x: Array) -> dict[str, Array]:
        return {"y": glu.glu_forward(x, 1, gate), "dx": glu.glu_backward(dy, x, 1, gate)}

    return compare(lambda x: function(x, 1), theirs, exact, [2 * drawn((3, 10, 23), dtype, device)])


CHECKS = [Check("glu", name, functools.partial(check_glu, name)) for name in GATED]
