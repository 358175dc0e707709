"""What only a GPU can show: streams, CUDA graphs, no host synchronisation, several devices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import gpunn.functional as GF

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU: streams and graphs are CUDA's"
)


def operands(device: str = "cuda") -> list[torch.Tensor]:
    """x, weight, bias and residual, in bfloat16, that require gradients."""
    shapes = [(256, 128), (192, 128), (192,), (256, 192)]
    return [
        torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for shape in shapes
    ]


def step(tensors: list[torch.Tensor], dropout_p: float = 0.0) -> list[torch.Tensor]:
    """Forward and backward; the result and all gradients."""
    x, weight, bias, residual = tensors
    y = GF.linear(x, weight, bias, activation="gelu", residual=residual, dropout_p=dropout_p)
    return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]


def test_the_host_never_waits() -> None:
    tensors = operands()
    step(tensors, 0.1)  # compiles the kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tensors, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_on_new_values() -> None:
    tensors = operands()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for replayed, fresh in zip(captured, step(tensors), strict=True):
        assert torch.equal(replayed, fresh)


def test_a_replayed_graph_draws_a_new_dropout() -> None:
    x, weight, _, _ = operands()
    with torch.no_grad():
        GF.linear(x, weight, dropout_p=0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = GF.linear(x, weight, dropout_p=0.5)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append((y == 0).clone())
    assert 0.4 < (masks[0] == masks[1]).double().mean() < 0.6


def test_runs_on_the_callers_stream() -> None:
    x, weight, _, _ = operands()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = GF.linear(late, weight, activation="relu")
    stream.synchronize()
    expected = F.relu(F.linear(x, weight))
    torch.testing.assert_close(y, expected.detach(), rtol=2e-2, atol=2e-1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_own_device() -> None:
    tensors = operands("cuda:1")
    assert all(result.get_device() == 1 for result in step(tensors))
