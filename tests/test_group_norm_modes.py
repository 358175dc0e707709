"""group_norm and instance_norm under PyTorch's modes, what they refuse, and as layers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from gpunn.kernels import group_norm as launcher
from gpunn.reference.batch_norm import updated
from gpunn.reference.group_norm import instance_statistics
from kit import as_numpy, check_gradients, launched

Read = Callable[[bool], None]
each_reading = pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """Makes groups be read twice, however small they are."""

    def choose(twice: bool) -> None:
        if twice:
            monkeypatch.setattr(launcher, "TILES", ())

    return choose


def operands(device: str) -> list[torch.Tensor]:
    """x, weight and bias, of which all want a gradient."""
    return [torch.randn(s, device=device).requires_grad_() for s in ((2, 6, 3, 4), (6,), (6,))]


def call(*tensors: torch.Tensor) -> torch.Tensor:
    x, weight, bias = tensors
    return GF.group_norm(x, 2, weight, bias, activation="silu")


def by_torch(*tensors: torch.Tensor) -> torch.Tensor:
    x, weight, bias = tensors
    return F.silu(F.group_norm(x, 2, weight, bias))


def agree(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(theirs)
    for mine, torchs in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True
    ):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


@each_reading
def test_backward_twice_and_bit_identical(twice: bool, device: str, read: Read) -> None:
    read(twice)
    tensors = operands(device)
    y, dy = call(*tensors), torch.randn(2, 6, 3, 4, device=device)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    again = torch.autograd.grad(y, tensors, dy)
    anew = torch.autograd.grad(call(*tensors), tensors, dy)
    for a, b, c in zip(first, again, anew, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@each_reading
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_wanted_is_computed(
    wanted: tuple[int, ...], twice: bool, device: str, read: Read
) -> None:
    """For the parameters alone, nothing of the input's size."""
    read(twice)
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(operands(device))]
    chosen = [leaves[i] for i in wanted]
    with gpunn.trace() as trace:
        agree(call(*leaves), by_torch(*leaves), chosen)
    kernels = {record.kernel for record in trace.launches}
    assert ("group_input_gradient_kernel" in kernels) == (twice and 0 in wanted)


@pytest.mark.parametrize(("activation", "twice"), [("gelu", False), ("sigmoid", True)])
def test_gradients_once_and_twice(activation: str | None, twice: bool, read: Read) -> None:
    read(twice)
    check_gradients(
        lambda x, *parameters: GF.group_norm(x, 1, *parameters, activation=activation),
        torch.randn(2, 2, 2), torch.rand(2) + 0.5, torch.randn(2),
    )  # fmt: skip


def test_gradients_of_instances(device: str) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return GF.instance_norm(x.movedim(1, -1).contiguous().movedim(-1, 1), weight=weight)

    check_gradients(function, torch.randn(2, 2, 3), torch.rand(2) + 0.5)


