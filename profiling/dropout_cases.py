"""What is benchmarked of dropout: of elements, of channels, and with a mask drawn before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.profiling.case import Case, Mode, Tensors, normal

P = 0.1


@dataclass(frozen=True)
class Dropout:
    """One way to drop; the inputs are x and, for gradients, dy."""

    kind: str
    """"dropout", "dropout2d" or "dropout by a mask", which is drawn and then applied."""
    shape: tuple[int, ...]
    mode: Mode = "forward"
    channels_last: bool = False

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        tensors = normal(self.shape, *[self.shape] * (self.mode != "forward"))(device, dtype, seed)
        if not self.channels_last:
            return tensors
        return tuple(t.contiguous(memory_format=torch.channels_last) for t in tensors)

    def ours(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "dropout by a mask":
            return GF.dropout(x, P, mask=GF.dropout_mask(x.shape, P, device=x.device))
        return GF.dropout(x, P) if self.kind == "dropout" else GF.dropout2d(x, P)

    def theirs(self, x: torch.Tensor) -> torch.Tensor:
        """For a backward PyTorch keeps a mask in any case, of a byte an element."""
        return F.dropout2d(x, P) if self.kind == "dropout2d" else F.dropout(x, P)

    def bytes(self) -> int:
        """x or dy read, y or dx written, in bfloat16; and the mask read, if a backward has one."""
        n = prod(self.shape)
        is_read = self.kind == "dropout by a mask" and self.mode == "backward"
        return 4 * n + (n // 8 if is_read else 0)

    def case(self) -> Case:
        layout = ", channels_last" * self.channels_last
        return Case(
            op="dropout",
            name=self.kind + layout + ": dx" * (self.mode == "backward"),
            shapes=" × ".join(map(str, self.shape)),
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=self.bytes(),
            flops=0,
            small=replace(self, shape=tuple(min(size, 32) for size in self.shape)).case,
            mode=self.mode,
            wanted=(0,) if self.mode != "forward" else (),
            dropped=lambda x, *_: torch.zeros_like(x),
        )


def dropout_cases() -> list[Case]:
    """The activations of a transformer's layer, and of a residual network's stage."""
    size, image = (8192, 8192), (64, 256, 56, 56)
    specs = [
        Dropout("dropout", size),
        Dropout("dropout", size, "backward"),
        Dropout("dropout by a mask", size),
        Dropout("dropout by a mask", size, "backward"),
        Dropout("dropout2d", image),
        Dropout("dropout2d", image, channels_last=True),
    ]
    return [spec.case() for spec in specs]
