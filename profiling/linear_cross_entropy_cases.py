"""What is benchmarked of linear_cross_entropy: the heads of GPT-2 and Llama 3, a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.profiling.case import Case, Tensors


def make(
    rows: int, features: int, classes: int, device: torch.device, dtype: torch.dtype, seed: int
) -> Tensors:
    """x, W, class numbers, and the gradient of the loss."""
    x = torch.empty(rows, features, device=device, dtype=dtype)
    weight = torch.empty(classes, features, device=device, dtype=dtype)
    target = torch.empty(rows, device=device, dtype=torch.int64)
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(seed)
        x.normal_(generator=generator)
        weight.normal_(generator=generator).mul_(features**-0.5)
        target.random_(classes, generator=generator)
    return x, weight, target, torch.ones((), device=device, dtype=dtype)


def theirs(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PyTorch's way with all logits in memory."""
    return F.cross_entropy(F.linear(x, weight), target)


def rivals() -> Mapping[str, Callable[..., torch.Tensor]]:
    """torch's own function, chunk by chunk of rows, where this release has it."""
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        return {}
    return {"linear_cross_entropy": partial(F.linear_cross_entropy, options=options())}


def linear_cross_entropy(rows: int, features: int, classes: int) -> Case:
    """The mean over rows, and the gradients of x and W."""
    x, weight = rows * features, classes * features
    return Case(
        op="linear_cross_entropy",
        name="linear_cross_entropy: step",
        shapes=f"{rows} × {features}, {classes} classes",
        make=partial(make, rows, features, classes),
        ours=GF.linear_cross_entropy,
        theirs=theirs,
        bytes=2 * 2 * (x + weight) + 8 * rows + 2,
        flops=3 * 2 * x * classes,
        small=partial(linear_cross_entropy, 5, min(features, 48), min(classes, 300)),
        mode="step",
        wanted=(0, 1),
        rivals=rivals(),
    )


def linear_cross_entropy_cases() -> list[Case]:
    """Of 50,257 classes and of 128,256."""
    return [linear_cross_entropy(8192, 768, 50257), linear_cross_entropy(4096, 4096, 128256)]
