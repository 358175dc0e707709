"""The networks of ``gan.py``: dense ones, and convolutional ones after Radford et al. (2016)."""

from __future__ import annotations

import torch

from gpunn import nn

LEAK = 0.2  # of every leaky ReLU, as in the paper
LEAKY = ("leaky_relu", LEAK)


def dense_generator(size: int, latent: int, width: int) -> nn.Sequential:
    """z, (n, latent), to images in (-1, 1), (n, 1, size, size).

    ReLU is computed in the pass that normalises, tanh in the last product's kernel.
    """
    return nn.Sequential(
        nn.Linear(latent, width),
        nn.BatchNorm1d(width, activation="relu"),
        nn.Linear(width, width),
        nn.BatchNorm1d(width, activation="relu"),
        nn.Linear(width, size * size, activation="tanh"),
        nn.Unflatten(1, (1, size, size)),
    )


def dense_discriminator(size: int, width: int, dropout_p: float) -> nn.Sequential:
    """Images to logits, (n, 1): above 0 for what looks real.

    Leaky ReLU and dropout are computed in the kernels of the products.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size * size, width, activation=LEAKY, dropout_p=dropout_p),
        nn.Linear(width, width, activation=LEAKY, dropout_p=dropout_p),
        nn.Linear(width, 1),
    )


def convolutional_generator(size: int, latent: int, channels: int) -> nn.Sequential:
    """z, (n, latent), to images in (-1, 1), (n, 1, size, size), doubled in size twice.

    size is a multiple of 4.
    """
    return nn.Sequential(
        nn.Unflatten(1, (latent, 1, 1)),
        nn.ConvTranspose2d(latent, 2 * channels, size // 4, bias=False),
        nn.BatchNorm2d(2 * channels, activation="relu"),
        nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels, activation="relu"),
        nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1, activation="tanh"),
    )


def convolutional_discriminator(size: int, channels: int, normalised: bool) -> nn.Sequential:
    """Images to logits, (n, 1).

    A critic with a gradient penalty is not ``normalised``: the penalty is about the gradient at one
    image, and batch normalisation would make that depend on the others.
    """
    first = nn.Conv2d(1, channels, 4, stride=2, padding=1, activation=LEAKY)
    second: list[nn.Module]
    if normalised:
        second = [
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels, activation=LEAKY),
        ]
    else:
        second = [nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1, activation=LEAKY)]
    return nn.Sequential(first, *second, nn.Conv2d(2 * channels, 1, size // 4), nn.Flatten())


def draw_weights(model: nn.Sequential) -> nn.Sequential:
    """The model with Radford's first weights: N(0, 0.02²), those of normalisations N(1, 0.02²)."""
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            torch.nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            torch.nn.init.normal_(layer.weight, 1.0, 0.02)
    return model
