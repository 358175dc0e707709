"""batch_norm under PyTorch's modes, what it refuses, and as layers with what is fused."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from gpunn.kernels.launch import Backend
from kit import launched


def operands(device: str, *, channels: int = 6) -> list[torch.Tensor]:
    """x, weight, bias and residual, of which all want a gradient."""
    shapes = [(4, channels, 3, 5), (channels,), (channels,), (4, channels, 3, 5)]
    return [torch.randn(shape, device=device).requires_grad_() for shape in shapes]


def call(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor:
    """In training, with all that is fused."""
    arguments: Any = (x, None, None, weight, bias, True)
    return GF.batch_norm(*arguments, activation="relu", residual=residual)


def by_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, True) + residual)


def agree(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(theirs)
    for mine, torchs in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True
    ):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


def test_backward_twice_and_bit_identical(device: str) -> None:
    tensors = operands(device)
    before = [tensor.detach().clone() for tensor in tensors]
    y, dy = call(*tensors), torch.randn(4, 6, 3, 5, device=device)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    again = torch.autograd.grad(y, tensors, dy)
    anew = torch.autograd.grad(call(*tensors), tensors, dy)
    for a, b, c in zip(first, again, anew, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2), (0, 3)])
def test_only_what_is_wanted_is_computed(wanted: tuple[int, ...], device: str) -> None:
    """Parameters alone: nothing of the input's size; a residual alone: no sums."""
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(operands(device))]
    with gpunn.trace() as trace:
        y = call(*leaves)
        got = torch.autograd.grad(y, [leaves[i] for i in wanted], dy := torch.randn_like(y))
    sums = [r for r in trace.launches if r.kernel == "gradient_sums_kernel"]
    assert len(sums) == (wanted != (3,))
    expected = torch.autograd.grad(by_torch(*leaves), [leaves[i] for i in wanted], dy)
    for mine, torchs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


def test_without_an_activation_the_residuals_gradient_is_dy(device: str) -> None:
    x, weight, bias, residual = operands(device)
    arguments: Any = (x.detach(), None, None, weight.detach(), bias.detach(), True)
    with gpunn.trace() as trace:
        y = GF.batch_norm(*arguments, residual=residual)
        (got,) = torch.autograd.grad(y, residual, dy := torch.randn_like(y))
    assert torch.equal(got, dy)
    assert {record.operator for record in trace.launches} == {"batch_norm_forward"}


def test_a_gradient_penalty(device: str) -> None:
    """Through the bits of relu and a residual, too."""
    results = []
    for function in (call, by_torch):
        torch.manual_seed(3)
        tensors = operands(device)
        (dx,) = torch.autograd.grad(function(*tensors).pow(2).sum(), tensors[0], create_graph=True)
        results.append(torch.autograd.grad((dx.norm() - 1) ** 2, tensors))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_compiles(training: bool, device: str) -> None:
    torch._dynamo.reset()
    layer = gpunn.nn.BatchNorm2d(6, activation="relu").to(device).train(training)
    twin = gpunn.nn.BatchNorm2d(6, activation="relu").to(device).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (4, 5):
        x, residual = (torch.randn(batch, 6, 3, 5, device=device) for _ in range(2))
        x.requires_grad_()
        agree(compiled(x, residual), twin(x, residual), [x])
    for name, expected in twin.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], expected)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_under_autocast_the_dtype_is_inputs(lower: torch.dtype, device: str) -> None:
    """As of torch's: float32 parameters and statistics beside inputs of half precision."""
    layer = gpunn.nn.BatchNorm2d(6, activation="relu").to(device)
    twin = torch.nn.BatchNorm2d(6).to(device)
    x = torch.randn(4, 6, 3, 5, device=device).to(lower)
    with torch.autocast(device, dtype=lower):
        ours, theirs = layer(x), F.relu(twin(x))
    assert ours.dtype == theirs.dtype == lower
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.running_var, twin.running_var)


def test_a_residual_of_another_dtype_is_torchs_sum(device: str) -> None:
    x, weight, bias, residual = operands(device)
    lower = residual.bfloat16()
    with gpunn.trace() as trace:
        y = call(x, weight, bias, lower)
    agree(y, by_torch(x, weight, bias, lower), [x, weight, bias, residual])
    assert [f.reason for f in trace.fallbacks] == ["a residual in torch.bfloat16: PyTorch's sum"]


