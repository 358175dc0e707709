"""What is benchmarked of group and instance normalisation: diffusion's UNets, style transfer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import gpunn.functional as GF
from gpunn.functional.activation import TORCH
from gpunn.kernels.pooling import format_of
from gpunn.profiling.case import Case, Mode, Tensors, normal

EPS = 1e-5


@dataclass(frozen=True)
class GroupNorm:
    """f(group_norm(x)); by instances without ``num_groups``. Of x, weight, bias and perhaps dy."""

    shape: tuple[int, int, int, int]
    num_groups: int | None
    activation: str
    channels_last: bool = False
    mode: Mode = "forward"

    @property
    def name(self) -> str:
        """The function's."""
        return "instance_norm" if self.num_groups is None else "group_norm"

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        images = [self.shape] * (1 + (self.mode != "forward"))
        x, *others = normal(*images)(device, dtype, seed)
        parameters = normal(self.shape[1:2], self.shape[1:2])(device, dtype, seed)
        memory_format = format_of(self.channels_last)
        if self.activation == "relu":  # away from its kink, where roundings would decide
            x, parameters = x + 3 * x.sign(), (parameters[0].abs() + 0.5, parameters[1] / 10)
        x, *others = (t.contiguous(memory_format=memory_format) for t in (x, *others))
        return (x, *parameters, *others)

    def call(self, module: Any, x: torch.Tensor, given: Tensors, **fused: Any) -> torch.Tensor:
        weight, bias, *_ = given
        if self.num_groups is None:
            y: torch.Tensor = module.instance_norm(x, None, None, weight, bias, eps=EPS, **fused)
        else:
            y = module.group_norm(x, self.num_groups, weight, bias, EPS, **fused)
        return y

    def ours(self, x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return self.call(GF, x, given, activation=self.activation)

    def theirs(self, x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return TORCH[self.activation](self.call(torch.nn.functional, x, given))

    def bytes(self) -> int:
        """In bfloat16; x is counted once, as if a cache held it for the second reading."""
        n, parameters = torch.Size(self.shape).numel(), 2 * self.shape[1]
        forward, backward = 2 * n + parameters, 3 * n + 2 * parameters
        return 2 * {"forward": forward, "backward": backward, "step": forward + backward}[self.mode]

    def case(self) -> Case:
        n, c, height, width = self.shape
        layout = "channels_last" if self.channels_last else "contiguous"
        suffix = {"forward": "", "backward": ": gradients", "step": ": step"}[self.mode]
        small = (2, 16, min(height, 6), min(width, 6))
        return Case(
            op="group_norm",
            name=f"{self.name}, {self.activation}, {layout}{suffix}",
            shapes=f"{n} × {c} × {height} × {width}",
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=self.bytes(),
            flops=0,
            small=replace(self, shape=small, num_groups=self.num_groups and 4).case,
            mode=self.mode,
            wanted=(0, 1, 2) if self.mode != "forward" else (),
        )


def group_norm_cases() -> list[Case]:
    """Of a UNet's widest and deepest levels, and of style transfer's residual blocks."""
    modes: tuple[Mode, ...] = ("forward", "backward", "step")
    specs = [
        GroupNorm(shape, 32, "silu", last, mode)
        for shape, last in (
            ((8, 320, 64, 64), False),
            ((8, 320, 64, 64), True),
            ((8, 1280, 16, 16), True),
        )
        for mode in modes
    ]
    specs += [GroupNorm((8, 1280, 8, 8), 32, "silu", mode=mode) for mode in modes[:2]]
    specs += [GroupNorm((16, 128, 64, 64), None, "relu", mode=mode) for mode in modes]
    specs += [GroupNorm((16, 32, 256, 256), None, "relu", mode=mode) for mode in modes]
    return [spec.case() for spec in specs]
