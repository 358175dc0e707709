"""The launches of augmentation that are compiled: both tiles, of one channel and of three."""

from __future__ import annotations

from functools import partial

import torch

from gpunn.functional.augment_arguments import settings_of
from gpunn.kernels.launch import launchers
from gpunn.kernels.pooling import format_of
from gpunn.profiling.static_report import meta
from scenario import Scenario

BYTE, SINGLE, HALF, BRAIN = torch.uint8, torch.float32, torch.float16, torch.bfloat16
# What is asked of the kernels is in their arguments: their code is the same for all distortions.
SETTINGS = settings_of(rotation=30, elastic_amplitude=3, brightness=0.4)
TURNED = settings_of(rotation=30)
TAPS = 4

# Name: (shape, channels_last, dtypes in and out). Tiles are narrow up to 32 columns.
FORWARD: dict[str, tuple[list[int], bool, torch.dtype, torch.dtype]] = {
    "bytes-to-float32": ([8, 3, 64, 224], True, BYTE, SINGLE),
    "bytes-to-bfloat16": ([8, 3, 64, 224], True, BYTE, BRAIN),
    "bytes": ([8, 3, 64, 224], True, BYTE, BYTE),
    "bfloat16": ([8, 3, 64, 224], False, BRAIN, BRAIN),
    "float32-narrow": ([8, 1, 28, 28], False, SINGLE, SINGLE),
    "float16-four-channels": ([8, 4, 64, 224], True, HALF, HALF),
}
# Of the chunks' last one, whose elements are no multiple of eight, the sums are turned one by one.
BACKWARD: dict[str, tuple[list[int], bool, torch.dtype]] = {
    "float32": ([8, 3, 64, 224], True, SINGLE),
    "bfloat16-narrow-odd": ([1, 1, 27, 27], False, BRAIN),
}
# Gradients that are gathered.
GATHERED: dict[str, tuple[list[int], bool, torch.dtype]] = {
    "bfloat16": ([8, 3, 64, 224], True, BRAIN),
    "float32": ([8, 3, 64, 224], False, SINGLE),
    "float32-narrow": ([8, 1, 28, 28], False, SINGLE),
}


def _images(shape: list[int], dtype: torch.dtype, last: bool) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=format_of(last))


def augment_scenarios() -> dict[str, Scenario]:
    """What is looked up is narrow: four pixels of each channel, and the seed."""
    found, seed = {}, meta(1, dtype=torch.int64)
    for name, (shape, last, source, wanted) in FORWARD.items():
        images, size = _images(shape, source, last), shape[2:]
        by_bytes = shape[1] != 4  # a block has one channel of four that lie side by side
        taps = TAPS * (3 if shape[1] == 3 else 1)
        found[f"augment-forward-{name}"] = Scenario(
            partial(launchers["augment_forward"], images, seed, size, *SETTINGS, wanted),
            wide_only=by_bytes,
            narrow_allowed=taps + 2,  # the seed, and a line that is no multiple of 16 bytes
            capabilities=(80, 90, 100) if name == "bytes-to-float32" else (90,),
        )
    for name, (shape, last, dtype) in BACKWARD.items():
        images = _images(shape, dtype, last)
        arguments = images, images, seed, shape[2:], *SETTINGS, dtype, last
        found[f"augment-backward-{name}"] = Scenario(
            partial(launchers["augment_backward"], *arguments),
            capabilities=(80, 90, 100) if name == "float32" else (90,),
        )
    for name, (shape, last, dtype) in GATHERED.items():
        dy = _images(shape, dtype, last)
        found[f"augment-gather-{name}"] = Scenario(
            partial(launchers["augment_backward"], dy, None, seed, shape[2:], *TURNED, dtype, last),
            wide_only=True,
            narrow_allowed=2 + 3 * shape[1],  # the gradients that are looked at
            capabilities=(80, 90, 100) if name == "bfloat16" else (90,),
        )
    return found
