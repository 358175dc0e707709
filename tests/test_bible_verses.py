"""The verses of two Bibles: modules of SWORD are read, and Strong's numbers give the places."""

from __future__ import annotations

import importlib
import re
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gpunn
from gpunn.models import TranslationTransformer

HEAD = '<div canonical="true" osisID="{0}" sID="b" type="book"/> <title level="1">{0}</title>'
CHAPTER = '<chapter n="1" osisID="{0}.1" sID="{0}.1"/>'
ENDED = ' <chapter eID="{0}.1"/> <div eID="b" osisID="{0}" type="x-p"/>'


def w(number: str, words: str) -> str:
    return f'<w lemma="strong:{number}">{words}</w>'


GENESIS = (
    f"In the {w('H7225', 'beginning')} {w('H0430', 'God')} {w('H1254', 'created')} <q>heaven</q>.",
    f"¶And <note>a {w('H1', 'note')}</note> {w('H0430', 'God')} said to {w('H0430', 'God')}: No",
    "This </q> is damaged",
)
GENESIS_ES = (
    f"{w('H7225', 'En el principio')} {w('H1254', 'crió')} {w('H0430', 'Dios')} el cielo.",
    f"Y dijo {w('H0430', 'Dios')}: {w('H1', 'No')}",
    "Ist beschädigt",
)
N_MATTHEW = 64  # a batch
JOHN = (f"In the {w('G3056', 'word')}",)
JOHN_ES = (f"En el {w('G3056', 'verbo')}",)


def write_module(
    folder: Path, name: str, testament: str, books: dict[str, tuple[str, ...]]
) -> None:
    """As Debian's packages have them: an empty place, then each book with its two headings."""
    files = folder / "modules" / "texts" / "ztext" / name
    files.mkdir(parents=True, exist_ok=True)
    blocks, places, packed = b"", struct.pack("<IIH", 0, 0, 0), b""
    for number, (book, verses) in enumerate(books.items()):
        text = b""
        ended = (*verses[:-1], verses[-1] + ENDED.format(book))
        for entry in (HEAD.format(book), CHAPTER.format(book), *ended, ""):
            places += struct.pack("<IIH", number, len(text), len(entry.encode()))
            text += entry.encode()
        compressed = zlib.compress(text)
        blocks += struct.pack("<III", len(packed), len(compressed), len(text))
        packed += compressed
    for kind, content in (("bzs", blocks), ("bzv", places), ("bzz", packed)):
        (files / f"{testament}.{kind}").write_bytes(content)


@pytest.fixture
def bible(demo_folder: Path) -> ModuleType:
    return importlib.import_module("bible_verses")


@pytest.fixture
def folder(tmp_path: Path, bible: ModuleType) -> Path:
    """Modules of two books, one of which is held out."""
    books = (bible.ENGLISH, GENESIS, JOHN), (bible.SPANISH, GENESIS_ES, JOHN_ES)
    for name, genesis, john in books:
        write_module(tmp_path, name, "ot", {"Gen": genesis})
        write_module(tmp_path, name, "nt", {"Matt": (genesis[0],) * N_MATTHEW, "John": john})
    return tmp_path


def test_words_and_numbers_are_read(bible: ModuleType, folder: Path) -> None:
    """No heading, no note and nothing damaged; a number counts where it is at one word."""
    first, second, *others = bible.verses(folder)
    assert [verse.book for verse in others] == ["Matt"] * N_MATTHEW + ["John"]
    assert first.book == second.book == "Gen"
    assert " ".join(word.text for word in first.english) == "in the beginning god created heaven ."
    assert " ".join(word.text for word in second.english) == "and god said to god : no"
    assert [word.number for word in first.english] == ["", "", "H7225", "H0430", "H1254", "", ""]
    assert [word.number for word in first.spanish] == ["", "", "", "H1254", "H0430", "", "", ""]


def test_words_of_the_same_number_stand_for_each_other(bible: ModuleType, folder: Path) -> None:
    """But not where the number is there twice, or in a note."""
    first, second, *_ = map(bible.pair_of, bible.verses(folder))
    assert first.places == {3: 4, 4: 3}  # crió, Dios
    assert second.places == {}


def test_whole_books_and_rare_words_are_held_out(
    bible: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And verses that are too long, in either language, are left out."""
    corpus = bible.bible_verses(folder)
    assert [" ".join(pair.target) for pair in corpus.held_out.pairs] == ["en el verbo"]
    assert len(corpus.train) == 2 + N_MATTHEW
    assert "created" in corpus.source_words.number
    assert "said" not in corpus.source_words.number
    monkeypatch.setattr(bible, "MOST_LEARNT", 7)
    assert len(bible.bible_verses(folder).train) == 1
    monkeypatch.setattr(bible, "MOST_MEASURED", 3)
    assert len(bible.bible_verses(folder).held_out) == 1


def test_the_demo_learns_from_them(
    demo_folder: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few steps, a beam search, BLEU last, and pictures."""
    for package in ("sacrebleu", "matplotlib", "rich", "sklearn"):
        pytest.importorskip(package, reason=f"no {package}: pip install 'gpunn[demo]'")
    demo = importlib.import_module("transformer_translate")
    given = ["--pair", "en-es", "--corpus", str(folder), "--steps", "2", "--device", "cpu"]
    search, beams = TranslationTransformer.beam_search, []

    def spy(*given: Any, n_beams: int) -> Any:
        beams.append(n_beams)
        return search(*given, n_beams=n_beams)

    monkeypatch.setattr(TranslationTransformer, "beam_search", spy)
    with gpunn.backend("torch"):
        assert demo.main([*given, "--out", str(tmp_path / "out")]) == 0
    assert set(beams) == {4}
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"BLEU of them all: [\d.]+ \(expected: at least [\d.]+\)", last), last
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    assert demo.main([*given[:2], "--corpus", str(tmp_path / "none")]) == 1
    assert "apt install sword-text-kjv sword-text-sparv" in capsys.readouterr().err
