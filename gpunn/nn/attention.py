"""Attention as a module, without weights."""

from __future__ import annotations

import torch

import gpunn.functional as GF
from gpunn.functional.attention_arguments import Alignment, Window


class ScaledDotProductAttention(torch.nn.Module):
    """``gpunn.functional.scaled_dot_product_attention`` with its settings kept.

    Args:
        dropout_p: of the probabilities, in training alone.
        is_causal, scale, enable_gqa, window, softcap, alignment: the function's.

    ``forward(query, key, value, attn_mask=None, *, alibi_slopes=None)``; (*, L, E), (*, S, E) and
    (*, S, Ev) to (*, L, Ev).
    """

    def __init__(
        self,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        window: Window | None = None,
        softcap: float | None = None,
        alignment: Alignment = "upper_left",
    ) -> None:
        super().__init__()
        self.dropout_p, self.is_causal, self.scale = dropout_p, is_causal, scale
        self.enable_gqa, self.window, self.softcap = enable_gqa, window, softcap
        self.alignment: Alignment = alignment

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *,
        alibi_slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        y: torch.Tensor = GF.scaled_dot_product_attention(
            query, key, value, attn_mask, self.dropout_p if self.training else 0.0,
            self.is_causal, self.scale, self.enable_gqa, window=self.window,
            alibi_slopes=alibi_slopes, softcap=self.softcap, alignment=self.alignment,
        )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        settings.pop("training")
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())
