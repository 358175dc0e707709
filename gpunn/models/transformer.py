"""The Transformer that translates: an encoder reads a sentence, a decoder writes another.

Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser and Polosukhin, "Attention is all you
need", 2017, https://arxiv.org/abs/1706.03762.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import gpunn.functional as GF
from gpunn import nn
from gpunn.models.decoding import DecoderCache, Special, beam_search, greedy
from gpunn.models.generation import evaluating
from gpunn.nn.embedding import fill_sinusoidal
from gpunn.nn.overrides import overrides
from gpunn.nn.transformer_layer import BLOCKS, HOOKS


class AttentionMaps(NamedTuple):
    """Attention's probabilities, one tensor (N, heads, queries, keys) for each layer asked for."""

    encoder: list[torch.Tensor]
    """Of the source to itself, (N, heads, S, S)."""
    decoder: list[torch.Tensor]
    """Of the target to itself and what came before, (N, heads, T, T)."""
    cross: list[torch.Tensor]
    """Of the target to the source, (N, heads, T, S)."""


class TranslationTransformer(nn.Module):
    """Source tokens (N, S) and target tokens (N, T) to logits (N, T, target_size).

    Row i of the logits is for what follows target token i: for training, the target begins with
    the start and lacks its last token, and the logits are compared with the target from its second
    token on, as by ``gpunn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(),
    ignore_index=padding_index, label_smoothing=0.1)``.

    Tokens are looked up, scaled by √d_model and added to sines and cosines of their positions;
    ``transformer``, an ``nn.Transformer`` with torch's parameters, does the rest but the output
    layer, which has no bias. As torch's, it has what the paper's lacks: a normalisation after each
    stack, and dropout of attention's probabilities and inside of the dense layers. Shorter
    sentences are padded at their end; padding is not attended to. Of a target that is padded, the
    rows of its padding mean nothing.

    Matrices start as Xavier's (uniform), embeddings from a normal distribution of deviation
    1 / √d_model, so that their scaled vectors are of the size of the positions.

    Args:
        source_size, target_size: the numbers of tokens of the vocabularies.
        d_model, n_heads, n_layers, d_hidden: the width of the residual stream, the heads that it is
            divided among, the layers of the encoder, and as many of the decoder, and the width
            inside of their dense layers.
        dropout: its probability, wherever there is one.
        share_embeddings: one matrix for source, target and output (section 3.4 of the paper),
            where the vocabularies are one.
        share_output: one matrix for target and output, whatever the vocabulary of the source
            (Press and Wolf, "Using the output embedding to improve language models", 2017,
            https://arxiv.org/abs/1608.05859).
        max_length: the longest sentence.
        norm_first: normalise before each layer rather than, as in the paper, after it.
        padding_index, start_index, end_index: the tokens that are no words.

    Raises:
        ValueError: heads that do not divide the width, a dropout outside of [0, 1], embeddings
            to share of vocabularies of two sizes; in forward, tokens of another shape or longer
            than ``max_length``.
    """

    needs_gpunn = True
    """Its layers are called with residuals and positions: see ``gpunn.restore``."""

    def __init__(
        self,
        source_size: int,
        target_size: int,
        d_model: int = 512,
        n_heads: int = 8,
        n_layers: int = 6,
        d_hidden: int = 2048,
        *,
        dropout: float = 0.1,
        share_embeddings: bool = False,
        share_output: bool = False,
        max_length: int = 512,
        norm_first: bool = False,
        padding_index: int = 0,
        start_index: int = 1,
        end_index: int = 2,
    ) -> None:
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads: expected a divisor of d_model = {d_model}, got {n_heads}")
        if share_embeddings and source_size != target_size:
            raise ValueError(
                "share_embeddings: expected vocabularies of one size, got "
                f"{source_size} and {target_size}"
            )
        self.max_length = max_length
        self.special = Special(padding_index, start_index, end_index)
        table = GF.sinusoidal_encoding(max_length, d_model)

        def embedding(size: int) -> nn.Embedding:
            layer = nn.Embedding(
                size, d_model, scale=math.sqrt(d_model), positional=table, dropout_p=dropout
            )
            torch.nn.init.normal_(layer.weight, std=d_model**-0.5)
            return layer

        self.source_embedding = embedding(source_size)
        self.target_embedding = embedding(target_size)
        options: Any = {"batch_first": True, "norm_first": norm_first}
        # As nn.Transformer makes it, but for torch's warnings of a path that is not used here.
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d_model, n_heads, d_hidden, dropout, **options),
            n_layers, nn.LayerNorm(d_model), enable_nested_tensor=False,
        )  # fmt: skip
        self.transformer = nn.Transformer(
            d_model, n_heads, n_layers, n_layers, d_hidden, dropout, custom_encoder=encoder,
            **options,
        )  # fmt: skip
        self.output = nn.Linear(d_model, target_size, bias=False)
        torch.nn.init.xavier_uniform_(self.output.weight)
        if share_embeddings:
            self.target_embedding.weight = self.source_embedding.weight
        if share_embeddings or share_output:
            self.output.weight = self.target_embedding.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        embeddings: Any = self.source_embedding, self.target_embedding
        were_meta = [layer.positional.is_meta for layer in embeddings]
        super()._apply(fn, recurse)
        for layer, was_meta in zip(embeddings, were_meta, strict=True):
            if was_meta:
                fill_sinusoidal(layer.positional)
        return self

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The logits (N, T, target_size) of what follows each token of the target."""
        self._check(source, "source")
        self._check(target, "target")
        padding, length = source == self.special.padding, target.shape[1]
        # The mask is for torch; gpunn's layers are told that it is causal, and do not read it.
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        y = self.transformer(
            self.source_embedding(source), self.target_embedding(target), tgt_mask=later,
            src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True,
        )  # fmt: skip
        logits: torch.Tensor = self.output(y)
        return logits

    def _check(self, tokens: torch.Tensor, name: str) -> None:
        if tokens.dim() != 2 or tokens.shape[1] > self.max_length:
            raise ValueError(
                f"{name}: expected shape (N, L), with L up to {self.max_length}, "
                f"got {tuple(tokens.shape)}"
            )

    def read(self, source: torch.Tensor, max_length: int | None = None) -> DecoderCache:
        """Encode source tokens (N, S): the cache of a decoder for ``max_length`` tokens.

        None: for as many as the model takes.

        Raises:
            RuntimeError: attention in the decoder has hooks, or a forward that is not gpunn's, or a
                layer has blocks of its own: what reads a cache would pass them by.
            ValueError: source tokens of another shape, or lengths over the model's.
        """
        self._check(source, "source")
        max_length = self.max_length if max_length is None else max_length
        if not 1 <= max_length <= self.max_length:
            raise ValueError(f"max_length: expected 1 to {self.max_length}, got {max_length}")
        _check_cacheable(self.transformer.decoder)
        padding = source == self.special.padding
        encoder: Any = self.transformer.encoder
        memory = encoder(self.source_embedding(source), src_key_padding_mask=padding)
        pairs = []
        for layer in self._layers():
            attention = layer.multihead_attn
            key, value = _projected(attention, memory, 1, 3)
            pairs.append((key, value))
        return DecoderCache(max_length, pairs, ~padding[:, None, None])

    def next_logits(self, tokens: torch.Tensor, cache: DecoderCache) -> torch.Tensor:
        """The logits (N, target_size) of what follows ``tokens``, which the cache then holds.

        ``tokens`` (N, L) are of any length for a new cache, one each later. Attention to what is in
        the cache has no dropout.

        Raises:
            ValueError: more tokens than there is room for, or several beside what is in the cache.
        """
        positions = cache.advance(tokens)
        x = self.target_embedding(tokens, positions=positions)
        for i, layer in enumerate(self._layers()):
            x = _decoded(layer, i, x, cache)
        norm: Any = self.transformer.decoder.norm
        logits: torch.Tensor = self.output(norm(x[:, -1]))
        return logits

    def _layers(self) -> Iterator[Any]:
        yield from self.transformer.decoder.layers

    @torch.no_grad()
    def translate(self, source: torch.Tensor, max_length: int | None = None) -> torch.Tensor:
        """The likeliest token, one after the other: (N, up to ``max_length``), padded.

        Without the start, with the end where it was reached, and without dropout, whatever the
        mode. The host waits for the device after every token, to see whether all have ended.

        Raises:
            ValueError: source tokens of another shape, or lengths over the model's.
        """
        with evaluating(self):
            return greedy(
                self.next_logits, self.read(source, max_length), len(source), self.special
            )

    @torch.no_grad()
    def beam_search(
        self,
        source: torch.Tensor,
        max_length: int | None = None,
        *,
        n_beams: int = 4,
        length_penalty: float = 0.6,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``translate``, but the best of ``n_beams`` at a time; and its score, (N,).

        The score is log p(translation) / ((5 + length) / 6)^length_penalty, where the length
        counts the end, too; what has not ended at ``max_length`` counts as if it had. A beam holds
        the ``n_beams`` of the best score, ended or not: one beam is the greedy choice.

        Raises:
            ValueError: as ``translate``; no beam, or a length_penalty below 0.
        """
        if n_beams < 1:
            raise ValueError(f"n_beams: expected 1 or more, got {n_beams}")
        if not length_penalty >= 0:
            raise ValueError(f"length_penalty: expected 0 or more, got {length_penalty}")
        with evaluating(self):
            cache = self.read(source, max_length)
            return beam_search(
                self.next_logits, cache, len(source), self.special, n_beams, length_penalty
            )

    @torch.no_grad()
    def attention_maps(
        self, source: torch.Tensor, target: torch.Tensor, layers: Sequence[int] | None = None
    ) -> AttentionMaps:
        """What ``forward`` attends to, without dropout, in these layers; None: in all.

        Raises:
            IndexError: there is no such layer.
            ValueError: as ``forward``.
        """
        encoder: Any = self.transformer.encoder.layers
        decoder: Any = self.transformer.decoder.layers
        chosen = range(len(decoder)) if layers is None else layers
        own = [encoder[i].self_attn for i in chosen]
        theirs = [decoder[i].self_attn for i in chosen]
        cross = [decoder[i].multihead_attn for i in chosen]
        with evaluating(self), _watched([*own, *theirs, *cross]) as seen:
            self(source, target)
        return AttentionMaps(*([seen[a] for a in part] for part in (own, theirs, cross)))


