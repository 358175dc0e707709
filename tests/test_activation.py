"""The activation functions: values and gradients in every dtype, range, layout and size."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import gpunn
import gpunn.functional as GF
import gpunn.nn
from closeness import assert_accurate
from gpunn.functional.activation import TORCH, TORCH_GRADIENT
from gpunn.kernels.activation import ACTIVATIONS
from gpunn.kernels.elementwise import LAUNCH, activation_backward, activation_forward
from gpunn.reference import activation as reference
from kit import PARAMETERS, as_numpy, check_gradients, each_dtype, launched, layouts

BLOCK = LAUNCH.block
Function = Callable[..., torch.Tensor]

# Every function of gpunn.functional. "identity" is none: the last test has it.
NAMES = [name for name in ACTIVATIONS if name not in ("identity", "gelu_tanh")]
FUNCTIONS: dict[str, Function] = {n: getattr(GF, n) for n in NAMES if hasattr(GF, n)}
FUNCTIONS["gelu_tanh"] = lambda x: GF.gelu(x, approximate="tanh")
CASES: list[tuple[str, tuple[float, ...]]] = [(name, ()) for name in FUNCTIONS]
CASES += [(name, given) for name, given in PARAMETERS.items() if name in FUNCTIONS]
each_case = pytest.mark.parametrize(
    ("name", "parameters"), CASES, ids=[f"{name}{given or ''}" for name, given in CASES]
)
each_name = pytest.mark.parametrize("name", FUNCTIONS)


def value_and_gradient(
    function: Function, x: torch.Tensor, dy: torch.Tensor, parameters: tuple[float, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = function(x, *parameters)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y, dx


def truths(
    name: str, x: torch.Tensor, dy: torch.Tensor, parameters: tuple[float, ...] = ()
) -> list[NDArray[np.float64]]:
    """The exact value and gradient, infinite where x's dtype has no number as large."""
    given = parameters or ACTIVATIONS[name].defaults
    exact = [reference.activation_forward(as_numpy(x), name, *given)]
    exact.append(reference.activation_backward(as_numpy(dy), as_numpy(x), name, *given))
    rounded = [as_numpy(torch.as_tensor(each).to(x.dtype)) for each in exact]
    return [np.where(np.isinf(r), r, e) for r, e in zip(rounded, exact, strict=True)]


def assert_both_accurate(
    name: str, x: torch.Tensor, dy: torch.Tensor, parameters: tuple[float, ...] = ()
) -> None:
    """Value and gradient of ``name`` at x are right, and our kernels computed them."""
    given = parameters or ACTIVATIONS[name].defaults
    with gpunn.trace() as trace:
        y, dx = value_and_gradient(FUNCTIONS[name], x, dy, parameters)
    launched(trace, "activation_forward", "activation_backward")
    torch_y, torch_dx = value_and_gradient(TORCH[name], x, dy, given)
    exact_y, exact_dx = truths(name, x, dy, parameters)
    assert_accurate(y, exact_y, torch_y, f"{name}: y")
    assert_accurate(dx, exact_dx, torch_dx, f"{name}: dx")


