"""The networks and the training of gan.py: a generator against a discriminator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import gpunn.functional as GF
from gpunn import nn

N_LATENT = 64
LEAKY = ("leaky_relu", 0.2)
PENALTY = 10.0  # of WGAN-GP


def mlp_generator() -> nn.Sequential:
    """z (N, 64) to images (N, 1, 8, 8) from -1 to 1."""
    return nn.Sequential(
        nn.Linear(N_LATENT, 128),
        nn.BatchNorm1d(128, activation="relu"),
        nn.Linear(128, 256),
        nn.BatchNorm1d(256, activation="relu"),
        nn.Linear(256, 64, activation="tanh"),
        nn.Unflatten(1, (1, 8, 8)),
    )


def mlp_discriminator(dropout_p: float = 0.3) -> nn.Sequential:
    """Images (N, 1, 8, 8) to a logit each: how real it looks."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256, activation=LEAKY, dropout_p=dropout_p),
        nn.Linear(256, 128, activation=LEAKY, dropout_p=dropout_p),
        nn.Linear(128, 1),
    )


def dcgan_generator(channels: int = 64) -> nn.Sequential:
    """z (N, 64) to images (N, 1, 28, 28) from -1 to 1: Radford et al. (2016), in small."""
    return nn.Sequential(
        nn.Linear(N_LATENT, channels * 7 * 7),
        nn.BatchNorm1d(channels * 7 * 7, activation="relu"),
        nn.Unflatten(1, (channels, 7, 7)),
        nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1),
        nn.BatchNorm2d(channels // 2, activation="relu"),
        nn.ConvTranspose2d(channels // 2, 1, 4, 2, 1, activation="tanh"),
    )


def dcgan_discriminator(channels: int = 64) -> nn.Sequential:
    """Images (N, 1, 28, 28) to a logit each."""
    return nn.Sequential(
        nn.Conv2d(1, channels // 2, 4, 2, 1, activation=LEAKY),
        nn.Conv2d(channels // 2, channels, 4, 2, 1),
        nn.BatchNorm2d(channels, activation=LEAKY),
        nn.Flatten(),
        nn.Linear(channels * 7 * 7, 1),
    )


@dataclass(frozen=True)
class Setting:
    """A game: who plays, for what, and how long."""

    title: str
    game: str
    """What the generator plays for: "non-saturating", "minimax" or "wasserstein"."""
    generator: Callable[[], nn.Sequential]
    discriminator: Callable[[], nn.Sequential]
    size: int
    """The images are of so many pixels by as many."""
    steps: int
    expected: float
    """The inception score to reach with so many steps."""
    quick_steps: int
    quick_expected: float
    batch: int = 64
    rates: tuple[float, float] = (2e-3, 1e-3)
    """Of the generator and the discriminator."""
    betas: tuple[float, float] = (0.5, 0.999)
    real_label: float = 1.0
    """Less than 1: one-sided label smoothing (Salimans et al., 2016)."""
    noise: float = 0.0
    """The deviation of noise on all that the discriminator sees; it falls linearly to 0."""
    memory: float = 0.995
    """Of the moving average of the generator's weights, which is what draws."""
    discriminator_steps: int = 1


def cross_entropy_with(logits: torch.Tensor, label: float) -> torch.Tensor:
    """-E[label log D + (1 - label) log (1 - D)] with D = sigmoid(logits)."""
    return GF.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def generator_loss(game: str, fake: torch.Tensor) -> torch.Tensor:
    """What the generator minimises, given the discriminator's logits of its images.

    Minimax, as Goodfellow et al. (2014) define it, E log (1 - D); non-saturating, as they train it,
    -E log D; of Wasserstein, -E of the critic.
    """
    if game == "minimax":
        return -cross_entropy_with(fake, 0.0)
    return cross_entropy_with(fake, 1.0) if game == "non-saturating" else -fake.mean()


def penalty(
    critic: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor
) -> torch.Tensor:
    """E (|gradient of the critic| - 1)² between real images and others: Gulrajani et al. (2017)."""
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    lengths: torch.Tensor = slope.flatten(1).norm(dim=1)
    return (lengths - 1).square().mean()


class Training:
    """Both networks, their optimisers, and the generator's moving average."""

    def __init__(self, setting: Setting, images: torch.Tensor, seed: int, steps: int) -> None:
        """``images``: (n, 1, size, size), from -1 to 1."""
        torch.manual_seed(seed)
        self.setting, self.images, self.steps = setting, images, steps
        self.generator = setting.generator().to(images.device)
        self.discriminator = setting.discriminator().to(images.device)
        self.average = copy.deepcopy(self.generator)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=rate, betas=setting.betas)
            for network, rate in zip(
                (self.generator, self.discriminator), setting.rates, strict=True
            )
        ]
        self.step = 0
        self.order: Iterator[torch.Tensor] = iter(())

    def latent(self, n: int) -> torch.Tensor:
        return torch.randn(n, N_LATENT, device=self.images.device)

    def batch(self) -> torch.Tensor:
        """The next real images, of passes in an order drawn anew."""
        n = self.setting.batch
        rows = next(self.order, None)
        if rows is None:
            self.order = iter(torch.randperm(len(self.images)).split(n)[: len(self.images) // n])
            rows = next(self.order)
        return self.images[rows.to(self.images.device)]

    def seen(self, images: torch.Tensor) -> torch.Tensor:
        """With the noise of this step."""
        deviation = self.setting.noise * (1 - self.step / self.steps)
        return images + deviation * torch.randn_like(images) if deviation else images

    def discriminator_loss(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """-E log D of real images - E log (1 - D) of others: 2 ln 2 where it cannot tell.

        Of Wasserstein, E of the critic of others less that of real ones, with the penalty.
        """
        setting, network = self.setting, self.discriminator
        if setting.game == "wasserstein":
            apart: torch.Tensor = network(fake).mean() - network(real).mean()
            return apart + PENALTY * penalty(network, real, fake)
        on_real = cross_entropy_with(network(self.seen(real)), setting.real_label)
        return on_real + cross_entropy_with(network(self.seen(fake)), 0.0)

    def train_step(self) -> tuple[float, float]:
        """One of the generator, after those of the discriminator; the losses of both."""
        setting = self.setting
        of_generator, of_discriminator = self.optimizers
        for _ in range(setting.discriminator_steps):
            real = self.batch()
            with torch.no_grad():
                fake = self.generator(self.latent(len(real)))
            loss = self.discriminator_loss(real, fake)
            of_discriminator.zero_grad()
            loss.backward()
            of_discriminator.step()
        self.discriminator.requires_grad_(False)
        drawn = self.generator(self.latent(setting.batch))
        own = generator_loss(setting.game, self.discriminator(self.seen(drawn)))
        of_generator.zero_grad()
        own.backward()
        of_generator.step()
        self.discriminator.requires_grad_(True)
        self.remember()
        self.step += 1
        return own.item(), loss.item()

    @torch.no_grad()
    def remember(self) -> None:
        """Move the average towards the generator; buffers are the generator's own."""
        pairs = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        for mean, value in pairs:
            mean.lerp_(value, 1 - self.setting.memory)
        for kept, buffer in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def draw(self, latent: torch.Tensor) -> torch.Tensor:
        """The images that the averaged generator makes of z, from -1 to 1."""
        self.average.eval()
        images: torch.Tensor = self.average(latent)
        self.average.train()
        return images


SETTINGS: dict[str, Setting] = {
    "mlp": Setting(
        "non-saturating", "non-saturating", mlp_generator, mlp_discriminator, 8,
        4000, 7.0, 700, 4.0, real_label=0.9, noise=0.3,
    ),
    "minimax": Setting(
        "minimax", "minimax", mlp_generator, mlp_discriminator, 8, 4000, 7.0, 1000, 4.0,
    ),
    "dcgan": Setting(
        "DCGAN", "non-saturating", dcgan_generator, dcgan_discriminator, 28, 1200, 6.0, 150, 3.0,
        rates=(1e-3, 4e-4), real_label=0.9,
    ),
    "wgan-gp": Setting(
        "WGAN-GP", "wasserstein", mlp_generator, lambda: mlp_discriminator(0.0), 8,
        2000, 7.0, 300, 5.0, rates=(1e-3, 1e-3), betas=(0.0, 0.9), discriminator_steps=3,
    ),
}  # fmt: skip