def test_what_is_kept(device: str) -> None:
    """x, neither y nor what is normalised; the statistics are of groups."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x, *parameters = operands(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        GF.group_norm(x, 2, parameters[0], parameters[1], activation="sigmoid")
    assert sorted(tensor.numel() for tensor in kept) == [4, 4, 6, 6, x.numel()]


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 6, 0), (2, 0, 4)])
def test_nothing(shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, device=device).requires_grad_()
    weight, bias = (torch.randn(shape[1], device=device).requires_grad_() for _ in range(2))
    y = GF.group_norm(x, 2, weight, bias, activation="silu")
    assert y.shape == shape
    dx, *others = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert dx.shape == shape
    assert not any(gradient.any() for gradient in others)
    assert GF.instance_norm(x.detach()).shape == shape


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_under_autocast_the_dtype_is_torchs(lower: torch.dtype, device: str) -> None:
    layer = gpunn.nn.GroupNorm(2, 6, activation="silu").to(device)
    twin = torch.nn.GroupNorm(2, 6).to(device)
    x = torch.randn(2, 6, 3, 4, device=device).to(lower).requires_grad_()
    with torch.autocast(device, dtype=lower):
        ours, theirs = layer(x), F.silu(twin(x))
        instances = GF.instance_norm(x), F.instance_norm(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(*instances, rtol=1e-2, atol=1e-2)
    dy = torch.randn_like(ours)
    (dx,) = torch.autograd.grad(ours, x, dy, create_graph=True)
    torch.testing.assert_close(dx, torch.autograd.grad(theirs, x, dy)[0], rtol=3e-2, atol=3e-2)


def test_compiles(device: str) -> None:
    """In shapes that are known only when it runs; running statistics move as they do without."""
    torch._dynamo.reset()
    for make in (
        lambda: gpunn.nn.GroupNorm(2, 6, activation="silu"),
        lambda: gpunn.nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    ):
        layer, twin = make().to(device), make().to(device)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for size in (3, 5):
            x = torch.randn(2, 6, size, 4, device=device).requires_grad_()
            agree(compiled(x), twin(x), [x])
        for name, expected in twin.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], expected)


def test_what_is_torchs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that was chosen; planes of more positions than 32 bits count; half a batch."""
    tensors = operands(device)
    with gpunn.trace() as trace:
        with gpunn.backend("torch"):
            agree(call(*tensors), by_torch(*tensors), tensors)
            x = tensors[0].detach()
            torch.testing.assert_close(
                GF.instance_norm(x, activation="silu"), F.silu(F.instance_norm(x))
            )
        with gpunn.backend("auto"):
            running = torch.zeros(6, device=device), torch.ones(6, device=device)
            assert GF.instance_norm(x[:0], *running).shape == (0, 6, 3, 4)
            module = importlib.import_module("gpunn.functional.group_norm")
            monkeypatch.setattr(module, "MOST_POSITIONS", 10)
            agree(call(*tensors), by_torch(*tensors), tensors)
    assert not trace.launches
    assert [fallback.reason for fallback in trace.fallbacks] == [
        "backend('torch')", "backend('torch')",
        "no statistics of a batch of shape (0, 6, 3, 4)", "no kernel for images of shape (3, 4)",
    ]  # fmt: skip


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_instances_with_running_statistics(dtype: torch.dtype, last: bool, device: str) -> None:
    """They move by the mean over the images; in eval mode, they are batch_norm's."""
    x = (torch.randn(3, 6, 4, 5, device=device) * 2 + 1).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, bias = torch.randn(2, 6, device=device).to(dtype)
    mean, var = torch.randn(6, device=device), torch.rand(6, device=device) + 0.5
    theirs = mean.clone(), var.clone()
    moved = [
        updated(as_numpy(part), of_images, 0.3)
        for part, of_images in zip(theirs, instance_statistics(as_numpy(x)), strict=True)
    ]
    for use_input_stats in (True, False):
        arguments: Any = (weight, bias, use_input_stats, 0.3, 1e-3)
        with gpunn.trace() as trace:
            ours = GF.instance_norm(x, mean, var, *arguments, activation="silu")
        kernel = "group_norm_forward" if use_input_stats else "batch_norm_forward"
        launched(trace, kernel)
        expected = F.silu(F.instance_norm(x, theirs[0], theirs[1], *arguments))
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
        assert ours.stride() == x.stride()
    for mine, exact in zip((mean, var), moved, strict=True):
        torch.testing.assert_close(mine.cpu(), torch.from_numpy(exact).float())


