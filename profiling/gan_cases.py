"""What is benchmarked of adversarial networks: a training step of DCGAN.

Radford, Metz and Chintala (2016), https://arxiv.org/abs/1511.06434: figure 1 is the generator, and
the discriminator is its mirror. The tolerance is that of ``model_cases``, for its reasons.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

from gpunn import nn
from gpunn.profiling.case import Case, Function
from gpunn.profiling.model_cases import Step, in_torch

LEAKY = ("leaky_relu", 0.2)
PARTS = "generator", "discriminator"


def dcgan(latent: int, widths: tuple[int, ...]) -> nn.Module:
    """A generator of RGB images, doubled in size from 4×4 by each width, and a discriminator."""
    generator: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[0], 4, bias=False)]
    discriminator: list[nn.Module] = [
        nn.Conv2d(3, widths[-1], 4, stride=2, padding=1, activation=LEAKY)
    ]
    for wide, narrow in itertools.pairwise(widths):
        up = nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, bias=False)
        generator += [nn.BatchNorm2d(wide, activation="relu"), up]
    for narrow, wide in itertools.pairwise(widths[::-1]):
        down = nn.Conv2d(narrow, wide, 4, stride=2, padding=1, bias=False)
        discriminator += [down, nn.BatchNorm2d(wide, activation=LEAKY)]
    last = nn.ConvTranspose2d(widths[-1], 3, 4, stride=2, padding=1, activation="tanh")
    generator += [nn.BatchNorm2d(widths[-1], activation="relu"), last]
    discriminator += [nn.Conv2d(widths[0], 1, 4), nn.Flatten()]
    both = nn.Sequential(*generator), nn.Sequential(*discriminator)
    for module in (*both[0], *both[1]):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            torch.nn.init.normal_(module.weight, 0.0, 0.02)
    return torch.nn.ModuleDict(dict(zip(PARTS, both, strict=True)))


@dataclass(frozen=True)
class AdversarialStep(Step):
    """A training step of both networks without an optimizer; ``n_classes`` is the size of z.

    The inputs are as ``Step``'s, but z (batch, n_classes, 1, 1) for the labels.
    """

    def second_input(self, dtype: torch.dtype) -> torch.Tensor:
        """z, from a normal distribution."""
        return torch.randn(self.batch, self.n_classes, 1, 1, dtype=dtype)

    def loss_of(self, network: nn.Module) -> Function:
        """softplus(-D(x)) + softplus(D(G(z))) for D alone, and softplus(-D(G(z))) for G alone.

        Their sum has both gradients: in each term the other network's parameters are detached.
        """
        generator, discriminator = (network.get_submodule(part) for part in PARTS)

        def loss(images: torch.Tensor, z: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
            given = dict(zip(self.names, state, strict=True))
            g, d = (
                {n.removeprefix(f"{p}."): t for n, t in given.items() if n.startswith(p)}
                for p in PARTS
            )
            frozen = {name: tensor.detach() for name, tensor in d.items()}
            drawn = functional_call(generator, g, (z,))
            real = functional_call(discriminator, d, (images,))
            fake = functional_call(discriminator, d, (drawn.detach(),))
            deceived = functional_call(discriminator, frozen, (drawn,))
            return (F.softplus(-real) + F.softplus(fake) + F.softplus(-deceived)).mean()

        return loss

    def flops(self) -> int:
        """Of each output and gradient that is needed.

        Those of images and z are not, and of the three times that the discriminator computes, its
        weights get a gradient twice.
        """
        products: list[int] = []

        def count(layer: Any, inputs: Any, y: torch.Tensor) -> None:
            times = inputs[0] if isinstance(layer, torch.nn.ConvTranspose2d) else y
            products.append(2 * times.numel() * layer.weight[0].numel())

        with torch.device("meta"):
            network = in_torch(self.drawn(torch.float32))
            generator, discriminator = (network.get_submodule(part) for part in PARTS)
            for layer in network.modules():
                if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                    layer.register_forward_hook(count)
            images = generator(torch.empty(self.batch, self.n_classes, 1, 1))
            of_generator = 3 * sum(products) - products[0]
            products.clear()
            discriminator(images)
        return of_generator + 8 * sum(products) - 2 * products[0]


def gan_cases() -> list[Case]:
    """What transposed convolutions and normalisations amount to."""
    name = "DCGAN: forward and backward of both networks"
    small = AdversarialStep(name, partial(dcgan, 8, (16, 8)), 3, 16, 8)
    widths = (1024, 512, 256, 128)
    return [AdversarialStep(name, partial(dcgan, 100, widths), 128, 64, 100, small).case()]
