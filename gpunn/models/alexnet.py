"""AlexNet: as published, in two towers, and in the one tower of torchvision's checkpoints."""

from __future__ import annotations

import torch

from gpunn import nn


class AlexNet(nn.Module):
    """AlexNet as published, for images (N, 3, 227, 227): logits (N, num_classes).

    Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural
    networks", NIPS 2012. Five convolutions of 96, 256, 384, 384 and 256 maps and three dense layers
    of 4096, 4096 and ``num_classes``, each but the last followed by ReLU: 60,965,224 parameters for
    1000 classes. Convolutions 2, 4 and 5 see one half of the maps (``groups=2``): in 2012 the
    halves were on two GPUs. Max pooling 3×3 with stride 2 overlaps; dropout follows the first two
    dense layers. (The paper writes 224×224, which its first layer's 55×55 does not fit; 227 does.)
    Weights start as PyTorch's layers do.

    Args:
        num_classes: the number of logits.
        dropout: the probability of dropout.
        local_response_norm: whether the ReLU of convolutions 1 and 2 is followed by the paper's
            local response normalisation, b = a / (2 + 10⁻⁴ Σ a²)^0.75, the sum over five
            neighbouring maps. It is PyTorch's layer, and off by default: Simonyan and Zisserman
            (2015, section 4.1) found no gain by it.

    Raises:
        ValueError: a dropout outside of [0, 1]; in forward, an input of another shape.
    """

    def __init__(
        self, num_classes: int = 1000, *, dropout: float = 0.5, local_response_norm: bool = False
    ) -> None:
        super().__init__()

        def between() -> nn.Module:
            # PyTorch's divides alpha by the number of maps that it sums over.
            return (
                torch.nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
                if local_response_norm
                else nn.Identity()
            )

        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 11, stride=4, activation="relu"),
            between(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(96, 256, 5, padding=2, groups=2, activation="relu"),
            between(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(256, 384, 3, padding=1, activation="relu"),
            nn.Conv2d(384, 384, 3, padding=1, groups=2, activation="relu"),
            nn.Conv2d(384, 256, 3, padding=1, groups=2, activation="relu"),
            nn.MaxPool2d(3, 2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(256 * 6 * 6, 4096, activation="relu", dropout_p=dropout),
            nn.Linear(4096, 4096, activation="relu", dropout_p=dropout),
            nn.Linear(4096, num_classes),
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The logits (N, num_classes) of images (N, 3, 227, 227)."""
        if input.dim() != 4 or tuple(input.shape[1:]) != (3, 227, 227):
            raise ValueError(
                f"input: AlexNet expects shape (N, 3, 227, 227), got {tuple(input.shape)}"
            )
        logits: torch.Tensor = self.classifier(self.features(input).flatten(1))
        return logits


class AlexNetOneTower(nn.Module):
    """AlexNet in one tower, for images (N, 3, H, W) of 63×63 or more: logits (N, num_classes).

    Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv 1404.5997
    (2014), with 256 maps in the fourth convolution: 64, 192, 384, 256, 256, none of them grouped.
    This is the network that torchvision calls AlexNet, and parameters have its names and shapes
    (``features.0``, ``3``, ``6``, ``8``, ``10``, ``classifier.1``, ``4``, ``6``): 61,100,840
    parameters for 1000 classes. Adaptive average pooling makes 6×6 of whatever the last pooling
    leaves, which is 6×6 for images of 224×224. Weights start as PyTorch's layers do.

    Args:
        num_classes: the number of logits.
        dropout: the probability of dropout, before each of the first two dense layers.

    Raises:
        ValueError: a dropout outside of [0, 1].
    """

    def __init__(self, num_classes: int = 1000, *, dropout: float = 0.5) -> None:
        super().__init__()
        # An Identity stands where torchvision has a layer that is fused into one before it, so
        # that the indices are the same.
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2, activation="relu"),
            nn.Identity(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2, activation="relu"),
            nn.Identity(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1, activation="relu"),
            nn.Identity(),
            nn.Conv2d(384, 256, 3, padding=1, activation="relu"),
            nn.Identity(),
            nn.Conv2d(256, 256, 3, padding=1, activation="relu"),
            nn.Identity(),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096, activation="relu", dropout_p=dropout),
            nn.Identity(),
            nn.Identity(),
            nn.Linear(4096, 4096, activation="relu"),
            nn.Identity(),
            nn.Linear(4096, num_classes),
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The logits (N, num_classes) of images (N, 3, H, W)."""
        maps = self.avgpool(self.features(input))
        logits: torch.Tensor = self.classifier(maps.flatten(1))
        return logits


def alexnet(
    num_classes: int = 1000, *, dropout: float = 0.5, local_response_norm: bool = False
) -> AlexNet:
    """``AlexNet`` as published, in two towers; ``alexnet_one_tower`` takes torchvision's weights.

    Raises:
        ValueError: a dropout outside of [0, 1].
    """
    return AlexNet(num_classes, dropout=dropout, local_response_norm=local_response_norm)


def alexnet_one_tower(num_classes: int = 1000, *, dropout: float = 0.5) -> AlexNetOneTower:
    """``AlexNetOneTower``, the network that torchvision calls AlexNet.

    Raises:
        ValueError: a dropout outside of [0, 1].
    """
    return AlexNetOneTower(num_classes, dropout=dropout)
