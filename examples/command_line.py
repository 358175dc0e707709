"""What the command lines of the demos have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def parser_for(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with ``--device`` and ``--out``, for the demo of this name."""
    parser = argparse.ArgumentParser(f"{name}.py", description=(description or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda")
    parser.add_argument("--out", type=Path, default=Path("out", name), help="pictures' folder")
    return parser


def device_of(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device that ``--device`` names; one that is not here is a usage error."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device: expected auto, cpu or cuda, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: {name} was asked for, but PyTorch finds no CUDA device here")
    return device
