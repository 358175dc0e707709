"""What only a GPU can show: streams, CUDA graphs, no host synchronisation, several devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import gpunn.functional as GF

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU: streams and graphs are CUDA's"
)


Step = Callable[[list[torch.Tensor], float], list[torch.Tensor]]


def operands(device: str = "cuda") -> list[torch.Tensor]:
    """x, weight, bias, residual and images, in bfloat16, that require gradients."""
    shapes = [(256, 128), (192, 128), (192,), (256, 192), (4, 16, 30, 30)]
    return [
        torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for shape in shapes
    ]


def triton_step(tensors: list[torch.Tensor], dropout_p: float) -> list[torch.Tensor]:
    """Forward and backward of Triton's kernels; the result and all gradients."""
    x, weight, bias, residual, _ = tensors
    y = GF.linear(x, weight, bias, activation="gelu", residual=residual, dropout_p=dropout_p)
    return [y, *torch.autograd.grad(y, tensors[:4], torch.ones_like(y))]


def cuda_step(tensors: list[torch.Tensor], dropout_p: float) -> list[torch.Tensor]:
    """The same of kernels in CUDA C++, contiguous and channels_last."""
    images, results = tensors[4], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images.contiguous(memory_format=memory_format)
        y = GF.dropout(GF.max_pool2d(x, 3, 2, 1) + GF.avg_pool2d(x, 3, 2, 1), dropout_p)
        y = GF.augment(y, seed=7, rotation=30, brightness=0.5)
        results += [y, *torch.autograd.grad(y, images, torch.ones_like(y))]
    return results


each_language = pytest.mark.parametrize("step", [triton_step, cuda_step])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@each_language
def test_the_host_never_waits(step: Step) -> None:
    tensors = operands()
    step(tensors, 0.1)  # compiles the kernels, which may wait
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(tensors, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_language
def test_a_graph_replays_on_new_values(step: Step) -> None:
    tensors = operands()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(tensors, 0.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # autograd's graph of it must not live on, for another stream
        captured = [result.detach() for result in step(tensors, 0.0)]
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for replayed, fresh in zip(captured, step(tensors, 0.0), strict=True):
        assert torch.equal(replayed, fresh)


@pytest.mark.parametrize(
    "drop",
    [lambda t: GF.linear(t[0], t[1], dropout_p=0.5), lambda t: GF.dropout(t[4], 0.5)],
    ids=["triton", "cuda"],
)
def test_a_replayed_graph_draws_a_new_dropout(
    drop: Callable[[list[torch.Tensor]], torch.Tensor],
) -> None:
    tensors = operands()
    with torch.no_grad():
        drop(tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = drop(tensors)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append((y == 0).clone())
    assert 0.4 < (masks[0] == masks[1]).double().mean() < 0.6


@each_language
def test_runs_on_the_callers_stream(step: Step) -> None:
    tensors = operands()
    expected = step(tensors, 0.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(tensor) for tensor in tensors]
        torch.cuda._sleep(50_000_000)
        for target, tensor in zip(late, tensors, strict=True):
            target.copy_(tensor.detach()).requires_grad_()
        results = step(late, 0.0)
    stream.synchronize()
    assert all(map(torch.equal, results, expected))


@each_language
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_own_device(step: Step) -> None:
    assert all(result.get_device() == 1 for result in step(operands("cuda:1"), 0.0))
