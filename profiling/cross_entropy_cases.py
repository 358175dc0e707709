"""What is benchmarked of cross-entropy: the vocabularies of GPT-2 and Llama 3."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.profiling.case import Case, Mode, Tensors


def make(
    rows: int, classes: int, step: bool, device: torch.device, dtype: torch.dtype, seed: int
) -> Tensors:
    """Logits, class numbers, and the gradient of the loss."""
    x = torch.empty(rows, classes, device=device, dtype=dtype)
    target = torch.empty(rows, device=device, dtype=torch.int64)
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(seed)
        x.normal_(generator=generator)
        target.random_(classes, generator=generator)
    return (x, target, *[torch.ones((), device=device, dtype=dtype)] * step)


def cross_entropy(rows: int, classes: int, mode: Mode) -> Case:
    """The mean over rows; of a step, the logits' gradient, too."""
    step = mode == "step"
    return Case(
        op="cross_entropy",
        name="cross_entropy: step" if step else "cross_entropy",
        shapes=f"{rows} × {classes}",
        make=partial(make, rows, classes, step),
        ours=GF.cross_entropy,
        theirs=F.cross_entropy,
        bytes=2 * rows * classes * (2 if step else 1) + 8 * rows + 2,
        flops=0,
        small=partial(cross_entropy, 5, min(classes, 5000), mode),
        mode=mode,
        wanted=(0,) if step else (),
    )


def cross_entropy_cases() -> list[Case]:
    """Losses alone, and with their gradient, for which the logits need be read but once."""
    modes: tuple[Mode, ...] = ("step", "forward")
    return [
        cross_entropy(rows, classes, mode)
        for rows, classes in ((16384, 50304), (8192, 128256))
        for mode in modes
    ]
