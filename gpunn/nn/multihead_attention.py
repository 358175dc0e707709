"""Multi-head attention with torch's parameters and call."""

from __future__ import annotations

import torch

import gpunn.functional as GF
from gpunn.functional.dispatch import decline


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on ``gpunn.functional.multi_head_attention_forward``.

    What the arguments mean, and is refused, stands there. There is one path for training and
    inference. Jagged nested tensors are taken in both, with batch_first, no masks and no weights;
    nested tensors that are not jagged are left to torch's path for inference.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's output, in the layout of query, and the probabilities or None."""
        if is_nested_elsewhere(query):
            decline("multihead_attention", "a nested tensor that is not jagged")
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                is_causal,
            )  # fmt: skip
        return GF.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight,
            self.in_proj_bias, self.bias_k, self.bias_v, self.add_zero_attn, self.dropout,
            self.out_proj.weight, self.out_proj.bias, self.training, key_padding_mask,
            need_weights, attn_mask, not self._qkv_same_embed_dim, self.q_proj_weight,
            self.k_proj_weight, self.v_proj_weight, None, None, average_attn_weights, is_causal,
            batch_first=self.batch_first,
        )  # fmt: skip


def is_nested_elsewhere(input: object) -> bool:
    """Whether this is a nested tensor, but not a jagged one."""
    if not isinstance(input, torch.Tensor):
        return False
    return input.is_nested and input.layout != torch.jagged
