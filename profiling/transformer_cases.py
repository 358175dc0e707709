"""What is benchmarked of a Transformer: GPT-2's training step, and a step of its decoding.

Torch's network is written here, of the same parameters, as one would write it in PyTorch alone; the
cache that it decodes from is as large from the first token, so that it can be compiled.

In bfloat16 the gradients of two correct networks lie further apart than those of one op. In PyTorch
2.13 on a CPU, those of 12 layers of 384 channels (2,048 words, 2 × 128 tokens) differ from
float32's by up to 0.046 of their norm, and the logits of a decoded token by 0.011. The
tests compare small networks in float32, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.func import functional_call

from gpunn import nn
from gpunn.models import GPT, KeyValueCache
from gpunn.profiling.case import Case, Tensors

TOLERANCE, TOLERANCE_OF_LOGITS = 0.1, 0.025
"""Twice the differences above, since both networks have them; that of zeros is 1."""
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Decoder(nn.Module):
    """A step of decoding as a function of tensors, for a cache that holds all tokens but one."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(
        self, token: torch.Tensor, lengths: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Logits (N, vocab_size) for tokens (N, 1), lengths (N,) of the cache, and its tensors."""
        cache = KeyValueCache(keys.shape[3])
        cache.length, cache.lengths = keys.shape[3] - 1, lengths.clone()
        cache.keys, cache.values = list(keys), list(values)
        return self.gpt.next_logits(token, cache)


@dataclass(frozen=True)
class Network:
    """A GPT without dropout, in ours and in torch's operations."""

    vocab_size: int
    length: int
    n_embd: int
    n_layer: int
    n_head: int

    @cached_property
    def gpt(self) -> GPT:
        """Without memory."""
        with torch.device("meta"):
            return self.drawn()

    def drawn(self) -> GPT:
        """On torch's default device."""
        sizes = self.vocab_size, self.length, self.n_embd, self.n_layer, self.n_head
        return GPT(*sizes, dropout=0.0).eval()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return tuple(name for name, _ in self.gpt.named_parameters())

    def parameters(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        """As they start; from the same seed the same."""
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(forked), device:
            torch.manual_seed(seed)
            return tuple(parameter.detach() for parameter in self.drawn().to(dtype).parameters())

    def hidden(
        self,
        parameters: Sequence[torch.Tensor],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
    ) -> torch.Tensor:
        """What the last normalisation gives, in torch's operations."""
        of = dict(zip(self.names, parameters, strict=True))

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.layer_norm(x, x.shape[-1:], of[f"{name}.weight"], of[f"{name}.bias"])

        def dense(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.linear(x, of[f"{name}.weight"], of[f"{name}.bias"])

        x = F.embedding(tokens, of["wte.weight"]) + F.embedding(positions, of["wpe.weight"])
        for layer in range(self.n_layer):
            at = f"h.{layer}"
            packed = dense(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").chunk(3, -1)
            q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in packed)
            y = attention(layer, q, k, v).transpose(1, 2).flatten(2)
            x = x + dense(y, f"{at}.attn.c_proj")
            y = F.gelu(dense(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc"), approximate="tanh")
            x = x + dense(y, f"{at}.mlp.c_proj")
        return norm(x, "ln_f")

    @cached_property
    def n_weights(self) -> int:
        """Numbers in the matrices that a token is multiplied with; the output's is one of them."""
        return 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd


@dataclass(frozen=True)
class TrainingStep:
    """Gradients of the mean cross-entropy; inputs are tokens, targets, parameters and dloss."""

    network: Network
    batch: int

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        parameters = self.network.parameters(device, dtype, seed)
        shape = 2, self.batch, self.network.length
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        tokens, targets = torch.randint(
            self.network.vocab_size, shape, generator=generator, device=device
        )
        return tokens, targets, *parameters, parameters[0].new_ones(())

    def ours(
        self, tokens: torch.Tensor, targets: torch.Tensor, *given: torch.Tensor
    ) -> torch.Tensor:
        state = dict(zip(self.network.names, given, strict=True))
        loss: torch.Tensor = functional_call(self.network.gpt, state, (tokens, targets))
        return loss

    def theirs(
        self, tokens: torch.Tensor, targets: torch.Tensor, *given: torch.Tensor
    ) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)

        def causal(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        x = self.network.hidden(given, tokens, positions, causal)
        logits = F.linear(x, given[0])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def case(self) -> Case:
        """Parameters are read twice and their gradients written; what lies between is not counted.

        Three products a weight and token; of attention 3.5 times what its forward pass takes.
        """
        network, n_tokens = self.network, self.batch * self.network.length
        n_pairs = self.batch * network.length**2 // 2
        small = TrainingStep(Network(48, 16, 32, 1, 2), 2)
        return Case(
            op="models",
            name="GPT-124M without dropout: forward and backward",
            shapes=f"{self.batch} × {network.length}",
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=3 * 2 * sum(p.numel() for p in network.gpt.parameters()) + 16 * n_tokens,
            flops=6 * n_tokens * network.n_weights
            + 7 * 4 * n_pairs * network.n_embd * network.n_layer // 2,
            small=small.case,
            mode="step",
            wanted=tuple(range(2, 2 + len(network.names))),
            tolerance=TOLERANCE,
        )


@dataclass(frozen=True)
class Decoding:
    """The logits of the next token of each sequence, from a cache of all before.

    The inputs are tokens, the cache's lengths, keys and values, and parameters.
    """

    network: Network
    batch: int

    def make(self, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        network = self.network
        parameters = network.parameters(device, dtype, seed)
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        token = torch.randint(
            network.vocab_size, (self.batch, 1), generator=generator, device=device
        )
        shape = network.n_layer, self.batch, network.n_head, network.length
        keys, values = (
            torch.randn(
                *shape, network.n_embd // network.n_head,
                generator=generator, device=device, dtype=dtype,
            )
            for _ in range(2)
        )  # fmt: skip
        lengths = token.new_full((self.batch,), network.length - 1)
        return token, lengths, keys, values, *parameters

    def ours(self, *given: torch.Tensor) -> torch.Tensor:
        names = (f"gpt.{name}" for name in self.network.names)
        state = dict(zip(names, given[4:], strict=True))
        logits: torch.Tensor = functional_call(Decoder(self.network.gpt), state, given[:4])
        return logits

    def theirs(
        self,
        token: torch.Tensor,
        lengths: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *given: torch.Tensor,
    ) -> torch.Tensor:
        position = lengths[:1]
        seen = torch.arange(keys.shape[3], device=keys.device) <= position

        def cached(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys[layer].index_copy_(2, position, k)
            values[layer].index_copy_(2, position, v)
            return F.scaled_dot_product_attention(q, keys[layer], values[layer], seen[None])

        x = self.network.hidden(given, token, position, cached)
        return F.linear(x[:, -1], given[0])

    def case(self) -> Case:
        """All is read once; one product a weight and token."""
        network = self.network
        inputs = self.make(torch.device("meta"), torch.bfloat16, 0)
        small = Decoding(Network(48, 16, 32, 1, 2), 2)
        return Case(
            op="models",
            name="GPT-124M: the next token from a cache",
            shapes=f"{self.batch} × {network.length}",
            make=self.make,
            ours=self.ours,
            theirs=self.theirs,
            bytes=sum(tensor.nbytes for tensor in inputs) + 2 * self.batch * network.vocab_size,
            flops=2 * self.batch * network.n_weights
            + 4 * self.batch * network.length * network.n_embd * network.n_layer,
            small=small.case,
            launch_bound=True,
            tolerance=TOLERANCE_OF_LOGITS,
        )


def transformer_cases() -> list[Case]:
    """GPT-2 in its smallest size; decoding is bound by its launches, but for a CUDA graph."""
    gpt2 = Network(50257, 1024, 768, 12, 12)
    return [TrainingStep(gpt2, 8).case(), Decoding(gpt2, 1).case()]
