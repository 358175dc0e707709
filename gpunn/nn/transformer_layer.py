"""The Transformer's layers: what adds, drops, normalises and activates is fused with the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.functional.activation import ActivationName
from gpunn.functional.dispatch import decline, record_fallback
from gpunn.functional.multihead_attention import rows_of, with_rows
from gpunn.nn.activation import GELU, ReLU
from gpunn.nn.dropout import Dropout
from gpunn.nn.layer_norm import LayerNorm
from gpunn.nn.linear import Linear
from gpunn.nn.multihead_attention import MultiheadAttention, is_nested_elsewhere
from gpunn.nn.overrides import overrides

Activation = str | Callable[[torch.Tensor], torch.Tensor]
Attention = Callable[[torch.Tensor], torch.Tensor]
OURS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Dropout: Dropout,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.Linear: Linear,
    torch.nn.MultiheadAttention: MultiheadAttention,
}
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "forward"
)  # fmt: skip
"""A layer's own forward, and what listens to it."""
BLOCKS = "_sa_block", "_mha_block", "_ff_block"
"""What torch's forward of a layer calls, and users replace; gpunn's computes past them."""
# What can be computed past its forward, by its part in a layer. What has one of CHANGES is called:
# it must not be passed by.
FUSIBLE: dict[str, tuple[type[torch.nn.Module], ...]] = {
    "activation": (GELU, ReLU, torch.nn.GELU, torch.nn.ReLU),
    "dropout": (Dropout,),
    "linear": (Linear,),
    "norm": (LayerNorm,),
}
CHANGES = *HOOKS, "activation", "dropout_p", "return_sum"


def adopt(layer: torch.nn.Module) -> None:
    """Give what torch made inside of a layer gpunn's classes; the activation is the user's."""
    for name, child in layer.named_children():
        if name != "activation":
            child.__class__ = OURS.get(type(child), type(child))


def _is_plain(part: str, module: Any) -> bool:
    """Whether a layer can be computed past its forward: it is none of the user's own making."""
    if type(module) not in FUSIBLE[part] or torch.nn.modules.module._has_any_global_hook():
        return False
    return not any(vars(module).get(name) for name in CHANGES)


def _may_fuse(**modules: Any) -> bool:
    """Whether all, each by its part, can be computed past their forward; the trace says if not."""
    for part, module in modules.items():
        if not _is_plain(part, module):
            reason = "has hooks or settings, or is not gpunn's: not fused with its neighbours"
            record_fallback("transformer", f"a {type(module).__name__} {reason}")
            return False
    return True


def _has_own_block(layer: torch.nn.Module, base: type[torch.nn.Module]) -> bool:
    """Whether a user replaced a block of torch's class ``base``; the trace says so."""
    found = overrides(layer, base, *BLOCKS)
    if found:
        reason = "a block of the user's own: torch's forward, of which nothing is fused"
        record_fallback("transformer", reason)
    return found


def _probability(dropout: Any) -> float:
    return float(dropout.p) if dropout.training else 0.0


