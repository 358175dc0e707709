"""GPT: a decoder-only Transformer for text, with GPT-2's parameters.

Radford, Wu, Child, Luan, Amodei and Sutskever, "Language models are unsupervised multitask
learners", OpenAI 2019 (GPT-2); the code that came with it, github.com/openai/gpt-2.
"""

from __future__ import annotations

import math
from typing import Any

import torch

import gpunn.functional as GF
from gpunn import nn
from gpunn.models.generation import KeyValueCache, check_sampling, evaluating, sample

MOST_KEPT = 2**29
"""Logits that are kept for the backward pass, and not computed twice: 1 GiB in 16 bits."""


class GPTAttention(nn.Module):
    """Causal attention with several heads; (N, L, n_embd) and a residual to the same shape.

    One product (``c_attn``) gives queries, keys and values side by side. Keys and values of earlier
    tokens come from a cache where one is given.
    """

    needs_gpunn = True
    """Its last layer is called with a residual: see ``gpunn.restore``."""

    def __init__(self, n_embd: int, n_head: int, layer: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.layer, self.dropout = n_head, layer, dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd, dropout_p=dropout)

    def forward(
        self, input: torch.Tensor, residual: torch.Tensor, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """dropout(c_proj(attention(input))) + residual."""
        packed = self.c_attn(input).unflatten(2, (3, self.n_head, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each (N, n_head, L, head)
        if cache is None:
            dropout_p = self.dropout if self.training else 0.0
            y = GF.scaled_dot_product_attention(query, key, value, None, dropout_p, True)
        else:
            y = cache.attend(self.layer, query, key, value)
        result: torch.Tensor = self.c_proj(y.transpose(1, 2).flatten(2), residual)
        return result


class GPTMLP(nn.Module):
    """Two dense layers with GELU between them; (N, L, n_embd) and a residual to the same shape."""

    needs_gpunn = True
    """Its last layer is called with a residual: see ``gpunn.restore``."""

    def __init__(self, n_embd: int, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, activation="gelu_tanh")
        self.c_proj = nn.Linear(4 * n_embd, n_embd, dropout_p=dropout)

    def forward(self, input: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """dropout(c_proj(gelu(c_fc(input)))) + residual."""
        result: torch.Tensor = self.c_proj(self.c_fc(input), residual)
        return result


class GPTBlock(nn.Module):
    """A layer of the network: x + attention(norm(x)), then x + mlp(norm(x)); (N, L, n_embd).

    Dropout and residual are in the epilogue of the product before them, rather than in the
    normalisation after it, which takes both, too. Counted in passes over (N, L, n_embd), an
    epilogue and a norm then read residual and stream and write stream and norm: 4, where a product
    that writes its own result, and a norm that reads it, pass 5 times. Backward it is 6 in both:
    ``return_sum`` hands the stream on through the norm, whose backward pass so adds the gradient of
    the residual branch itself; autograd would pass 3 times to do so.
    """

    def __init__(self, n_embd: int, n_head: int, layer: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, return_sum=True)
        self.attn = GPTAttention(n_embd, n_head, layer, dropout)
        self.ln_2 = nn.LayerNorm(n_embd, return_sum=True)
        self.mlp = GPTMLP(n_embd, dropout)

    def forward(self, input: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        """The residual stream after this layer."""
        y, stream = self.ln_1(input)
        y, stream = self.ln_2(self.attn(y, stream, cache))
        result: torch.Tensor = self.mlp(y, stream)
        return result


class GPT(nn.Module):
    """GPT-2's network: tokens (N, L) to the logits of each one's successor, (N, L, vocab_size).

    Token and position embeddings, summed; ``n_layer`` blocks, each normalised before its attention
    and before its dense layers; a last normalisation; and the token embedding once more, as the
    output layer's weight. Weights start from normal distributions: of deviation 0.02, or 0.01 for
    positions, or, for the projections onto the residual stream, 0.02 / √(2 n_layer); biases from 0.

    Parameters have the names of OpenAI's and Hugging Face's GPT-2. ``load_state_dict`` takes the
    ``state_dict`` of transformers' ``GPT2Model`` and ``GPT2LMHeadModel``, too: their prefix, masks
    and transposed weights (told by the shape of ``h.0.attn.c_attn.weight``) are taken care of.

    Args:
        vocab_size: the number of tokens.
        n_positions: the longest sequence.
        n_embd: the width of the residual stream.
        n_layer: the number of blocks.
        n_head: the number of heads, which divides ``n_embd``.
        dropout: the probability of dropout: of the embeddings' sum, of attention's probabilities,
            and of what is added to the residual stream.
        initializer_range: takes the place of 0.02, to which the others are in proportion; a
            narrow network learns sooner from a larger one.

    Raises:
        ValueError: heads that do not divide the width, a dropout outside of [0, 1]; in forward,
            tokens of another shape or longer than ``n_positions``.
    """

    needs_gpunn = True
    """Its layers are called with residuals and positions: see ``gpunn.restore``."""

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        *,
        dropout: float = 0.1,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_head: expected a divisor of n_embd = {n_embd}, got {n_head}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")
        self.n_positions = n_positions
        self.wte = nn.Embedding(vocab_size, n_embd, dropout_p=dropout)
        self.wpe = nn.Embedding(n_positions, n_embd)
        self.h = nn.ModuleList(GPTBlock(n_embd, n_head, layer, dropout) for layer in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.register_load_state_dict_pre_hook(_from_checkpoint)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
            elif "ln_" not in name:
                deviation = initializer_range / (2 if name == "wpe.weight" else 1)
                if name.endswith("c_proj.weight"):
                    deviation /= math.sqrt(2 * n_layer)
                torch.nn.init.normal_(parameter, std=deviation)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """The logits (N, L, vocab_size) of tokens (N, L), or, given targets, the mean loss.

        Args:
            tokens: (N, L), int64.
            targets: (N, L), int64: the tokens that follow; -100 where there is none to predict.
                The loss is the mean cross-entropy in nats. It is in forward so that there are no
                logits to hand out: they are kept if they are up to 2²⁹; of more, a chunk stands in
                memory at a time.
        """
        if tokens.dim() != 2 or tokens.shape[1] > self.n_positions:
            raise ValueError(
                f"tokens: GPT expects shape (N, L), with L up to {self.n_positions}, "
                f"got {tuple(tokens.shape)}"
            )
        hidden = self._hidden(tokens)
        if targets is None:
            return GF.linear(hidden, self.wte.weight)
        hidden, weight = hidden.flatten(0, 1), self.wte.weight
        keep = hidden.shape[0] * weight.shape[0] <= MOST_KEPT
        return GF.linear_cross_entropy(hidden, weight, targets.flatten(), keep_logits=keep)

    def _hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """The normalised residual stream after the last block, (N, L, n_embd).

        Positions are 0, 1, … where none are given. Both embeddings, their sum and its dropout are
        one pass.
        """
        x = self.wte(tokens, self.wpe.weight, positions)
        for block in self.h:
            x = block(x, cache)
        result: torch.Tensor = self.ln_f(x)
        return result

    def next_logits(self, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """The logits (N, vocab_size) of what follows ``tokens``, which the cache then holds.

        For generation: without dropout on attention's probabilities, and without a gradient for
        what was cached before. No host synchronisation, and nothing that changes with the number
        of cached tokens but numbers on the device: a step can be captured in a CUDA graph.

        Args:
            tokens: (N, L): a prompt of any length for an empty cache; later, one token each.
            cache: its keys and values are written.

        Raises:
            ValueError: more tokens than the cache or the positions have room for, or several
                beside what is in the cache.
        """
        if cache.max_length > self.n_positions:
            raise ValueError(
                f"cache: expected room for {self.n_positions} tokens at most, as many as there "
                f"are positions, got {cache.max_length}"
            )
        positions = cache.advance(tokens)
        x = self._hidden(tokens, positions, cache)
        return GF.linear(x[:, -1], self.wte.weight)

    @torch.no_grad()
    def generate(
        self,
        prompt: torch.Tensor,
        n_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The prompt and ``n_tokens`` more, drawn one after another: (N, L + n_tokens).

        Without dropout, whatever the mode. All must fit in ``n_positions``: learned positions have
        no meaning past the last one, and a window that slides would change every cached key.

        Args:
            prompt: (N, L), int64, L at least 1.
            n_tokens: how many to draw.
            temperature: divides the logits; at 0, the likeliest token is taken.
            top_k: draw among so many of the likeliest tokens; None: among all.
            top_p: draw among the fewest of the likeliest tokens whose probabilities, after
                ``top_k``, sum up to so much; None: among all (Holtzman et al., 2020,
                https://arxiv.org/abs/1904.09751).
            generator: on the prompt's device, for the same draws each time; None: torch's own.

        Raises:
            ValueError: an empty prompt, more tokens than positions, or a number that is none of
                those allowed.
        """
        check_sampling(temperature, top_k, top_p)
        if prompt.dim() != 2 or prompt.shape[1] == 0:
            raise ValueError(f"prompt: expected shape (N, L), L ≥ 1, got {tuple(prompt.shape)}")
        length = prompt.shape[1] + n_tokens
        if n_tokens < 0 or length > self.n_positions:
            raise ValueError(
                f"n_tokens: expected from 0 to {self.n_positions - prompt.shape[1]}, which is what "
                f"{self.n_positions} positions leave beside the prompt, got {n_tokens}"
            )
        cache, found = KeyValueCache(length), [prompt]
        with evaluating(self):
            for _ in range(n_tokens):
                logits = self.next_logits(found[-1], cache)
                found.append(sample(logits, temperature, top_k, top_p, generator)[:, None])
        return torch.cat(found, 1)


def _from_checkpoint(
    model: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Give the entries of a GPT-2 checkpoint this model's names and shapes, in place."""
    head = None
    for name in [name for name in state if name.startswith(prefix)]:
        value = state.pop(name)
        short = name.removeprefix(prefix).removeprefix("transformer.")
        if short == "lm_head.weight":
            head = value
        elif not short.endswith((".attn.bias", ".attn.masked_bias")):  # masks, in older files
            state[prefix + short] = value
    if head is not None and not torch.equal(head, state.setdefault(f"{prefix}wte.weight", head)):
        errors.append("lm_head.weight: expected wte.weight, to which this model's output is tied")
    packed = state.get(f"{prefix}h.0.attn.c_attn.weight")
    if packed is not None and packed.shape[0] < packed.shape[-1]:  # (in, out), as Conv1D has it
        for name, value in state.items():
            if name.startswith(f"{prefix}h.") and ".c_" in name and name.endswith(".weight"):
                state[name] = value.t()


def gpt2(*, dropout: float = 0.1) -> GPT:
    """``GPT`` as published in its smallest size: 12 layers, 124,439,808 parameters.

    Raises:
        ValueError: a dropout outside of [0, 1].
    """
    return GPT(dropout=dropout)
