"""Networks whose features style transfer compares: trained here, random, or VGG-19 from a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import gpunn
from alexnet import LEARNING_RATE, Region, draw_patches
from checkpoint import Part
from digits_mlp import train_step
from gpunn import models, nn
from loops import progress_bar

WIDTHS = (32, 64, 96, 128)  # of the trained network's stages, each of two convolutions
BATCH = 32
GRID = (3, 4)  # regions of an image that the trained network tells from each other
RANDOM_WIDTHS = (32, 64, 96, 96)  # of the random network's stages, each of one convolution
RANDOM_KERNELS = (5, 5, 5, 3)
SAVE_EVERY = 50  # steps of training
GREY, CONTRAST = 0.45, 0.25  # about the mean and the deviation of a photograph's pixels
# VGG-19 as torchvision's weights know it: the means and deviations of ImageNet's colours.
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG_STYLE = (0, 5, 10, 19, 28)  # conv1_1, conv2_1, conv3_1, conv4_1 and conv5_1 of the paper
VGG_CONTENT = 21  # conv4_2
VGG_DREAM = (10, 19, 28)


class FeatureNetwork(nn.Module):
    """A chain of convolutions and poolings that gives the maps of any of its layers.

    Its parameters are constants: only images are optimised.

    Args:
        layers: convolutions, with their ReLU fused, poolings and identities.
        style: the numbers of the layers whose Gram matrices are the style.
        content: the number of the layer whose maps are the content.
        dream: the numbers of the layers that dreams amplify.
        mean, deviation: of each colour; an image is normalised by them.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(
        self,
        layers: Sequence[nn.Module],
        style: Sequence[int],
        content: int,
        dream: Sequence[int] = (),
        mean: Sequence[float] = (GREY,) * 3,
        deviation: Sequence[float] = (CONTRAST,) * 3,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.style, self.content, self.dream = tuple(style), content, tuple(dream)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, image: torch.Tensor, wanted: Sequence[int]) -> list[torch.Tensor]:
        """The maps after the layers ``wanted``, in their order, of images (N, 3, H, W)."""
        maps = (image - self.mean) / self.deviation
        found = {}
        for number, layer in enumerate(self.layers.children()):
            if number > max(wanted):
                break
            maps = layer(maps)
            found[number] = maps
        return [found[number] for number in wanted]


@torch.no_grad()
def calibrate(network: FeatureNetwork, images: Sequence[torch.Tensor]) -> FeatureNetwork:
    """Give every channel mean 0 and deviation 1 over the images, before its ReLU; in place.

    Else the Gram matrices would be those of the few channels that happen to be strong, and L-BFGS
    would take ten times the steps.
    """
    maps = [(image - network.mean) / network.deviation for image in images]
    for layer in network.layers:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            activation, layer.activation = layer.activation, None
            values = torch.cat([layer(each).flatten(2) for each in maps], 2)[0]
            layer.activation = activation
            deviation, mean = torch.std_mean(values, dim=1)
            deviation.clamp_(min=1e-6)  # of a channel that is the same everywhere
            layer.weight /= deviation.view(-1, 1, 1, 1)
            layer.bias.sub_(mean).div_(deviation)
        maps = [layer(each) for each in maps]
    return network


def with_averages(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers, with averages for maxima, which the paper found to look better."""
    return [nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in layers]


def random_network(seed: int) -> FeatureNetwork:
    """Four convolutions of He's random weights, with average pooling between them."""
    layers: list[nn.Module] = []
    channels = 3
    generator = torch.Generator().manual_seed(seed)
    for width, size in zip(RANDOM_WIDTHS, RANDOM_KERNELS, strict=True):
        layer = nn.Conv2d(channels, width, size, padding=size // 2, activation="relu")
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        layers += [layer, nn.AvgPool2d(2)]
        channels = width
    return FeatureNetwork(layers[:-1], style=(0, 2, 4, 6), content=4)


def classifier(n_classes: int, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """VGG's order of layers in small, with batch normalisation."""
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        for _ in range(2):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers.append(nn.BatchNorm2d(width, activation="relu"))
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, n_classes))


def features_of(model: nn.Module) -> FeatureNetwork:
    """The convolutions of a trained ``classifier``, its normalisations folded into them."""
    folded = gpunn.fold_batch_norm(model)
    kept = [m for m in folded.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
    # Each stage is two convolutions and a pooling.
    return FeatureNetwork(with_averages(kept), style=(0, 3, 6, 9), content=3, dream=(4, 7, 10))


def trained_network(
    images: Sequence[torch.Tensor], steps: int, seed: int, device: torch.device, part: Part
) -> FeatureNetwork:
    """A network that learnt from which region of which image (3, H, W) a patch comes.

    Where ``part`` was begun, the training goes on.
    """
    regions: list[Region] = []
    for image in images:
        normalised = ((image - GREY) / CONTRAST).cpu()
        for row in normalised.tensor_split(GRID[0], dim=1):
            parts = row.tensor_split(GRID[1], dim=2)
            regions += [Region(len(regions) + i, part) for i, part in enumerate(parts)]
    torch.manual_seed(seed)
    model = classifier(len(regions)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    begun = part.state
    if begun is not None:
        model.load_state_dict(begun["model"])
        optimizer.load_state_dict(begun["optimizer"])
        generator.set_state(begun["generator"])
    first = 0 if begun is None else begun["step"]
    with progress_bar() as progress:
        task = progress.add_task("", total=steps, completed=first, loss=float("nan"))
        for step in range(first, steps):
            patches = draw_patches(regions, BATCH, generator).to(device)
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
            loss = train_step(model, optimizer, patches.x, patches.y)
            progress.update(task, advance=1, loss=loss)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                part.keep({
                    "step": step + 1, "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
                })  # fmt: skip
    return features_of(model)


def vgg19_network(path: Path) -> FeatureNetwork:
    """The convolutions of VGG-19, with the weights of a file of torchvision's.

    Pooling takes averages. The dense layers are not read.

    Raises:
        ValueError: the file holds no VGG-19 of torchvision's names and shapes.
    """
    try:
        given: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (torch.load has no error of its own)
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{path} cannot be read as a state_dict: {reason}") from None
    with torch.device("meta"):
        features = models.vgg19().features[: max(VGG_STYLE) + 1]
    for name, wanted in features.state_dict().items():
        found = given.get(f"features.{name}") if isinstance(given, dict) else None
        if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
            has = tuple(found.shape) if isinstance(found, torch.Tensor) else "nothing"
            raise ValueError(
                f"{path} is no VGG-19 of torchvision: expected features.{name} of shape "
                f"{tuple(wanted.shape)}, found {has}"
            )
    weights = {name: given[f"features.{name}"].float() for name in features.state_dict()}
    features.load_state_dict(weights, assign=True)
    return FeatureNetwork(
        with_averages(features.children()), VGG_STYLE, VGG_CONTENT, VGG_DREAM, IMAGENET_MEAN,
        IMAGENET_DEVIATION,
    )  # fmt: skip
