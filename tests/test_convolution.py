"""Convolution against the reference, in every geometry that its kernels tell apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
import gpunn.nn
from closeness import assert_accurate
from gpunn.checks.comparison import any_algorithm
from gpunn.checks.convolution import CASES, Case, calls, exact, inputs_of
from gpunn.kernels.convolve import transposed_taps, unit_of
from kit import as_numpy, check_gradients, each_dtype, launched, layouts

each_case = pytest.mark.parametrize("name", CASES)
LAUNCHERS = {
    False: ("conv_forward", "conv_transpose_forward", "conv_weight_gradient"),
    True: ("conv_transpose_forward", "conv_forward", "conv_weight_gradient"),
}


def assert_all_accurate(
    case: Case, inputs: list[torch.Tensor], dy: torch.Tensor, what: str = ""
) -> None:
    """Value and all gradients are right, and kernels computed them."""
    ours, theirs = calls(case)
    leaves = [[t.detach().requires_grad_() for t in inputs] for _ in range(2)]
    with gpunn.trace() as trace:
        y = ours(*leaves[0])
        got = [y, *torch.autograd.grad(y, leaves[0], dy)]
    launched(trace, *LAUNCHERS[case.transposed])
    with any_algorithm():
        torch_y = theirs(*leaves[1])
        baseline = [torch_y, *torch.autograd.grad(torch_y, leaves[1], dy)]
    truth = exact(case, as_numpy(dy), *map(as_numpy, inputs))
    for mine, (part, expected), torchs in zip(got, truth.items(), baseline, strict=True):
        assert_accurate(mine, expected, torchs, f"{part} {what}")


def upstream(case: Case, dtype: torch.dtype, device: str) -> torch.Tensor:
    shape = case.x[0], case.n_outputs, *case.output_size()
    return torch.randn(shape).to(device, dtype)


@each_dtype
@each_case
def test_value_and_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    case = CASES[name]
    inputs = inputs_of(case, dtype, device)
    assert_all_accurate(case, inputs, upstream(case, dtype, device))


@pytest.mark.parametrize("name", ["conv2d, 3 × 3", "conv2d, depthwise", "conv_transpose2d"])
def test_any_layout(name: str, device: str) -> None:
    """Of the input, of the weight and of the upstream gradient."""
    case = CASES[name]
    inputs = inputs_of(case, torch.float32, device)
    dy = upstream(case, torch.float32, device)
    for layout, x in layouts(inputs[0]):
        assert_all_accurate(case, [x, *inputs[1:]], dy, f"x {layout}")
    for layout, weight in layouts(inputs[1]):
        assert_all_accurate(case, [inputs[0], weight, *inputs[2:]], dy, f"weight {layout}")
    for layout, gradient in layouts(dy):
        assert_all_accurate(case, inputs, gradient, f"dy {layout}")


SMALL = {
    "one group": Case("conv2d", (1, 2, 3, 3), (2, 2, 2, 2), (2, 1), (1, 0), activation="tanh"),
    "groups": Case("conv2d", (1, 2, 3, 3), (2, 1, 2, 2), dilation=(2, 1), groups=2),
    "transposed": Case("conv_transpose2d", (1, 2, 2, 2), (2, 1, 2, 2), (2, 1), activation="tanh"),
}


@pytest.mark.parametrize("name", SMALL)
def test_gradients_once_and_twice(name: str) -> None:
    ours, _ = calls(SMALL[name])
    check_gradients(ours, *inputs_of(SMALL[name], torch.float64, "cpu"))


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6])
def test_phases_are_all_of_the_gradient(
    size: int, padding: int, dilation: int, stride: int
) -> None:
    """Every output in one phase, and every tap that reaches it from a whole place, once."""
    kernel = 4
    found = []
    for taps in transposed_taps(size, kernel, stride, padding, dilation):
        for p in range(taps.grid):
            out = taps.first_out + p * taps.out_step
            for i in range(taps.n_taps):
                place = p * taps.stride + taps.origin + i * taps.spacing
                found.append((out, place, taps.first_tap + i * taps.tap_step))
    expected = [
        (out, (out + padding - r * dilation) // stride, r)
        for out in range(size)
        for r in range(kernel)
        if (out + padding - r * dilation) % stride == 0
    ]
    assert sorted(found) == sorted(expected)


def images(n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(n, c, h, w, dtype=dtype, memory_format=torch.channels_last)


# What channels, and the places of images, are multiples of; 16 is left to Triton.
UNITS = {
    "eighths": (8, images(2, 24, 5, 4), images(2, 40, 3, 4)),
    "eighths and sixteenths": (8, images(2, 24, 5, 4), images(2, 32, 3, 4)),
    "sixteenths": (1, images(2, 16, 5, 4), images(2, 32, 3, 4)),
    "odd outputs": (1, images(2, 24, 5, 4), images(2, 20, 3, 4)),
    "few channels": (1, images(2, 8, 5, 4), images(2, 24, 3, 4)),
    "channels apart": (1, images(2, 24, 5, 4), images(2, 40, 3, 8).contiguous()),
    "between others": (1, images(2, 25, 5, 4)[:, :24], images(2, 40, 3, 4)),
    "one row": (
        8,
        images(2, 24, 1, 4).as_strided((2, 24, 1, 4), (96, 1, 3, 24)),
        images(2, 40, 1, 4),
    ),
    "float64": (1, images(2, 24, 5, 4, torch.float64), images(2, 40, 3, 4, torch.float64)),
}


@pytest.mark.parametrize("name", UNITS)
def test_what_is_loaded_together(name: str) -> None:
    unit, x, y = UNITS[name]
    assert unit_of(x.shape[1], y.shape[1], x, y) == unit


def test_floats_are_loaded_together_for_tensor_cores() -> None:
    x, y = (images(2, c, 5, 4, torch.float32) for c in (20, 36))
    setting: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = setting.fp32_precision
    try:
        for precision, unit in (("tf32", 4), ("ieee", 1)):
            setting.fp32_precision = precision
            assert unit_of(20, 36, x, y) == unit
    finally:
        setting.fp32_precision = before


def test_only_the_gradients_that_are_wanted_are_computed(device: str) -> None:
    x, weight, bias = (torch.randn(s, device=device) for s in ((1, 16, 5, 5), (8, 16, 3, 3), (8,)))
    for wanted, operators in (
        ((0,), {"conv_forward", "conv_transpose_forward"}),
        ((1,), {"conv_forward", "conv_weight_gradient"}),
        ((2,), {"conv_forward", "linear_epilogue_backward"}),
    ):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, weight, bias))]
        with gpunn.trace() as trace:
            GF.conv2d(leaves[0], leaves[1], leaves[2]).sum().backward()
        assert {record.operator for record in trace.launches} == operators


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_what_is_kept(activation: str | None, device: str) -> None:
    """x, the weight and the bias, and one more tensor where the activation's input is needed."""
    x = torch.randn(1, 4, 5, 5, device=device, requires_grad=True)
    weight = torch.randn(3, 4, 3, 3, device=device)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = GF.conv2d(x, weight, activation=activation)
    expected = {None: [], "relu": [y.shape], "gelu": [y.shape]}[activation]
    assert sorted(t.shape for t in kept) == sorted([x.shape, weight.shape, *expected])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(mode: Any, device: str) -> None:
    torch.manual_seed(0)
    ours = gpunn.nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode, activation="relu").to(device)
    theirs = torch.nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2, 6, 7, device=device)
    residual = torch.randn(1, 3, 6, 9, device=device)
    torch.testing.assert_close(ours(x, residual), F.relu(theirs(x)) + residual)
    assert "activation='relu'" in repr(ours)


