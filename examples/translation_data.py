"""What ``transformer_translate.py`` learns from: pairs of sentences, as words and as numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

SPECIAL = "<pad>", "<s>", "</s>", "<unk>"
PADDING, START, END, UNKNOWN = range(4)
UNREADABLE = "⁇"
BEFORE, AFTER = re.compile(r"([¿¡(]) "), re.compile(r" ([,.;:?!)])")


class Pair(NamedTuple):
    """A sentence and its translation, in words."""

    source: list[str]
    target: list[str]
    places: dict[int, int]
    """Of words of the target, by their number: which word of the source they stand for."""


class Vocabulary:
    """Words and their numbers; one that is not known is ``<unk>``."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = [*SPECIAL, *sorted(set(words))]
        self.number = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encoded(self, words: Sequence[str]) -> list[int]:
        """Their numbers."""
        return [self.number.get(word, UNKNOWN) for word in words]

    def decoded(self, tokens: Sequence[int]) -> list[str]:
        """The words up to the end."""
        words = [self.words[token] for token in tokens if token not in (PADDING, START)]
        return words[: words.index("</s>")] if "</s>" in words else words


@dataclass(frozen=True)
class Sentences:
    """As padded numbers: sources (n, S) with their end, targets (n, T) with start and end."""

    pairs: list[Pair]
    source: torch.Tensor
    target: torch.Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Numbers that sort by the source's length, then by the target's."""
        source, target = ((tokens != PADDING).sum(1) for tokens in (self.source, self.target))
        return source * (self.target.shape[1] + 1) + target

    def first(self, n: int) -> Sentences:
        """So many of them."""
        return Sentences(self.pairs[:n], self.source[:n], self.target[:n])

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of these rows, no wider than the longest of them."""
        return _narrowed(self.source[rows]), _narrowed(self.target[rows])


@dataclass(frozen=True)
class Corpus:
    """Sentences to learn from, others to be measured by, and their words."""

    source_words: Vocabulary
    target_words: Vocabulary
    train: Sentences
    held_out: Sentences

    @classmethod
    def of(cls, train: list[Pair], held_out: list[Pair], at_least: int = 1) -> Corpus:
        """The vocabularies are the training part's words that stand there so often."""
        counts = Counter[str](), Counter[str]()
        for pair in train:
            counts[0].update(pair.source)
            counts[1].update(pair.target)
        source, target = (
            Vocabulary(word for word, count in words.items() if count >= at_least)
            for words in counts
        )

        def numbers(pairs: list[Pair]) -> Sentences:
            sources = [[*source.encoded(pair.source), END] for pair in pairs]
            targets = [[START, *target.encoded(pair.target), END] for pair in pairs]
            return Sentences(pairs, _padded(sources), _padded(targets))

        return cls(source, target, numbers(train), numbers(held_out))


def _narrowed(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, : int((tokens != PADDING).sum(1).max())]


def _padded(rows: list[list[int]]) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [PADDING] * (longest - len(row)) for row in rows])


def sentence(words: Sequence[str]) -> str:
    """As it is written: no space before a full stop, nor after what opens a question."""
    text = " ".join(UNREADABLE if word == SPECIAL[UNKNOWN] else word for word in words)
    return BEFORE.sub(r"\1", AFTER.sub(r"\1", text))
