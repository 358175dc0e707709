"""What is benchmarked of whole networks: a training step of ResNet-50 and of AlexNet.

Torch's network is the same one in torch's layers. In bfloat16 the gradients of two correct networks
lie far apart, since roundings decide what ReLU and max pooling let pass. In PyTorch 2.13 on a CPU,
the gradients of ResNet-50 (as it starts here, for 32 images of 160×160) change by up to 0.25 of
their norm when the result of a normalisation is no longer rounded before the shortcut and ReLU, and
differ from float32's by up to 0.34; AlexNet's (32 images of 227×227) change by up to 0.25 when a
convolution is rounded before its bias is added. So the benchmark notices NaN, zeros and wrong
signs; the tests compare small networks in float32, where the roundings are too small to matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

import gpunn
from gpunn import nn
from gpunn.models import alexnet
from gpunn.models.resnet import Bottleneck, ResNet
from gpunn.profiling.case import Case, Function, Tensors

TOLERANCE = 0.5
"""Twice the differences above; that of zeros is 1."""


def _activated(y: torch.Tensor, layer: Any) -> torch.Tensor:
    match layer.activation:
        case None:
            return y
        case "relu":
            return F.relu(y, inplace=True)
        case "tanh":
            return y.tanh_()
        case ("leaky_relu", slope):
            return F.leaky_relu(y, slope, inplace=True)
    raise ValueError(f"no torch layer here computes {layer.activation!r}")


class _Conv2d(torch.nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _activated(super().forward(input), self)


class _ConvTranspose2d(torch.nn.ConvTranspose2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return _activated(super().forward(input), self)


class _Linear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _activated(super().forward(input), self)


class _BatchNorm2d(torch.nn.BatchNorm2d):
    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(input)
        if residual is not None:
            y += residual
        return _activated(y, self)


_IN_TORCH = {
    nn.Conv2d: _Conv2d, nn.ConvTranspose2d: _ConvTranspose2d, nn.Linear: _Linear,
    nn.BatchNorm2d: _BatchNorm2d,
}  # fmt: skip


def in_torch(network: nn.Module) -> nn.Module:
    """The network, its layers now torch's; what follows them works in place, as is usual."""
    for module in network.modules():
        module.__class__ = _IN_TORCH.get(type(module), type(module))
    gpunn.restore(network)
    return network


def resnet(depths: tuple[int, int, int, int], n_classes: int, width: int) -> ResNet:
    """A ResNet whose blocks start near their shortcuts, without which roundings grow too much."""
    network = ResNet(Bottleneck, depths, n_classes, width=width)
    for module in network.modules():
        if isinstance(module, Bottleneck):
            torch.nn.init.constant_(module.bn3.weight, 0.1)
    return network


def small_resnet() -> ResNet:
    """The first two stages of a narrow ResNet."""
    network = resnet((2, 1, 1, 1), 10, 8)
    network.layer3, network.layer4 = nn.Sequential(), nn.Sequential()
    network.fc = nn.Linear(64, 10)
    return network


def small_alexnet() -> nn.Module:
    """Layers of AlexNet's kinds, fewer and narrower, for images of 63×63."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 11, stride=4, activation="relu"),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(32, 32, 5, padding=2, groups=2, activation="relu"),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(32, 32, 3, padding=1, activation="relu"),
        nn.Flatten(),
        nn.Linear(128, 64, activation="relu"),
        nn.Linear(64, 10),
    )


@dataclass(frozen=True)
class Step:
    """A training step without an optimizer: gradients of the mean cross-entropy.

    The inputs are images, labels, the parameters, the buffers, and the loss's own gradient, 1. All
    is in the case's dtype but batch normalisation's parameters and statistics, in float32.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: int
    size: int
    """Of the images, in rows and in columns."""
    n_classes: int
    small: Step | None = None
    """The same at a size that an interpreter can run; None if this is it."""

    def drawn(self, dtype: torch.dtype) -> nn.Module:
        """The network in our layers, on torch's default device."""
        network: Any = self.build().to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
        return network  # type: ignore[no-any-return]

    @cached_property
    def network(self) -> nn.Module:
        """In our layers, without memory."""
        with torch.device("meta"):
            return self.drawn(torch.bfloat16)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, then of the buffers."""
        parameters, buffers = self.network.named_parameters(), self.network.named_buffers()
        return tuple(name for name, _ in (*parameters, *buffers))

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(forked), device:
            torch.manual_seed(seed)
            network = self.drawn(dtype)
            images = torch.randn(self.batch, 3, self.size, self.size, dtype=dtype)
            second = self.second_input(dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        state = (tensor.detach() for tensor in (*network.parameters(), *network.buffers()))
        return images, second, *state, images.new_ones(())

    def second_input(self, dtype: torch.dtype) -> torch.Tensor:
        """The labels; drawn on torch's default device."""
        return torch.randint(self.n_classes, (self.batch,))

    def loss_of(self, network: nn.Module) -> Function:
        """The loss as a function of images, labels and the network's parameters and buffers."""

        def loss(images: torch.Tensor, labels: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
            given = dict(zip(self.names, state, strict=True))
            return F.cross_entropy(functional_call(network, given, (images,)), labels)

        return loss

    def bytes(self) -> int:
        """Parameters read twice and their gradients written, and the images read.

        What lies between the layers is not counted, though no cache could hold it.
        """
        images = 3 * self.size**2 * self.batch * torch.bfloat16.itemsize
        return images + 3 * sum(parameter.nbytes for parameter in self.network.parameters())

    def flops(self) -> int:
        """Of each layer's output and of the gradients of its weight and, but the first, its input.

        torch.utils.flop_counter counts the gradients of a grouped convolution's weight too often.
        """
        products: list[int] = []

        def count(layer: Any, inputs: Any, y: torch.Tensor) -> None:
            products.append(2 * y.numel() * layer.weight[0].numel())

        with torch.device("meta"):
            network = in_torch(self.drawn(torch.bfloat16))
            for layer in network.modules():
                if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                    layer.register_forward_hook(count)
            network(torch.empty(self.batch, 3, self.size, self.size, dtype=torch.bfloat16))
        return 3 * sum(products) - products[0]

    def case(self) -> Case:
        n_parameters = len(list(self.network.parameters()))
        with torch.device("meta"):
            in_their_layers = in_torch(self.drawn(torch.bfloat16))
        return Case(
            op="models",
            name=self.name,
            shapes=f"{self.batch} × 3 × {self.size} × {self.size}",
            make=self.make,
            ours=self.loss_of(self.network),
            theirs=self.loss_of(in_their_layers),
            bytes=self.bytes(),
            flops=self.flops(),
            small=(self.small or self).case,
            mode="step",
            wanted=tuple(range(2, 2 + n_parameters)),
            tolerance=TOLERANCE,
        )


def model_cases() -> list[Case]:
    """What the convolutions, normalisations and poolings amount to."""
    name = "ResNet-50: forward and backward"
    small = Step(name, small_resnet, 4, 32, 10)
    full = Step(name, partial(resnet, (3, 4, 6, 3), 1000, 64), 128, 224, 1000, small)
    name = "AlexNet without dropout: forward and backward"
    narrow = Step(name, small_alexnet, 2, 63, 10)
    wide = Step(name, partial(alexnet, dropout=0.0), 128, 227, 1000, narrow)
    return [full.case(), wide.case()]
