"""What is benchmarked of linear."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.functional.activation import TORCH
from gpunn.kernels.linear import saves
from gpunn.profiling.case import Case, Mode, Tensors, normal, reduced

DROPOUT_P = 0.1


@dataclass(frozen=True)
class Linear:
    """The cases of linear: y = dropout(f(x Wᵀ + b)) + residual, x (rows, inner), W (cols, inner).

    The inputs are x, W, then b, residual and dy where there are any.
    """

    rows: int
    inner: int
    cols: int
    activation: str | None = None
    bias: bool = True
    dropout: bool = False
    """Dropout, and a residual."""
    mode: Mode = "forward"
    wanted: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    launch_bound: bool = False

    def parts(self, rest: Tensors) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """b and the residual, from the inputs that follow x and W."""
        return rest[0] if self.bias else None, rest[int(self.bias)] if self.dropout else None

    def ours(self, x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        bias, residual = self.parts(rest)
        p = DROPOUT_P if self.dropout else 0.0
        return GF.linear(
            x, weight, bias, activation=self.activation, residual=residual, dropout_p=p
        )

    def theirs(self, x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        bias, residual = self.parts(rest)
        y = F.linear(x, weight, bias)
        if self.activation is not None:
            y = TORCH[self.activation](y)
        return y if residual is None else F.dropout(y, DROPOUT_P) + residual

    def library(self, x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if self.mode == "forward":
            return torch.mm(x, weight.T)
        dy = rest[-1]
        return torch.mm(dy, weight) if self.wanted == (0,) else torch.mm(dy.T, x)

    @property
    def saves(self) -> str:
        """What the forward pass keeps; see ``gpunn.kernels.linear.saves``."""
        return saves(self.activation or "identity", [], DROPOUT_P * self.dropout, self.dropout)

    def work(self) -> tuple[int, int]:
        """Fewest bytes, and flops."""
        x, weight = self.rows * self.inner, self.inner * self.cols
        y, flops = self.rows * self.cols, 2 * self.rows * self.inner * self.cols
        sizes = (x, weight, self.cols)
        forward = x + weight + self.cols * self.bias + y * self.dropout + y
        operands = weight * (0 in self.wanted) + x * (1 in self.wanted)
        saved = y * (self.saves != "nothing")
        backward = y + saved + operands + sum(sizes[i] for i in self.wanted)
        n_products = len(set(self.wanted) & {0, 1})
        elements, n = {
            "forward": (forward, 1),
            "backward": (backward, n_products),
            "step": (forward + y * (self.saves == "saved") + backward, 1 + n_products),
        }[self.mode]
        return elements * self.dtype.itemsize, n * flops

    @property
    def name(self) -> str:
        gradients = ", ".join(("dx", "dW", "db")[i] for i in self.wanted)
        parts = ["bias"] * self.bias + [self.activation or ""] * bool(self.activation)
        parts += ["dropout", "residual"] * self.dropout
        suffix = {"forward": "", "backward": f": {gradients}", "step": ": forward and backward"}
        return (" + ".join(parts) or "bare") + suffix[self.mode]

    def case(self) -> Case:
        x, weight = (self.rows, self.inner), (self.cols, self.inner)
        y, bare = (self.rows, self.cols), not self.bias and self.activation is None
        shapes = [x, weight] + [(self.cols,)] * self.bias + [y] * self.dropout
        rows, inner, cols = reduced(self.rows), reduced(self.inner), reduced(self.cols)
        n_bytes, flops = self.work()
        return Case(
            op="linear",
            name=self.name,
            shapes=f"M={self.rows} K={self.inner} N={self.cols}",
            make=normal(*shapes, *[y] * bool(self.wanted), scales=(1.0, self.inner**-0.5)),
            ours=self.ours,
            theirs=self.theirs,
            bytes=n_bytes,
            flops=flops,
            small=replace(self, rows=rows, inner=inner, cols=cols).case,
            dtype=self.dtype,
            tf32=self.tf32,
            mode=self.mode,
            wanted=self.wanted,
            library=self.library if bare and len(self.wanted) < 2 else None,
            launch_bound=self.launch_bound,
            dropped=(lambda *inputs: inputs[-1]) if self.dropout else None,
        )


def linear_cases() -> list[Case]:
    """The sizes of a transformer's layers first, then what is unusual."""
    tokens, cols, everything = 8192, 4096, (0, 1, 2)
    specs = [
        Linear(tokens, inner, cols, activation, bias)
        for inner in (1024, 4096, 512, 8192)
        for bias, activation in ((True, "gelu"), (True, "relu"), (True, None), (False, None))
    ]
    specs += [Linear(tokens, inner, cols, "gelu", dropout=True) for inner in (1024, 4096)]
    specs += [
        Linear(tokens, inner, cols, "gelu", mode="backward", wanted=everything)
        for inner in (1024, 4096)
    ]
    specs += [
        Linear(tokens, 1024, cols, "relu", mode="backward", wanted=everything),
        Linear(tokens, 1024, cols, "gelu", mode="step", wanted=everything),
        Linear(tokens, 4096, cols, bias=False, mode="backward", wanted=(0,)),
        Linear(tokens, 4096, cols, bias=False, mode="backward", wanted=(1,)),
        Linear(16, 4096, cols, bias=False, launch_bound=True),
        Linear(16, 4096, cols, "gelu", launch_bound=True),
        Linear(1000, 1001, 1003, "gelu", launch_bound=True),
        Linear(tokens, 1024, cols, "gelu", dtype=torch.float32),
        Linear(tokens, 1024, cols, "gelu", dtype=torch.float32, tf32=True),
    ]
    return [spec.case() for spec in specs]
