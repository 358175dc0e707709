"""What is benchmarked of convolution: layers of ResNet-50, VGG-16, DCGAN and MobileNet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.functional.activation import TORCH
from gpunn.profiling.case import ACROSS_THE_KINK, Case, Mode, Tensors, normal


@dataclass(frozen=True)
class Convolution:
    """A channels_last convolution with a bias and, perhaps, relu; x, weight, bias and dy.

    Transposed, ``size`` is that of the output, as in the convolution whose gradient it is.
    """

    layer: str
    n: int
    channels: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    activation: str | None = "relu"
    transposed: bool = False
    mode: Mode = "forward"
    wanted: tuple[int, ...] = ()

    @property
    def padding(self) -> int:
        """Half of the kernel, less one where an even one is strided."""
        return (self.kernel - 1) // 2

    @property
    def small_size(self) -> int:
        """Rows of the smaller of input and output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def shapes(self) -> list[tuple[int, ...]]:
        """Of x, weight, bias and y."""
        large, small = (self.n, self.channels, self.size), (self.n, self.outputs, self.small_size)
        weight = (self.outputs, self.channels // self.groups, self.kernel, self.kernel)
        x, y = ((*shape, shape[2]) for shape in (large, small))
        pair = (y, x) if self.transposed else (x, y)
        return [pair[0], weight, (pair[1][1],), pair[1]]

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        x, weight, bias, y = self.shapes()
        shapes = [x, weight, bias] + [y] * (self.mode != "forward")
        scales = 1.0, prod(weight[1:]) ** -0.5
        drawn = normal(*shapes, scales=scales)(device, dtype, seed)
        return tuple(
            t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in drawn
        )

    def arguments(self) -> tuple[int, ...]:
        """What follows the bias."""
        if self.transposed:
            return self.stride, self.padding, 0, self.groups
        return self.stride, self.padding, 1, self.groups

    def ours(self, x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        function = GF.conv_transpose2d if self.transposed else GF.conv2d
        return function(x, weight, rest[0], *self.arguments(), activation=self.activation)

    def theirs(self, x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        function = F.conv_transpose2d if self.transposed else F.conv2d
        y: torch.Tensor = function(x, weight, rest[0], *self.arguments())
        return y if self.activation is None else TORCH[self.activation](y)

    def work(self) -> tuple[int, int]:
        """Fewest bytes in bfloat16, and flops."""
        x, weight, bias, y = map(prod, self.shapes())
        small = self.n * self.outputs * self.small_size**2
        flops = 2 * small * prod(self.shapes()[1][1:])
        sizes = (x, weight, bias)
        forward = x + weight + bias + y
        saved = y if self.activation else 0
        operands = weight * (0 in self.wanted) + x * (1 in self.wanted)
        backward = y + saved + operands + sum(sizes[i] for i in self.wanted)
        n_products = len(set(self.wanted) & {0, 1})
        elements, n = {
            "forward": (forward, 1),
            "backward": (backward, n_products),
            "step": (forward + backward, 1 + n_products),
        }[self.mode]
        return 2 * elements, n * flops

    def case(self) -> Case:
        gradients = ", ".join(("dx", "dW", "db")[i] for i in self.wanted)
        suffix = {"forward": "", "backward": f": {gradients}", "step": ": forward and backward"}
        activation = f" + {self.activation}" if self.activation else ""
        n_bytes, flops = self.work()
        channels = self.channels if self.groups == 1 else 16
        outputs = self.outputs if self.groups == 1 else 16
        return Case(
            op="convolution",
            name=f"{self.layer}, bias{activation}{suffix[self.mode]}",
            shapes=f"N={self.n} C={self.channels} K={self.outputs} {self.size}² "
            f"{self.kernel}×{self.kernel}/{self.stride}",
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=n_bytes,
            flops=flops,
            small=replace(
                self,
                n=1,
                channels=min(channels, 16),
                outputs=min(outputs, 16),
                size=8,
                groups=min(self.groups, 16),
            ).case,
            mode=self.mode,
            wanted=self.wanted,
            tolerance=ACROSS_THE_KINK if self.activation and self.wanted else None,
        )


def convolution_cases() -> list[Case]:
    """What is computed most first."""
    middle = Convolution("ResNet-50 conv3", 128, 128, 128, 28)
    specs = [
        Convolution("ResNet-50 conv2", 128, 64, 64, 56),
        middle,
        Convolution("ResNet-50 conv4", 128, 256, 256, 14),
        replace(middle, activation=None),
        replace(middle, mode="backward", wanted=(0,), activation=None),
        replace(middle, mode="backward", wanted=(1,), activation=None),
        replace(middle, mode="step", wanted=(0, 1, 2)),
        Convolution("ResNet-50 conv1", 128, 3, 64, 224, 7, 2),
        Convolution("ResNet-50 1 × 1", 128, 256, 64, 56, 1),
        Convolution("VGG-16 conv4", 32, 512, 512, 28),
        Convolution("MobileNet depthwise", 128, 128, 128, 56, groups=128),
        Convolution("DCGAN generator", 128, 256, 512, 16, 4, 2, transposed=True),
    ]
    return [spec.case() for spec in specs]
