"""Numbers in words, in two languages: a corpus that needs no download, and what stands for what."""

from __future__ import annotations

import copy
import functools
import random
import re
from typing import Any

from translation_data import Corpus, Pair

Dictionary = dict[str, set[str]]
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


@functools.cache
def speller(language: str) -> Any:
    """num2words's, without its names for numbers above a million, each of which it would try.

    Raises:
        ModuleNotFoundError: num2words is not installed.
    """
    try:
        from num2words import CONVERTER_CLASSES
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The number words need {error.name}: pip install 'gpunn[demo]'", name=error.name
        ) from None
    found = copy.copy(CONVERTER_CLASSES[language])
    cards = found.cards.items()
    found.cards = {number: name for number, name in cards if number <= 10**LARGEST_EXPONENT}
    return found


def spelt(number: int, language: str) -> list[str]:
    """A number in words, of which German compounds are taken apart: zwei und sieb zig."""
    text = speller(language).to_cardinal(number).replace("-", " ").replace(",", "")
    return GERMAN_PARTS.findall(text) if language == "de" else text.split()


def number_words(pair: str, n_train: int = N_TRAIN, n_held_out: int = N_HELD_OUT) -> Corpus:
    """English numbers below a million and the same in German or French, always the same ones.

    Their logarithms are spread evenly. No held-out number is one to learn from.
    """
    draw = random.Random(0)
    drawn = (int(10 ** draw.uniform(0, LARGEST_EXPONENT)) for _ in range(100_000))
    numbers = list(dict.fromkeys(drawn))[: n_held_out + n_train]
    draw.shuffle(numbers)
    words = dictionary(pair)
    pairs = []
    for number in numbers:
        english, other = spelt(number, "en"), spelt(number, LANGUAGES[pair])
        pairs.append(Pair(english, other, aligned(english, other, words)))
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


def aligned(source: list[str], target: list[str], words: Dictionary) -> dict[int, int]:
    """For each word of the target that can stand for one word of the source alone: which one."""
    found = {}
    for i, word in enumerate(target):
        places = [j for j, theirs in enumerate(source) if theirs in words.get(word, ())]
        if len(places) == 1:
            found[i] = places[0]
    return found
