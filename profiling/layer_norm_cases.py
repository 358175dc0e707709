"""What is benchmarked of layer normalisation: the residual stream of transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.profiling.case import Case, Mode, Tensors, normal

EPS = 1e-5


@dataclass(frozen=True)
class RowNorm:
    """Of x, weight (and bias), a residual and dy, which there may be."""

    function: str
    rows: int
    columns: int
    residual: bool = False
    mode: Mode = "forward"

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        n_parameters = 2 if self.function == "layer_norm" else 1
        shape = self.rows, self.columns
        shapes = [shape, *[(self.columns,)] * n_parameters, *[shape] * self.residual]
        return normal(*shapes, *[shape] * (self.mode != "forward"))(device, dtype, seed)

    def call(self, module: Any, x: torch.Tensor, given: Tensors, **fused: Any) -> torch.Tensor:
        function = getattr(module, self.function)
        y: torch.Tensor = function(x, (self.columns,), *given, EPS, **fused)
        return y

    def ours(self, x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        if self.residual:
            return self.call(GF, x, given[:-1], residual=given[-1])
        return self.call(GF, x, given)

    def theirs(self, x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        if self.residual:
            return self.call(F, x + given[-1], given[:-1])
        return self.call(F, x, given)

    def bytes(self) -> int:
        """In bfloat16; of what a backward pass needs, the sum is written, and read."""
        n, n_parameters = self.rows * self.columns, 2 if self.function == "layer_norm" else 1
        parameters = n_parameters * self.columns
        forward = n * (2 + self.residual) + parameters
        backward = 3 * n + self.columns + parameters
        elements = {
            "forward": forward, "backward": backward,
            "step": forward + n * self.residual + backward,
        }[self.mode]  # fmt: skip
        return 2 * elements

    def case(self) -> Case:
        suffix = {"forward": "", "backward": ": gradients", "step": ": step"}[self.mode]
        n_inputs = (3 if self.function == "layer_norm" else 2) + self.residual
        return Case(
            op="layer_norm",
            name=f"{self.function}{' + residual' * self.residual}{suffix}",
            shapes=f"{self.rows} × {self.columns}",
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=self.bytes(),
            flops=0,
            small=lambda: replace(self, rows=9).case(),
            mode=self.mode,
            wanted=tuple(range(n_inputs)) if self.mode != "forward" else (),
        )


def layer_norm_cases() -> list[Case]:
    """GPT-2's and Llama's widths, and one that no program holds the sums of."""
    modes: tuple[Mode, ...] = ("forward", "backward", "step")
    specs = [RowNorm("layer_norm", 32768, 1024, mode=mode) for mode in modes[:2]]
    specs += [RowNorm("layer_norm", 16384, 4096, True, mode) for mode in modes]
    specs += [RowNorm("rms_norm", 16384, 4096, True, mode) for mode in modes]
    specs += [RowNorm("rms_norm", 8192, 8192, mode=mode) for mode in modes[:2]]
    return [spec.case() for spec in specs]