def drawn(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers on both sides of every kink."""
    return (3 * torch.randn(shape)).to(device, dtype)


def random_gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape).to(x)


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS, *TORCH, *TORCH_GRADIENT, *PARAMETERS}))
def test_every_table_has_it(name: str) -> None:
    for file, table in (("kernels", ACTIVATIONS), ("gpunn/reference", reference.ACTIVATIONS)):
        assert name in table, f"{name} has no entry in ACTIVATIONS of {file}/activation.py"
    file = "gpunn/functional/activation.py"
    assert name in TORCH, f"TORCH of {file} lacks {name}"
    from_output = ACTIVATIONS[name].saves == "output" and name != "identity"
    assert (name in TORCH_GRADIENT) == from_output, (
        f"TORCH_GRADIENT of {file} has those with saves='output', but for identity: {name} "
        + ("is one" if from_output else "is none")
    )
    # relu6's parameters are the limits between which it is hardtanh; its function takes no others
    has_other = ACTIVATIONS[name].defaults != () and name != "relu6"
    assert (name in PARAMETERS) == has_other, (
        f"in PARAMETERS of tests/kit.py are other values for parameters: {name} has "
        + ("parameters, and no entry" if has_other else "none, and an entry")
    )


@pytest.mark.parametrize("name", NAMES)
def test_function_and_module_are_public(name: str, device: str) -> None:
    export = "is not exported: the import and __all__ of"
    assert name in GF.__all__, f"{name} {export} gpunn/functional/__init__.py"
    modules = {public.lower(): getattr(gpunn.nn, public) for public in gpunn.nn.__all__}
    module = modules.get(name.replace("_", ""))
    assert module, (
        f"{name}'s class {export} gpunn/nn/__init__.py (named {name}, but for _ and case)"
    )
    x = drawn((5, 67), device, torch.float32)
    for parameters in ((), PARAMETERS.get(name, ())):
        assert torch.equal(module(*parameters)(x), FUNCTIONS[name](x, *parameters)), (
            f"gpunn.nn.{module.__name__}{parameters} is not gpunn.functional.{name}"
        )


@each_dtype
@each_case
def test_value_and_gradient(
    name: str, parameters: tuple[float, ...], dtype: torch.dtype, device: str
) -> None:
    x = drawn((5, 67), device, dtype)
    assert_both_accurate(name, x, random_gradient(x), parameters)


KINKS = {
    **dict.fromkeys(("relu", "leaky_relu", "elu", "celu", "selu"), (0.0, -0.0)),
    "relu6": (0.0, 6.0),
    **dict.fromkeys(("hardsigmoid", "hardswish"), (-3.0, 3.0)),
    "hardtanh": (-1.0, 1.0),
    "softplus": (20.0, 20.000002),
    **dict.fromkeys(("softshrink", "hardshrink"), (-0.5, 0.5)),
}


@each_name
def test_kinks_are_listed(name: str) -> None:
    x = np.arange(-25_000, 25_001) / 1000
    slopes = reference.activation_backward(np.ones(1), x, name, *ACTIVATIONS[name].defaults)
    jumps = x[1:][np.abs(np.diff(slopes)) > 0.05]
    missing = [at for at in jumps if not np.isclose(at, KINKS.get(name, ()), atol=2e-3).any()]
    assert not missing, f"the gradient of {name} jumps at {missing}, which KINKS lacks"


@pytest.mark.parametrize(("name", "kinks"), KINKS.items())
def test_kinks(name: str, kinks: tuple[float, ...], device: str) -> None:
    """On a kink the gradient is that of the side which PyTorch takes."""
    x = torch.tensor(kinks, device=device)
    dy = torch.full_like(x, 0.75)
    y, dx = value_and_gradient(FUNCTIONS[name], x, dy)
    exact_y, exact_dx = truths(name, x, dy)
    assert y.tolist() == pytest.approx(exact_y.tolist(), abs=1e-6)
    assert dx.tolist() == pytest.approx(exact_dx.tolist(), abs=1e-6)


@each_dtype
@pytest.mark.parametrize("size", [100.0, 1e4])
@each_name
def test_large_numbers(name: str, size: float, dtype: torch.dtype, device: str) -> None:
    x = torch.linspace(-size, size, 301, device=device).to(dtype)
    assert_both_accurate(name, x, random_gradient(x))


# Whose value or gradient is less than 1e-6 within 1e-4 of 0.
VANISHING = ("softshrink", "hardshrink", "tanhshrink")


@each_dtype
@each_name
def test_tiny_numbers(name: str, dtype: torch.dtype, device: str) -> None:
    """1e-4: where exp(x) - 1 and the like cancel."""
    x = torch.linspace(-1e-4, 1e-4, 301, device=device).to(dtype)
    dy = random_gradient(x)
    if name not in VANISHING:
        assert_both_accurate(name, x, dy)
        return
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    results = value_and_gradient(FUNCTIONS[name], x, dy)
    for got, right, error in zip(results, truths(name, x, dy), (1e-4 * eps, 1e-8), strict=True):
        allowed = 4 * eps * np.abs(right) + np.maximum(error, least * eps) * (right != 0)
        assert (np.abs(as_numpy(got) - right) <= allowed).all()


# Whose gradient is 0 from -4 to -2.
FLAT = ("relu", "relu6", "hardtanh")


@each_dtype
@each_name
def test_negative_tail(name: str, dtype: torch.dtype, device: str) -> None:
    """From -4 to -2, where there is no large value to hide an error behind."""
    x = torch.linspace(-4, -2, 301, device=device).to(dtype)
    dy = random_gradient(x)
    if name not in FLAT:
        assert_both_accurate(name, x, dy)
        return
    y, dx = value_and_gradient(FUNCTIONS[name], x, dy)
    assert (as_numpy(y) == truths(name, x, dy)[0]).all()
    assert not dx.any()


# Where PyTorch may give NaN although there is a limit, and what the kernels give there.
LIMITS = {
    ("gelu", "y", torch.inf): torch.inf,
    ("softsign", "dx", torch.inf): 0.0,
    ("softsign", "dx", -torch.inf): 0.0,
}


@each_dtype
@each_name
def test_infinities_nans_and_extremes(name: str, dtype: torch.dtype, device: str) -> None:
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, most, -most, least, -least, least / 4]
    x = torch.tensor(special, device=device, dtype=dtype)
    dy = torch.full_like(x, 0.75)
    got = value_and_gradient(FUNCTIONS[name], x, dy)
    torchs = value_and_gradient(TORCH[name], x, dy, ACTIVATIONS[name].defaults)
    eps = torch.finfo(dtype).eps
    for ours, theirs, what in zip(got, torchs, ("y", "dx"), strict=True):
        for at, a, b in zip(special, ours.tolist(), theirs.tolist(), strict=True):
            expected = LIMITS.get((name, what, at), b)
            # below the least normal number, either may flush to 0
            close = abs(a - expected) <= max(4 * eps * abs(expected), least)
            same = a == expected or (a != a and expected != expected) or close
            advice = "a NaN is lost" if at != at else "if the limit exists, say so in LIMITS"
            assert same, f"{what} at {at}: {a}, expected {expected}, PyTorch's is {b}; {advice}"


@each_name
def test_gradients_once_and_twice(name: str) -> None:
    x = torch.tensor([-4.1, -1.7, -0.21, 0.12, 0.7, 7.5])
    check_gradients(FUNCTIONS[name], x)


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_gradients_with_parameters(name: str, parameters: tuple[float, ...]) -> None:
    x = torch.tensor([-1.7, -0.21, 0.12, 0.72, 1.9])
    check_gradients(lambda x: FUNCTIONS[name](x, *parameters), x)


@pytest.mark.parametrize("name", ["relu", "gelu"], ids=["saves its output", "saves its input"])
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 4, 5)], ids=str)
def test_layouts(name: str, shape: tuple[int, ...], device: str) -> None:
    """Every layout of the input with every layout of the gradient."""
    base = torch.randn(shape, device=device)
    base.view(-1)[0] = 1.25  # what the expanded layouts repeat
    for of_x, x in layouts(base):
        for of_dy, dy in layouts(torch.randn(shape, device=device)):
            y, dx = value_and_gradient(FUNCTIONS[name], x, dy)
            exact, exact_dx = truths(name, x, dy)
            torch_y, torch_dx = value_and_gradient(TORCH[name], x, dy)
            assert_accurate(y, exact, torch_y, f"y, x {of_x}")
            assert_accurate(dx, exact_dx, torch_dx, f"dx, x {of_x}, dy {of_dy}")


def test_memory_format_is_kept(device: str) -> None:
    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    y, dx = value_and_gradient(GF.silu, x, torch.randn(2, 3, 4, 5, device=device))
    assert y.stride() == x.stride()
    assert dx.stride() == x.stride()


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((), id="no dimensions"),
        pytest.param((1,), id="one element"),
        pytest.param((7, 13), id="odd"),
        pytest.param((BLOCK - 1,), id="the last element of a block is masked"),
        pytest.param((BLOCK,), id="no element of a block is masked"),
        pytest.param((BLOCK + 1,), id="a second program has one element"),
    ],
)
def test_sizes(shape: tuple[int, ...], device: str) -> None:
    x = 1 + torch.rand(shape, device=device)
    assert_both_accurate("tanh", x, random_gradient(x))


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)], ids=str)
def test_no_elements(shape: tuple[int, ...], device: str) -> None:
    x = torch.empty(shape, device=device)
    y, dx = value_and_gradient(GF.mish, x, torch.empty(shape, device=device))
    assert y.shape == dx.shape == shape


@each_name
def test_backward_twice_and_nothing_is_overwritten(name: str, device: str) -> None:
    x, dy = torch.randn(50, device=device), torch.randn(50, device=device)
    x.requires_grad_()
    before = x.detach().clone(), dy.clone()
    y = FUNCTIONS[name](x)
    kept = y.detach().clone()
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(first, second)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])
    assert torch.equal(y, kept)


@pytest.mark.parametrize("limit", [0.3, 0.7, 0.1])
@each_dtype
def test_limits_that_no_dtype_has(limit: float, dtype: torch.dtype, device: str) -> None:
    """hardtanh's output, clamped to 0.7, is 0.6992 in bfloat16: below the limit, still clamped."""
    x = torch.tensor([-5.0, -1.0, 0.0, 0.0625, 1.0, 5.0], device=device, dtype=dtype)
    y, dx = value_and_gradient(GF.hardtanh, x, torch.ones_like(x), (-limit, limit))
    assert dx.tolist() == [0, 0, 1, 1, 0, 0]
    assert y.tolist() == x.clamp(-limit, limit).tolist()


@pytest.mark.parametrize("name", ["leaky_relu", "elu", "celu"])
def test_a_negative_parameter(name: str, device: str) -> None:
    """The sign of such an output does not tell that of the input, so the input is what is kept."""
    x, dy = torch.randn(30, device=device), torch.randn(30, device=device)
    got = value_and_gradient(FUNCTIONS[name], x, dy, (-0.5,))
    torch.testing.assert_close(got, value_and_gradient(TORCH[name], x, dy, (-0.5,)))


@pytest.mark.parametrize("name", ["elu", "celu"])
def test_an_infinite_parameter(name: str, device: str) -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 1.5], device=device)
    expected = TORCH[name](x, math.inf)
    torch.testing.assert_close(FUNCTIONS[name](x, math.inf), expected, equal_nan=True)


def test_identity(device: str) -> None:
    """Only an epilogue of other kernels; here from the launchers."""
    x, dy = torch.randn(9, device=device), torch.randn(9, device=device)
    assert torch.equal(activation_forward(x, "identity", []), x)
    assert torch.equal(activation_backward(dy, x, "identity", []), dy)
