"""Rotary position embedding as a layer that makes its angles."""

from __future__ import annotations

from typing import Any

import torch

import gpunn.functional as GF


class RotaryEmbedding(torch.nn.Module):
    """``gpunn.functional.rotary_embedding`` by the angles of positions.

    Has no parameters and nothing in the ``state_dict``. Tables of cos and sin are float32 whatever
    type the model is converted to, and kept for the longest sequence so far; in ``torch.compile``,
    and for given positions, they are made in each call.

    Args:
        dim: the elements of a head that turn; the rest passes through.
        base: of the angles t / base^(2i / dim); 500,000 in Llama 3.
        interleaved: whether pairs are neighbours, and not dim / 2 apart.

    Raises:
        ValueError: dim is not positive and even.

    Source: J. Su et al., "RoFormer", 2021, https://arxiv.org/abs/2104.09864.
    """

    def __init__(self, dim: int, base: float = 10000.0, *, interleaved: bool = False) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = dim, base, interleaved
        self._kept = GF.rotary_tables(0, dim, base=base)

    def tables(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the positions 0 to length - 1, (length, dim / 2)."""
        if torch.compiler.is_compiling():
            return GF.rotary_tables(length, self.dim, base=self.base, device=device)
        cos, sin = self._kept
        if cos.shape[0] < length or cos.device != device:
            with torch.inference_mode(False):  # tables of inference cannot be used in training
                cos, sin = GF.rotary_tables(length, self.dim, base=self.base, device=device)
            # Not the stand-ins that a model is traced with: they could not be computed with later.
            if type(cos) is torch.Tensor and not torch._is_functional_tensor(cos):
                self._kept = cos, sin
        return cos[:length], sin[:length]

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query and key (batch, heads, length, head), turned.

        ``positions``: (length,) or (batch, length), as in decoding from a cache; by default from 0.
        """
        if positions is None:
            cos, sin = self.tables(query.shape[-2], query.device)
        else:
            cos, sin = GF.rotary_tables(positions, self.dim, base=self.base)
        turned: Any = GF.rotary_embedding(
            query, key, cos, sin, interleaved=self.interleaved, rotary_dim=self.dim
        )
        return turned  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
