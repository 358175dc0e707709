"""The VGG networks: many convolutions of 3×3 where others had a few large ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpunn import nn

STAGE_CHANNELS = (64, 128, 256, 512, 512)
# The number of convolutions in each stage, by the number of layers with weights.
STAGE_DEPTHS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """A VGG network for images (N, 3, H, W) of 32×32 or more: logits (N, num_classes).

    Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition",
    ICLR 2015. Five stages of 3×3 convolutions with ReLU, of 64, 128, 256, 512 and 512 maps, each
    stage followed by max pooling 2×2; then dense layers of 4096, 4096 and ``num_classes``, the
    first two followed by ReLU and dropout. Adaptive average pooling makes 7×7 of what the stages
    leave, which is 7×7 for the paper's 224×224.

    Parameters have torchvision's names and shapes. Convolutions start from He's normal distribution
    for the fan out, dense weights from N(0, 0.01²), biases from 0.

    Args:
        stage_depths: the number of convolutions in each of the five stages.
        num_classes: the number of logits.
        batch_norm: whether batch normalisation comes between a convolution and its ReLU.
        dropout: the probability of dropout.

    Raises:
        ValueError: not five stages, or a dropout outside of [0, 1].
    """

    def __init__(
        self,
        stage_depths: Sequence[int],
        num_classes: int = 1000,
        *,
        batch_norm: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if len(stage_depths) != len(STAGE_CHANNELS):
            raise ValueError(f"stage_depths: expected five numbers, got {tuple(stage_depths)}")
        # An Identity stands where torchvision has a layer that is fused into one before it, so
        # that the indices are the same.
        layers: list[nn.Module] = []
        in_channels = 3
        for channels, depth in zip(STAGE_CHANNELS, stage_depths, strict=True):
            for _ in range(depth):
                if batch_norm:
                    layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                    layers.append(nn.BatchNorm2d(channels, activation="relu"))
                else:
                    layers.append(nn.Conv2d(in_channels, channels, 3, padding=1, activation="relu"))
                layers.append(nn.Identity())
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096, activation="relu", dropout_p=dropout),
            nn.Identity(),
            nn.Identity(),
            nn.Linear(4096, 4096, activation="relu", dropout_p=dropout),
            nn.Identity(),
            nn.Identity(),
            nn.Linear(4096, num_classes),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of convolutions and dense layers afresh, and zero their biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                torch.nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                torch.nn.init.zeros_(module.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The logits (N, num_classes) of images (N, 3, H, W)."""
        maps = self.avgpool(self.features(input))
        logits: torch.Tensor = self.classifier(maps.flatten(1))
        return logits


def vgg11(num_classes: int = 1000, *, dropout: float = 0.5) -> VGG:
    """``VGG`` with 11 layers, the paper's A."""
    return VGG(STAGE_DEPTHS[11], num_classes, dropout=dropout)


def vgg11_bn(num_classes: int = 1000, *, dropout: float = 0.5) -> VGG:
    """``vgg11`` with batch normalisation."""
    return VGG(STAGE_DEPTHS[11], num_classes, batch_norm=True, dropout=dropout)


def vgg13(num_classes: int = 1000, *, dropout: float = 0.5) -> VGG:
    """``VGG`` with 13 layers, the paper's B."""
    return VGG(STAGE_DEPTHS[13], num_classes, dropout=dropout)


def vgg13_bn(num_classes: int = 1000, *, dropout: float = 0.5) -> VGG:
    """``vgg13`` with batch normalisation."""
    return VGG(STAGE_DEPTHS[13], num_classes, batch_norm=True, dropout=dropout)


def vgg16(num_classes: int = 1000, *, dropout: float = 0.5) -> VGG:
    """``VGG`` with 16 layers, the paper's D."""
    return VGG(STAGE_DEPTHS[16], num_classes, dropout=dropout)


def vgg16_bn(num_classes: int = 1000, *, dropout: float = 0.5) -> VGG:
    """``vgg16`` with batch normalisation."""
    return VGG(STAGE_DEPTHS[16], num_classes, batch_norm=True, dropout=dropout)


def vgg19(num_classes: int = 1000, *, dropout: float = 0.5) -> VGG:
    """``VGG`` with 19 layers, the paper's E."""
    return VGG(STAGE_DEPTHS[19], num_classes, dropout=dropout)


def vgg19_bn(num_classes: int = 1000, *, dropout: float = 0.5) -> VGG:
    """``vgg19`` with batch normalisation."""
    return VGG(STAGE_DEPTHS[19], num_classes, batch_norm=True, dropout=dropout)
