"""The memory that a convolution takes, forward and backward: no more than torch's needs.

On a GPU both are measured. Elsewhere ours is what the launchers allocate for an H200, measured by
torch's profiler while the launches themselves are left out, and torch's the least that any
implementation keeps: the result, the gradient before the activation, and the gradients.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.kernels import launch
from gpunn.profiling.static_report import chip

# Function, input, weight and arguments: whole layers, since small sums of parts would count.
LAYERS: dict[str, tuple[str, list[int], list[int], dict[str, Any]]] = {
    "3x3": ("conv2d", [32, 64, 56, 56], [64, 64, 3, 3], {"padding": 1}),
    "strided": ("conv2d", [32, 64, 56, 56], [128, 64, 3, 3], {"stride": 2, "padding": 1}),
    "dilated": ("conv2d", [32, 64, 28, 28], [64, 64, 3, 3], {"dilation": 2}),
    "1x1": ("conv2d", [32, 64, 56, 56], [128, 64, 1, 1], {}),
    "grouped": ("conv2d", [32, 64, 56, 56], [64, 16, 3, 3], {"padding": 1, "groups": 4}),
    "depthwise": ("conv2d", [32, 64, 56, 56], [64, 1, 3, 3], {"padding": 1, "groups": 64}),
    "three channels": ("conv2d", [32, 3, 112, 112], [64, 3, 7, 7], {"stride": 2, "padding": 3}),
    "transposed": (
        "conv_transpose2d", [32, 64, 28, 28], [64, 64, 4, 4], {"stride": 2, "padding": 1}
    ),
}  # fmt: skip


class Nowhere(list[launch.Call]):
    """Launches that are not made and, unlike ``captured``'s, not kept with their tensors."""

    def append(self, call: launch.Call) -> None:
        pass


def peak_on_cpu(function: Callable[[], object]) -> int:
    """The most bytes that ``function`` holds at once of what it allocates."""
    options: Any = {"activities": [torch.profiler.ProfilerActivity.CPU], "acc_events": True}
    with torch.profiler.profile(profile_memory=True, **options) as profile:
        kept = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    assert kept is not None
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def peak_on_cuda(function: Callable[[], object]) -> int:
    function()  # so that what a first call compiles and keeps is there
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", LAYERS)
def test_no_more_than_torch_needs(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No im2col buffer, no padded copy; where parts of sums stand is free before dx is made."""
    torch.use_deterministic_algorithms(False)  # or filling what is new would take memory of its own
    function, input_size, weight_size, arguments = LAYERS[name]
    x, weight = (
        torch.randn(size, device=device).bfloat16().to(memory_format=torch.channels_last)
        for size in (input_size, weight_size)
    )
    n_outputs = weight_size[1 if "transpose" in function else 0]
    bias = torch.randn(n_outputs, device=device).bfloat16()
    given = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    theirs = getattr(F, function)
    dy = torch.randn_like(theirs(*given, **arguments).detach())

    def by_gpunn() -> object:
        y = getattr(GF, function)(*given, activation="relu", **arguments)
        return y, torch.autograd.grad(y, given, dy)

    def by_torch() -> object:
        y = F.relu(theirs(*given, **arguments))
        return y, torch.autograd.grad(y, given, dy)

    least = 2 * dy.nbytes + sum(tensor.nbytes for tensor in given)
    if device == "cuda":
        assert peak_on_cuda(by_gpunn) <= max(peak_on_cuda(by_torch), 1.01 * least)
        return
    monkeypatch.setattr(launch, "_capture", (chip(90), Nowhere()))
    found = peak_on_cpu(by_gpunn)
    assert least <= found <= 1.01 * least, f"{found:,} bytes, where torch needs {least:,}"
