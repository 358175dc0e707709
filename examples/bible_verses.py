"""The verses of two Bibles, English and Spanish: a corpus of sentences that people wrote.

King James's of 1769 and Reina and Valera's of 1909, as Debian packages them (``sword-text-kjv``,
``sword-text-sparv``; both are in the public domain, but the first, in the United Kingdom, under the
Crown's patent). Both mark words by the number that Strong's concordance gives the Hebrew or Greek
one that they translate: where a number stands at one English word and at one Spanish word, and
nowhere else in the verse, these are known to stand for each other.

Format: zText modules of The SWORD Project, https://crosswire.org/sword. Of each testament,
``.bzz`` holds books compressed by zlib; ``.bzs`` says where each is (start, compressed size, size,
32 bits each); ``.bzv`` says where each verse is (its book, 32 bits; start, 32; size, 16).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

from translation_data import Corpus, Pair

FOLDER = Path("/usr/share/sword")
ENGLISH, SPANISH = "engKJV2006eb", "spaRV1909eb"
TESTAMENTS = "ot", "nt"
WORDS = re.compile(r"\w+(?:[’'-]\w+)*|[^\w\s]")
UNSPOKEN = {"note", "title"}
HELD_OUT = {"Ruth", "Esth", "Eccl", "Jonah", "John", "Jas"}
"""Books of several kinds, of which no other repeats whole passages, as Luke does of Mark's."""
MOST_LEARNT, MOST_MEASURED = 30, 22  # words of a verse, in either language
AT_LEAST = 4  # times that a word stands in the verses to learn from; rarer ones are not known


class Word(NamedTuple):
    """A word of a verse, and Strong's number of what it translates alone, where that is known."""

    text: str
    number: str


class Verse(NamedTuple):
    book: str
    english: list[Word]
    spanish: list[Word]


def _entries(folder: Path, name: str, testament: str) -> list[str]:
    """The markup of every verse, of every heading and, at every book's and chapter's beginning."""
    files = folder / "modules" / "texts" / "ztext" / name
    books, places, packed = (
        (files / f"{testament}.{kind}").read_bytes() for kind in ("bzs", "bzv", "bzz")
    )
    texts = [
        zlib.decompress(packed[start : start + size])
        for start, size, _ in struct.iter_unpack("<III", books)
    ]
    return [
        texts[book][start : start + size].decode() if size else ""
        for book, start, size in struct.iter_unpack("<IIH", places)
    ]


def _spoken(element: ET.Element, number: str = "") -> Iterator[tuple[str, str]]:
    """Texts in their order, with Strong's number where they have one; no notes, no titles."""
    number = element.get("lemma", number).removeprefix("strong:")
    if element.tag not in UNSPOKEN:
        yield element.text or "", number
        for child in element:
            yield from _spoken(child, number)
            yield child.tail or "", number


def _words(markup: ET.Element) -> list[Word]:
    """In lower case; punctuation marks are words, too."""
    found = []
    for text, number in _spoken(markup):
        words = WORDS.findall(text.lower().replace("¶", " "))
        alone = number if len(words) == 1 else ""
        found += [Word(word, alone) for word in words]
    return found


def verses(folder: Path = FOLDER) -> list[Verse]:
    """All that both Bibles have, but for some 50 whose markup is damaged.

    Raises:
        FileNotFoundError: no such modules in the folder.
    """
    found = []
    for testament in TESTAMENTS:
        book = ""
        both = (_entries(folder, name, testament) for name in (ENGLISH, SPANISH))
        for markups in zip(*both, strict=True):
            begun = re.search(r'<div [^>]*osisID="(\w+)"[^>]*type="book"', markups[0])
            book = begun[1] if begun else book
            if begun or re.search("<chapter [^>]*sID=", markups[0]) or not all(markups):
                continue
            try:
                english, spanish = (
                    _words(ET.fromstring(f"<verse>{markup}</verse>")) for markup in markups
                )
            except ET.ParseError:
                continue
            if book and english and spanish:
                found.append(Verse(book, english, spanish))
    return found


def pair_of(verse: Verse) -> Pair:
    """Its words, and which stand for which by Strong's numbers."""
    sides = verse.english, verse.spanish
    counts = [Counter(word.number for word in words) for words in sides]
    once = {number for number in counts[0] if number and all(c[number] == 1 for c in counts)}
    english = {word.number: i for i, word in enumerate(verse.english)}
    places = {i: english[w.number] for i, w in enumerate(verse.spanish) if w.number in once}
    source, target = ([word.text for word in words] for words in sides)
    return Pair(source, target, places)


def bible_verses(folder: Path = FOLDER) -> Corpus:
    """Verses that are not too long in either language; whole books are held out.

    Raises:
        FileNotFoundError: Debian's packages are not there; says how to get them.
    """
    try:
        found = verses(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The verses need {error.filename}, of Debian's packages: apt install sword-text-kjv "
            "sword-text-sparv; or unpack both anywhere (dpkg -x PACKAGE FOLDER), and "
            "--corpus FOLDER/usr/share/sword"
        ) from None
    train, held_out = list[Pair](), list[Pair]()
    for verse in found:
        held = verse.book in HELD_OUT
        longest = max(len(verse.english), len(verse.spanish))
        if longest <= (MOST_MEASURED if held else MOST_LEARNT):
            (held_out if held else train).append(pair_of(verse))
    return Corpus.of(train, held_out, AT_LEAST)
