"""Activations: what they refuse, what is left to torch, autocast and torch.compile."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

import gpunn
import gpunn.functional as GF
from gpunn.functional.activation import TORCH
from gpunn.kernels.activation import ACTIVATIONS
from kit import PARAMETERS, each_dtype, launched
from test_activation import FUNCTIONS, each_name, value_and_gradient

IN_PLACE = [
    name for name in FUNCTIONS if "inplace" in inspect.signature(FUNCTIONS[name]).parameters
]


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_is_torchs(name: str, device: str) -> None:
    x = torch.randn(20, device=device)
    with pytest.raises(RuntimeError, match=rf"{name}: .* inplace=True"):
        FUNCTIONS[name](x, inplace=True)
    expected = TORCH[name](x, *ACTIVATIONS[name].defaults)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        y = FUNCTIONS[name](x, inplace=True)
    assert y is x
    assert torch.equal(x, expected)
    assert [record.reason for record in trace.fallbacks] == ["inplace=True"]


Refusal = tuple[str, dict[str, object], type[Exception]]
# By torch, where it has the function, and by us.
REFUSED: list[Refusal] = [
    ("celu", {"alpha": 0.0}, RuntimeError),
    ("softshrink", {"lambd": -0.5}, RuntimeError),
    ("hardtanh", {"min_val": 1.0, "max_val": -1.0}, ValueError),
    ("gelu", {"approximate": "exact"}, RuntimeError),
]
# By us; torch's hardtanh makes NaN of all, and which softshrinks it refuses depends on its release.
REFUSED_BY_US: list[Refusal] = [
    ("hardtanh", {"min_val": math.nan}, ValueError),
    ("softshrink", {"lambd": math.nan}, RuntimeError),
    ("softshrink", {"lambd": math.inf}, RuntimeError),
]


@pytest.mark.parametrize(("name", "arguments", "refused"), REFUSED + REFUSED_BY_US)
def test_refused(
    name: str, arguments: dict[str, object], refused: type[Exception], device: str
) -> None:
    x = torch.randn(4, device=device)
    if (name, arguments, refused) in REFUSED and hasattr(torch.nn.functional, name):
        with pytest.raises(refused):
            getattr(torch.nn.functional, name)(x, **arguments)
    with pytest.raises(refused, match=f"^{next(iter(arguments))}: .*got"):
        getattr(GF, name)(x, **arguments)


def test_only_tensors_and_numbers(device: str) -> None:
    with pytest.raises(TypeError, match=r"^input: tanh expects a tensor, got float"):
        GF.tanh(1.0)  # type: ignore[arg-type]
    x = torch.randn(4, device=device)
    for none in ("0.5", None, torch.ones(1, device=device), np.ones(1)):
        with pytest.raises(TypeError, match=r"^elu: expected a number, got"):
            GF.elu(x, none)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_numbers_of_numpy_and_of_tensors_are_numbers(name: str, device: str) -> None:
    x = torch.randn(9, device=device)
    expected = FUNCTIONS[name](x, *PARAMETERS[name])
    for kind in (np.float32, torch.tensor):
        assert torch.equal(FUNCTIONS[name](x, *map(kind, PARAMETERS[name])), expected)


@pytest.mark.parametrize("name", ["leaky_relu", "relu6", "elu", "selu", "celu"])
def test_the_result_may_be_changed_where_torchs_may(name: str, device: str) -> None:
    """``y = leaky_relu(x); y += shortcut`` and a dropout in place are common in models."""
    x, dy = torch.randn(30, device=device), torch.randn(30, device=device)
    expected = value_and_gradient(FUNCTIONS[name], x, dy)[1]
    got = value_and_gradient(lambda x: FUNCTIONS[name](x).mul_(2.0), x, dy)[1]
    torch.testing.assert_close(got, 2 * expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_integers_go_to_torch(dtype: torch.dtype, device: str) -> None:
    x = torch.tensor([0, 1], device=device).to(dtype)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        assert torch.equal(GF.sigmoid(x), torch.sigmoid(x))
    assert trace.fallbacks[0].reason == f"no kernel for {dtype} on {device}"


@each_dtype
@each_name
def test_autocast_as_torch(name: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(8, device=device).to(dtype)
    with torch.autocast(device, torch.bfloat16):
        y, expected = FUNCTIONS[name](x), TORCH[name](x, *ACTIVATIONS[name].defaults)
    assert y.dtype == expected.dtype


def test_compiles_without_a_graph_break(device: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return GF.hardswish(GF.leaky_relu(GF.gelu(x, approximate="tanh"), 0.2))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device)
    with gpunn.trace() as trace:
        got = value_and_gradient(compiled, x, dy)
    launched(trace, "activation_forward", "activation_backward")
    assert all(map(torch.equal, got, value_and_gradient(function, x, dy)))
