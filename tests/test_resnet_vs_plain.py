"""The demo of residual against plain networks: a fair comparison, and the paper's outcome."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gpunn
from kit import assert_trains_as_torch


@pytest.fixture
def demo(demo_folder: Path) -> ModuleType:
    """The module; the test is skipped where its packages are missing."""
    return importlib.import_module("resnet_vs_plain")


def test_deep_residual_networks_learn_where_plain_ones_do_not(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quick demo: 20 points at depth 32, with a last line that says so, and its pictures."""
    from matplotlib.image import imread

    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    with gpunn.backend("torch"):
        assert demo.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "31 × batch_norm           torch  backend('torch')" in shown
    assert re.search(r"plain, 32 layers, .* loss \d\.\d+", shown), "the bar has no live loss"
    last = shown.splitlines()[-1]
    said = re.fullmatch(
        r"Residual over plain at depth 32: ([+-][\d.]+) points or more "
        r"\(expected: at least (\d+)\)",
        last,
    )
    assert said, last
    assert float(said[1]) >= float(said[2]) == demo.EXPECTED == 20
    for name in ("depth.png", "gradients.png"):
        pixels = imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.02, "the picture is blank"


def test_both_networks_start_from_the_same_weights(demo: ModuleType) -> None:
    """So that the shortcut is the only difference; another seed draws others."""
    cpu = torch.device("cpu")
    residual, plain, other = (
        demo.build(20, kind, seed, cpu).state_dict()
        for kind, seed in ((True, 0), (False, 0), (True, 1))
    )
    assert residual.keys() == plain.keys()
    assert all(torch.equal(residual[name], plain[name]) for name in residual)
    assert not torch.equal(residual["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("residual", [True, False])
def test_the_kernels_train_as_torch_does(demo: ModuleType, residual: bool, device: str) -> None:
    images = demo.load_digits_as_images(device)
    model = demo.build(8, residual, 0, torch.device(device))
    assert_trains_as_torch(
        model, images.train_x[:3], images.train_y[:3], "conv_forward", "conv_weight_gradient",
        "batch_norm_forward", "batch_norm_backward", "linear_forward",
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_explode_without_the_shortcut(demo: ModuleType, seed: int) -> None:
    """From the last of 56 layers to the first.

    With eight seeds 790- to 2,860-fold, and five- to eightfold with it.
    """
    images = demo.load_digits_as_images("cpu")
    growth = {}
    for residual in (True, False):
        with gpunn.backend("torch"):
            model = demo.build(56, residual, seed, torch.device("cpu"))
            norms = demo.gradient_norms(model, images)
        assert len(norms) == 55
        growth[residual] = norms[0] / norms[-1]
    assert growth[True] < 15
    assert growth[False] > 200
    assert growth[False] > 50 * growth[True]


def test_no_held_out_image_is_trained_on(demo: ModuleType) -> None:
    images = demo.load_digits_as_images("cpu")
    assert images.train_x.shape == (1347, 1, 8, 8)
    assert images.held_out_x.shape == (450, 1, 8, 8)
    seen = set(map(tuple, images.train_x.flatten(1).tolist()))
    assert not seen & set(map(tuple, images.held_out_x.flatten(1).tolist()))


def test_a_rate_is_chosen_on_training_images_alone(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each candidate on every fold; the folds' validation images make up the training part."""
    tried = []
    accuracies = {0.01: 0.5, 0.02: 0.9, 0.05: 0.9, 0.1: 0.2}

    def learn(network: Any, images: Any, steps: int, *_: Any) -> tuple[float, float]:
        tried.append((network, images))
        return 0.0, accuracies[network.rate]

    monkeypatch.setattr(demo, "learn", learn)
    images = demo.load_digits_as_images("cpu")
    for _ in range(2):  # what the journal has is not tried again
        journal = demo.open_journal(tmp_path, True, {})
        assert demo.choose_rates(images, [8], 42, journal) == {(8, True): 0.02, (8, False): 0.02}
        assert len(tried) == len(set(map(str, tried))) == 2 * 4 * 4
    validation = torch.cat([fold.held_out_x for _, fold in tried[:4]])
    assert sorted(validation.flatten(1).tolist()) == sorted(images.train_x.flatten(1).tolist())
    assert not {network.seed for network, _ in tried} & {0, 1, 2}
    assert "8 layers, plain: 0.01: 50.0%, 0.02: 90.0%" in capsys.readouterr().out


def test_no_seeds_are_refused(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--seeds", "0"])
    assert "--seeds: expected 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "n_seeds"),
    [([], 3), (["--quick"], 1), (["--seeds", "2"], 2), (["--quick", "--seeds", "2"], 2)],
)
def test_as_many_seeds_as_are_asked_for(
    demo: ModuleType, options: list[str], n_seeds: int, tmp_path: Path
) -> None:
    parsed = demo.parse(["--seed", "5", "--device", "cpu", "--out", str(tmp_path), *options])
    assert parsed.seeds == range(5, 5 + n_seeds)
