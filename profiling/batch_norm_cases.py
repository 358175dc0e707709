"""What is benchmarked of batch normalisation: ResNet-50's shapes, as its blocks use it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.kernels.pooling import format_of
from gpunn.profiling.case import ACROSS_THE_KINK, Case, Mode, Tensors, normal

EPS, MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class BatchNorm:
    """relu(batch_norm(x) + residual) in training; the inputs are x, weight, bias, residual, dy."""

    shape: tuple[int, int, int, int]
    residual: bool
    channels_last: bool = True
    mode: Mode = "forward"

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        images = [self.shape] * (1 + self.residual + (self.mode != "forward"))
        x, *others = normal(*images)(device, dtype, seed)
        parameters = normal(self.shape[1:2], self.shape[1:2])(device, torch.float32, seed)
        memory_format = format_of(self.channels_last)
        if self.residual:  # away from relu's kink, where roundings would decide
            others[0] += 4 * others[0].sign()
        x, *others = (t.contiguous(memory_format=memory_format) for t in (x, *others))
        return (x, *parameters, *others)

    def added(self, rest: Tensors) -> torch.Tensor | None:
        """The residual, of what follows weight and bias."""
        return rest[0] if self.residual else None

    def ours(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *rest: torch.Tensor
    ) -> torch.Tensor:
        arguments: Any = (x, None, None, weight, bias, True, MOMENTUM, EPS)
        return GF.batch_norm(*arguments, activation="relu", residual=self.added(rest))

    def theirs(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *rest: torch.Tensor
    ) -> torch.Tensor:
        z, residual = (
            F.batch_norm(x, None, None, weight, bias, True, MOMENTUM, EPS),
            self.added(rest),
        )
        return F.relu(z if residual is None else z + residual)

    def bytes(self) -> int:
        """In bfloat16, and of the channels in float32; x is counted once, as if a cache held it.

        What is to be differentiated keeps a bit an element of a relu after a residual.
        """
        n, parameters = torch.Size(self.shape).numel(), 2 * 4 * self.shape[1]
        bits = n // 8 if self.residual else 0
        forward = 2 * n * (2 + self.residual) + parameters
        backward = 2 * n * (3 + self.residual) + bits + 2 * parameters
        return {
            "forward": forward, "backward": backward, "step": forward + bits + backward
        }[self.mode]  # fmt: skip

    def case(self) -> Case:
        n, c, height, width = self.shape
        layout = "channels_last" if self.channels_last else "contiguous"
        suffix = {"forward": "", "backward": ": gradients", "step": ": step"}[self.mode]
        wanted = (0, 1, 2, 3) if self.residual else (0, 1, 2)
        return Case(
            op="batch_norm",
            name=f"batch_norm{' + residual' * self.residual}, ReLU, {layout}{suffix}",
            shapes=f"{n} × {c} × {height} × {width}",
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=self.bytes(),
            flops=0,
            small=replace(self, shape=(2, 16, min(height, 7), min(width, 7))).case,
            mode=self.mode,
            wanted=wanted if self.mode != "forward" else (),
            tolerance=ACROSS_THE_KINK if self.residual and self.mode != "forward" else None,
        )


def batch_norm_cases() -> list[Case]:
    """The widest and the narrowest layers of ResNet-50 at a batch of 128, alone and in training."""
    modes: tuple[Mode, ...] = ("forward", "backward", "step")
    specs = [BatchNorm((128, 64, 112, 112), False, mode=mode) for mode in modes]
    specs += [BatchNorm((128, 256, 56, 56), True, mode=mode) for mode in modes]
    specs += [BatchNorm((128, 256, 56, 56), True, channels_last=False, mode=mode) for mode in modes]
    specs += [BatchNorm((128, 2048, 7, 7), True, mode=mode) for mode in modes]
    return [spec.case() for spec in specs]
