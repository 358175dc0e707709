"""What generating text takes: a cache of keys and values, and the drawing of a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import gpunn.functional as GF

UNIT = 2**40
"""What probabilities are counted in where they are summed: more digits than a float32 has."""


class KeyValueCache:
    """Keys and values of the tokens that a decoder has read, so that each is computed once.

    For a batch of sequences of one length. Of each layer they are (batch, heads, max_length, head),
    allocated with the first tokens, in their dtype. How many there are is known to the host
    (``length``) and, where kernels read it, to the device (``lengths``, (batch,)).
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.lengths = self.positions = torch.empty(0, dtype=torch.int64)

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Make room for tokens (batch, L); their positions, (L,).

        Raises:
            ValueError: they do not fit, or are several beside what is in the cache.
        """
        n_sequences, n_new = tokens.shape
        if self.length + n_new > self.max_length:
            raise ValueError(
                f"tokens: the cache has room for {self.max_length - self.length} of "
                f"{self.max_length}, got {n_new}"
            )
        if self.length and n_new != 1:
            raise ValueError(f"tokens: expected one beside {self.length} in the cache, got {n_new}")
        if self.length:
            self.lengths += 1  # in place, so that a CUDA graph that is replayed moves on
            self.positions = self.lengths[:1] - 1 if n_sequences else self.positions[-1:] + 1
        else:
            self.lengths = tokens.new_full((n_sequences,), n_new)
            self.positions = torch.arange(n_new, device=tokens.device)
        self.length += n_new
        return self.positions

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention of the new tokens to all; each (batch, heads, L, head).

        Layers come in order: 0, 1, … with every ``advance``.
        """
        is_prompt = layer == len(self.keys)
        if is_prompt:
            shape = *key.shape[:2], self.max_length, key.shape[3]
            self.keys.append(key.new_empty(shape))
            self.values.append(value.new_empty(shape))
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.positions, key)
        values.index_copy_(2, self.positions, value)
        if is_prompt:
            y: torch.Tensor = GF.scaled_dot_product_attention(query, key, value, is_causal=True)
            return y
        return GF.attention_decode(query[:, :, 0], keys, values, self.lengths)[:, :, None]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse what ``next_probabilities`` cannot take.

    Raises:
        ValueError: a number that is none of those allowed.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and up to 1, or None, got {top_p}")


def next_probabilities(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """The probabilities that a next token is drawn with, float32, (batch, vocab_size).

    softmax(logits / temperature), of which the ``top_k`` largest are kept; of those, again made to
    sum up to 1, each that less than ``top_p`` comes before in descending order.
    """
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter(
            -1, logits.argmax(-1, keepdim=True), 1.0
        )
    logits = logits.float()
    # No largest one to divide: by however small a temperature, it stays finite.
    p = GF.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)
    if top_k is None and top_p is None:
        return p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = 0
        ordered /= ordered.sum(-1, keepdim=True)
    if top_p is not None:
        # As integers, for which a running sum has the same bits in whatever order a GPU adds.
        counts = (ordered * UNIT).long()
        ordered[counts.cumsum(-1) - counts >= top_p * UNIT] = 0
        ordered /= ordered.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, order, ordered)


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Tokens (batch,) drawn with ``next_probabilities``; the host does not wait for the device.

    Of exponential variables with rates p, the k-th is the smallest with probability p_k.
    """
    p = next_probabilities(logits, temperature, top_k, top_p)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; then every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
