"""What is benchmarked of pooling: the first layers of ResNet and VGG, and ResNet's last."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.kernels.pooling import format_of
from gpunn.profiling.case import Case, Function, Mode, Tensors, normal

Size = tuple[int, int, int, int]


@dataclass(frozen=True)
class Pooling:
    """A pooling of square windows; its inputs are x and, for gradients, dy."""

    kind: str
    """``max_pool2d``, ``avg_pool2d`` or ``adaptive_avg_pool2d``."""
    shape: Size
    kernel: int
    """The adaptive one's output size."""
    stride: int = 0
    padding: int = 0
    channels_last: bool = False
    mode: Mode = "forward"

    @property
    def arguments(self) -> tuple[int, ...]:
        """What follows x."""
        return (self.kernel, self.stride, self.padding) if self.stride else (self.kernel,)

    @property
    def output_shape(self) -> Size:
        """Of y and dy."""
        n, c, height, width = self.shape
        if not self.stride:
            return n, c, self.kernel, self.kernel

        def pooled(size: int) -> int:
            return (size + 2 * self.padding - self.kernel) // self.stride + 1

        return n, c, pooled(height), pooled(width)

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        shapes = [self.shape] + [self.output_shape] * (self.mode != "forward")
        drawn = normal(*shapes)(device, dtype, seed)
        memory_format = format_of(self.channels_last)
        return tuple(tensor.contiguous(memory_format=memory_format) for tensor in drawn)

    def function(self, namespace: object) -> Function:
        """The pooling as ``gpunn.functional`` or PyTorch has it."""
        pool: Function = getattr(namespace, self.kind)
        return lambda x, *_: pool(x, *self.arguments)

    def bytes(self) -> int:
        """In bfloat16; a maximum that is to be differentiated keeps one byte more an output."""
        x, y = torch.Size(self.shape).numel(), torch.Size(self.output_shape).numel()
        kept = y if self.kind == "max_pool2d" else 0
        one_way = 2 * (x + y)
        return {
            "forward": one_way, "backward": one_way + kept, "step": 2 * (one_way + kept)
        }[self.mode]  # fmt: skip

    def case(self) -> Case:
        n, c, height, width = self.shape
        layout = "channels_last" if self.channels_last else "contiguous"
        suffix = {"forward": "", "backward": ": dx", "step": ": forward and backward"}[self.mode]
        geometry = f"{self.kernel}×{self.kernel}" + f" / {self.stride}" * bool(self.stride)
        return Case(
            op="pooling",
            name=f"{self.kind} {geometry}, {layout}{suffix}",
            shapes=f"{n} × {c} × {height} × {width}",
            make=self.make,
            ours=self.function(GF),
            theirs=self.function(F),
            bytes=self.bytes(),
            flops=0,
            small=replace(self, shape=(2, 16, min(height, 17), min(width, 17))).case,
            mode=self.mode,
            wanted=(0,) if self.mode != "forward" else (),
        )


def pooling_cases() -> list[Case]:
    """Each in both layouts: what it costs alone, and in training."""
    specs = [
        Pooling("max_pool2d", (128, 64, 112, 112), 3, 2, 1, channels_last, mode)
        for channels_last in (True, False)
        for mode in ("forward", "backward", "step")
    ]
    specs += [
        Pooling("max_pool2d", (32, 64, 224, 224), 2, 2, 0, channels_last, mode)
        for channels_last in (True, False)
        for mode in ("forward", "backward")
    ]
    specs += [
        Pooling("avg_pool2d", (128, 128, 56, 56), 2, 2, 0, True, "forward"),
        Pooling("avg_pool2d", (128, 128, 56, 56), 2, 2, 0, True, "backward"),
        Pooling("adaptive_avg_pool2d", (256, 2048, 7, 7), 1, channels_last=True),
        Pooling("adaptive_avg_pool2d", (256, 2048, 7, 7), 1, channels_last=True, mode="backward"),
    ]
    return [spec.case() for spec in specs]
