"""What the command lines of the demos have in common."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def folder(text: str) -> Path:
    """A folder that can be written into; it is made here, so that no work is done for nothing."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot write into {path}: {error.strerror or error}"
        ) from None


def parser_for(
    description: str | None,
    name: str,
    *,
    seed: str,
    steps: str,
    quick: str,
    resume: str = "go on from the last checkpoint",
) -> argparse.ArgumentParser:
    """A parser with the options that all demos have, for the demo of this name.

    What ``seed``, ``steps``, ``quick`` and ``resume`` do in this one is given in words.
    """
    parser = argparse.ArgumentParser(f"{name}.py", description=(description or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda")
    parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--steps", type=positive, help=steps)
    out = str(Path("out", name))  # argparse gives a default to its type only if it is text
    parser.add_argument("--out", type=folder, default=out, help="pictures' folder")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--resume", action="store_true", help=resume)
    return parser


def device_of(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device that ``--device`` names; one that is not here is a usage error."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected auto, cpu or cuda, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: {name} was asked for, but PyTorch finds no CUDA device here")
    return device
