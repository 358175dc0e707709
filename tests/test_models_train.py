"""A training step of a whole network on the kernels gives torch's loss and gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import gpunn
from gpunn import models
from gpunn.kernels.launch import Backend


def test_a_training_step_of_resnet18(device: str) -> None:
    """At an eighth of its width; by torch in float64 it is what both are compared with."""
    torch.manual_seed(0)
    net = models.ResNet(models.BasicBlock, (2, 2, 2, 2), 10, width=8).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 48, 48, device=device).contiguous(memory_format=torch.channels_last)
    label = torch.tensor([1, 7], device=device)

    def step(choice: Backend, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        net.to(dtype)
        with gpunn.backend(choice):
            loss = F.cross_entropy(net(x.to(dtype)), label)
            gradients = torch.autograd.grad(loss, list(net.parameters()))
        return loss.double(), torch.cat([g.flatten().double() for g in gradients])

    exact_loss, exact = step("torch", torch.float64)
    torch_loss, baseline = step("torch", torch.float32)
    with gpunn.trace() as trace:
        loss, got = step("kernels", torch.float32)
    assert not trace.fallbacks, trace
    assert {record.operator for record in trace.launches} >= {
        "conv_forward", "conv_transpose_forward", "conv_weight_gradient", "batch_norm_forward",
        "batch_norm_backward", "max_pool_forward", "max_pool_backward", "linear_forward",
    }  # fmt: skip
    assert (loss - exact_loss).abs() <= 2 * (torch_loss - exact_loss).abs() + 1e-6
    assert (got - exact).norm() <= 2 * (baseline - exact).norm() + 1e-6 * exact.norm()
    assert exact.norm() > 1


def test_buffers_after_a_step_are_torchs(device: str) -> None:
    """Running statistics, and how often they were updated."""
    torch.manual_seed(0)
    x = torch.randn(3, 1, 8, 8, device=device)
    states = []
    choices: list[Backend] = ["kernels", "torch"]
    for choice in choices:
        torch.manual_seed(1)
        net = models.resnet_cifar(8, in_channels=1).to(device)
        with gpunn.backend(choice):
            net(x)
        states.append(net.state_dict())
    ours, theirs = states
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert int(ours["bn1.num_batches_tracked"]) == 1
