"""The checks of layer normalisation and of that by the root mean square."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, compare, drawn
from gpunn.reference.layer_norm import row_norm_backward, row_norm_forward

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """Rows of a length, and whether a residual is added first."""

    function: str
    rows: int
    columns: int
    residual: bool = False


CASES: dict[str, Case] = {
    "layer_norm": Case("layer_norm", 40, 37),
    "layer_norm, residual": Case("layer_norm", 9, 256, True),
    "layer_norm, sums by columns": Case("layer_norm", 5, 4100),
    "layer_norm, longer than a tile": Case("layer_norm", 2, 16400),
    "rms_norm": Case("rms_norm", 40, 37),
    "rms_norm, residual": Case("rms_norm", 9, 256, True),
}


def _call(
    module: Any, case: Case, x: torch.Tensor, parameters: tuple[Any, ...], **fused: Any
) -> torch.Tensor:
    function, shape = getattr(module, case.function), (case.columns,)
    y: torch.Tensor = function(x, shape, *parameters, EPS, **fused)
    return y


def check_layer_norm(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradients of all that it is given."""
    case = CASES[name]
    centred = case.function == "layer_norm"

    def parts(given: tuple[torch.Tensor, ...]) -> tuple[Any, Any]:
        return (given[:-1], given[-1]) if case.residual else (given, None)

    def ours(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        parameters, residual = parts(given)
        return _call(GF, case, x, parameters, residual=residual)

    def theirs(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        parameters, residual = parts(given)
        return _call(F, case, x if residual is None else x + residual, parameters)

    def exact(dy: Array, x: Array, weight: Array, *others: Array) -> dict[str, Array]:
        bias = others[0] if centred else None
        ds, dweight, dbias = row_norm_backward(dy, total, weight, EPS, centred)
        found = {"y": row_norm_forward(total, weight, bias, EPS, centred), "dx": ds}
        found |= {"dweight": dweight} | ({"dbias": dbias} if centred else {})
        return found | ({"dresidual": ds} if case.residual else {})

    x, residual = (drawn((case.rows, case.columns), dtype, device) for _ in range(2))
    s = x + residual if case.residual else x  # rounded to the dtype, as both round it
    total = s.double().cpu().numpy()
    inputs = [x, *(drawn((case.columns,), dtype, device) for _ in range(1 + centred))]
    inputs += [residual] if case.residual else []
    return compare(ours, theirs, exact, inputs)


CHECKS = [Check("layer_norm", name, functools.partial(check_layer_norm, name)) for name in CASES]
