"""Gated linear units as modules; the second half of the input is the gate."""

from __future__ import annotations

import torch

import gpunn.functional as GF
from gpunn.functional.glu import geglu_gate


class GLU(torch.nn.GLU):
    """``torch.nn.GLU`` on ``gpunn.functional.glu``: y = a sigmoid(b)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.glu(input, self.dim)


class SwiGLU(GLU):
    """y = a silu(b), (a, b) the halves of the input along ``dim``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.swiglu(input, self.dim)


class GEGLU(GLU):
    """y = a gelu(b), (a, b) the halves of the input along ``dim``; ``approximate`` as in gelu.

    Raises:
        RuntimeError: ``approximate`` is neither "none" nor "tanh".
    """

    def __init__(self, dim: int = -1, approximate: str = "none") -> None:
        super().__init__(dim)
        geglu_gate(approximate)  # refuses what is no approximation
        self.approximate = approximate

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.geglu(input, self.dim, self.approximate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"


class ReGLU(GLU):
    """y = a relu(b), (a, b) the halves of the input along ``dim``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return GF.reglu(input, self.dim)