def test_auto_fuses_what_there_is_to_fuse(device: str) -> None:
    x, weight, bias, residual = operands(device)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        call(x, weight, bias, None)
    launched(trace, "batch_norm_forward")
    arguments: Any = (x, None, None, weight, bias, True)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        y = GF.batch_norm(*arguments)
    assert torch.equal(y, F.batch_norm(*arguments))
    assert [f.reason for f in trace.fallbacks] == ["nothing to fuse: PyTorch's batch_norm"]
    with gpunn.backend("torch"):
        agree(call(x, weight, bias, residual), by_torch(x, weight, bias, residual), [x, residual])


def test_what_no_kernel_takes_is_torchs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty batch; and more positions than 32 bits count."""
    x = torch.randn(0, 6, 3, 5, device=device)
    running = torch.zeros(6, device=device), torch.ones(6, device=device)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        assert GF.batch_norm(x, *running, activation="relu").shape == x.shape
        nothing = torch.randn(4, 0, 3, device=device)
        arguments: Any = (nothing, None, None, None, None, True)
        assert GF.batch_norm(*arguments).shape == F.batch_norm(*arguments).shape
        module = importlib.import_module("gpunn.functional.batch_norm")
        monkeypatch.setattr(module, "MOST_POSITIONS", 10)
        x, weight, bias, residual = operands(device)
        agree(call(x, weight, bias, residual), by_torch(x, weight, bias, residual), [x])
    assert not trace.launches
    assert len(trace.fallbacks) == 3


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one dimension": ({"input": torch.randn(6)}, IndexError, "input"),
    "one value a channel": ({"input": torch.randn(1, 6, 1)}, ValueError, "more than 1 value"),
    "no statistics": ({"training": False}, RuntimeError, "running_mean"),
    "half of them": (
        {"training": False, "running_mean": torch.zeros(6)}, RuntimeError, "running_var"
    ),
    "a short weight": ({"weight": torch.ones(5)}, RuntimeError, "weight"),
    "a long bias": ({"bias": torch.ones(7)}, RuntimeError, "bias"),
    "short statistics": ({"running_mean": torch.ones(5)}, RuntimeError, "running_mean"),
    "a narrow weight": ({"weight": torch.ones(6).half()}, RuntimeError, "weight"),
    "no tensor": ({"weight": 1.0}, TypeError, "weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_torchs(name: str, device: str) -> None:
    change, error, message = REFUSED[name]
    given: dict[str, Any] = {
        "input": torch.randn(4, 6, 3), "running_mean": None, "running_var": None, "training": True
    } | change  # fmt: skip
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(error):
        F.batch_norm(**given)
    with pytest.raises(error, match=message):
        GF.batch_norm(**given, activation="relu")


def test_what_newer_releases_of_torch_refuse_is_refused(device: str) -> None:
    x = torch.randn(4, 6, 3, device=device)
    for eps, training in ((-1e-5, True), (0.0, True), (-1e-5, False)):
        with pytest.raises(ValueError, match=r"^eps: .*got"):
            GF.batch_norm(x, x[:, :, 0].mean(0), x[:, :, 0].var(0), training=training, eps=eps)


def test_a_residual_that_does_not_fit_is_refused(device: str) -> None:
    x, weight, bias, residual = operands(device)
    choices: list[Backend] = ["kernels", "torch"]
    for choice in choices:
        with gpunn.backend(choice), pytest.raises(RuntimeError, match="residual"):
            call(x, weight, bias, residual[:1])
    with pytest.raises(ValueError, match="rleu"):
        gpunn.nn.BatchNorm1d(3, activation="rleu")


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_layers_are_torchs_with_what_is_fused(name: str, device: str) -> None:
    ours = getattr(gpunn.nn, name)(6, activation=("leaky_relu", 0.2)).to(device)
    theirs = getattr(torch.nn, name)(6).to(device)
    shape = (4, 6, *[3] * int(name[-2]))
    for train in (True, False):
        x, residual = torch.randn(2, *shape, device=device)
        expected = F.leaky_relu(theirs.train(train)(x) + residual, 0.2)
        torch.testing.assert_close(ours.train(train)(x, residual), expected)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    assert "activation=('leaky_relu', 0.2)" in repr(ours)
    with pytest.raises(ValueError, match="expected"):
        ours(torch.randn(6, device=device))