def _name_of(activation: Any) -> ActivationName:
    """As linear calls it; None where it has no name there."""
    if isinstance(activation, torch.nn.Module) and not _is_plain("activation", activation):
        return None
    if activation in (F.relu, torch.relu, GF.relu) or isinstance(activation, torch.nn.ReLU):
        return "relu"
    if isinstance(activation, torch.nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return "gelu" if activation in (F.gelu, GF.gelu) else None


def _normalised(x: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x), and x, whose gradient beside it is added in the backward pass of the norm."""
    if not _may_fuse(norm=norm):
        return norm(x), x
    pair: tuple[torch.Tensor, torch.Tensor] = GF.layer_norm(
        x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, return_sum=True
    )
    return pair


def _normalised_sum(
    x: torch.Tensor, residual: torch.Tensor, dropout: Any, norm: Any, return_sum: bool = False
) -> Any:
    """norm(s) and, where it is asked for, s = residual + dropout(x), in one pass."""
    if _may_fuse(dropout=dropout, norm=norm):
        return GF.layer_norm(
            x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, residual=residual,
            dropout_p=_probability(dropout), return_sum=return_sum,
        )  # fmt: skip
    s = residual + dropout(x)
    return (norm(s), s) if return_sum else norm(s)


def _hidden(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """dropout(activation(linear1(x))), in one kernel."""
    name = _name_of(layer.activation)
    if name is None:
        reason = "an activation that linear does not have, or with hooks: not fused with it"
        record_fallback("transformer", reason)
    elif _may_fuse(linear=layer.linear1, dropout=layer.dropout):
        return GF.linear(
            x, layer.linear1.weight, layer.linear1.bias, activation=name,
            dropout_p=_probability(layer.dropout),
        )  # fmt: skip
    y: torch.Tensor = layer.dropout(layer.activation(layer.linear1(x)))
    return y


def _added(x: torch.Tensor, residual: torch.Tensor, linear: Any, dropout: Any) -> torch.Tensor:
    """residual + dropout(linear(x)), in one kernel."""
    if _may_fuse(linear=linear, dropout=dropout):
        return GF.linear(
            x, linear.weight, linear.bias, residual=residual, dropout_p=_probability(dropout)
        )
    y: torch.Tensor = residual + dropout(linear(x))
    return y


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` in few passes: what a residual adds is added on the way.

    After attention, dropout, residual and normalisation are one pass; linear1, activation (relu or
    gelu, by name, function or module) and dropout one kernel; with norm_first, linear2, dropout and
    residual too. A layer inside that has hooks, or is not gpunn's own, is called by itself, as the
    trace says; where ``_sa_block``, ``_mha_block`` or ``_ff_block`` is a subclass's or the layer's
    own, torch's forward calls all. There is one path for training and inference. Arguments are
    torch's; src may be a jagged nested tensor with batch_first and without masks. Other nested
    tensors are torch's.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        adopt(self)

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """The layer's output, of src's shape."""
        if _has_own_block(self, torch.nn.TransformerEncoderLayer):
            self.activation_relu_or_gelu = 0  # or torch, in inference, computes past the block
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if is_nested_elsewhere(src):
            decline("transformer", "a nested tensor that is not jagged")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = rows_of(src)
        h, x = _normalised(x, self.norm1) if self.norm_first else (x, x)
        h = with_rows(h, src)
        h = self.self_attn(
            h, h, h, key_padding_mask=src_key_padding_mask, need_weights=False, attn_mask=src_mask,
            is_causal=is_causal,
        )[0]  # fmt: skip
        h = rows_of(h)
        if self.norm_first:
            h, x = _normalised_sum(h, x, self.dropout1, self.norm2, return_sum=True)
            y = _added(_hidden(self, h), x, self.linear2, self.dropout2)
        else:
            x = _normalised_sum(h, x, self.dropout1, self.norm1)
            y = self.linear2(_hidden(self, x))
            y = _normalised_sum(y, x, self.dropout2, self.norm2)
        return with_rows(y, src)


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer``, as ``TransformerEncoderLayer``."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        adopt(self)

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """The layer's output, of tgt's shape."""
        if _has_own_block(self, torch.nn.TransformerDecoderLayer):
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip

        def attended(layer: Any, x: torch.Tensor, other: Any, *masks: Any) -> torch.Tensor:
            query = with_rows(x, tgt)
            memory = query if other is None else other
            mask, padding_mask, is_causal = masks
            y = layer(
                query, memory, memory, key_padding_mask=padding_mask, need_weights=False,
                attn_mask=mask, is_causal=is_causal,
            )[0]  # fmt: skip
            return rows_of(y)

        own = None, tgt_mask, tgt_key_padding_mask, tgt_is_causal
        others = memory, memory_mask, memory_key_padding_mask, memory_is_causal
        y = self.around(
            rows_of(tgt),
            lambda x: attended(self.self_attn, x, *own),
            lambda x: attended(self.multihead_attn, x, *others),
        )
        return with_rows(y, tgt)

    def around(self, x: torch.Tensor, own: Attention, cross: Attention) -> torch.Tensor:
        """The layer's output, whatever computes the attention of x to itself and to the memory.

        ``forward`` gives it those of a whole target; decoding, those that read a cache.
        """
        if self.norm_first:
            h, x = _normalised(x, self.norm1)
            h, x = _normalised_sum(own(h), x, self.dropout1, self.norm2, return_sum=True)
            h, x = _normalised_sum(cross(h), x, self.dropout2, self.norm3, return_sum=True)
            return _added(_hidden(self, h), x, self.linear2, self.dropout3)
        x = _normalised_sum(own(x), x, self.dropout1, self.norm1)
        x = _normalised_sum(cross(x), x, self.dropout2, self.norm2)
        h = self.linear2(_hidden(self, x))
        y: torch.Tensor = _normalised_sum(h, x, self.dropout3, self.norm3)
        return y
