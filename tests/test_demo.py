"""``gpunn demo``: what it lists, how it runs a demo, and the page of pictures that it writes."""

from __future__ import annotations

import ast
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import gpunn
from gpunn import demo
from gpunn.cli import main

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

SMALL = '''
"""It draws & says <what> it was told.

    python small.py [--fail]

One paragraph of prose,
in ``two`` lines:

    a + b

Data: none.
"""
from pathlib import Path

def main(argv):
    out = Path(argv[argv.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    (out / "a_picture.png").write_bytes(b"")
    print("told", *argv[:-2])
    print(f"Reached: {len(argv)} < 9")
    return int("--fail" in argv)
'''


class Page(HTMLParser):
    """The text of a page, and the pictures that it shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.pictures, self.alternatives = "", list[str](), list[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")
            self.alternatives.append(dict(attrs)["alt"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def small(tmp_path: Path, monkeypatch: Patch) -> None:
    """There is one demo, which takes no time."""
    where = tmp_path / "examples"
    where.mkdir()
    (where / "small_demo.py").write_text(SMALL.lstrip())
    monkeypatch.setattr(demo, "folder", lambda: where)
    monkeypatch.setattr(demo, "DEMOS", {"small": demo.Demo("small_demo", "no data", 3)})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "small_demo", raising=False)


def test_every_demo_is_listed(capsys: Capture) -> None:
    """Every file of examples/ with a ``main``; none of them is imported for it."""
    files = (Path(gpunn.__file__).resolve().parent.parent / "examples").glob("*.py")
    has_main = {
        path.stem
        for path in files
        if any(getattr(node, "name", "") == "main" for node in ast.parse(path.read_text()).body)
    }
    assert {d.module for d in demo.DEMOS.values()} == has_main
    assert main(["demo"]) == 0
    shown = capsys.readouterr().out.splitlines()
    for name, listed in demo.DEMOS.items():
        (line,) = (line for line in shown if line.split()[0] == name)
        assert listed.title in line
        assert listed.data in line
        assert f"{listed.seconds} s" in line
        assert listed.prose


@pytest.mark.usefixtures("small")
def test_a_demo_gets_its_options_and_its_page_is_written(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main(["demo", "small", "--out", str(out), "--seed", "7", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "told --seed 7 --quick" in shown
    assert shown.endswith(f"All pictures: {out / 'index.html'}\n")
    page = Page(out / "index.html")
    assert page.pictures == ["small/a_picture.png"]
    assert (out / page.pictures[0]).exists()
    for text in (
        "It draws & says <what> it was told.",
        "One paragraph of prose, in two lines:",
        "    a + b",
        "Data: none.",
        "Reached: 5 < 9",
        "gpunn demo small --seed 7 --quick",
        "a picture",
    ):
        assert text in page.text
    assert "small.py [--fail]" not in page.text, "the usage is not prose"


@pytest.mark.usefixtures("small")
def test_a_demo_that_fails_is_on_no_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["demo", "all", "--fail", "--out", str(out)]) == 1
    assert Page(out / "index.html").pictures == []


@pytest.mark.usefixtures("small")
def test_the_page_keeps_what_ran_before(tmp_path: Path, monkeypatch: Patch) -> None:
    out = os.path.relpath(tmp_path / "out")
    assert main(["demo", "small", "--out", out]) == 0
    more = demo.DEMOS | {"again": demo.DEMOS["small"]}
    monkeypatch.setattr(demo, "DEMOS", more)
    assert main(["demo", "again", "--out", out]) == 0
    assert Page(Path(out, "index.html")).pictures == ["small/a_picture.png", "again/a_picture.png"]


@pytest.mark.usefixtures("small")
def test_pictures_stand_in_the_order_in_which_they_were_drawn(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["demo", "small", "--out", str(out)]) == 0
    for second, name in enumerate(("last", "a_picture", "first")):
        path = out / "small" / f"{name}.png"
        path.touch()
        os.utime(path, (0, 10 - second))
    demo.write_page(out)
    names = [Path(picture).stem for picture in Page(out / "index.html").pictures]
    assert names == ["first", "a_picture", "last"]


@pytest.mark.usefixtures("small")
def test_any_name_of_a_picture_is_shown(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["demo", "small", "--out", str(out)]) == 0
    picture = (out / "small" / "a_picture.png").rename(out / "small" / 'a #1 "q"<b>&?%20.jpg')
    page = Page(demo.write_page(out))
    (source,) = page.pictures
    assert out / unquote(source) == picture
    assert not set('#?"<> ') & set(source)
    assert 'a #1 "q"<b>&?%20' in page.text
    assert page.alternatives == [picture.stem]


@pytest.mark.usefixtures("small")
def test_help_of_one_demo_is_its_own(tmp_path: Path, capsys: Capture) -> None:
    """Of none, more or all, it is the command's."""
    assert main(["demo", "small", "--help", "--out", str(tmp_path)]) == 0
    assert "told --help" in capsys.readouterr().out
    for names in ([], ["small", "small"], ["all"]):
        assert main(["demo", *names, "-h"]) == 0
        shown = capsys.readouterr().out
        assert "usage: gpunn demo" in shown
        assert "told" not in shown


def test_an_unknown_demo_is_refused(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "nonsense"])
    said = capsys.readouterr().err
    assert "unknown demo 'nonsense'; known are neuron" in said
    assert "options" not in said.rsplit("\n", 2)[-2]
    with pytest.raises(SystemExit):
        main(["demo", "--steps", "1", "--quick", "neuron"])
    assert "unknown demo '1'; names come before a demo's options" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", "--seed", "1"])
    assert "unrecognized arguments: --seed 1" in capsys.readouterr().err
