"""The LeNet-5 demo: it reaches its figure, shows what it learnt, and trains on the kernels."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import gpunn
from kit import assert_trains_as_torch

PICTURES = ("learning_curve.png", "feature_maps.png", "wrong_answers.png")


@pytest.fixture
def lenet_digits(demo_folder: Path) -> ModuleType:
    """The demo, which imports what it shares as scripts do, from its own folder."""
    return importlib.import_module("lenet_digits")


@pytest.mark.parametrize("arguments", [[], ["--modern"]], ids=["paper", "modern"])
def test_the_quick_demo_reaches_its_figure(
    lenet_digits: ModuleType,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The trace is printed, the figure is the last line, and every picture shows something."""
    from matplotlib.image import imread

    out = tmp_path / "new" / "folder"
    with gpunn.backend("torch"):
        status = lenet_digits.main(["--quick", "--device", "cpu", "--out", str(out), *arguments])
    assert status == 0
    printed = capsys.readouterr().out
    assert "3 × conv2d" in printed
    assert "2 × linear" in printed
    last = printed.splitlines()[-1]
    said = re.fullmatch(r"Held-out accuracy: ([\d.]+)% \(expected: at least ([\d.]+)%\)", last)
    assert said, last
    assert float(said[1]) >= float(said[2]) == 100 * lenet_digits.QUICK_EXPECTED
    for name in PICTURES:
        pixels = imread(out / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.02, f"{name} is blank"


def test_no_held_out_image_is_trained_on(lenet_digits: ModuleType) -> None:
    digits = lenet_digits.load("cpu")
    assert digits.train_x.shape == (1347, 1, 32, 32)
    assert digits.held_out_x.shape == (450, 1, 32, 32)
    seen = {image.numpy().tobytes() for image in digits.train_x}
    assert not seen & {image.numpy().tobytes() for image in digits.held_out_x}


def test_shifting_moves_an_image_and_changes_no_pixel(lenet_digits: ModuleType) -> None:
    """A dot in the middle ends everywhere within SHIFT pixels of it, in both directions."""
    shift = lenet_digits.SHIFT
    dots = torch.full((500, 1, 32, 32), -1.0)
    dots[:, :, 16, 16] = 1.0
    moved = lenet_digits.shifted(dots)
    assert moved.shape == dots.shape
    assert torch.equal(moved.flatten(1).sort().values, dots.flatten(1).sort().values)
    where = {tuple(index[2:]) for index in (moved == 1).nonzero().tolist()}
    reach = range(16 - shift, 16 + shift + 1)
    assert where == {(row, column) for row in reach for column in reach}


def test_the_feature_maps_are_the_networks(lenet_digits: ModuleType) -> None:
    model = lenet_digits.variant(modern=False).model
    image = torch.randn(1, 32, 32)
    with gpunn.backend("torch"):
        first, second = lenet_digits.feature_maps(model, image)
    exact = torch.tanh(F.conv2d(image[None], model.c1.weight, model.c1.bias))
    assert_close(first, exact[0].detach())
    exact = torch.tanh(F.conv2d(F.avg_pool2d(exact, 2), model.c3.weight, model.c3.bias))
    assert_close(second, exact[0].detach())


def test_the_kernels_train_as_torch_does(lenet_digits: ModuleType, device: str) -> None:
    """The loss and every gradient of one step; convolutions and dense layers are all gpunn's."""
    digits = lenet_digits.load(device)
    model = lenet_digits.variant(modern=False).model.to(device)
    x, y = digits.train_x[:2], digits.train_y[:2]
    trace = assert_trains_as_torch(model, x, y)
    operators = [record.operator for record in trace.launches]
    assert operators.count("conv_forward") >= 3
    assert operators.count("linear_forward") >= 2
    assert operators.count("conv_weight_gradient") >= 3
    assert operators.count("linear_weight_gradient") >= 2
