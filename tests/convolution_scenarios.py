"""The launches of the convolutions' kernels that are compiled: each tile, and by groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpunn.kernels.launch import launchers
from gpunn.kernels.pooling import format_of
from gpunn.profiling.static_report import meta
from scenario import Scenario

HALF = torch.bfloat16
PADDING, DILATION = [1, 1, 1, 1], [1, 1]
STRIDES = {"transposed": [2, 1], "unstrided": [1, 1]}
"""Of the kinds that have none of two; a stride of two makes two phases."""


def _images(shape: list[int], dtype: torch.dtype, channels_last: bool = True) -> torch.Tensor:
    memory_format = format_of(channels_last)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def _convolution(
    kind: str, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, channels_last: bool
) -> None:
    """Forward with all that it fuses, or one of the gradients, for (N, C, K, size, groups)."""
    n, c, k, size, groups = sizes
    stride, half = STRIDES.get(kind, [2, 2]), size // 2
    size_in = [half * step for step in stride]
    x, weight = _images([n, c, *size_in], dtype, channels_last), [k, c // groups, 3, 3]
    y = _images([n, k, half, half], dtype, channels_last)
    geometry = stride, PADDING, DILATION, groups
    w = meta(*weight, dtype=dtype)
    if kind == "forward":
        bias = meta(k, dtype=dtype)
        launchers["conv_forward"](x, w, bias, y, *geometry, "gelu_tanh", [], True)
    elif kind == "weight":
        launchers["conv_weight_gradient"](y, x, weight, *geometry)
    else:
        launchers["conv_transpose_forward"](
            y, w, None, None, size_in, *geometry, "identity", [], False
        )


def _with_precision(ieee: bool, launch: Callable[[], None]) -> None:
    """Float32 as torch's setting for convolutions has it by default, or in full."""
    setting: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    previous, setting.fp32_precision = setting.fp32_precision, "ieee" if ieee else "tf32"
    try:
        launch()
    finally:
        setting.fp32_precision = previous


# Name: (N, C, K, size, groups) and dtype, as large as the tile asks for.
SIZES: dict[str, tuple[tuple[int, int, int, int, int], torch.dtype]] = {
    "128x128": ((64, 128, 256, 56, 1), HALF),
    "256x64": ((64, 64, 64, 56, 1), HALF),
    "128x64": ((32, 64, 64, 56, 1), HALF),
    "64x64": ((1, 64, 64, 14, 1), HALF),
    "64x32": ((1, 64, 64, 8, 1), HALF),
    "packed": ((64, 3, 64, 224, 1), HALF),
    "packed-64x32": ((1, 3, 64, 8, 1), HALF),
    "packed-outputs": ((64, 64, 3, 56, 1), HALF),
    "eighths-128x128": ((64, 72, 136, 56, 1), HALF),
    "eighths-256x64": ((64, 72, 40, 56, 1), HALF),
    "eighths-128x64": ((32, 72, 56, 56, 1), HALF),
    "eighths-64x64": ((1, 72, 72, 14, 1), HALF),
    "eighths-64x32": ((1, 72, 24, 8, 1), HALF),
    "float32-quarters": ((64, 68, 132, 56, 1), torch.float32),
    "unaligned-64x64": ((32, 100, 100, 56, 1), HALF),
    "unaligned-64x32": ((1, 76, 20, 14, 1), HALF),
    "unaligned-channels": ((32, 100, 128, 56, 1), HALF),
    "unaligned-groups": ((32, 200, 200, 56, 2), HALF),
    "groups": ((64, 256, 256, 56, 4), HALF),
    "depthwise": ((64, 128, 128, 56, 128), HALF),
    "float32-64x64": ((64, 64, 128, 56, 1), torch.float32),
    "float32-32x32": ((1, 64, 64, 14, 1), torch.float32),
    "float32-packed": ((64, 3, 64, 224, 1), torch.float32),
    "ieee-64x64": ((64, 64, 128, 56, 1), torch.float32),
    "ieee-32x32": ((1, 64, 64, 14, 1), torch.float32),
    "ieee-quarters": ((64, 68, 132, 56, 1), torch.float32),
    "float32-unaligned": ((32, 102, 102, 56, 1), torch.float32),
    "ieee-unaligned": ((32, 102, 102, 56, 1), torch.float32),
    "ieee-packed": ((64, 3, 64, 224, 1), torch.float32),
    "float32-depthwise": ((64, 128, 128, 56, 128), torch.float32),
}
# What is compiled for images whose channels lie apart as well.
CONTIGUOUS_TOO = ("128x128", "packed", "unaligned-64x64", "float32-64x64", "ieee-64x64")


# Each kind with the chips that it is compiled for, if code differs between them: transposed with a
# stride is a launch for each of its phases, which differ as much from each other.
KINDS: dict[str, tuple[int, ...]] = {
    "forward": (80, 90, 100),
    "weight": (80, 90, 100),
    "transposed": (90,),
    "unstrided": (80, 100),
}


def convolution_scenarios() -> dict[str, Scenario]:
    """Of the weight's gradient, the sum of its parts is launched, too."""
    found = {}
    for name, (sizes, dtype) in SIZES.items():
        for kind, everywhere in KINDS.items():
            for channels_last in (True, False) if name in CONTIGUOUS_TOO else (True,):
                # float32 and contiguous images have the tiles of sm_90 on all chips
                differs = channels_last and dtype == HALF
                chips = tuple(chip for chip in everywhere if differs or chip == 90)
                layout = "" if channels_last else "-contiguous"
                launch = partial(_convolution, kind, sizes, dtype, channels_last)
                precise = partial(_with_precision, name.startswith("ieee"), launch)
                # of the weight's gradient, the sum of the parts is no product
                cores = dtype == HALF and name != "depthwise" and kind != "weight"
                if chips:
                    found[f"convolution-{kind}-{name}{layout}"] = Scenario(
                        precise, cores, False, chips
                    )
    return found