@contextmanager
def _watched(attentions: Sequence[nn.Module]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """In the block, these compute their weights, too, and each is found under its layer."""
    seen: dict[nn.Module, torch.Tensor] = {}

    def ask(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        seen[layer] = output[1]

    hooks = [layer.register_forward_pre_hook(ask, with_kwargs=True) for layer in attentions]
    hooks += [layer.register_forward_hook(keep) for layer in attentions]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _projected(attention: Any, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Some of queries, keys and values, (how many, N, heads, L, head), in one product."""
    rows = slice(first * attention.embed_dim, last * attention.embed_dim)
    packed: torch.Tensor = GF.linear(
        x, attention.in_proj_weight[rows], attention.in_proj_bias[rows]
    )
    shape = last - first, attention.num_heads, attention.head_dim
    parts: torch.Tensor = packed.unflatten(2, shape).permute(2, 0, 3, 1, 4)
    return parts


def _decoded(layer: Any, i: int, x: torch.Tensor, cache: DecoderCache) -> torch.Tensor:
    """New tokens, (N, L, d_model), after decoder layer i."""

    def joined(attention: Any, heads: torch.Tensor) -> torch.Tensor:
        last = attention.out_proj
        y: torch.Tensor = GF.linear(heads.transpose(1, 2).flatten(2), last.weight, last.bias)
        return y

    def own(x: torch.Tensor) -> torch.Tensor:
        query, key, value = _projected(layer.self_attn, x, 0, 3)
        return joined(layer.self_attn, cache.attend(i, query, key, value))

    def cross(x: torch.Tensor) -> torch.Tensor:
        query = _projected(layer.multihead_attn, x, 0, 1)[0]
        return joined(layer.multihead_attn, cache.attend_to_source(i, query))

    y: torch.Tensor = layer.around(x, own, cross)
    return y


def _check_cacheable(decoder: Any) -> None:
    """Refuse what decoding from a cache would pass by: another forward or block, or a hook."""
    passed_by: list[tuple[Any, type[torch.nn.Module]]] = [(decoder, nn.TransformerDecoder)]
    for layer in decoder.layers:
        passed_by.append((layer, nn.TransformerDecoderLayer))
        for attention in (layer.self_attn, layer.multihead_attn):
            passed_by += [(attention, nn.MultiheadAttention), (attention.out_proj, torch.nn.Linear)]
    for module, expected in passed_by:
        if overrides(module, expected, "forward", *BLOCKS) or any(map(vars(module).get, HOOKS)):
            raise RuntimeError(
                f"decoder: a cache of keys and values expects gpunn.nn's {expected.__name__} "
                f"without hooks or methods of its own, got {type(module).__name__}"
            )


def noam_rate(step: int, d_model: int, warm_up: int = 4000, factor: float = 1.0) -> float:
    """factor / √d_model · min(1 / √step, step / warm_up^1.5), the paper's learning rate.

    It rises in a line for ``warm_up`` steps, then falls as 1 / √step. As a schedule, with an
    optimiser whose own rate is 1:
    ``LambdaLR(optimizer, lambda done: noam_rate(done + 1, d_model))``.

    Raises:
        ValueError: a step or warm_up below 1.

    Source: section 5.3, equation 3.
    """
    if step < 1 or warm_up < 1:
        raise ValueError(f"step, warm_up: expected 1 or more, got {step} and {warm_up}")
    return float(factor * d_model**-0.5 * min(step**-0.5, step * warm_up**-1.5))


def transformer_base(source_size: int, target_size: int, **options: Any) -> TranslationTransformer:
    """The paper's base model: 6 + 6 layers, 8 heads, d_model 512, d_hidden 2048, dropout 0.1.

    ``options`` are ``TranslationTransformer``'s.
    """
    return TranslationTransformer(source_size, target_size, **options)


def transformer_big(source_size: int, target_size: int, **options: Any) -> TranslationTransformer:
    """The paper's big model: 6 + 6 layers, 16 heads, d_model 1024, d_hidden 4096, dropout 0.3.

    ``options`` are ``TranslationTransformer``'s.
    """
    sizes = {"d_model": 1024, "n_heads": 16, "d_hidden": 4096, "dropout": 0.3}
    return TranslationTransformer(source_size, target_size, **{**sizes, **options})


def transformer_small(source_size: int, target_size: int, **options: Any) -> TranslationTransformer:
    """One for a CPU: 2 + 2 layers, 4 heads, d_model 128, d_hidden 256, dropout 0.05.

    ``options`` are ``TranslationTransformer``'s.
    """
    sizes = {"d_model": 128, "n_heads": 4, "n_layers": 2, "d_hidden": 256, "dropout": 0.05}
    return TranslationTransformer(source_size, target_size, **{**sizes, **options})
