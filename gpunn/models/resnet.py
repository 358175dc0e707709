"""Residual networks: for ImageNet, with torchvision's parameters, and the paper's for CIFAR-10.

He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016. The last batch
normalisation of a block adds the shortcut and takes the ReLU: relu(batch_norm(x) + shortcut).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from gpunn import nn


def _convolution(in_channels: int, channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width but for its stride; no bias, as a norm follows."""
    return nn.Conv2d(in_channels, channels, size, stride, size // 2, bias=False)


def _projection(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    """What a shortcut needs to fit: nothing, or a 1×1 convolution and its normalisation."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(_convolution(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))


def _reset_convolutions(model: nn.Module) -> None:
    """Draw the convolutions' weights from He's normal distribution for the fan out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: (N, in_channels, H, W) to (N, channels, H', W').

    H' = ⌈H / stride⌉. The first convolution has the stride; the shortcut is the input, or
    (``downsample``) its 1×1 convolution where the shapes differ. The paper's figure 5, left.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels, activation="relu")
        self.conv2 = _convolution(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels, activation="relu")
        self.downsample = _projection(in_channels, channels, stride)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """relu(f(input) + shortcut(input))."""
        shortcut = input if self.downsample is None else self.downsample(input)
        maps = self.bn1(self.conv1(input))
        result: torch.Tensor = self.bn2(self.conv2(maps), shortcut)
        return result


class Bottleneck(nn.Module):
    """Convolutions of 1×1, 3×3 and 1×1 beside a shortcut, with 4 ``channels`` maps as its output.

    (N, in_channels, H, W) to (N, 4 channels, H', W'), H' = ⌈H / stride⌉. The paper's figure 5,
    right, but with the stride in the 3×3 convolution, as torchvision (its "v1.5") has it.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = _convolution(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels, activation="relu")
        self.conv2 = _convolution(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels, activation="relu")
        self.conv3 = _convolution(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels, activation="relu")
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """relu(f(input) + shortcut(input))."""
        shortcut = input if self.downsample is None else self.downsample(input)
        maps = self.bn1(self.conv1(input))
        maps = self.bn2(self.conv2(maps))
        result: torch.Tensor = self.bn3(self.conv3(maps), shortcut)
        return result


class ResNet(nn.Module):
    """A residual network for images (N, 3, H, W), in the paper 224×224: logits (N, num_classes).

    The paper's table 1. Parameters have torchvision's names and shapes. Convolutions start from
    He's normal distribution for the fan out, normalisations as the identity.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        stage_depths: the number of blocks in each of the four stages.
        num_classes: the number of logits.
        zero_init_residual: start the last normalisation of every block with weight 0, so that the
            block starts as its shortcut (Goyal et al., arXiv 1706.02677, section 5.1).
        width: channels of the first stage, before a block's expansion; in the paper 64.

    Raises:
        ValueError: not four stages.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        stage_depths: Sequence[int],
        num_classes: int = 1000,
        *,
        zero_init_residual: bool = False,
        width: int = 64,
    ) -> None:
        super().__init__()
        if len(stage_depths) != 4:
            raise ValueError(f"stage_depths: expected four numbers, got {tuple(stage_depths)}")

        def stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
            between = block.expansion * channels
            rest = [block(between, channels) for _ in range(depth - 1)]
            return nn.Sequential(block(in_channels, channels, stride), *rest)

        expanded = width * block.expansion
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width, activation="relu")
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(width, width, stage_depths[0], 1)
        self.layer2 = stage(expanded, 2 * width, stage_depths[1], 2)
        self.layer3 = stage(2 * expanded, 4 * width, stage_depths[2], 2)
        self.layer4 = stage(4 * expanded, 8 * width, stage_depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * expanded, num_classes)
        _reset_convolutions(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock):
                    torch.nn.init.zeros_(module.bn2.weight)
                elif isinstance(module, Bottleneck):
                    torch.nn.init.zeros_(module.bn3.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The logits (N, num_classes) of images (N, 3, H, W)."""
        maps = self.maxpool(self.bn1(self.conv1(input)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        logits: torch.Tensor = self.fc(self.avgpool(maps).flatten(1))
        return logits


def resnet18(num_classes: int = 1000, *, zero_init_residual: bool = False) -> ResNet:
    """``ResNet`` with 18 layers."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, zero_init_residual=zero_init_residual)


def resnet34(num_classes: int = 1000, *, zero_init_residual: bool = False) -> ResNet:
    """``ResNet`` with 34 layers."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, zero_init_residual=zero_init_residual)


def resnet50(num_classes: int = 1000, *, zero_init_residual: bool = False) -> ResNet:
    """``ResNet`` with 50 layers, in bottlenecks."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, zero_init_residual=zero_init_residual)


def resnet101(num_classes: int = 1000, *, zero_init_residual: bool = False) -> ResNet:
    """``ResNet`` with 101 layers, in bottlenecks."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, zero_init_residual=zero_init_residual)


def resnet152(num_classes: int = 1000, *, zero_init_residual: bool = False) -> ResNet:
    """``ResNet`` with 152 layers, in bottlenecks."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, zero_init_residual=zero_init_residual)


class CifarBlock(nn.Module):
    """Two 3×3 convolutions, with a shortcut that has no parameters, or (plain) with none.

    (N, in_channels, H, W) to (N, channels, H', W'), H' = ⌈H / stride⌉. Where the shapes differ the
    shortcut takes every ``stride``-th pixel and adds maps of zeros: the paper's option A.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, residual: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels, activation="relu")
        self.conv2 = _convolution(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels, activation="relu")
        self.stride = stride
        self.new_channels = channels - in_channels
        self.residual = residual

    def _shortcut(self, input: torch.Tensor) -> torch.Tensor | None:
        if not self.residual:
            return None
        if self.stride == 1 and self.new_channels == 0:
            return input
        pixels = input[:, :, :: self.stride, :: self.stride]
        return F.pad(pixels, (0, 0, 0, 0, 0, self.new_channels))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """relu(f(input) + shortcut(input)), or relu(f(input))."""
        maps = self.bn1(self.conv1(input))
        result: torch.Tensor = self.bn2(self.conv2(maps), self._shortcut(input))
        return result


class CifarResNet(nn.Module):
    """The paper's residual network for small images, and its plain rival of equal depth.

    Section 4.2: for images (N, in_channels, H, W), in the paper 32×32, a 3×3 convolution, three
    stages of n blocks with 16, 32 and 64 maps of H, H / 2 and H / 4 rows, the average over all
    positions and a dense layer: 6 n + 2 layers with weights, logits (N, n_classes). Convolutions
    start from He's normal distribution for the fan out.

    Args:
        depth: 6 n + 2; in the paper 20, 32, 44, 56 and 110.
        n_classes: the number of logits.
        in_channels: of the images.
        residual: whether blocks have their shortcut. It has no parameters, so that the two
            networks differ in nothing else.

    Raises:
        ValueError: a depth that is not 6 n + 2 with an n of 1 or more.
    """

    def __init__(
        self, depth: int, n_classes: int = 10, in_channels: int = 3, residual: bool = True
    ) -> None:
        super().__init__()
        n_blocks, excess = divmod(depth - 2, 6)
        if excess or n_blocks < 1:
            raise ValueError(f"depth: expected 6 n + 2, as in 8, 14, 20 or 110, got {depth}")

        def stage(before: int, channels: int, stride: int) -> nn.Sequential:
            first = CifarBlock(before, channels, stride, residual=residual)
            rest = [CifarBlock(channels, channels, residual=residual) for _ in range(n_blocks - 1)]
            return nn.Sequential(first, *rest)

        self.conv1 = _convolution(in_channels, 16, 3)
        self.bn1 = nn.BatchNorm2d(16, activation="relu")
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, n_classes)
        _reset_convolutions(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The logits (N, n_classes) of images (N, in_channels, H, W)."""
        maps = self.layer1(self.bn1(self.conv1(input)))
        maps = self.layer3(self.layer2(maps))
        logits: torch.Tensor = self.fc(self.avgpool(maps).flatten(1))
        return logits


def resnet_cifar(
    depth: int, n_classes: int = 10, in_channels: int = 3, residual: bool = True
) -> CifarResNet:
    """``CifarResNet`` of ``depth`` = 6 n + 2 layers; ``residual=False`` is the plain network.

    Raises:
        ValueError: a depth that is not 6 n + 2 with an n of 1 or more.
    """
    return CifarResNet(depth, n_classes, in_channels, residual)
