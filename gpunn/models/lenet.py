"""LeNet-5, the network that read digits on cheques."""

from __future__ import annotations

import torch

from gpunn import nn
from gpunn.functional.activation import ActivationName

POOLINGS = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}


class LeNet5(nn.Module):
    """LeNet-5 for images (N, 1, 32, 32): logits (N, n_classes).

    LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
    Proceedings of the IEEE 86(11), 1998. The layers have the paper's names:

    ======  ==============================  ================  ==========
    layer   what it is                      output            parameters
    ======  ==============================  ================  ==========
    c1      convolution 5×5, activation     (N, 6, 28, 28)    156
    s2      pooling 2×2                     (N, 6, 14, 14)
    c3      convolution 5×5, activation     (N, 16, 10, 10)   2,416
    s4      pooling 2×2                     (N, 16, 5, 5)
    c5      convolution 5×5, activation     (N, 120, 1, 1)    48,120
    f6      dense, activation               (N, 84)           10,164
    output  dense                           (N, n_classes)    850 for 10
    ======  ==============================  ================  ==========

    The paper's subsampling has two trainable numbers a map and its own sigmoid, its c3 sees only
    some of the six maps (1,516 parameters), its tanh is scaled, and its output are distances to
    fixed patterns; here, as has become usual, these are plain pooling, all maps, tanh and logits.
    Weights start as PyTorch's layers do.

    Args:
        n_classes: the number of logits.
        activation: as ``gpunn.functional.linear`` takes it; "relu" for today's variant.
        pooling: "average", as in the paper, or "max".

    Raises:
        ValueError: an unknown activation or pooling; in forward, an input of another shape.
    """

    def __init__(
        self,
        n_classes: int = 10,
        *,
        activation: ActivationName = "tanh",
        pooling: str = "average",
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.c1 = nn.Conv2d(1, 6, 5, activation=activation)
        self.s2 = POOLINGS[pooling](2)
        self.c3 = nn.Conv2d(6, 16, 5, activation=activation)
        self.s4 = POOLINGS[pooling](2)
        self.c5 = nn.Conv2d(16, 120, 5, activation=activation)
        self.f6 = nn.Linear(120, 84, activation=activation)
        self.output = nn.Linear(84, n_classes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The logits (N, n_classes) of images (N, 1, 32, 32)."""
        if input.dim() != 4 or tuple(input.shape[1:]) != (1, 32, 32):
            raise ValueError(
                f"input: LeNet-5 expects shape (N, 1, 32, 32), got {tuple(input.shape)}; "
                "pad digits of 28×28 pixels by 2"
            )
        maps = self.s2(self.c1(input))
        maps = self.c5(self.s4(self.c3(maps)))
        logits: torch.Tensor = self.output(self.f6(maps.flatten(1)))
        return logits


def lenet5(
    n_classes: int = 10, *, activation: ActivationName = "tanh", pooling: str = "average"
) -> LeNet5:
    """``LeNet5``, where its layers stand; ``activation="relu", pooling="max"`` is today's variant.

    Raises:
        ValueError: an unknown activation or pooling.
    """
    return LeNet5(n_classes, activation=activation, pooling=pooling)