X, RUNNING = torch.randn(2, 6, 4), {"running_mean": torch.zeros(6), "running_var": torch.ones(6)}
REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "one dimension": ("group_norm", {"input": torch.randn(6)}, RuntimeError, "input"),
    "four of six": ("group_norm", {"num_groups": 4}, RuntimeError, "num_groups"),
    "less than none": ("group_norm", {"num_groups": -1}, RuntimeError, "num_groups"),
    "half a group": ("group_norm", {"num_groups": 1.5}, TypeError, "num_groups"),
    "one value": (
        "group_norm", {"input": torch.randn(1, 6, 1), "num_groups": 6}, ValueError, "more than 1"
    ),
    "a short weight": ("group_norm", {"weight": torch.ones(5)}, RuntimeError, "weight"),
    "a square weight": ("group_norm", {"weight": torch.ones(2, 3)}, RuntimeError, "weight"),
    "a long bias": ("group_norm", {"bias": torch.ones(7)}, RuntimeError, "bias"),
    "a weight of another dtype": (
        "group_norm", {"weight": torch.ones(6).half()}, RuntimeError, "weight"
    ),
    "no tensor": ("group_norm", {"weight": 1.0}, TypeError, "weight"),
    "one position": ("instance_norm", {"input": X[:, :, :1]}, ValueError, "more than 1 spatial"),
    "no positions": ("instance_norm", {"input": X[0]}, ValueError, "more than 1 spatial"),
    "no statistics": ("instance_norm", {"use_input_stats": False}, RuntimeError, "running_mean"),
    "half of them": ("instance_norm", {"running_mean": X[0, :, 0]}, ValueError, "running_var"),
    "short ones": (
        "instance_norm", {k: v[:5] for k, v in RUNNING.items()}, RuntimeError, "running_mean"
    ),
    "a short instance weight": ("instance_norm", {"weight": X[0, 0]}, RuntimeError, "weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_torchs(name: str, device: str) -> None:
    function, change, error, message = REFUSED[name]
    given: dict[str, Any] = {"input": X} | ({"num_groups": 2} if function == "group_norm" else {})
    given |= change
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(error):
        getattr(F, function)(**given)
    with gpunn.trace() as trace, pytest.raises(error, match=message):
        getattr(GF, function)(**given, activation="relu")
    assert not trace.launches


def test_layers(device: str) -> None:
    """With what is fused; of no batch; and given their classes by accelerate."""
    ours = gpunn.nn.InstanceNorm1d(6, 1e-3, 0.3, True, True, activation=("elu", 0.5)).to(device)
    theirs = torch.nn.InstanceNorm1d(6, 1e-3, 0.3, True, True).to(device)
    for shape in ((2, 6, 5), (6, 5)):
        for train in (True, False):
            x = torch.randn(shape, device=device)
            expected = F.elu(theirs.train(train)(x), 0.5)
            torch.testing.assert_close(ours.train(train)(x), expected, rtol=1e-4, atol=1e-5)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    assert "activation=('elu', 0.5)" in repr(ours)
    assert "activation='silu'" in repr(gpunn.nn.GroupNorm(2, 6, activation="silu"))
    with pytest.raises(ValueError, match="expected"):
        ours(torch.randn(6, device=device))
    with pytest.warns(UserWarning, match="num_features"):
        gpunn.nn.InstanceNorm1d(5).to(device)(torch.randn(2, 6, 5, device=device))
    net = torch.nn.Sequential(torch.nn.GroupNorm(2, 6), torch.nn.InstanceNorm2d(6), ours)
    record = gpunn.accelerate(net)
    assert set(record.replaced) == {"0", "1"}
    net.eval()  # in which an instance normalisation that tracks nothing does as it does in training
    x = torch.randn(2, 6, 3, 4, device=device)
    with gpunn.trace() as trace:
        y = net[1](net[0].to(device)(x))
    launched(trace, "group_norm_forward")
    back = gpunn.restore(net)
    torch.testing.assert_close(net[1](net[0](x)), y, rtol=1e-4, atol=1e-5)
    assert "its fused parts" in back.kept["2"]
    for name in ("GroupNorm", "InstanceNorm1d"):
        with pytest.raises(ValueError, match="rleu"):
            getattr(gpunn.nn, name)(6, 6, activation="rleu")
