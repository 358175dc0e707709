"""The AlexNet demo: full-size steps are timed, and the small net is tested on unseen pixels."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gpunn
from gpunn import models, nn
from kit import assert_trains_as_torch

PICTURES = ("filters.png", "learning_curve.png")


@pytest.fixture
def alexnet(demo_folder: Path) -> ModuleType:
    """The demo, which imports what it shares as scripts do, from its own folder."""
    return importlib.import_module("alexnet")


def test_the_quick_demo_reaches_its_figure(
    alexnet: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Speed, memory and the held-out accuracy are printed; every picture shows something."""
    from matplotlib.image import imread

    out = tmp_path / "new" / "folder"
    with gpunn.backend("torch"):
        assert alexnet.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for layers in ("5 × conv2d", "3 × max_pool2d", "3 × linear"):
        assert layers in printed
    speed = re.search(r"Full size: ([\d.]+) images a second on (.+)", printed)
    assert speed, printed
    assert float(speed[1]) > 0
    assert re.search(r"regions trained on: [\d.]+% \(all above the next line is memory\)", printed)
    last = printed.splitlines()[-1]
    said = re.fullmatch(
        r"Accuracy on the strips held out, never seen: ([\d.]+)% "
        r"\(expected: at least ([\d.]+)%\)",
        last,
    )
    assert said, last
    assert float(said[1]) >= float(said[2]) == 100 * alexnet.QUICK_EXPECTED >= 2 * 12.5
    for name in PICTURES:
        pixels = imread(out / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.02, f"{name} is blank"


def test_no_held_out_pixel_is_trained_on(
    alexnet: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pixel is its own number; patches of the two parts have none in common."""
    height, width = alexnet.quarters()[7].shape[1:]
    numbers = torch.arange(8.0 * height * width).view(8, 1, height, width)
    monkeypatch.setattr(alexnet, "quarters", lambda: list(numbers))
    generator = torch.Generator().manual_seed(0)
    seen, unseen = (alexnet.draw_patches(part, 1000, generator) for part in alexnet.regions())
    for patches in (seen, unseen):
        assert patches.x.shape == (1000, 1, alexnet.PATCH, alexnet.PATCH)
        quarter = patches.x.flatten(1) // (height * width)
        assert torch.equal(quarter, patches.y[:, None].expand_as(quarter).float())
        assert patches.y.unique().tolist() == list(range(8))
    assert not set(seen.x.unique().tolist()) & set(unseen.x.unique().tolist())


def test_the_small_net_is_alexnets_build(alexnet: ModuleType) -> None:
    """Its layers are those of the full size, in the same order."""
    full = models.alexnet()
    layers = [*full.features, nn.Flatten(), *full.classifier]
    kinds = [type(layer) for layer in layers if not isinstance(layer, nn.Identity)]
    assert [type(layer) for layer in alexnet.build()] == kinds


def test_the_kernels_train_as_torch_does(alexnet: ModuleType, device: str) -> None:
    """But for dropout, which is drawn by another generator."""
    patches = alexnet.draw_patches(alexnet.regions()[0], 2, torch.Generator().manual_seed(0))
    patches = patches.to(device)
    torch.manual_seed(0)
    model = alexnet.build().to(device).eval()
    assert_trains_as_torch(
        model, patches.x, patches.y, "conv_forward", "conv_weight_gradient", "max_pool_forward",
        "max_pool_backward", "linear_forward", "linear_weight_gradient",
    )  # fmt: skip
