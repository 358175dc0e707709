"""What is benchmarked of lookups: the inputs of GPT-2 and of the first Transformer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.profiling.case import Case, Mode, Tensors


@dataclass(frozen=True)
class Lookup:
    """Tokens, the weight, and a positional table, if there is one; dy.

    A token is row i with a probability in proportion to 1 / (i + 1): Zipf's law.
    """

    name: str
    sequences: int
    length: int
    rows: int
    columns: int
    scale: float = 1.0
    positional: bool = False
    mode: Mode = "forward"

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        shape = self.sequences, self.length
        tokens = torch.empty(shape, dtype=torch.int64, device=device)
        shapes: list[tuple[int, ...]] = [(self.rows, self.columns)]
        shapes += [(self.length, self.columns)] * self.positional
        shapes += [(*shape, self.columns)] * (self.mode != "forward")
        others = [torch.empty(s, dtype=dtype, device=device) for s in shapes]
        if device.type != "meta":
            generator = torch.Generator(device).manual_seed(seed)
            shares = self.shares().to(device, torch.float32)
            drawn = torch.multinomial(shares, tokens.numel(), True, generator=generator)
            tokens.copy_(drawn.view(shape))
            for tensor in others:
                tensor.normal_(generator=generator)
        return tokens, *others

    def shares(self) -> torch.Tensor:
        """The probabilities of the rows."""
        parts = 1 / torch.arange(1, self.rows + 1, dtype=torch.float64)
        return parts / parts.sum()

    def ours(
        self, tokens: torch.Tensor, weight: torch.Tensor, *given: torch.Tensor
    ) -> torch.Tensor:
        table = given[0] if given else None
        return GF.embedding(tokens, weight, scale=self.scale, positional=table)

    def theirs(
        self, tokens: torch.Tensor, weight: torch.Tensor, *given: torch.Tensor
    ) -> torch.Tensor:
        y = F.embedding(tokens, weight)
        y = y if self.scale == 1 else y * self.scale
        return y + given[0] if given else y

    def bytes(self) -> int:
        """In bfloat16: of the weight as many rows as on average are looked up, or all gradients."""
        n_tokens = self.sequences * self.length
        looked_up = round(float((1 - (1 - self.shares()) ** n_tokens).sum()))
        rows = looked_up if self.mode == "forward" else self.rows
        return 2 * (n_tokens + rows + self.length * self.positional) * self.columns + 8 * n_tokens

    def case(self) -> Case:
        suffix = "" if self.mode == "forward" else ": gradients"
        n_tables = 1 + self.positional
        return Case(
            op="embedding",
            name=f"{self.name}{suffix}",
            shapes=f"{self.sequences} × {self.length} of {self.rows} × {self.columns}",
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=self.bytes(),
            flops=0,
            small=lambda: replace(self, sequences=2, length=7, rows=20).case(),
            mode=self.mode,
            reads_all=False,
            wanted=tuple(range(1, 1 + n_tables)) if self.mode != "forward" else (),
        )


def embedding_cases() -> list[Case]:
    """GPT-2's words alone, and with its learned positions; the paper's scale, too."""
    modes: tuple[Mode, ...] = ("forward", "backward")
    found = []
    for mode in modes:
        found += [
            Lookup("embedding", 16, 1024, 50257, 768, mode=mode),
            Lookup("embedding + positions", 16, 1024, 50257, 768, positional=True, mode=mode),
        ]
    return [spec.case() for spec in found] + [
        Lookup("scale embedding + positions", 64, 256, 37000, 512, 512**0.5, True).case()
    ]
