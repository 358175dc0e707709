"""The demo of adversarial networks: its figure, its pictures, its losses, and the kernels below."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gpunn
from gpunn import nn
from gpunn.functional.dispatch import AGAIN
from kit import launched

pytestmark = pytest.mark.usefixtures("demo_folder")


@pytest.fixture
def training() -> ModuleType:
    return importlib.import_module("gan_training")


@pytest.fixture
def small() -> Any:
    """Games of small networks."""
    return importlib.import_module("small_gan")


def test_the_quick_demo_draws_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trace is printed, the figure is the last line, and every picture shows something."""
    from matplotlib.image import imread

    gan = importlib.import_module("gan")
    with gpunn.backend("torch"):
        assert gan.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    assert "4 × batch_norm" in shown
    last = shown.splitlines()[-1]
    said = re.fullmatch(
        r"Inception score: ([\d.]+), 10 of 10 digits "
        r"\(expected: at least ([\d.]+), all 10; real images: ([\d.]+)\)",
        last,
    )
    assert said, last
    assert float(said[1]) >= float(said[2])
    share = gan.SETTINGS["mlp"].quick["expected"]
    assert float(said[2]) == pytest.approx(share * float(said[3]), abs=0.01)
    for name in ("samples.png", "walk.png", "curves.png"):
        pixels = imread(tmp_path / "new" / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.02, f"{name} is blank"


def first_step(small: Any, name: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses, and all gradients, by whichever backend is chosen."""
    game = small.game_of(name, device)
    losses = game.advance()
    parameters = [*game.discriminator.parameters(), *game.generator.parameters()]
    gradients = torch.cat([parameter.grad.flatten() for parameter in parameters])
    return torch.stack([losses.discriminator, losses.generator]), gradients


@pytest.mark.parametrize("name", ["mlp", "minimax", "dcgan", "wgan-gp"])
def test_the_kernels_train_as_torch_does(small: Any, name: str, device: str) -> None:
    """In a step of D, and of G against what D has become; but for the gradient of a gradient."""
    with gpunn.backend("torch"):
        expected, expected_gradients = first_step(small, name, device)
    with gpunn.backend("kernels"), gpunn.trace() as trace:
        losses, gradients = first_step(small, name, device)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert expected_gradients.abs().max() > 0.01
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)
    left = {fallback.reason for fallback in trace.fallbacks}
    assert left == ({AGAIN} if name == "wgan-gp" else set())
    trace.fallbacks.clear()
    launched(trace, *small.SMALL[name].kernels)


def test_the_losses_are_the_formulas(training: ModuleType, device: str) -> None:
    """V of D(x) = 0.8, 0.5 and D(G(z)) = 0.1, 0.3, and what G has of it in both forms."""
    real, fake = (
        torch.tensor([[p], [q]], device=device, dtype=torch.float64).logit()
        for p, q in ((0.8, 0.5), (0.1, 0.3))
    )
    e_real = (math.log(0.8) + math.log(0.5)) / 2
    e_fake = (math.log(0.9) + math.log(0.7)) / 2
    assert training.value(real, fake).item() == pytest.approx(e_real + e_fake)
    assert training.minimax_loss(fake).item() == pytest.approx(e_fake)
    saturating = (math.log(0.1) + math.log(0.3)) / 2
    assert training.non_saturating_loss(fake).item() == pytest.approx(-saturating)
    assert training.critic_loss(fake).item() == pytest.approx(-fake.mean().item())
    guess = torch.zeros(4, 1, device=device)
    assert training.value(guess, guess).item() == pytest.approx(-2 * math.log(2))


def test_only_the_literal_form_saturates(training: ModuleType, device: str) -> None:
    """Where D is sure that an image is fake, its gradient is D(G(z)), and the other's -1."""
    gradients = []
    for loss in (training.minimax_loss, training.non_saturating_loss):
        fake = torch.full((1, 1), -10.0, device=device, requires_grad=True)
        gradients.append(torch.autograd.grad(loss(fake), fake)[0].item())
    assert gradients == pytest.approx([-1 / (1 + math.exp(10)), -1.0], rel=1e-3)


def test_the_penalty_of_a_linear_critic(training: ModuleType, device: str) -> None:
    """(‖w‖ - 1)², whose gradient is 2 (‖w‖ - 1) w / ‖w‖: by differentiating twice."""
    layer = nn.Linear(4, 1).to(device)
    w, critic = layer.weight, nn.Sequential(nn.Flatten(), layer)
    with torch.no_grad():
        w.copy_(torch.tensor([[3.0, 0.0, 0.0, 4.0]]))
    real, fake = torch.randn(2, 3, 1, 2, 2, device=device)
    penalty = training.gradient_penalty(critic, real, fake)
    assert penalty.item() == pytest.approx(16.0)
    (gradient,) = torch.autograd.grad(penalty, w)
    expected = torch.tensor([[4.8, 0.0, 0.0, 6.4]])
    torch.testing.assert_close(gradient.cpu(), expected)


def test_the_penalty_is_taken_between_real_and_fake(training: ModuleType) -> None:
    """Each image at a share of its own; the critic ½ ‖x‖² has the gradient x."""
    points = []

    def critic(x: torch.Tensor) -> torch.Tensor:
        points.append(x.detach())
        return 0.5 * x.square().flatten(1).sum(1)

    real, fake = torch.ones(100, 1, 2, 2), torch.full((100, 1, 2, 2), 3.0)
    penalty = training.gradient_penalty(critic, real, fake)
    (x,) = points
    assert (x == x[:, :, :1, :1]).all()
    assert 1 <= x.min() < 1.3
    assert 2.7 < x.max() <= 3
    torch.testing.assert_close(penalty, (2 * x[:, 0, 0, 0] - 1).square().mean())


def unfused(model: torch.nn.Module) -> torch.nn.Sequential:
    """The same weights in torch's layers, with the activations as layers of their own."""
    layers: list[torch.nn.Module] = []
    for layer in model.children():
        kind = getattr(torch.nn, type(layer).__name__)
        theirs = kind.__new__(kind)
        theirs.__dict__ = dict(layer.__dict__)
        layers.append(theirs)
        activation = getattr(layer, "activation", None)
        if activation is not None:
            layers.append(
                {"relu": torch.nn.ReLU(), "tanh": torch.nn.Tanh()}.get(
                    activation, torch.nn.LeakyReLU(0.2)
                )
            )
    return torch.nn.Sequential(*layers)


RELU, LEAKY, TANH, NORM = "ReLU", "LeakyReLU", "Tanh", "BatchNorm2d"
UP, DOWN = "ConvTranspose2d", "Conv2d"


@pytest.mark.parametrize(
    ("name", "of_generator", "of_discriminator"),
    [
        (
            "mlp",
            ["Linear", "BatchNorm1d", RELU, "Linear", "BatchNorm1d", RELU, "Linear", TANH,
             "Unflatten"],
            ["Flatten", "Linear", LEAKY, "Linear", LEAKY, "Linear"],
        ),
        (
            "dcgan",
            ["Unflatten", UP, NORM, RELU, UP, NORM, RELU, UP, TANH],
            [DOWN, LEAKY, DOWN, NORM, LEAKY, DOWN, "Flatten"],
        ),
        (
            "wgan-gp",
            ["Unflatten", UP, NORM, RELU, UP, NORM, RELU, UP, TANH],
            [DOWN, LEAKY, DOWN, LEAKY, DOWN, "Flatten"],
        ),
    ],
)  # fmt: skip
def test_the_networks_are_the_papers(
    training: ModuleType, name: str, of_generator: list[str], of_discriminator: list[str]
) -> None:
    """Layer by layer; no normalisation in a critic, no activation after a logit."""
    setting = training.SETTINGS[name]
    size = 28 if setting.large else 8
    generator, discriminator = setting.generator(size), setting.discriminator(size)
    kinds = [[type(layer).__name__ for layer in unfused(m)] for m in (generator, discriminator)]
    assert kinds == [of_generator, of_discriminator]
    z = torch.randn(3, setting.latent)
    with gpunn.backend("torch"), torch.no_grad():
        for model in (generator, discriminator):
            model.eval()
        images = generator(z)
        assert images.shape == (3, 1, size, size)
        assert discriminator(images).shape == (3, 1)
        torch.testing.assert_close(images, unfused(generator)(z))
        torch.testing.assert_close(discriminator(images), unfused(discriminator)(images))
    if name == "dcgan":
        for layer, mean in ((generator[1], 0.0), (generator[2], 1.0), (discriminator[1], 0.0)):
            assert layer.weight.mean().item() == pytest.approx(mean, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.25)


def test_each_network_learns_in_its_own_step(small: Any) -> None:
    """D's step leaves G as it is, G's step leaves D and its gradients; the average follows G."""
    with gpunn.backend("torch"):
        game = small.game_of("mlp", decay=0.75)
        g, d = game.generator[0].weight, game.discriminator[1].weight
        g_before, d_before = g.detach().clone(), d.detach().clone()
        game.teach_discriminator()
        assert torch.equal(g, g_before)
        assert not torch.equal(d, d_before)
        d_before, gradient = d.detach().clone(), d.grad.clone()
        game.teach_generator()
        assert not torch.equal(g, g_before)
        assert torch.equal(d, d_before)
        assert torch.equal(d.grad, gradient)
        assert d.requires_grad
    assert torch.equal(game.average[0].weight, g_before)
    game.follow()
    expected = 0.75 * g_before + 0.25 * g.detach()
    torch.testing.assert_close(game.average[0].weight, expected)
    mean = game.generator[1].running_mean
    assert mean.abs().max() > 1e-3
    torch.testing.assert_close(game.average[1].running_mean, 0.25 * mean)
    with gpunn.backend("torch"), torch.no_grad():
        assert torch.equal(game.draw(game.shown), game.average(game.shown))
        assert not game.average.training


def test_a_critic_has_more_steps(
    training: ModuleType, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert training.SETTINGS["wgan-gp"].n_critic == 5
    taught = []
    game = small.game_of("mlp", n_critic=3)
    monkeypatch.setattr(game, "teach_discriminator", lambda: taught.append("D"))
    monkeypatch.setattr(game, "teach_generator", lambda: taught.append("G"))
    game.advance()
    assert taught == ["D", "D", "D", "G"]
    assert game.step == 1


def test_the_noise_falls_to_nothing(small: Any) -> None:
    game = small.game_of("mlp", noise=0.4)
    x = torch.zeros(100_000)
    assert game.seen(x).std().item() == pytest.approx(0.4, rel=0.02)
    game.step = 5
    assert game.seen(x).std().item() == pytest.approx(0.2, rel=0.02)
    game.step = 10
    assert game.seen(x) is x


def test_real_images_are_answered_with_less_than_certainty(
    training: ModuleType, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One-sided: 0.9 for what is real, 0 for what is not; what is reported has no smoothing."""
    asked = []

    def cross_entropy(logits: torch.Tensor, target: float) -> torch.Tensor:
        asked.append((target, logits.requires_grad and torch.is_grad_enabled()))
        return logits.mean()

    with gpunn.backend("torch"):
        game = small.game_of("mlp")
        monkeypatch.setattr(training, "cross_entropy", cross_entropy)
        game.teach_discriminator()
    assert asked == [(0.9, True), (0.0, True), (1.0, False), (0.0, False)]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--setting", "biggan"], "invalid choice: 'biggan'"),
        (["--device", "abacus"], "--device: expected auto, cpu or cuda, got abacus"),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("gan").main(arguments)
    assert complaint in capsys.readouterr().err
