"""What is benchmarked of the Transformer that translates: a training step, and a step of decoding.

Torch's network is ``torch.nn.Transformer`` with the same parameters; its decoding, which torch does
not have, is written here, from caches as large as they get, so that it can be compiled.

As to the tolerances, see ``transformer_cases.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

import gpunn.functional as GF
from gpunn import nn
from gpunn.models import TranslationTransformer
from gpunn.models.decoding import DecoderCache
from gpunn.profiling.case import Case, Tensors
from gpunn.profiling.transformer_cases import TOLERANCE, TOLERANCE_OF_LOGITS

SMOOTHING = 0.1
UNREAD = "transformer.encoder."  # when decoding


class Torchs(nn.Module):
    """The same network as one would write it in PyTorch alone."""

    def __init__(self, ours: TranslationTransformer) -> None:
        super().__init__()
        d_model, layer = ours.transformer.d_model, ours.transformer.decoder.layers[0]
        n_layers, d_hidden = len(ours.transformer.decoder.layers), layer.linear1.out_features
        self.scale = math.sqrt(d_model)
        self.source_embedding = torch.nn.Embedding(*ours.source_embedding.weight.shape)
        self.transformer = torch.nn.Transformer(
            d_model, ours.transformer.nhead, n_layers, n_layers, d_hidden, 0.0, batch_first=True
        )

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        """The logits of what follows each token of the target."""

        def embedded(tokens: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.source_embedding(tokens)
            return y * self.scale + table[: tokens.shape[1]]

        padding, length = source == 0, target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        y = self.transformer(
            embedded(source), embedded(target), tgt_mask=later, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return F.linear(y, self.source_embedding.weight)


class Decoder(nn.Module):
    """A step of decoding as a function of tensors, for a cache that holds all tokens but one."""

    def __init__(self, model: TranslationTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: torch.Tensor, lengths: torch.Tensor, *caches: Any) -> torch.Tensor:
        """Logits (N, vocabulary); the caches are of keys and values, own and the source's."""
        keys, values, source_keys, source_values, real = caches
        memory = list(zip(source_keys, source_values, strict=True))
        cache = DecoderCache(keys.shape[3], memory, real)
        cache.length, cache.lengths = keys.shape[3] - 1, lengths.clone()
        cache.keys, cache.values = list(keys), list(values)
        return self.model.next_logits(token, cache)


