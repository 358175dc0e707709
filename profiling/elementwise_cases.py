"""What is benchmarked of the activations and the gated linear units."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.functional.activation import TORCH
from gpunn.profiling.case import Case, Mode, normal, reduced


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return a * F.silu(b)


def elementwise(name: str, shape: tuple[int, int], mode: Mode = "forward") -> Case:
    """An activation of x, or swiglu, whose y is half as wide as x; gradients from dy and x."""
    gated = name == "swiglu"
    rows, cols = shape
    y_shape = (rows, cols // 2) if gated else shape
    backward = mode == "backward"
    x_size, y_size = rows * cols, rows * y_shape[1]

    return Case(
        op="glu" if gated else "activation",
        name=f"{name}: dx" if backward else name,
        shapes=f"{rows} × {cols}",
        make=normal(shape, *[y_shape] * backward),
        ours=getattr(GF, name),
        theirs=_swiglu if gated else TORCH[name],
        bytes=2 * (y_size + x_size * (1 + backward)),
        flops=0,
        small=partial(elementwise, name, (reduced(rows), reduced(cols)), mode),
        mode=mode,
        wanted=(0,) if backward else (),
    )


def activation_cases() -> list[Case]:
    """The two activations of today's transformers."""
    return [
        elementwise(name, (8192, 8192), mode)
        for name in ("gelu", "silu")
        for mode in ("forward", "backward")
    ]


def glu_cases() -> list[Case]:
    """The two halves of a Llama-3 8B feed-forward layer."""
    return [elementwise("swiglu", (8192, 2 * 14336), mode) for mode in ("forward", "backward")]
