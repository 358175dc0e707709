"""The Transformer: stacks of its layers, and an encoder beside a decoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.multihead_attention import rows_of, with_rows
from gpunn.functional.multihead_attention_arguments import additive_mask
from gpunn.nn.layer_norm import LayerNorm
from gpunn.nn.multihead_attention import is_nested_elsewhere
from gpunn.nn.transformer_layer import (
    Activation,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    adopt,
)


def _normalised(stack: Any, x: torch.Tensor) -> torch.Tensor:
    norm = stack.norm
    if norm is None:
        return x
    by_rows = isinstance(norm, LayerNorm) and not is_nested_elsewhere(x)
    y: torch.Tensor = with_rows(norm(rows_of(x)), x) if by_rows else norm(x)
    return y


def _adopt_stack(stack: Any, own: type, layer: type) -> None:
    """Give a stack that torch made, and all in it, gpunn's classes."""
    stack.__class__ = own
    adopt(stack)
    for each in stack.layers:
        each.__class__ = layer
        adopt(each)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder``: layers, then a normalisation.

    ``enable_nested_tensor`` and ``mask_check`` say how torch looks for its path for inference,
    which is not used. ``is_causal=None`` is False here, as to compare the mask with a causal one
    waits for the device: say True where it is, and the scores that it rules out are not computed.
    """

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        """The output of the last layer, normalised."""
        y = src
        for layer in self.layers:
            given, padding = mask, src_key_padding_mask
            if not isinstance(layer, TransformerEncoderLayer):  # to which torch gives numbers
                given, padding = (additive_mask(m, src.dtype) for m in (mask, padding))
            y = layer(y, src_mask=given, is_causal=bool(is_causal), src_key_padding_mask=padding)
        return _normalised(self, y)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``, as ``TransformerEncoder``."""

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """The output of the last layer, normalised."""
        y = tgt
        for layer in self.layers:
            y = layer(
                y, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=bool(tgt_is_causal), memory_is_causal=memory_is_causal,
            )  # fmt: skip
        return _normalised(self, y)


class Transformer(torch.nn.Transformer):
    """``torch.nn.Transformer``: a ``TransformerEncoder`` and a ``TransformerDecoder`` that sees it.

    Arguments, initialisation and ``state_dict`` are torch's; an encoder or decoder that is given
    stays what it is. As to ``src_is_causal`` and ``tgt_is_causal``, see ``TransformerEncoder``.

    Source: Vaswani et al. (2017), https://arxiv.org/abs/1706.03762.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout,
            activation, custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype,
        )  # fmt: skip
        if custom_encoder is None:
            _adopt_stack(self.encoder, TransformerEncoder, TransformerEncoderLayer)
        if custom_decoder is None:
            _adopt_stack(self.decoder, TransformerDecoder, TransformerDecoderLayer)

    def forward(
        self,
        src: torch.Tensor,
        tgt: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """The decoder's output for tgt beside the encoder's for src.

        Raises:
            RuntimeError: src and tgt differ in their number of sequences, or in features from the
                model.
        """
        batch = 0 if self.batch_first else 1
        if src.dim() == 3 and src.size(batch) != tgt.size(batch):
            raise RuntimeError(
                f"tgt: expected {src.size(batch)} sequences, as src has, got {tgt.size(batch)}"
            )
        for name, tensor in (("src", src), ("tgt", tgt)):
            if tensor.size(-1) != self.d_model:
                raise RuntimeError(
                    f"{name}: expected {self.d_model} features, got {tensor.size(-1)}"
                )
        memory = self.encoder(
            src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal
        )
        y: torch.Tensor = self.decoder(
            tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )  # fmt: skip
        return y
