"""Augmentation against its float64 reference, by drawn combinations of all that it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawing import drawing
from gpunn.reference import augment as reference
from gpunn.reference.closeness import judge
from kit import as_numpy
from test_augment import SEED, distortion_of, pictures, results


def ranges(least: float, greatest: float) -> st.SearchStrategy[tuple[float, float]]:
    ends = st.tuples(*[st.floats(least, greatest, width=16)] * 2)
    return ends.map(lambda pair: (min(pair), max(pair)))


ASKED = st.fixed_dictionaries(
    {},
    optional={
        "horizontal_flip": st.sampled_from([0.5, 1.0]),
        "vertical_flip": st.sampled_from([0.5, 1.0]),
        "rotation": ranges(-400, 400),
        "shear_x": ranges(-60, 60),
        "shear_y": ranges(-60, 60),
        "scale": ranges(0.25, 4),
        "translation_x": ranges(-0.5, 0.5),
        "translation_y": ranges(-0.5, 0.5),
        "crop_area": ranges(0.0625, 1),
        "crop_ratio": ranges(0.25, 4),
        "elastic_amplitude": st.sampled_from([0.5, 3.0, 50.0]),
        "elastic_spacing": st.sampled_from([4.0, 5.3, 64.0]),
        "brightness": ranges(0, 2),
        "contrast": ranges(0, 2),
        "grey": st.sampled_from([0.0, 0.25]),
        "clamp": st.booleans(),
    },
)
SIZES = st.tuples(st.integers(1, 12), st.sampled_from([1, 2, 7, 16, 33, 70]))


def farthest(images: torch.Tensor, size: tuple[int, int], asked: dict[str, Any]) -> float:
    """The largest coordinate of a place that is looked up, of which the last bit is a rounding."""
    distortion = distortion_of(asked)
    found = [
        reference.places(SEED, i, images.shape[2:], size, distortion) for i in range(len(images))
    ]
    return float(np.abs(found).max())


@given(
    ASKED,
    SIZES,
    SIZES,
    st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 4])),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([("zeros", 0.0), ("zeros", 0.75), ("border", 0.0), ("reflection", 0.0)]),
)
@drawing(0, 60)
def test_all_together(
    asked: dict[str, Any],
    input_size: tuple[int, int],
    size: tuple[int, int],
    channels: tuple[int, int],
    channels_last: bool,
    dtype: torch.dtype,
    outside: tuple[str, float],
) -> None:
    """Drawn combinations, sizes in and out, layouts: 2 or 4 tiles, lines of any length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = asked | {"padding_mode": outside[0], "fill": outside[1]}
    if channels[1] == 3:
        asked = asked | {"saturation": (0.25, 1.75)}
    torch.manual_seed(0)
    images = pictures(*channels, *input_size).to(device, dtype)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    dy = torch.randn(*channels, *size).to(device, dtype)
    rounding = 4 * torch.finfo(torch.float32).eps * farthest(images, size, asked)
    for what, got, exact, torchs in results(images, dy, asked):
        found = judge(as_numpy(got), exact, as_numpy(torchs), torch.finfo(dtype).eps)
        slope = 1.0 if what == "y" else float(dy.abs().max())
        assert found.error <= found.allowed + rounding * slope, f"{what}: {found}"
