"""The arguments of augmentation as numbers for a kernel; what makes no sense is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gpunn.kernels.augment import COLOURS, FINEST, PADDING_MODES, PARAMETERS, Settings

Range = float | tuple[float, float]
LAYOUTS = ("NCHW", "NHWC")
DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Least and greatest value, whether those are allowed, and in words.
LIMITS: dict[str, tuple[float, float, bool, str]] = {
    "shear_x": (-90, 90, False, "degrees between -90 and 90"),
    "shear_y": (-90, 90, False, "degrees between -90 and 90"),
    "scale": (0, math.inf, False, "factors above 0"),
    "crop_area": (0, 1, True, "shares of the area above 0, up to 1"),
    "crop_ratio": (0, math.inf, False, "ratios above 0"),
    **dict.fromkeys(COLOURS, (0, math.inf, True, "factors of at least 0")),
}
NO_LIMITS = (-math.inf, math.inf, True, "finite numbers")
AROUND_ZERO = ("rotation", "shear_x", "shear_y", "translation_x", "translation_y")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_number(name: str, value: Any, least: float, greatest: float, words: str) -> None:
    if not _is_number(value):
        raise TypeError(f"{name}: augment expects {words}, got {value!r}")
    if not (least <= value <= greatest and abs(value) < math.inf):
        raise ValueError(f"{name}: augment expects {words}, got {value!r}")


def _pair(name: str, value: Any) -> tuple[float, float]:
    """The two ends of a range; of a number, which ends it stands for."""
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value)):
        return value[0], value[1]
    around = name in AROUND_ZERO or name in COLOURS
    if not (around and _is_number(value)):
        expected = "a number or two, the least first" if around else "two numbers, the least first"
        error = ValueError if _is_number(value) else TypeError
        raise error(f"{name}: augment expects {expected}, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: augment expects a number of at least 0, or two, got {value!r}")
    return (-value, value) if name in AROUND_ZERO else (max(0.0, 1 - value), 1 + value)


def range_of(name: str, value: Any) -> tuple[float, float]:
    """The least and the greatest value that a parameter may take.

    Raises:
        TypeError: it is neither a number nor two.
        ValueError: it is upside down, or beyond the limits of the parameter.
    """
    least, greatest = _pair(name, value)
    if not (abs(least) < math.inf and abs(greatest) < math.inf):
        raise ValueError(f"{name}: augment expects finite numbers, got {value!r}")
    if least > greatest:
        raise ValueError(f"{name}: augment expects the least value first, got {value!r}")
    low, high, closed, words = LIMITS.get(name, NO_LIMITS)
    inside = low <= least and greatest <= high if closed else low < least and greatest < high
    if not inside or (name == "crop_area" and least == 0):
        raise ValueError(f"{name}: augment expects {words}, got {value!r}")
    return float(least), float(greatest)


def settings_of(
    horizontal_flip: float = 0.0,
    vertical_flip: float = 0.0,
    crop_area: tuple[float, float] | None = None,
    elastic_amplitude: float = 0.0,
    elastic_spacing: float = 32.0,
    grey: float = 0.5,
    padding_mode: str = "zeros",
    fill: float = 0.0,
    clamp: bool = True,
    **ranges: Any,
) -> Settings:
    """What ``augment`` is asked for, as its operators take it.

    Raises:
        TypeError: an argument is not of its type, or there is none of that name.
        ValueError: an argument is out of its limits.
    """
    drawn: dict[str, tuple[float, float]] = {"crop_x": (0.0, 1.0), "crop_y": (0.0, 1.0)}
    for name, p in (("horizontal_flip", horizontal_flip), ("vertical_flip", vertical_flip)):
        _check_number(name, p, 0, 1, "a probability from 0 to 1")
        drawn[name] = (-float(p), 1 - float(p))
    for name, value in ranges.items():
        if name not in PARAMETERS or name in drawn:
            raise TypeError(f"augment has no argument {name!r}")
        drawn[name] = range_of(name, value)
    drawn["crop_area"] = (0.0, 0.0) if crop_area is None else range_of("crop_area", crop_area)
    words = f"a distance of at least {FINEST} pixels"
    _check_number("elastic_spacing", elastic_spacing, FINEST, math.inf, words)
    _check_number("elastic_amplitude", elastic_amplitude, 0, math.inf, "pixels, at least 0")
    _check_number("grey", grey, 0, 1, "a share of the largest colour, from 0 to 1")
    _check_number("fill", fill, -math.inf, math.inf, "a finite number")
    if padding_mode not in PADDING_MODES:
        allowed = ", ".join(PADDING_MODES)
        raise ValueError(f"padding_mode: augment expects one of {allowed}, got {padding_mode!r}")
    if fill != 0 and padding_mode != "zeros":
        raise ValueError(f"fill: {padding_mode!r} leaves nothing to fill, got {fill!r}")
    if not isinstance(clamp, bool):
        raise TypeError(f"clamp: augment expects a bool, got {type(clamp).__name__}")
    default = {"crop_ratio": (3 / 4, 4 / 3), "scale": (1.0, 1.0)}
    default |= dict.fromkeys(COLOURS, (1.0, 1.0)) | dict.fromkeys(AROUND_ZERO, (0.0, 0.0))
    numbers = [n for name in PARAMETERS for n in (default | drawn)[name]]
    field = [float(elastic_amplitude), float(elastic_spacing)]
    return Settings(numbers, field, [float(fill), float(grey)], padding_mode, clamp)


def check_images(images: torch.Tensor, settings: Settings) -> None:
    """Refuse what is no batch of pictures (N, C, H, W).

    Raises:
        TypeError: integers other than bytes.
        ValueError: another shape; or saturation is to change, and there are not three channels.
    """
    if images.dtype not in DTYPES:
        raise TypeError(f"images: augment expects bytes or floating point, got {images.dtype}")
    shape = tuple(images.shape)
    if images.dim() != 4 or 0 in shape[1:]:
        expected = "four dimensions, none but the first 0"
        raise ValueError(f"images: augment expects {expected}, got {shape}")
    if settings.recolours[2] and shape[1] != 3:
        raise ValueError(f"saturation: augment expects red, green, blue, got {shape[1]} channels")


def check_layout(layout: str) -> None:
    """Refuse a layout that is none.

    Raises:
        ValueError: it is not among ``LAYOUTS``.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: augment expects one of {', '.join(LAYOUTS)}, got {layout!r}")


def size_of(size: int | Sequence[int] | None, of_images: Sequence[int]) -> list[int]:
    """Height and width of the result; by default, the images'.

    Raises:
        TypeError: it is not one or two integers.
        ValueError: one of them is below 1.
    """
    if size is None:
        return list(of_images)
    pair: list[Any] = list(size) if isinstance(size, (tuple, list)) else [size, size]
    if len(pair) != 2 or not all(isinstance(n, (int, torch.SymInt)) for n in pair):
        raise TypeError(f"size: augment expects an integer or two, got {size!r}")
    if min(pair) < 1:
        raise ValueError(f"size: augment expects at least 1, got {size!r}")
    return pair


def dtype_of(dtype: torch.dtype | None, of_images: torch.dtype) -> torch.dtype:
    """That of the result.

    Raises:
        ValueError: it is neither floating point nor that of the images.
    """
    if dtype is None or dtype == of_images:
        return of_images
    if dtype not in DTYPES or not dtype.is_floating_point:
        raise ValueError(
            f"dtype: augment expects floating point, or that of the images, {of_images}, "
            f"got {dtype}"
        )
    return dtype
