"""Decoding a translation: the cache of its decoder, greedy choice and beam search."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch

import gpunn.functional as GF
from gpunn.models.generation import KeyValueCache


class DecoderCache(KeyValueCache):
    """What a decoder has read, and keys and values of the encoder's output, computed once.

    Args:
        max_length: how many tokens there may be.
        memory: of each layer, the keys and values of the source, (batch, heads, S, head).
        real: (batch, 1, 1, S), True at tokens of the source that are no padding.
    """

    def __init__(
        self, max_length: int, memory: list[tuple[torch.Tensor, torch.Tensor]], real: torch.Tensor
    ) -> None:
        super().__init__(max_length)
        self.memory, self.real = memory, real

    def attend_to_source(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attention of (batch, heads, L, head) to the source."""
        keys, values = self.memory[layer]
        y: torch.Tensor = GF.scaled_dot_product_attention(query, keys, values, self.real)
        return y

    def repeat(self, n: int) -> None:
        """Each sequence n times, one beside the other; before any token is read."""
        self.memory = [
            (keys.repeat_interleave(n, 0), values.repeat_interleave(n, 0))
            for keys, values in self.memory
        ]
        self.real = self.real.repeat_interleave(n, 0)

    def select(self, rows: torch.Tensor) -> None:
        """Sequence i goes on as sequence ``rows[i]``, one of the same source."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]


class Step(Protocol):
    """The logits (batch, vocabulary) of what follows tokens (batch, 1), which the cache takes."""

    def __call__(self, tokens: torch.Tensor, cache: DecoderCache) -> torch.Tensor: ...


class Special(NamedTuple):
    """The numbers of the tokens that are no words."""

    padding: int
    start: int
    end: int


def _log_probabilities(
    step: Step, last: torch.Tensor, cache: DecoderCache, special: Special
) -> torch.Tensor:
    """Of the next token, in float32, if it is none of padding, which is never chosen."""
    logits = step(last[:, None], cache).float()
    padding = torch.arange(logits.shape[1], device=logits.device) == special.padding
    return GF.log_softmax(logits.masked_fill(padding, -math.inf), -1)


def greedy(step: Step, cache: DecoderCache, n_sequences: int, special: Special) -> torch.Tensor:
    """The likeliest token, one after the other, until all have ended or the cache is full.

    Returns (n_sequences, length), the start left out, padding after the end. The host waits for
    the device after every token, to see whether all have ended.
    """
    device = cache.real.device
    last = torch.full((n_sequences,), special.start, device=device)
    ended = torch.zeros(n_sequences, dtype=torch.bool, device=device)
    found = []
    for _ in range(cache.max_length):
        likeliest = _log_probabilities(step, last, cache, special).argmax(-1)
        last = torch.where(ended, special.padding, likeliest)
        found.append(last)
        ended = ended | (last == special.end)
        if bool(ended.all()):
            break
    return torch.stack(found, 1)


def length_norm(length: torch.Tensor, penalty: float) -> torch.Tensor:
    """((5 + length) / 6)^penalty, which log-probabilities are divided by.

    Source: Wu et al. (2016), https://arxiv.org/abs/1609.08144, equation 14.
    """
    return ((5 + length) / 6) ** penalty


def beam_search(
    step: Step,
    cache: DecoderCache,
    n_sequences: int,
    special: Special,
    n_beams: int,
    length_penalty: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the translations that a beam holds, and its score.

    The score is log p(translation) / ((5 + length) / 6)^length_penalty, the end counted in the
    length. A beam holds the ``n_beams`` best, whether they have ended or not; those that have stay
    as they are. It is left when the best has ended and none that goes on can overtake it: log p
    only falls, and the divisor is largest for the longest.
    """
    device, shape = cache.real.device, (n_sequences, n_beams)
    cache.repeat(n_beams)
    tokens = torch.empty(*shape, 0, dtype=torch.int64, device=device)
    last = torch.full(shape, special.start, device=device)
    ended = torch.zeros(shape, dtype=torch.bool, device=device)
    lengths = torch.zeros(shape, dtype=torch.int64, device=device)
    logs = torch.full(shape, -math.inf, device=device)
    logs[:, 0] = 0.0  # at first all are one
    longest = length_norm(torch.tensor(cache.max_length, device=device), length_penalty)
    first_row = torch.arange(n_sequences, device=device)[:, None] * n_beams
    for _ in range(cache.max_length):
        more = _log_probabilities(step, last.flatten(), cache, special)
        n_tokens = more.shape[-1]
        more = more.view(*shape, n_tokens)
        stays = torch.full((n_tokens,), -math.inf, device=device)
        stays[special.padding] = 0.0
        total = (logs[..., None] + torch.where(ended[..., None], stays, more)).flatten(1)
        lengths = lengths + ~ended
        norm = length_norm(lengths, length_penalty).repeat_interleave(n_tokens, 1)
        scores, best = (total / norm).topk(n_beams)
        beam, last = best // n_tokens, best % n_tokens
        logs, lengths = total.gather(1, best), lengths.gather(1, beam)
        ended = ended.gather(1, beam) | (last == special.end)
        tokens = tokens.gather(1, beam[..., None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens, last[..., None]], 2)
        cache.select((first_row + beam).flatten())
        hopes = torch.where(ended, -math.inf, logs / longest).amax(1)
        if bool((ended[:, 0] & (scores[:, 0] >= hopes)).all()):
            break
    return tokens[:, 0], scores[:, 0]
