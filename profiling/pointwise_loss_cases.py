"""What is benchmarked of the losses of elements: regression, and logits of yes or no."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.profiling.case import Case, Mode, Tensors


def make(size: int, backward: bool, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
    """Inputs, targets of 0 and 1, and the gradient of the loss."""
    x, y = (torch.empty(size, device=device, dtype=dtype) for _ in range(2))
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(seed)
        x.normal_(generator=generator)
        y.bernoulli_(generator=generator)
    return (x, y, *[torch.ones((), device=device, dtype=dtype)] * backward)


def pointwise_loss(name: str, size: int, dtype: torch.dtype, mode: Mode) -> Case:
    """A mean; backward, the input's gradient from input, target and one number."""
    backward = mode == "backward"
    return Case(
        op="pointwise_loss",
        name=f"{name}: dx" if backward else name,
        shapes=f"{size}",
        make=partial(make, size, backward),
        ours=getattr(GF, name),
        theirs=getattr(F, name),
        bytes=dtype.itemsize * (size * (2 + backward) + 1),
        flops=0,
        small=partial(pointwise_loss, name, min(size, 1040), dtype, mode),
        dtype=dtype,
        mode=mode,
        wanted=(0,) if backward else (),
    )


def pointwise_loss_cases() -> list[Case]:
    """A quarter of a gigabyte of float32, far more than a GPU's cache holds."""
    modes: tuple[Mode, ...] = ("forward", "backward")
    return [
        pointwise_loss(name, 2**26, dtype, mode)
        for name in ("mse_loss", "binary_cross_entropy_with_logits")
        for dtype in (torch.bfloat16, torch.float32)
        for mode in modes
    ]
