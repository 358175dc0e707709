"""How ``gan.py`` trains: the losses, the four settings, a step of the game, and its state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch

import gpunn.functional as GF
from checkpoint import generator_states, set_generator_states
from gan_judge import Images, Judge, covered, inception_score
from gan_networks import (
    convolutional_discriminator,
    convolutional_generator,
    dense_discriminator,
    dense_generator,
    draw_weights,
)
from gpunn import nn
from processes import Processes

N_JUDGED = 1000
N_SHOWN = 10


@dataclass(frozen=True)
class Losses:
    """Of one step, as tensors without gradients, so that nobody waits for a GPU."""

    discriminator: torch.Tensor
    """-V(D, G), which is 2 ln 2 where D cannot tell; a critic's estimate of the distance."""
    generator: torch.Tensor


def cross_entropy(logits: torch.Tensor, target: float) -> torch.Tensor:
    """The mean of -target log D - (1 - target) log(1 - D), where D is the sigmoid of a logit."""
    loss: torch.Tensor = GF.binary_cross_entropy_with_logits(
        logits, torch.full_like(logits, target)
    )
    return loss


def value(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """V(D, G) = E log D(x) + E log(1 - D(G(z))) of Goodfellow et al. (2014), equation 1."""
    return -cross_entropy(real, 1.0) - cross_entropy(fake, 0.0)


def minimax_loss(fake: torch.Tensor) -> torch.Tensor:
    """What G has of V: E log(1 - D(G(z))), nearly flat where D is sure of itself."""
    return -cross_entropy(fake, 0.0)


def non_saturating_loss(fake: torch.Tensor) -> torch.Tensor:
    """-E log D(G(z)): the same fixed point, and a gradient where D is sure of itself."""
    return cross_entropy(fake, 1.0)


def critic_loss(fake: torch.Tensor) -> torch.Tensor:
    """-E C(G(z)), what G has of the Wasserstein distance's estimate."""
    return -fake.mean()


def gradient_penalty(
    critic: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor
) -> torch.Tensor:
    """E (‖∇C(x)‖ - 1)² at points x between real images and fake ones.

    The gradient has a graph of its own: what differentiates it again are the backward passes of
    the layers. Gulrajani et al. (2017), https://arxiv.org/abs/1704.00028, algorithm 1.
    """
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty: torch.Tensor = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return penalty


@dataclass(frozen=True)
class Setting:
    """Two networks and how they are trained."""

    name: str
    large: bool
    """28×28 pixels, or 8×8."""
    generator: Callable[[int], nn.Sequential]
    """Of the images' size."""
    discriminator: Callable[[int], nn.Sequential]
    generator_loss: Callable[[torch.Tensor], torch.Tensor]
    steps: int
    expected: float
    """The inception score, as a share of the real images'; measured with the seeds 0 to 2."""
    quick: dict[str, Any]
    """What ``--quick`` changes."""
    latent: int = 32
    batch: int = 64
    rate: float = 5e-4
    """Of Adam, in both networks."""
    betas: tuple[float, float] = (0.5, 0.999)
    decay: float = 0.995
    """Of the moving average of the generator's weights, which is what draws."""
    smoothing: float = 1.0
    """What D is to answer to a real image. One-sided: to a fake one it is 0."""
    noise: float = 0.0
    """On whatever D sees; its deviation falls linearly to 0 over the run."""
    penalty: float | None = None
    """λ of a critic, which has a gradient penalty; None: a discriminator."""
    n_critic: int = 1
    """Steps of D for one of G."""


_SETTINGS = (
    Setting(
        name="mlp",
        large=False,
        generator=lambda size: dense_generator(size, 32, 256),
        discriminator=lambda size: dense_discriminator(size, 256, 0.3),
        generator_loss=non_saturating_loss,
        steps=4000, expected=0.9, quick={"steps": 500, "expected": 0.8},
        smoothing=0.9, noise=0.3,
    ),
    Setting(
        name="minimax",
        large=False,
        generator=lambda size: dense_generator(size, 32, 256),
        discriminator=lambda size: dense_discriminator(size, 256, 0.0),
        generator_loss=minimax_loss,
        steps=4000, expected=0.9, quick={"steps": 500, "expected": 0.8},
    ),
    Setting(
        name="dcgan",
        large=True,
        generator=lambda size: draw_weights(convolutional_generator(size, 64, 32)),
        discriminator=lambda size: draw_weights(convolutional_discriminator(size, 32, True)),
        generator_loss=non_saturating_loss,
        steps=1000, expected=0.85,
        quick={"steps": 250, "expected": 0.75, "batch": 32, "decay": 0.98},
        latent=64, rate=1e-3, decay=0.99, smoothing=0.9,
    ),
    Setting(
        name="wgan-gp",
        large=False,
        generator=lambda size: convolutional_generator(size, 32, 16),
        discriminator=lambda size: convolutional_discriminator(size, 16, False),
        generator_loss=critic_loss,
        steps=600, expected=0.88, quick={"steps": 200, "expected": 0.8},
        rate=1e-3, betas=(0.0, 0.9), decay=0.98, penalty=10.0, n_critic=5,
    ),
)  # fmt: skip
SETTINGS = {setting.name: setting for setting in _SETTINGS}


@dataclass(frozen=True)
class Point:
    """A point of the curves; losses are means over the steps since the one before."""

    step: int
    discriminator_loss: float
    generator_loss: float
    score: float
    n_covered: int


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients pass through the model, and its parameters get none."""
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


class Training:
    """The game: two networks, the generator's average, two optimisers, the step, the curves.

    All that a checkpoint holds.

    In several processes each has its part of every batch, and DistributedDataParallel gives them
    the mean of their gradients.
    """

    def __init__(
        self,
        setting: Setting,
        images: Images,
        device: torch.device,
        seed: int,
        steps: int,
        group: Processes,
    ) -> None:
        self.setting, self.steps, self.group, self.device = setting, steps, group, device
        self.seed, self.source = seed, images.source
        self.real = images.train_x.to(device)
        torch.manual_seed(seed)
        self.generator = setting.generator(images.size).to(device)
        self.discriminator = setting.discriminator(images.size).to(device)
        self.average = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.shared_generator = group.share(self.generator, fsdp=False)
        self.shared_discriminator = group.share(self.discriminator, fsdp=False)
        self.optimizers = [
            torch.optim.Adam(model.parameters(), setting.rate, setting.betas)
            for model in (self.generator, self.discriminator)
        ]
        self.shown = torch.randn(N_SHOWN, setting.latent, device=device)
        torch.manual_seed(seed * group.size + group.rank)  # images, z, noise and dropout differ
        self.step = 0
        self.losses: list[Losses] = []
        self.curve: list[Point] = []
        self.drawn: dict[int, torch.Tensor] = {}
        """By step: what the average makes of ``shown``."""

    @property
    def n_mine(self) -> int:
        """This process's part of a batch."""
        return -(-self.setting.batch // self.group.size)

    def latent(self) -> torch.Tensor:
        """z of this process's part of a batch."""
        return torch.randn(self.n_mine, self.setting.latent, device=self.device)

    def batch(self) -> torch.Tensor:
        """Real images, drawn with replacement."""
        return self.real[torch.randint(len(self.real), (self.n_mine,), device=self.device)]

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """x as D sees it, with the noise of this step."""
        deviation = self.setting.noise * (1 - self.step / self.steps)
        return x + deviation * torch.randn_like(x) if deviation > 0 else x

    def advance(self) -> Losses:
        """One step of G, after as many of D as it takes."""
        for _ in range(self.setting.n_critic):
            estimate = self.teach_discriminator()
        loss = self.teach_generator()
        self.follow()
        self.step += 1
        self.losses.append(Losses(estimate, loss))
        return self.losses[-1]

    def teach_discriminator(self) -> torch.Tensor:
        """A step of D, which ascends V; -V before it."""
        setting = self.setting
        with torch.no_grad():
            fake = self.seen(self.shared_generator(self.latent()))
        real = self.seen(self.batch())
        says_real, says_fake = self.shared_discriminator(real), self.shared_discriminator(fake)
        if setting.penalty is None:
            loss = cross_entropy(says_real, setting.smoothing) + cross_entropy(says_fake, 0.0)
            with torch.no_grad():
                estimate = -value(says_real, says_fake)
        else:
            estimate = says_real.mean() - says_fake.mean()
            penalty = gradient_penalty(self.discriminator, real, fake)
            loss = setting.penalty * penalty - estimate
        self.descend(1, loss)
        return estimate.detach()

    def teach_generator(self) -> torch.Tensor:
        """A step of G against D as it is now; the loss before it."""
        with frozen(self.discriminator):
            fake = self.discriminator(self.seen(self.shared_generator(self.latent())))
            loss = self.setting.generator_loss(fake)
            self.descend(0, loss)
        return loss.detach()

    def descend(self, which: int, loss: torch.Tensor) -> None:
        """A step of one of the optimisers."""
        self.optimizers[which].zero_grad()
        loss.backward()
        self.optimizers[which].step()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average, and that of the running statistics, towards the generator."""
        theirs = self.generator.state_dict()
        for name, ours in self.average.state_dict().items():
            if ours.is_floating_point():
                ours.lerp_(theirs[name], 1 - self.setting.decay)

    @torch.no_grad()
    def draw(self, z: torch.Tensor) -> torch.Tensor:
        """What the average makes of z, on the CPU."""
        images: torch.Tensor = self.average(z)
        return images.cpu()

    def means(self) -> tuple[float, float]:
        """Of both losses, over the steps since the last point of the curves and all processes."""
        sums = torch.zeros(2, device=self.device)
        for losses in self.losses:
            sums += torch.stack([losses.discriminator, losses.generator])
        count = len(self.losses) * self.group.size
        self.losses = []
        both = self.group.total(sums) / count if count else torch.full((2,), math.nan)
        discriminator, generator = both.tolist()
        return discriminator, generator

    def measure(self, judge: Judge | None) -> None:
        """Add a point to the curves: of samples from the same z at every point.

        All processes call it; the first has the judge.
        """
        means = self.means()
        if judge is None:
            return
        z = torch.randn(N_JUDGED, self.setting.latent, generator=torch.Generator().manual_seed(0))
        probabilities = judge.probabilities(self.draw(z.to(self.device)))
        score, n_covered = inception_score(probabilities), covered(probabilities)
        self.curve.append(Point(self.step, *means, score, n_covered))
        self.drawn[self.step] = self.draw(self.shown)

    def modules(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """What has a state of its own."""
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "average": self.average,
            "generator's optimizer": self.optimizers[0],
            "discriminator's optimizer": self.optimizers[1],
        }

    def chosen(self) -> dict[str, Any]:
        """What has to be the same in a run that goes on."""
        return {
            "setting": self.setting.name, "data": self.source, "seed": self.seed,
            "steps": self.steps, "batch": self.setting.batch, "processes": self.group.size,
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """All that the rest of the run, and its pictures, depend on."""
        losses = [[loss.cpu() for loss in (x.discriminator, x.generator)] for x in self.losses]
        return {
            **{name: module.state_dict() for name, module in self.modules().items()},
            "step": self.step,
            "shown": self.shown,
            "drawn": self.drawn,
            "curve": [astuple(point) for point in self.curve],
            "of each process": self.group.gathered((generator_states(), losses)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, module in self.modules().items():
            module.load_state_dict(state[name])
        self.step, self.drawn = state["step"], dict(state["drawn"])
        self.shown = state["shown"].to(self.device)
        self.curve = [Point(*numbers) for numbers in state["curve"]]
        generators, losses = state["of each process"][self.group.rank]
        set_generator_states(generators)
        self.losses = [Losses(*(loss.to(self.device) for loss in both)) for both in losses]
