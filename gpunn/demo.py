"""``gpunn demo``: the networks of a first lecture on deep learning, each a file in examples/.

A demo draws its pictures into ``out/NAME/``, and the last line that it prints is the figure that it
reached. ``out/index.html`` shows the pictures of all that ran, and says what each docstring says.
"""

from __future__ import annotations

import ast
import html
import importlib
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

SAID = "said.txt"
"""In a demo's folder: the command, and the last line that it printed."""


@dataclass(frozen=True)
class Demo:
    """A file of examples/."""

    module: str
    data: str
    seconds: int
    """About what it takes with its defaults on two cores of an AMD EPYC."""

    @property
    def docstring(self) -> str:
        return ast.get_docstring(ast.parse((folder() / f"{self.module}.py").read_text())) or ""

    @property
    def title(self) -> str:
        return self.docstring.split("\n", 1)[0]

    @property
    def prose(self) -> list[str]:
        """The docstring's paragraphs after title and usage; a formula is indented."""
        return self.docstring.split("\n\n")[2:]


DEMOS = {
    "neuron": Demo("neuron", "truth tables", 8),
    "activations": Demo("activations", "digits, 8×8", 26),
    "digits": Demo("digits_mlp", "digits, 8×8", 9),
    "tricks": Demo("tricks", "digits, 8×8", 39),
    "edges": Demo("edges", "a photograph", 4),
    "augment": Demo("augment_sheet", "two photographs, digits", 5),
    "lenet": Demo("lenet_digits", "digits, 8×8", 9),
    "alexnet": Demo("alexnet", "two photographs", 40),
    "resnet": Demo("resnet_vs_plain", "digits, 8×8", 39),
    "transformer": Demo("transformer_translate", "number words", 40),
    "gpt": Demo("gpt_text", "Python's language reference", 45),
    "gan": Demo("gan", "digits, 8×8", 31),
    "style": Demo("style_transfer", "two photographs, a painting", 95),
}


def folder() -> Path:
    """Where the demos are: in the package, if it is installed, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "examples"
    return installed if installed.is_dir() else here.parent / "examples"


def listing() -> str:
    """A line a demo: its name, what it shows, its data, its time."""
    from gpunn.cli import table

    header = ("demo", "time", "data", "what it shows")
    rows = [(name, f"{d.seconds} s", d.data, d.title) for name, d in DEMOS.items()]
    return table([header, *rows, ("all", "", "", "each of them, one after the other")])


class Tee:
    """A text stream that passes on what is written, and keeps it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.kept = stream, ""

    def write(self, text: str) -> int:
        self.kept += text
        return self.stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def run(name: str, options: Sequence[str], out: Path) -> int:
    """One demo, with its own options; its status."""
    demo = DEMOS[name]
    print(f"\n{name}: {demo.title}", flush=True)
    if str(folder()) not in sys.path:
        sys.path.insert(0, str(folder()))
    module = importlib.import_module(demo.module)
    heard = Tee(sys.stdout)
    with redirect_stdout(heard):  # type: ignore[type-var]
        status = int(module.main([*options, "--out", str(out / name)]))
    last = heard.kept.rstrip("\n").rsplit("\n", 1)[-1]
    if status == 0:
        command = " ".join(["gpunn demo", name, *options])
        (out / name / SAID).write_text(f"{command}\n{last}\n")
    return status


def run_command(names: Sequence[str], options: Sequence[str], out: Path) -> int:
    """``gpunn demo NAME …``: these demos, then the page of all that ran; 1 if one failed."""
    chosen = list(DEMOS) if "all" in names else list(names)
    failed = [name for name in chosen if run(name, options, out) != 0]
    print(f"\nAll pictures: {write_page(out)}")
    return 1 if failed else 0


STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
       color: #222; background: #fff; }
h1, h2 { line-height: 1.2; }
section { border-top: 1px solid #ccc; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
figure { margin: 0; }
figcaption, code { color: #555; }
.said { font-weight: 600; }
"""


def write_page(out: Path) -> Path:
    """``index.html``: of each demo that ran, its text, its last line and its pictures."""
    ran = [name for name in DEMOS if (out / name / SAID).exists()]
    page = out / "index.html"
    page.write_text(
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>gpunn: demos</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{STYLE}</style>\n<h1>What the demos of gpunn drew</h1>\n"
        + "\n".join(section(name, out / name) for name in ran)
        + "\n</html>\n",
        encoding="utf-8",
    )
    return page


def paragraph(text: str) -> str:
    """Of a docstring; what is indented keeps its lines, and ``this`` is code."""
    if text.startswith(" "):
        return f"<pre>{html.escape(text)}</pre>"
    escaped = html.escape(" ".join(text.split()))
    marked = re.sub("``(.+?)``", r"<code>\1</code>", escaped)
    return f"<p>{marked}</p>"


def section(name: str, drawn: Path) -> str:
    """A demo's part of the page; the pictures stand in the order in which they were drawn."""
    command, last = (drawn / SAID).read_text().splitlines()
    lines = [f'<section id="{name}">', f"<h2>{html.escape(DEMOS[name].title)}</h2>"]
    lines += map(paragraph, DEMOS[name].prose)
    lines += [f'<p class="said">{html.escape(last)}</p>', f"<p><code>{html.escape(command)}</code>"]
    pictures = [path for path in drawn.iterdir() if path.suffix in (".png", ".jpg")]
    for picture in sorted(pictures, key=lambda path: (path.stat().st_mtime_ns, path)):
        caption, source = html.escape(picture.stem.replace("_", " ")), quote(picture.name)
        lines.append(
            f'<figure><img src="{name}/{source}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "\n".join([*lines, "</section>"])
