"""The checks of softmax: along the last and another dimension, with a scale and a mask."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, compare, drawn
from gpunn.reference.softmax import softmax_backward, softmax_forward


@dataclass(frozen=True)
class Case:
    """A call of one of the functions."""

    function: str
    shape: tuple[int, ...]
    dim: int
    scale: float = 1.0
    mask: tuple[int, ...] | None = None


CASES: dict[str, Case] = {
    "softmax": Case("softmax", (5, 37), -1),
    "softmax, another dimension": Case("softmax", (2, 9, 11), 1),
    "softmax, scale and mask": Case("softmax", (3, 4, 37), -1, 0.3, (4, 37)),
    "softmax, longer than a tile": Case("softmax", (2, 17000), -1),
    "log_softmax": Case("log_softmax", (5, 37), -1),
    "softmin": Case("softmin", (5, 37), -1, 2.0),
}


def check_softmax(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradients of all that it is given."""
    case = CASES[name]
    logarithm, sign = case.function == "log_softmax", -1 if case.function == "softmin" else 1

    def ours(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = getattr(GF, case.function)(x, case.dim, scale=case.scale, mask=mask)
        return y

    def theirs(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        s = sign * case.scale * x
        s = s if mask is None else s + mask
        return torch.log_softmax(s, case.dim) if logarithm else torch.softmax(s, case.dim)

    def exact(dy: Array, x: Array, mask: Array | None = None) -> dict[str, Array]:
        s = sign * case.scale * x + (0 if mask is None else mask)
        ds = softmax_backward(dy, s, case.dim, logarithm)
        found = {"y": softmax_forward(s, case.dim, logarithm), "dx": sign * case.scale * ds}
        if mask is not None:
            found["dmask"] = ds.sum(tuple(range(ds.ndim - mask.ndim)))
        return found

    inputs = [drawn(case.shape, dtype, device)]
    inputs += [] if case.mask is None else [drawn(case.mask, dtype, device)]
    return compare(ours, theirs, exact, inputs)


CHECKS = [Check("softmax", name, functools.partial(check_softmax, name)) for name in CASES]
