"""The checks of augmentation: every distortion by itself, and all of them together."""

from __future__ import annotations

import functools
from typing import Any

import torch

import gpunn.functional as GF
from gpunn.checks.comparison import SEED, Array, Check, Comparison, compare
from gpunn.functional.augment_arguments import settings_of
from gpunn.functional.augment_composition import composed
from gpunn.reference import augment as reference

GEOMETRY: dict[str, Any] = {
    "rotation": (-30.0, 30.0),
    "shear_x": (-15.0, 15.0),
    "scale": (0.8, 1.25),
    "translation_x": (-0.2, 0.1),
    "elastic_amplitude": 3.0,
    "elastic_spacing": 8.0,
}
COLOURS: dict[str, Any] = {
    "brightness": (0.5, 1.5),
    "contrast": (0.5, 1.5),
    "saturation": (0.0, 2.0),
}
ALL = {**GEOMETRY, **COLOURS, "horizontal_flip": 0.5, "crop_area": (0.3, 0.9)}
# What is asked for, and the shape.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "flips": ({"horizontal_flip": 0.5, "vertical_flip": 0.5}, (6, 3, 8, 11)),
    "rotation": ({"rotation": (-180.0, 180.0)}, (2, 3, 9, 12)),
    "shear": ({"shear_x": (-30.0, 30.0), "shear_y": (0.0, 20.0)}, (2, 3, 9, 12)),
    "scale": ({"scale": (0.5, 2.0)}, (2, 3, 9, 12)),
    "translation": (
        {"translation_x": (-0.3, 0.3), "translation_y": (-0.3, 0.3), "fill": 0.75},
        (2, 1, 9, 12),
    ),
    "crop": ({"crop_area": (0.2, 0.8)}, (3, 3, 16, 12)),
    "elastic": ({"elastic_amplitude": 4.0, "elastic_spacing": 5.0}, (2, 4, 20, 37)),
    "border": ({**GEOMETRY, "padding_mode": "border"}, (2, 1, 16, 12)),
    "reflection": ({**GEOMETRY, "padding_mode": "reflection"}, (2, 1, 16, 12)),
    "brightness": ({"brightness": (0.5, 1.5)}, (3, 1, 6, 7)),
    "contrast": ({"contrast": (0.5, 1.5), "grey": 0.25}, (3, 1, 6, 7)),
    "saturation": ({"saturation": (0.0, 2.0)}, (3, 3, 6, 7)),
    "colours, not clamped": ({**COLOURS, "clamp": False}, (3, 3, 6, 7)),
    "all": (ALL, (3, 3, 40, 67)),
}


def check_augment(
    case: str, channels_last: bool, dtype: torch.dtype, device: str
) -> list[Comparison]:
    """One case, of pictures of a few colours beyond black and white, so that some are clamped."""
    asked, shape = CASES[case]
    images = (1.2 * torch.rand(shape) - 0.1).to(device, dtype)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    distortion = reference.Distortion(**asked)

    def exact(dy: Array, images: Array) -> dict[str, Array]:
        y = reference.augment_forward(images, SEED, shape[2:], distortion)
        return {"y": y, "dx": reference.augment_backward(dy, images, SEED, distortion)}

    def theirs(images: torch.Tensor) -> torch.Tensor:
        seed = torch.tensor([SEED], device=device)
        return composed(images, seed, list(shape[2:]), settings_of(**asked), dtype)

    return compare(functools.partial(GF.augment, seed=SEED, **asked), theirs, exact, [images])


def kernels_of(case: str) -> tuple[str, ...]:
    """Those of which each must run."""
    gathered = settings_of(**CASES[case][0]).is_gathered
    names = ("gather",) if gathered else ("exponent", "scatter", "gradient")
    return tuple(f"augment_{name}_kernel" for name in ("forward", *names))


def check(name: str, case: str, channels_last: bool) -> Check:
    """The check of a case in one layout."""
    function = functools.partial(check_augment, case, channels_last)
    return Check("augment", name, function, kernels_of(case))


CHECKS = [
    *(check(case, case, False) for case in CASES),
    check("rotation, channels_last", "rotation", True),
    check("augment, all, channels_last", "all", True),
]
