"""The GAN demo: its figure and pictures, its losses and its judge, and the kernels below it."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

import gpunn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def gan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo, which imports what it shares as scripts do, from its own folder."""
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package, reason=f"no {package}: pip install 'gpunn[demo]'")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("gan")


@pytest.fixture
def training(gan: ModuleType) -> ModuleType:
    return importlib.import_module("gan_training")


def test_the_quick_demo_reaches_its_figure(
    gan: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    with gpunn.backend("torch"):
        assert gan.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    said = re.fullmatch(
        r"Inception score: ([\d.]+), (\d+) of 10 digits covered "
        r"\(expected: at least ([\d.]+); real images: ([\d.]+)\)",
        last,
    )
    assert said, last
    assert float(said[3]) == gan.SETTINGS["mlp"].quick_expected
    assert float(said[3]) <= float(said[1]) < float(said[4])
    assert int(said[2]) >= 7
    for name in ("samples.png", "walk.png", "curves.png"):
        pixels = imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.02, f"{name} is blank"


def test_the_judges_score(gan: ModuleType) -> None:
    """Sure and even: as many as there are digits. Unsure, or always the same: 1."""
    assert gan.inception_score(torch.eye(10).double()) == pytest.approx(10)
    assert gan.inception_score(torch.full((7, 10), 0.1)) == pytest.approx(1)
    same = torch.zeros(5, 10)
    same[:, 3] = 1
    assert gan.inception_score(same) == pytest.approx(1, abs=1e-4)
    # two of a quarter and three quarters each: exp(3/4 log(3/2) + 1/4 log(1/2))
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).double()
    exact = math.exp(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert gan.inception_score(p) == pytest.approx(exact)
    assert gan.digits_covered(torch.eye(10)[torch.tensor([0] * 99 + [4])]) == 2
    assert gan.digits_covered(torch.eye(10)[torch.tensor([0] * 199 + [4])]) == 1


def test_the_losses_are_the_games(training: ModuleType) -> None:
    """Goodfellow's value function by its formula; the discriminator's loss is 2 ln 2 at 1/2."""
    logits = torch.tensor([[0.3], [-2.0], [1.5]])
    d = logits.sigmoid()
    with gpunn.backend("torch"):
        assert_close(training.generator_loss("minimax", logits), (1 - d).log().mean())
        assert_close(training.generator_loss("non-saturating", logits), -d.log().mean())
        assert_close(training.generator_loss("wasserstein", logits), -logits.mean())
        smoothed = training.cross_entropy_with(logits, 0.9)
        assert_close(smoothed, -(0.9 * d.log() + 0.1 * (1 - d).log()).mean())
        even = torch.zeros(4, 1)
        both = training.cross_entropy_with(even, 1.0) + training.cross_entropy_with(even, 0.0)
    assert float(both) == pytest.approx(2 * math.log(2))


def test_the_penalty_is_the_slopes_distance_from_1(training: ModuleType) -> None:
    real, fake = torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4, 4)
    slope = torch.randn(16)
    found = training.penalty(lambda x: x.flatten(1) @ slope, real, fake)
    assert_close(found, (slope.norm() - 1).square())


def test_the_average_follows_the_generator(training: ModuleType) -> None:
    images = torch.randn(70, 1, 8, 8)
    game = training.Training(training.SETTINGS["minimax"], images, 0, 10)
    before = [p.clone() for p in game.average.parameters()]
    with gpunn.backend("torch"):
        game.train_step()
    for mean, old, new in zip(
        game.average.parameters(), before, game.generator.parameters(), strict=True
    ):
        assert_close(mean, old + 0.005 * (new - old))
    assert any(
        (old != new).any() for old, new in zip(before, game.average.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["mlp", "minimax", "dcgan", "wgan-gp"])
def test_the_kernels_play_as_torch_does(training: ModuleType, name: str, device: str) -> None:
    """The losses of two steps, the second of which has the gradients of the first in it."""
    setting = replace(training.SETTINGS[name], batch=4, discriminator_steps=1)
    if name == "dcgan":
        build = training.dcgan_generator, training.dcgan_discriminator
        setting = replace(setting, generator=lambda: build[0](4), discriminator=lambda: build[1](4))
    else:  # without dropout, whose bits are not torch's
        setting = replace(setting, discriminator=lambda: training.mlp_discriminator(0.0))
    images = torch.rand(8, 1, setting.size, setting.size, device=device) * 2 - 1
    played = []
    for choice in ("torch", "kernels"):
        game = training.Training(setting, images, 0, 10)
        with gpunn.backend(choice), gpunn.trace() as trace:
            played.append(torch.tensor([game.train_step() for _ in range(2)]))
    assert (played[0][0] != played[0][1]).all()
    assert_close(played[1], played[0], rtol=1e-3, atol=1e-4)
    assert {"linear_forward", "batch_norm_forward"} <= {r.operator for r in trace.launches}
    if name == "dcgan":
        assert "conv_forward" in {record.operator for record in trace.launches}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--setting", "chess"], "invalid choice: 'chess'"),
    ],
)
def test_bad_options_are_refused(
    gan: ModuleType, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gan.main(arguments)
    assert complaint in capsys.readouterr().err