def test_transposed_layer_with_an_output_size(device: str) -> None:
    ours = gpunn.nn.ConvTranspose2d(4, 3, 3, stride=2, activation="tanh").to(device)
    theirs = torch.nn.ConvTranspose2d(4, 3, 3, stride=2).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 5, 5, device=device)
    expected = torch.tanh(theirs(x, output_size=[12, 11]))
    torch.testing.assert_close(ours(x, output_size=[12, 11]), expected)


def test_compiles_without_a_graph_break(device: str) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = GF.conv2d(x, weight, padding="same", activation="gelu")
        return GF.conv_transpose2d(y, weight, stride=2, activation="relu")

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 4, 5, 6, device=device, requires_grad=True)
    weight = torch.randn(4, 4, 3, 2, device=device, requires_grad=True)
    results = []
    for call in (compiled, function):
        y = call(x, weight)
        dy = torch.arange(y.numel(), device=device).view(y.shape) / y.numel()
        results.append((y, *torch.autograd.grad(y, (x, weight), dy)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@each_dtype
def test_autocast_as_torch(dtype: torch.dtype, device: str) -> None:
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3)
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    with torch.autocast(device, torch.bfloat16):
        assert GF.conv2d(x, weight, activation="relu").dtype == F.conv2d(x, weight).dtype


def test_nothing_and_one(device: str) -> None:
    weight = torch.randn(3, 4, 1, 1, device=device, requires_grad=True)
    none = torch.randn(0, 4, 5, 5, device=device)
    y = GF.conv2d(none, weight, activation="relu")
    assert y.shape == (0, 3, 5, 5)
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    assert not dweight.any()
    one = torch.randn(4, 1, 1, device=device)
    torch.testing.assert_close(GF.conv2d(one, weight), F.conv2d(one, weight))


def test_infinities_and_nans_are_torchs(device: str) -> None:
    x = torch.randn(1, 16, 4, 4, device=device)
    x[0, 0, 1, 1], x[0, 1, 2, 2] = math.inf, math.nan
    weight = torch.randn(2, 16, 1, 1, device=device)
    torch.testing.assert_close(GF.conv2d(x, weight), F.conv2d(x, weight), equal_nan=True)
