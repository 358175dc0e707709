"""One of the processes of test_sync_batch_norm.py: python sync_processes.py RANK SIZE STORE DEVICE.

It normalises its part of a batch, uneven and for one process empty, and holds values, gradients and
running statistics to those of the whole batch in this one process.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist

import gpunn
import gpunn.functional as GF

CHANNELS, MOMENTUM, EPS = 11, 0.3, 1e-3
Tensors = dict[str, torch.Tensor]


def batch(device: str, n_images: int) -> Tensors:
    """The same in every process."""
    torch.manual_seed(0)
    images = {name: torch.randn(n_images, CHANNELS, 3, 4) for name in ("x", "residual", "dy")}
    channels = {name: torch.rand(CHANNELS) + 0.5 for name in ("weight", "bias", "mean", "var")}
    return {name: tensor.to(device) for name, tensor in (images | channels).items()}


def results(given: Tensors, activation: str | None, residual: bool, group: Any) -> Tensors:
    """Of this process and the others; with no group, of this one alone."""
    names = ["x", "weight", "bias", *(["residual"] if residual else [])]
    leaves = {name: given[name].clone().requires_grad_() for name in names}
    mean, var = given["mean"].clone(), given["var"].clone()
    arguments: Any = (leaves["x"], mean, var, leaves["weight"], leaves["bias"])
    fused: Any = {"activation": activation, "residual": leaves.get("residual")}
    function: Any = GF.batch_norm if group is None else GF.sync_batch_norm
    options: Any = (True, MOMENTUM, EPS) if group is None else (MOMENTUM, EPS, group)
    y = function(*arguments, *options, **fused)
    gradients = torch.autograd.grad(y, list(leaves.values()), given["dy"])
    found = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), **found, "mean": mean, "var": var}


def compare(counts: list[int], rank: int, device: str, group: Any, **options: Any) -> None:
    """The process of this rank has ``counts[rank]`` images."""
    whole = batch(device, sum(counts))
    first = sum(counts[:rank])
    mine = {
        name: tensor[first : first + counts[rank]] if tensor.dim() > 1 else tensor
        for name, tensor in whole.items()
    }
    got, expected = results(mine, group=group, **options), results(whole, group=None, **options)
    for name, tensor in expected.items():
        ours = got[name]
        if tensor.dim() > 1:
            tensor = tensor[first : first + counts[rank]]
        elif name.startswith("d"):  # each process has the sum over its own images
            dist.all_reduce(ours, group=group)
        torch.testing.assert_close({name: ours}, {name: tensor}, rtol=1e-4, atol=1e-4)


def main() -> None:
    rank, size, store, device = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    with gpunn.backend("kernels"):
        for activation, residual in ((None, False), ("relu", True), ("gelu", True)):
            options: Any = {"activation": activation, "residual": residual}
            compare([3, 1, 0, 2], rank, device, dist.group.WORLD, **options)
            compare([1, 4], rank % 2, device, pairs[rank // 2], **options)
        layer = gpunn.nn.SyncBatchNorm.convert_sync_batchnorm(
            torch.nn.Sequential(torch.nn.BatchNorm2d(CHANNELS), gpunn.nn.BatchNorm2d(CHANNELS))
        ).to(device)
        whole = torch.nn.Sequential(*(torch.nn.BatchNorm2d(CHANNELS) for _ in range(2))).to(device)
        x = batch(device, 2 * size)["x"]
        got, expected = layer(x[2 * rank : 2 * rank + 2]), whole(x)
        torch.testing.assert_close(got, expected[2 * rank : 2 * rank + 2], rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(layer.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
    print("all agree", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads can wait for ever on the interpreter that is shutting down


if __name__ == "__main__":
    main()