@dataclass(frozen=True)
class Network:
    """A Transformer without dropout, with one vocabulary, for sentences of one length."""

    vocabulary: int
    length: int
    d_model: int
    n_heads: int
    n_layers: int
    d_hidden: int

    def drawn(self) -> TranslationTransformer:
        """On torch's default device."""
        return TranslationTransformer(
            self.vocabulary, self.vocabulary, self.d_model, self.n_heads, self.n_layers,
            self.d_hidden, dropout=0.0, share_embeddings=True, max_length=self.length,
        )  # fmt: skip

    @cached_property
    def model(self) -> TranslationTransformer:
        """Without memory."""
        with torch.device("meta"):
            return self.drawn()

    @cached_property
    def torchs(self) -> Torchs:
        """Without memory."""
        with torch.device("meta"):
            return Torchs(self.model)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return tuple(name for name, _ in self.model.named_parameters())

    def parameters(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        """The table of positions, then the parameters as they start; from one seed the same."""
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(forked), device:
            torch.manual_seed(seed)
            drawn = tuple(p.detach() for p in self.drawn().to(dtype).parameters())
        table = GF.sinusoidal_encoding(self.length, self.d_model, device=device, dtype=dtype)
        return table, *drawn

    def state(self, table: torch.Tensor, *parameters: torch.Tensor) -> dict[str, torch.Tensor]:
        """As ``functional_call`` takes them."""
        buffers = {f"{side}_embedding.positional": table for side in ("source", "target")}
        return {**dict(zip(self.names, parameters, strict=True)), **buffers}


def _tokens(network: Network, device: torch.device, seed: int, *shape: int) -> torch.Tensor:
    """None of them special."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    return torch.randint(3, network.vocabulary, shape, generator=generator, device=device)


@dataclass(frozen=True)
class TrainingStep:
    """Gradients of the mean cross-entropy; inputs are source, target, positions, parameters, dloss.

    The target has one token more than there are to be predicted.
    """

    network: Network
    batch: int

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        length = self.network.length
        source = _tokens(self.network, device, seed, self.batch, length)
        target = _tokens(self.network, device, seed + 1, self.batch, length + 1)
        given = self.network.parameters(device, dtype, seed)
        return source, target, *given, given[0].new_ones(())

    def ours(
        self, source: torch.Tensor, target: torch.Tensor, *given: torch.Tensor
    ) -> torch.Tensor:
        state = self.network.state(*given)
        logits = functional_call(self.network.model, state, (source, target[:, :-1]))
        loss: torch.Tensor = GF.cross_entropy(
            logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0,
            label_smoothing=SMOOTHING,
        )  # fmt: skip
        return loss

    def theirs(
        self, source: torch.Tensor, target: torch.Tensor, table: torch.Tensor, *given: torch.Tensor
    ) -> torch.Tensor:
        state = dict(zip(self.network.names, given, strict=True))
        logits = functional_call(self.network.torchs, state, (source, target[:, :-1], table))
        return F.cross_entropy(
            logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0,
            label_smoothing=SMOOTHING,
        )  # fmt: skip

    def case(self) -> Case:
        """Parameters are read twice and their gradients written; what lies between is not counted.

        Three products a weight and token; of attention 3.5 times what its forward pass takes.
        """
        network, (d, length) = self.network, (self.network.d_model, self.network.length)
        n_layers, dense = network.n_layers, 2 * d * network.d_hidden
        weights = n_layers * (4 * d**2 + dense) + n_layers * (8 * d**2 + dense)
        weights += d * network.vocabulary
        pairs = n_layers * (length**2 + length**2 // 2 + length**2)
        inputs = self.make(torch.device("meta"), torch.bfloat16, 0)
        parameters = sum(tensor.numel() for tensor in inputs[3:-1])
        small = TrainingStep(Network(24, 8, 32, 2, 1, 16), 2)
        return Case(
            op="models",
            name="Transformer-base without dropout: forward and backward",
            shapes=f"{self.batch} × {length} to {length}",
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=3 * 2 * parameters + sum(tensor.nbytes for tensor in inputs[:3]),
            flops=6 * self.batch * length * weights + 7 * 2 * d * self.batch * pairs,
            small=small.case,
            mode="step",
            wanted=tuple(range(3, 3 + len(network.names))),
            tolerance=TOLERANCE,
        )


@dataclass(frozen=True)
class Decoding:
    """The logits of the next token of each translation, from a cache of all before.

    The inputs are tokens, the cache's lengths, keys and values, those of the source, which of its
    tokens are no padding, positions, and the decoder's parameters.
    """

    network: Network
    batch: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.network.names if not name.startswith(UNREAD))

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        network = self.network
        token = _tokens(network, device, seed, self.batch, 1)
        table, *drawn = network.parameters(device, dtype, seed)
        named = dict(zip(network.names, drawn, strict=True))
        shape = network.n_layers, self.batch, network.n_heads, network.length
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        caches = [
            torch.randn(
                *shape, network.d_model // network.n_heads,
                generator=generator, device=device, dtype=dtype,
            )
            for _ in range(4)
        ]  # fmt: skip
        real = torch.ones(self.batch, 1, 1, network.length, dtype=torch.bool, device=device)
        lengths = token.new_full((self.batch,), network.length - 1)
        return token, lengths, *caches, real, table, *(named[name] for name in self.names)

    def ours(self, *given: torch.Tensor) -> torch.Tensor:
        state = dict(zip((f"model.{name}" for name in self.names), given[8:], strict=True))
        state["model.target_embedding.positional"] = given[7]
        logits: torch.Tensor = functional_call(Decoder(self.network.model), state, given[:7])
        return logits

    def theirs(
        self,
        token: torch.Tensor,
        lengths: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        source_keys: torch.Tensor,
        source_values: torch.Tensor,
        real: torch.Tensor,
        table: torch.Tensor,
        *given: torch.Tensor,
    ) -> torch.Tensor:
        of, d = dict(zip(self.names, given, strict=True)), self.network.d_model
        position = lengths[:1]
        seen = torch.arange(keys.shape[3], device=keys.device) <= position

        def dense(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.linear(x, of[f"{name}.weight"], of[f"{name}.bias"])

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.layer_norm(x, x.shape[-1:], of[f"{name}.weight"], of[f"{name}.bias"])

        def split(x: torch.Tensor, name: str, rows: int) -> tuple[torch.Tensor, ...]:
            weight, bias = of[f"{name}.in_proj_weight"][:rows], of[f"{name}.in_proj_bias"][:rows]
            parts = F.linear(x, weight, bias).split(d, -1)
            return tuple(p.unflatten(2, (self.network.n_heads, -1)).transpose(1, 2) for p in parts)

        x = F.embedding(token, of["source_embedding.weight"]) * math.sqrt(d) + table[position]
        for i in range(self.network.n_layers):
            at = f"transformer.decoder.layers.{i}"
            q, k, v = split(x, f"{at}.self_attn", 3 * d)
            keys[i].index_copy_(2, position, k)
            values[i].index_copy_(2, position, v)
            y = F.scaled_dot_product_attention(q, keys[i], values[i], seen[None])
            y = dense(y.transpose(1, 2).flatten(2), f"{at}.self_attn.out_proj")
            x = norm(x + y, f"{at}.norm1")
            (q,) = split(x, f"{at}.multihead_attn", d)
            y = F.scaled_dot_product_attention(q, source_keys[i], source_values[i], real)
            y = dense(y.transpose(1, 2).flatten(2), f"{at}.multihead_attn.out_proj")
            x = norm(x + y, f"{at}.norm2")
            x = norm(x + dense(dense(x, f"{at}.linear1").relu(), f"{at}.linear2"), f"{at}.norm3")
        return F.linear(norm(x[:, -1], "transformer.decoder.norm"), of["source_embedding.weight"])

    def case(self) -> Case:
        """All is read once, but for the projections of the source, which were done before."""
        network, d = self.network, self.network.d_model
        inputs = self.make(torch.device("meta"), torch.bfloat16, 0)
        unread = 2 * network.n_layers * (2 * d**2 + 2 * d)
        weights = network.n_layers * (6 * d**2 + 2 * d * network.d_hidden) + d * network.vocabulary
        small = Decoding(Network(24, 8, 32, 2, 1, 16), 2)
        return Case(
            op="models",
            name="Transformer-base: the next token from a cache",
            shapes=f"{self.batch} × {network.length} to {network.length}",
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=sum(tensor.nbytes for tensor in inputs)
            + 2 * self.batch * network.vocabulary
            - unread,
            flops=2 * self.batch * (weights + 4 * network.length * d * network.n_layers),
            small=small.case,
            reads_all=False,
            launch_bound=True,
            tolerance=TOLERANCE_OF_LOGITS,
        )


def translation_cases() -> list[Case]:
    """The paper's base model, with one vocabulary of 37,000."""
    base = Network(37000, 128, 512, 8, 6, 2048)
    return [TrainingStep(base, 64).case(), Decoding(base, 32).case()]
