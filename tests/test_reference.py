"""The references themselves: derivatives against differences, values against PyTorch's float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpunn.checks.glu import GATED
from gpunn.functional.activation import TORCH
from gpunn.kernels.activation import ACTIVATIONS
from gpunn.reference.activation import ACTIVATIONS as REFERENCES
from gpunn.reference.activation import activation_backward
from gpunn.reference.closeness import judge
from gpunn.reference.glu import glu_backward, glu_forward
from gpunn.reference.linear import linear_backward, linear_forward
from kit import PARAMETERS, as_numpy

Array = NDArray[np.float64]

CASES = [(name, definition.defaults) for name, definition in ACTIVATIONS.items()]
each_case = pytest.mark.parametrize(
    ("name", "parameters"), CASES + list(PARAMETERS.items()), ids=str
)


def difference(function: Callable[[Array], Array], x: Array, step: float = 1e-5) -> Array:
    """f'(x) by a central difference of fourth order."""
    near = function(x + step) - function(x - step)
    far = function(x + 2 * step) - function(x - 2 * step)
    return (8 * near - far) / (12 * step)


def test_every_activation_has_a_reference() -> None:
    assert set(REFERENCES) == set(ACTIVATIONS)


@each_case
def test_derivative_is_the_limit_of_differences(name: str, parameters: tuple[float, ...]) -> None:
    # misses every kink by more than two steps
    x = np.asarray(np.linspace(-9.013, 9.017, 199), dtype=np.float64)
    function, derivative = REFERENCES[name]
    slopes = difference(lambda x: function(x, *parameters), x)
    np.testing.assert_allclose(derivative(x, *parameters), slopes, rtol=1e-8, atol=1e-9)


@each_case
@pytest.mark.parametrize("size", [1e-3, 3.0, 40.0, 1e4])
def test_values_are_torchs_in_float64(
    name: str, parameters: tuple[float, ...], size: float
) -> None:
    x = torch.linspace(-size, size, 401, dtype=torch.float64)
    kinks = torch.tensor([0, -0.0, -3, 3, 6, -1, 1, 0.5, -0.5, 20, *parameters]).double()
    x = torch.cat([x, kinks]).requires_grad_()
    y = TORCH[name](x, *parameters)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy) if y is not x else (dy,)
    # In PyTorch's hardsigmoid 1/6 is a float32, in its celu 1/alpha.
    rtol = 1e-6 if name in ("hardsigmoid", "celu") else 1e-12
    values = REFERENCES[name][0](as_numpy(x), *parameters)
    gradient = activation_backward(as_numpy(dy), as_numpy(x), name, *parameters)
    np.testing.assert_allclose(values, as_numpy(y), rtol=rtol, atol=1e-14)
    np.testing.assert_allclose(gradient, as_numpy(dx), rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("gate", [gate for _, gate in GATED.values()])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_glu_is_torchs_composition_in_float64(gate: str, dim: int) -> None:
    x = torch.randn(4, 6, 2, dtype=torch.float64, requires_grad=True)
    a, b = x.chunk(2, dim)
    y = a * TORCH[gate](b)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    np.testing.assert_allclose(glu_forward(as_numpy(x), dim, gate), as_numpy(y), rtol=1e-12)
    got = glu_backward(as_numpy(dy), as_numpy(x), dim, gate)
    np.testing.assert_allclose(got, as_numpy(dx), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("activation", [("identity", ()), ("elu", (1.5,)), ("silu", ())], ids=str)
@pytest.mark.parametrize("extras", [True, False], ids=["bias, residual, factors", "plain"])
def test_linear_is_torchs_in_float64(
    leading: tuple[int, ...], activation: tuple[str, tuple[float, ...]], extras: bool
) -> None:
    name, parameters = activation
    shapes = {"x": (*leading, 7), "weight": (4, 7), "bias": (4,), "residual": (*leading, 4)}
    inputs = {n: torch.randn(s, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
    factors = torch.tensor([0.0, 2.0, 2.0, 0.0], dtype=torch.float64).expand(shapes["residual"])
    y = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"] * extras)
    y = TORCH[name](y, *parameters)
    y = y * factors + inputs["residual"] if extras else y + 0 * inputs["residual"].sum()
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, list(inputs.values()), dy)
    x, weight, bias, residual = map(as_numpy, inputs.values())
    given = {"bias": bias, "factors": as_numpy(factors)} if extras else {}
    rest = {"residual": residual} if extras else {}
    values = linear_forward(x, weight, activation=name, parameters=parameters, **given, **rest)
    np.testing.assert_allclose(values, as_numpy(y), rtol=1e-12)
    got = linear_backward(as_numpy(dy), x, weight, activation=name, parameters=parameters, **given)
    for what, mine, theirs in zip(got._fields, got, expected, strict=True):
        if extras or what in ("dx", "dweight"):
            np.testing.assert_allclose(mine, as_numpy(theirs), rtol=1e-12, err_msg=what)


def test_judge_refuses_shapes_that_would_broadcast() -> None:
    one = np.ones(1)
    with pytest.raises(ValueError, match=r"shapes differ: got \(1,\), exact \(3,\)"):
        judge(one, np.ones(3), np.ones(3), 1e-7)
