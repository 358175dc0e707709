"""Convolutions as layers: torch's parameters, with an activation by keyword."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
import gpunn.nn
from kit import launched
from test_convolution_modes import agree

LAYERS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "Conv1d": ((4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 7)),
    "Conv2d": ((4, 6, (3, 2)), {"padding": "same", "groups": 2}, (2, 4, 5, 6)),
    "ConvTranspose1d": ((4, 6, 3), {"stride": 2, "output_padding": 1}, (2, 4, 4)),
    "ConvTranspose2d": ((4, 6, (3, 2)), {"stride": (2, 1), "groups": 2}, (2, 4, 3, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.2)])
def test_layers_are_torchs_with_their_activation(name: str, activation: Any, device: str) -> None:
    arguments, options, shape = LAYERS[name]
    ours = getattr(gpunn.nn, name)(*arguments, **options, activation=activation).to(device)
    theirs = getattr(torch.nn, name)(*arguments, **options).to(device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, device=device, requires_grad=True)
    z = theirs(x)
    residual = torch.randn_like(z, requires_grad=True)
    slope = {None: 1.0, "relu": 0.0}.get(activation, 0.2) if activation is None else None
    y = z if slope else F.relu(z) if activation == "relu" else F.leaky_relu(z, 0.2)
    got = torch.autograd.grad(ours(x, residual=residual).sum(), [x, residual, *ours.parameters()])
    torch.testing.assert_close(ours(x, residual=residual), y + residual, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad((y + residual).sum(), [x, residual, *theirs.parameters()])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (f"activation={activation!r}" in repr(ours)) == (activation is not None)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same"])
def test_padding_modes_of_a_row(mode: Any, padding: Any, device: str) -> None:
    ours = gpunn.nn.Conv1d(3, 4, 4, padding=padding, padding_mode=mode).to(device)
    theirs = torch.nn.Conv1d(3, 4, 4, padding=padding, padding_mode=mode).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 7, device=device, requires_grad=True)
    torch.use_deterministic_algorithms(False)  # a GPU's gradients of these paddings are not
    agree(ours(x), theirs(x), [x])
    assert ours(x[0]).shape == theirs(x[0]).shape


def test_accelerate_and_restore(device: str) -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.ConvTranspose2d(4, 3, 2, 2),
        torch.nn.Flatten(2), torch.nn.Conv1d(3, 2, 3, padding=1, padding_mode="circular"),
        torch.nn.ConvTranspose1d(2, 2, 3), torch.nn.Conv3d(1, 1, 1),
    ).to(device)  # fmt: skip
    x = torch.randn(2, 3, 4, 5, device=device)
    expected = net[:-1](x)
    record = gpunn.accelerate(net)
    assert set(record.replaced) == {"0", "1", "2", "4", "5"}
    assert "Conv3d" in record.kept["6"]
    with gpunn.trace() as trace:
        torch.testing.assert_close(net[:-1](x), expected, rtol=1e-4, atol=1e-4)
    launched(trace, "conv_forward", "conv_transpose_forward", "activation_forward")
    net.append(gpunn.nn.Conv2d(3, 4, 3, activation="relu"))
    restored = gpunn.restore(net)
    assert set(restored.replaced) == {"0", "1", "2", "4", "5"}
    assert "its fused parts have no torch layer" in restored.kept["7"]
    torch.testing.assert_close(net[:-2](x), expected)


def with_own_method(package: Any, name: str, is_the_instances: bool, **fused: Any) -> Any:
    """A layer whose _conv_forward computes with another weight, and is the layer's or a class's."""
    arguments, options, _ = LAYERS[name]
    base = getattr(package, name)

    def own(self: Any, input: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        y: torch.Tensor = base._conv_forward(self, input.flip(-1), weight + 1, 2 * bias)
        return y

    if not is_the_instances:
        return type(name, (base,), {"_conv_forward": own})(*arguments, **options, **fused)
    layer = base(*arguments, **options, **fused)
    layer._conv_forward = own.__get__(layer)
    return layer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d"])
@pytest.mark.parametrize("is_the_instances", [False, True])
def test_a_conv_forward_of_the_users_own_is_called(
    is_the_instances: bool, name: str, device: str
) -> None:
    """As torch's layer calls it; activation and residual are applied to what it returns."""
    theirs = with_own_method(torch.nn, name, is_the_instances).to(device)
    x = torch.randn(LAYERS[name][2], device=device, requires_grad=True)
    z = theirs(x)
    residual = torch.randn_like(z, requires_grad=True)
    for activation, y in ((None, z), (("leaky_relu", 0.2), F.leaky_relu(z, 0.2))):
        ours = with_own_method(gpunn.nn, name, is_the_instances, activation=activation).to(device)
        ours.load_state_dict(theirs.state_dict())
        with gpunn.trace() as trace:
            torch.testing.assert_close(ours(x), y)
        assert [f.reason for f in trace.fallbacks] == [
            "a _conv_forward of the user's own: called, not fused with what follows"
        ]
        leaves = [[x, residual, *layer.parameters()] for layer in (ours, theirs)]
        dy = torch.randn_like(z)
        got = torch.autograd.grad(ours(x, residual=residual), leaves[0], dy)
        expected = torch.autograd.grad(y + residual, leaves[1], dy, retain_graph=True)
        torch.testing.assert_close(got, expected)
        for wrong, error in ((residual[..., :1], RuntimeError), (1.0, TypeError)):
            with pytest.raises(error, match="residual"):
                ours(x, residual=wrong)


