"""What is benchmarked of the negative log-likelihood: the pixels of a segmentation."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.profiling.case import Case, Mode, Tensors


def make(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
    """Log-probabilities, class numbers, and the gradient of the loss."""
    x = torch.empty(shape, device=device, dtype=dtype)
    target = torch.empty(shape[0], *shape[2:], device=device, dtype=torch.int64)
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(seed)
        x.normal_(generator=generator)
        target.random_(shape[1], generator=generator)
    return x, target, torch.ones((), device=device, dtype=dtype)


def nll_loss(shape: tuple[int, int, int, int], mode: Mode) -> Case:
    """A mean over pixels, of which one class each is read, and all are written backward."""
    n_images, n_classes, height, width = shape
    pixels = n_images * height * width
    step = mode == "step"
    return Case(
        op="nll_loss",
        name="nll_loss: step" if step else "nll_loss: dx",
        shapes=" × ".join(map(str, shape)),
        make=partial(make, shape),
        ours=GF.nll_loss,
        theirs=F.nll_loss,
        bytes=pixels * (8 + 2 * n_classes + 2 * step) + 2,
        flops=0,
        small=partial(nll_loss, (2, min(n_classes, 5), 4, 16), mode),
        mode=mode,
        wanted=(0,),
    )


def nll_loss_cases() -> list[Case]:
    """The classes of Cityscapes, in images of half its height and width."""
    modes: tuple[Mode, ...] = ("step", "backward")
    return [nll_loss((8, 19, 512, 1024), mode) for mode in modes]
