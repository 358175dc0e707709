"""The photographs of the style demo: read, resized, recoloured, compared."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gpunn


@pytest.fixture
def photographs(demo_folder: Path) -> Iterator[ModuleType]:
    """The module, with PyTorch's ops; the test is skipped where its packages are missing."""
    with gpunn.backend("torch"):
        yield importlib.import_module("photographs")


def test_colours_are_matched(photographs: ModuleType) -> None:
    """Mean and covariance of colours are the example's; what is flat takes its mean."""
    image = torch.rand(3, 20, 30) * torch.tensor([0.2, 0.5, 0.1]).view(3, 1, 1)
    mixed = torch.tensor([[0.1, 0.05, 0.0], [0.0, 0.1, 0.1], [0.05, 0.0, 0.05]])
    example = 0.4 + (mixed @ torch.rand(3, 400)).view(3, 20, 20)
    matched = photographs.match_colours(image, example).flatten(1)
    torch.testing.assert_close(matched.mean(1), example.flatten(1).mean(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(matched.cov(), example.flatten(1).cov(), atol=1e-5, rtol=0.02)
    flat = photographs.match_colours(torch.full((3, 4, 4), 0.2), example)
    torch.testing.assert_close(flat[:, 1, 2], example.mean((1, 2)), atol=1e-4, rtol=0)
    bright = photographs.match_colours(image, example * 1.9)
    assert 0 <= bright.min() < bright.max() == 1


def test_edges_correlate(photographs: ModuleType) -> None:
    """With themselves, whatever the brightness; not with another picture's."""
    image, other = torch.rand(2, 3, 40, 40)
    assert photographs.edge_correlation(image, 0.3 + image / 2) == pytest.approx(1, abs=1e-4)
    assert abs(photographs.edge_correlation(image, other)) < 0.15


def test_images_are_read_upright_and_resized(photographs: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "turned.png"
    pixels = torch.zeros(4, 8, 3, dtype=torch.uint8)
    pixels[0, :, 0] = 255  # the upper row is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels.numpy()).save(path, exif=exif)
    image = photographs.read_image(path)
    assert image.shape == (3, 8, 4)
    assert image[0, :, -1].tolist() == [1.0] * 8, "the right column is red"
    assert image[0, :, :-1].max() == image[1:].max() == 0
    larger = photographs.resized(image, 12)
    assert larger.shape == (3, 24, 12)
    assert 0 <= larger.min() < larger.max() <= 1
    assert larger.is_contiguous()
