"""What is benchmarked of softmax: a classifier's logits, and rows of a vocabulary."""

from __future__ import annotations

from functools import partial

import torch

import gpunn.functional as GF
from gpunn.profiling.case import Case, Mode, normal


def softmax(rows: int, cols: int, logarithm: bool, mode: Mode = "forward") -> Case:
    """Along the last dimension; gradients from dy and y."""
    name = "log_softmax" if logarithm else "softmax"
    backward = mode == "backward"
    return Case(
        op="softmax",
        name=f"{name}: dx" if backward else name,
        shapes=f"{rows} × {cols}",
        make=normal((rows, cols), *[(rows, cols)] * backward),
        ours=partial(getattr(GF, name), dim=-1),
        theirs=partial(getattr(torch, name), dim=-1),
        bytes=2 * rows * cols * (2 + backward),
        flops=0,
        small=partial(softmax, 5, min(cols, 17000), logarithm, mode),
        mode=mode,
        wanted=(0,) if backward else (),
    )


def softmax_cases() -> list[Case]:
    """Rows that stand in registers, and one that does not."""
    modes: tuple[Mode, ...] = ("forward", "backward")
    cases = [softmax(32768, 1024, False, mode) for mode in modes]
    cases += [softmax(8192, 8192, False, mode) for mode in modes]
    return [*cases, *(softmax(2048, 131072, True, mode) for mode in modes)]
