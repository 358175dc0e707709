"""Images as tensors (3, H, W) from 0 to 1: read, resized, recoloured and compared."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from edges import find_edges

try:
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError
    from sklearn.datasets import load_sample_images
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

LONGEST = 4  # times its shorter side


def read_image(path: Path) -> torch.Tensor:
    """An image of any format that Pillow reads, the right way up.

    Raises:
        ValueError: the file is no such image, or far longer than wide.
    """
    try:
        with Image.open(path) as file:
            pixels = np.asarray(ImageOps.exif_transpose(file).convert("RGB"), dtype=np.float32)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    height, width, _ = pixels.shape
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(
            f"{path}: expected an image at most {LONGEST} times as long as wide, "
            f"got {width}×{height} pixels"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def sample_photographs() -> dict[str, torch.Tensor]:
    """scikit-learn's two, by their names."""
    found = load_sample_images()
    return {
        Path(name).stem: torch.tensor(pixels).permute(2, 0, 1) / 255
        for name, pixels in zip(found.filenames, found.images, strict=True)
    }


def enlarged(image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The image (..., H, W) in the size of another, smoothly."""
    whole = image.reshape(-1, *image.shape[-3:])
    size = like.shape[-2:]
    return F.interpolate(whole, size, mode="bicubic", antialias=True).reshape(
        *image.shape[:-2], *size
    )


def resized(image: torch.Tensor, side: int) -> torch.Tensor:
    """The image (3, H, W), smoothly, with a shorter side of so many pixels."""
    scale = side / min(image.shape[1:])
    like = image.new_empty([max(side, round(scale * length)) for length in image.shape[1:]])
    return enlarged(image, like).clamp(0, 1)


def _mean_and_root(image: torch.Tensor, power: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean colour, and a power of the covariance matrix of colours."""
    colours = image.flatten(1).double()
    mean = colours.mean(1, keepdim=True)
    covariance = (colours - mean) @ (colours - mean).T / colours.shape[1]
    values, vectors = torch.linalg.eigh(covariance)
    return mean, vectors @ torch.diag(values.clamp(min=1e-6) ** power) @ vectors.T


def match_colours(image: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """The image (3, H, W) with the example's mean and covariance of colours, clamped to [0, 1].

    Source: Gatys et al. (2016), https://arxiv.org/abs/1606.05897, section 3.1, "image analogies",
    there used the other way round.
    """
    mean, whiten = _mean_and_root(image, -0.5)
    target, colour = _mean_and_root(example, 0.5)
    matched = colour @ whiten @ (image.flatten(1).double() - mean) + target
    return matched.view(image.shape).to(image.dtype).clamp(0, 1)


def edge_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Pearson's correlation of how strong the edges of two images of one size are."""
    strengths = [find_edges(image.mean(0)).norm(dim=0).flatten() for image in (one, other)]
    return torch.corrcoef(torch.stack(strengths))[0, 1].item()
