"""Gradients that pixels look for, against those that are added to them: two ways, one sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gpunn
import gpunn.functional as GF
from gpunn.kernels import augment as kernels
from test_augment import SEED, value_and_gradient

# What is asked for, and the sizes of input and output.
WAYS: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    "as it is": ({}, (9, 12), (9, 12)),
    "flips": ({"horizontal_flip": 0.5, "vertical_flip": 0.5}, (9, 12), (9, 12)),
    "turned": ({"rotation": (-180, 180)}, (30, 41), (30, 41)),
    "an eighth of a turn": ({"rotation": (45, 45)}, (16, 16), (16, 16)),
    "sheared": ({"shear_x": (70, 85), "shear_y": (-80, -60)}, (12, 40), (12, 40)),
    "all over one pixel": ({"scale": (30, 40)}, (5, 7), (33, 70)),
    "many to a pixel": ({"scale": (0.05, 0.1)}, (40, 70), (20, 7)),
    "moved out": ({"translation_x": (0.9, 1.5)}, (8, 8), (8, 8)),
    "crops": ({"crop_area": (0.05, 0.3), "rotation": 20}, (40, 67), (16, 24)),
    "one pixel": ({"rotation": 30}, (1, 1), (6, 5)),
    "to one pixel": ({"rotation": 30}, (6, 5), (1, 1)),
    "a long line": ({"rotation": 0.01, "scale": (0.9, 1.1)}, (2, 9000), (2, 8000)),
    "colours": (
        {"rotation": 20, "saturation": 0.4, "brightness": 0.4, "contrast": 0.2, "clamp": False},
        (12, 9), (12, 9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_gathered_is_scattered(
    way: str, channels_last: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three channels and of four, with gradients that are not finite among them."""
    asked, size_in, size_out = WAYS[way]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for n_channels in (3, 4):
        if n_channels == 4 and "saturation" in asked:
            continue
        x = torch.rand(3, n_channels, *size_in).to(device).to(memory_format=layout)
        dy = torch.randn(3, n_channels, *size_out).to(device)
        dy[2, 0, 0, 0], dy[2, 1, -1, -1] = torch.inf, torch.nan
        function = lambda x: GF.augment(x, size=size_out, seed=SEED, **asked)  # noqa: E731
        found, ran = [], []
        for gathered in (True, False):
            monkeypatch.setattr(kernels.Settings, "is_gathered", gathered)
            with gpunn.trace() as trace:
                found.append(value_and_gradient(function, x, dy)[1])
            ran.append({record.kernel for record in trace.launches})
        assert "augment_gather_kernel" in ran[0] - ran[1]
        assert "augment_scatter_kernel" in ran[1] - ran[0]
        got, expected = found
        assert got.stride() == expected.stride()
        most = max(1.0, float(expected.nan_to_num(0, 0, 0).abs().max()))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * most, equal_nan=True)


@pytest.mark.parametrize(
    ("asked", "gathered"),
    [
        ({"rotation": 20}, True),
        ({"rotation": 20, "brightness": 0.4, "clamp": False}, True),
        ({"rotation": 20, "brightness": 0.4}, False),
        ({"elastic_amplitude": 2.0}, False),
        ({"rotation": 20, "padding_mode": "border"}, False),
        ({"rotation": 20, "padding_mode": "reflection"}, False),
    ],
)
def test_what_is_gathered(asked: dict[str, Any], gathered: bool, device: str) -> None:
    """Where all pixels of the output that look at one of the input are easily found."""
    x = torch.rand(1, 1, 5, 6, device=device)
    with gpunn.trace() as trace:
        value_and_gradient(lambda x: GF.augment(x, seed=SEED, **asked), x, torch.ones_like(x))
    ran = {record.kernel for record in trace.launches} - {"augment_forward_kernel"}
    scattered = {"augment_exponent_kernel", "augment_scatter_kernel", "augment_gradient_kernel"}
    assert ran == ({"augment_gather_kernel"} if gathered else scattered)