def test_a_conv_forward_of_the_users_own_compiles(device: str) -> None:
    torch._dynamo.reset()
    layer = with_own_method(gpunn.nn, "Conv1d", False, activation="relu").to(device)
    x = torch.randn(LAYERS["Conv1d"][2], device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("is_the_instances", [False, True])
def test_accelerate_and_restore_leave_a_conv_forward_of_the_users_own(
    is_the_instances: bool, device: str
) -> None:
    x = torch.randn(LAYERS["Conv1d"][2], device=device)
    for package, change in ((torch.nn, gpunn.accelerate), (gpunn.nn, gpunn.restore)):
        layer = with_own_method(package, "Conv1d", is_the_instances).to(device)
        expected = layer(x)
        assert not change(layer).replaced
        torch.testing.assert_close(layer(x), expected)


def test_an_attribute_that_would_be_taken_for_the_activation() -> None:
    layer = torch.nn.Conv2d(3, 4, 3)
    layer.activation = "relu"  # type: ignore[assignment]
    record = gpunn.accelerate(torch.nn.Sequential(layer))
    assert not record.replaced
    assert "attribute" in record.kept["0"]


def test_a_layer_refuses_an_unknown_activation() -> None:
    for name, (arguments, options, _) in LAYERS.items():
        with pytest.raises(ValueError, match=r"activation.*'rleu'"):
            getattr(gpunn.nn, name)(*arguments, **options, activation="rleu")


def test_volumes_are_left_to_torch(device: str) -> None:
    """With what is fused elsewhere; the trace says so, and the kernels refuse."""
    x, weight = torch.randn(2, 2, 4, 3, 5, device=device), torch.randn(3, 2, 3, 3, 3, device=device)
    residual = torch.randn(2, 3, 2, 3, 5, device=device)
    arguments: Any = (None, 1, (0, 1, 1), 1, 1)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        y = GF.conv3d(x, weight, *arguments, activation="relu", residual=residual)
    torch.testing.assert_close(y, F.relu(F.conv3d(x, weight, *arguments)) + residual)
    assert [f.reason for f in trace.fallbacks] == ["no kernel for volumes"]
    with pytest.raises(RuntimeError, match="no kernel for volumes"):
        GF.conv3d(x, weight)
    with gpunn.backend("torch"), pytest.raises(RuntimeError, match="residual"):
        GF.conv3d(x, weight, *arguments, residual=residual[..., :2])
