"""Augmentation: random flips, rotations, shears, scales, translations, crops, colours, elasticity.

One kernel reads each picture once, by its strides, and writes the distorted one. Nothing but the
seed is kept for the backward, and the pictures where a colour may have been clamped.

Sources: torchvision's RandomAffine, RandomResizedCrop and ColorJitter (what is drawn);
F.grid_sample with align_corners=False (where pixels are); Simard, Steinkraus and Platt, "Best
practices for convolutional neural networks applied to visual document analysis", 2003 (elastic
distortion).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpunn.functional.augment_arguments import (
    Range,
    check_images,
    check_layout,
    dtype_of,
    settings_of,
    size_of,
)
from gpunn.functional.augment_composition import composed
from gpunn.functional.dispatch import differentiable_gradients, is_tensor
from gpunn.kernels.augment import Settings, augment_backward, augment_forward
from gpunn.kernels.cuda import takes_cuda
from gpunn.kernels.philox import draw_seed
from gpunn.kernels.pooling import is_channels_last


class _Augment(torch.autograd.Function):
    """Linear in the pictures, but for the clamping of colours."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        seed: torch.Tensor,
        size: list[int],
        settings: Settings,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(images if settings.clamps else None, seed)
        ctx.arguments, ctx.settings = (size, dtype), settings
        ctx.given = list(images.shape), images.dtype, is_channels_last(images)
        return augment_forward(images, seed, size, *settings, dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, seed = ctx.saved_tensors
        size, dtype = ctx.arguments
        settings: Settings = ctx.settings
        shape, given, channels_last = ctx.given
        if torch.is_grad_enabled():
            if images is None:  # the gradient is the same for all
                images = dy.new_zeros(shape, dtype=given).requires_grad_()

            def again(images: torch.Tensor) -> torch.Tensor:
                return composed(images, seed, size, settings, dtype)

            (dx,) = differentiable_gradients(again, [images], [True], dy)
            return dx, None, None, None, None
        dx = augment_backward(dy, images, seed, shape[2:], *settings, given, channels_last)
        return dx, None, None, None, None


def _seed_of(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """One int64 on the device: as given, or drawn.

    Raises:
        TypeError: it is neither an integer nor a tensor.
        ValueError: it is a tensor of something else, or an integer of more than 64 bits.
    """
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, int) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: augment expects an integer of 64 bits, got {seed}")
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, torch.Tensor):
        raise TypeError(f"seed: augment expects an integer or a tensor, got {seed!r}")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"seed: augment expects one int64 on {device}, where the images are, "
            f"got {seed.numel()} of {seed.dtype} on {seed.device}"
        )
    return seed.reshape(1)


def _augmented(
    images: torch.Tensor,
    seed: torch.Tensor,
    size: list[int],
    settings: Settings,
    dtype: torch.dtype,
) -> torch.Tensor:
    """By the kernels where they take the images, else by torch's operations."""
    result = images if dtype == images.dtype else images.new_empty(0, dtype=dtype)
    if not takes_cuda("augment", images, result, also=(torch.uint8,)):
        return composed(images, seed, size, settings, dtype)
    if images.requires_grad and torch.is_grad_enabled():
        return _Augment.apply(images, seed, size, settings, dtype)  # type: ignore[no-any-return]
    return augment_forward(images, seed, size, *settings, dtype)


def augment(
    images: torch.Tensor,
    *,
    horizontal_flip: float = 0.0,
    vertical_flip: float = 0.0,
    rotation: Range = 0.0,
    shear_x: Range = 0.0,
    shear_y: Range = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    translation_x: Range = 0.0,
    translation_y: Range = 0.0,
    crop_area: tuple[float, float] | None = None,
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    elastic_amplitude: float = 0.0,
    elastic_spacing: float = 32.0,
    brightness: Range = 0.0,
    contrast: Range = 0.0,
    saturation: Range = 0.0,
    grey: float = 0.5,
    padding_mode: str = "zeros",
    fill: float = 0.0,
    clamp: bool = True,
    size: int | Sequence[int] | None = None,
    layout: str = "NCHW",
    dtype: torch.dtype | None = None,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Pictures, each distorted by parameters of its own, drawn evenly from the given ranges.

    A range is its least and its greatest value. A number d stands for [-d, d]; of a colour for the
    factors [max(0, 1 - d), 1 + d]. What a picture goes through, in this order:

    - crop: a part anywhere, of the given area, a share, and ratio of width to height, drawn evenly
      in its logarithm, as far as the picture has room for it. It is given ``size``.
    - flips, with the given probabilities.
    - about the middle: shear along x (what is below goes to the right), then along y (what is
      right goes down); scale; rotation anticlockwise. Angles are degrees.
    - translation to the right and down, as a share of the width and the height.
    - elastic distortion: numbers in [-1, 1) on a grid of nodes ``elastic_spacing`` pixels apart,
      interpolated by a cubic B-spline, times ``elastic_amplitude`` pixels, move x and y.
    - brightness: f v. Contrast: f v + (1 - f) g with the fixed ``grey`` g, a share of the largest
      colour (torchvision's is the picture's mean). Saturation: the same with the pixel's own grey,
      0.2989 R + 0.587 G + 0.114 B, of three channels. Each is then clamped to [0, 1], or [0, 255].

    The geometry is one map, and y[n, c, i, j] a bilinear mean of four pixels.

    Args:
        images: x (N, C, H, W) of any strides, bytes or floating point; or (N, H, W, C), see layout.
        padding_mode: what is outside, as in F.grid_sample: "zeros", which are ``fill``, "border" or
            "reflection".
        fill: the colour outside, of bytes up to 255, before brightness and the rest.
        clamp: whether to clamp colours, which are changed otherwise.
        size: of the result, (OH, OW) or one number for both; by default that of the images.
        layout: of the images, "NCHW" or "NHWC". The result is (N, C, OH, OW), channels_last in
            memory where the images are.
        dtype: of the result: floating point, or by default that of the images. Bytes become
            numbers from 0 to 1; as bytes, they are rounded to the nearest.
        seed: an integer, or one int64 on the images' device; by default drawn from torch's
            generator there. Picture n depends on the seed and n alone.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an argument is out of its limits, or a range upside down.
    """
    check_layout(layout)
    settings = settings_of(
        horizontal_flip=horizontal_flip, vertical_flip=vertical_flip, rotation=rotation,
        shear_x=shear_x, shear_y=shear_y, scale=scale, translation_x=translation_x,
        translation_y=translation_y, crop_area=crop_area, crop_ratio=crop_ratio,
        elastic_amplitude=elastic_amplitude, elastic_spacing=elastic_spacing,
        brightness=brightness, contrast=contrast, saturation=saturation, grey=grey,
        padding_mode=padding_mode, fill=fill, clamp=clamp,
    )  # fmt: skip
    is_tensor("augment", images, "images")
    if layout == "NHWC" and images.dim() == 4:
        images = images.permute(0, 3, 1, 2)
    check_images(images, settings)
    wanted, result_size = dtype_of(dtype, images.dtype), size_of(size, images.shape[2:])
    source = _seed_of(seed, images.device)  # last, so that what is refused draws nothing
    return _augmented(images, source, result_size, settings, wanted)
