"""What ``transformer_translate.py`` learns from: pairs of sentences, as words and as numbers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Pair = tuple[list[str], list[str]]
Dictionary = dict[str, set[str]]
SPECIAL = "<pad>", "<s>", "</s>", "<unk>"
PADDING, START, END, UNKNOWN = range(4)
N_HELD_OUT, N_TRAIN = 500, 16_000
LARGEST_EXPONENT = 6
GERMAN_PARTS = re.compile(
    "hundert|tausend|sieben|sechs|zwölf|zwan|eins|drei|null|zwei|vier|fünf|sech|sieb|acht|neun|"
    "zehn|elf|ein|und|zig|ßig"
)
EMPTY = {"und", "et", "zig", "ßig"}
BESIDES = {"ein": "one", "vingt": "eighty", "cents": "hundred", "cent": "one", "mille": "one"}
TEENS = {"dix", "onze", "douze", "treize", "quatorze", "quinze", "seize"}
LANGUAGES = {"en-de": "de", "en-fr": "fr"}


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

        def words(side: int) -> list[str]:
            counts: dict[str, int] = {}
            for pair in train:
                for word in pair[side]:
                    counts[word] = counts.get(word, 0) + 1
            return [word for word, count in counts.items() if count >= at_least]

        source, target = Vocabulary(words(0)), Vocabulary(words(1))

        def numbers(pairs: list[Pair]) -> Sentences:
            sources = [[*source.encoded(theirs), END] for theirs, _ in pairs]
            targets = [[START, *target.encoded(ours), END] for _, ours in pairs]
            return Sentences(pairs, _padded(sources), _padded(targets))

        return cls(source, target, numbers(train), numbers(held_out))


def _narrowed(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, : int((tokens != PADDING).sum(1).max())]


def _padded(rows: list[list[int]]) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [PADDING] * (longest - len(row)) for row in rows])


def spelt(number: int, language: str) -> list[str]:
    """A number in words, of which German compounds are taken apart: zwei und sieb zig.

    Raises:
        ModuleNotFoundError: num2words is not installed.
    """
    try:
        from num2words import num2words
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The number words need {error.name}: pip install 'gpunn[demo]'", name=error.name
        ) from None
    text = num2words(number, lang=language).replace("-", " ").replace(",", "")
    return GERMAN_PARTS.findall(text) if language == "de" else text.split()


def number_words(pair: str, n_train: int = N_TRAIN, n_held_out: int = N_HELD_OUT) -> Corpus:
    """English numbers below a million and the same in German or French, always the same ones.

    Their logarithms are spread evenly. No held-out number is one to learn from.
    """
    draw = random.Random(0)
    drawn = (int(10 ** draw.uniform(0, LARGEST_EXPONENT)) for _ in range(100_000))
    numbers = list(dict.fromkeys(drawn))[: n_held_out + n_train]
    draw.shuffle(numbers)
    pairs = [(spelt(n, "en"), spelt(n, LANGUAGES[pair])) for n in numbers]
    return Corpus.of(pairs[n_held_out:], pairs[:n_held_out])


def dictionary(pair: str) -> Dictionary:
    """The English words that a word can stand for: each that is, alone, translated with it.

    And in French: cent and mille for the "one" before them, too, which is not said, and what
    depends on both words, as douze in soixante-douze, for either. What the word before decides,
    "und" and "et", the "zig" of "acht zig" and the "ßig" of "drei ßig", stands for nothing.
    """
    language = LANGUAGES[pair]
    found = {word: set(sources.split()) for word, sources in BESIDES.items()}
    alone = [(n, spelt(n, language)) for n in (*range(20), *range(20, 100, 10))]
    alone += [(n, spelt(n, language)[-1:]) for n in (100, 1000)]
    for number, words in alone:
        for word in words:
            found.setdefault(word, set()).add(spelt(number, "en")[-1])
    for number in (*range(71, 80), *range(91, 100)):
        for word in TEENS & set(spelt(number, language)):
            found[word].update(spelt(number, "en"))
    return {word: sources for word, sources in found.items() if word not in EMPTY}


def aligned(pair: Pair, words: Dictionary) -> dict[int, int]:
    """For each word of the target that can stand for one word of the source alone: which one."""
    source, target = pair
    found = {}
    for i, word in enumerate(target):
        places = [j for j, theirs in enumerate(source) if theirs in words.get(word, ())]
        if len(places) == 1:
            found[i] = places[0]
    return found
