"""The input of a transformer as a layer: lookups, their scale, positions and dropout."""

from __future__ import annotations

from typing import Any

import torch

import gpunn.functional as GF


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` on ``gpunn.functional.embedding``, with what is fused with it.

    ``forward(input, positional=None, positions=None)``: the function's; the layer's own positional
    table where none is given, as a second layer's ``weight`` in GPT-2.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            device, dtype: torch's.
        scale: what vectors are multiplied by, such as sqrt(embedding_dim).
        positional: a table (positions, embedding_dim); a ``Parameter`` is learned, and in the
            ``state_dict``; another tensor, as ``sinusoidal_encoding`` makes it, moves with the
            layer.
        dropout_p: in training alone.

    Raises:
        ValueError: dropout_p is no probability, or positional of another width.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        scale: float = 1.0,
        positional: torch.Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
            sparse, _weight, _freeze, device, dtype,
        )  # fmt: skip
        self._fuse(scale, positional, dropout_p)

    def _fuse(self, scale: float, positional: torch.Tensor | None, dropout_p: float) -> None:
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")
        if positional is not None and positional.shape[1:] != (self.embedding_dim,):
            raise ValueError(
                f"positional: expected (positions, {self.embedding_dim}), "
                f"got {tuple(positional.shape)}"
            )
        self.scale, self.dropout_p = scale, dropout_p
        if isinstance(positional, torch.nn.Parameter):
            self.register_parameter("positional", positional)
        else:
            self.register_buffer("positional", positional, persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: torch.Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        scale: float = 1.0,
        positional: torch.Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Embedding:
        """A layer with this weight, frozen by default, as torch's; and what is fused with it."""
        layer: Embedding = super().from_pretrained(
            embeddings, freeze, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
        del layer.positional
        layer._fuse(scale, positional, dropout_p)
        return layer

    def forward(
        self,
        input: torch.Tensor,
        positional: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # a layer of torch's that was given its class here has none of what is fused
        given = vars(self)
        own = getattr(self, "positional", None) if positional is None else positional
        return GF.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type,
            self.scale_grad_by_freq, self.sparse, scale=given.get("scale", 1.0), positional=own,
            positions=positions, dropout_p=given.get("dropout_p", 0.0) if self.training else 0.0,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """torch's description, and the fused parts where there are any."""
        given, parts = vars(self), [super().extra_repr()]
        parts += [f"{name}={given[name]}" for name in ("scale", "dropout_p") if name in given]
        plain = ("scale=1.0", "dropout_p=0.0")
        own = getattr(self, "positional", None)
        parts += [] if own is None else [f"positional={tuple(own.shape)}"]
        return ", ".join(part for part in parts if part not in plain)


def fill_sinusoidal(table: torch.Tensor, base: float = 10000.0) -> None:
    """Write sines and cosines into a table that was a meta tensor, if it no longer is one.

    As it is not in the ``state_dict``, ``to_empty`` would leave anything in it.
    """
    if not table.is_meta:
        made = GF.sinusoidal_encoding(*table.shape, base=base, device=table.device)
        table.copy_(made)


class PositionalEncoding(torch.nn.Module):
    """y = dropout(x + PE) for x (*, length, d_model), PE of sines and cosines.

    Where x is looked up, ``Embedding`` adds the same in its own pass: give it this layer's
    ``table``, or ``gpunn.functional.sinusoidal_encoding``.

    Args:
        d_model, base, device, dtype: as ``sinusoidal_encoding`` takes them.
        dropout_p: in training alone.
        max_len: positions that there may be.

    Raises:
        ValueError: dropout_p is no probability.

    Source: A. Vaswani et al., "Attention is all you need", 2017, section 3.5.
    """

    table: torch.Tensor

    def __init__(
        self,
        d_model: int,
        dropout_p: float = 0.1,
        max_len: int = 5000,
        *,
        base: float = 10000.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")
        self.dropout_p = dropout_p
        table = GF.sinusoidal_encoding(max_len, d_model, base=base, device=device, dtype=dtype)
        self.base = base
        self.register_buffer("table", table, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        was_meta = self.table.is_meta
        super()._apply(fn, recurse)
        if was_meta:
            fill_sinusoidal(self.table, self.base)
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output; RuntimeError where input has more positions, or another width."""
        length, (max_len, d_model) = input.shape[-2], self.table.shape
        if length > max_len or input.shape[-1] != d_model:
            raise RuntimeError(
                f"input: PositionalEncoding expects (*, up to {max_len}, {d_model}), "
                f"got {tuple(input.shape)}"
            )
        return GF.dropout(input + self.table[:length], self.dropout_p, self.training)

    def extra_repr(self) -> str:
        max_len, d_model = self.table.shape
        return f"{d_model}, dropout_p={self.dropout_p}, max_len={max_len}"
