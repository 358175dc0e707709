"""Checkpoints of a training that is killed and goes on with nothing lost.

A checkpoint is written to a temporary file, flushed to the disk and then renamed, so that at any
moment each name holds a whole one; a SHA-256 digest shows what was damaged later. The last two are
kept: where the newest is damaged, the one before it is used.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HEADER = b"gpunn checkpoint 1\n"
N_KEPT = 2


class DamagedCheckpointError(Exception):
    """No checkpoint is what was written."""


class ResumeError(Exception):
    """A checkpoint is not of this run."""


@dataclass(frozen=True)
class Loaded:
    """What was found."""

    path: Path
    state: dict[str, Any]
    refused: list[str]
    """Why newer ones were not taken."""


def write(path: Path, state: dict[str, Any]) -> None:
    """``state``, of tensors and plain values, as a file that is there whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(HEADER + hashlib.sha256(payload).digest())
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)  # noqa: PTH105 (says that it is atomic)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name survives a power cut, too
    finally:
        os.close(folder)


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What ``write`` wrote, on the CPU; or None, and what is wrong with the file."""
    content = path.read_bytes()
    start = len(HEADER) + hashlib.sha256().digest_size
    if not content.startswith(HEADER):
        return None, f"{path} is damaged, or no checkpoint: its header is another"
    if hashlib.sha256(content[start:]).digest() != content[len(HEADER) : start]:
        return None, f"{path} is damaged: its content does not have its SHA-256 digest"
    payload = io.BytesIO(content[start:])
    return torch.load(payload, map_location="cpu", weights_only=True), ""


class Checkpoints:
    """The checkpoints of a folder, numbered in the order in which they were written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted(self.folder.glob("checkpoint-*.pt"))

    def save(self, state: dict[str, Any]) -> Path:
        """Write one more; then remove all but the last two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.paths()
        number = int(before[-1].stem.removeprefix("checkpoint-")) + 1 if before else 1
        path = self.folder / f"checkpoint-{number:06}.pt"
        write(path, state)
        for old in self.paths()[:-N_KEPT]:
            old.unlink()
        return path

    def load(self) -> Loaded | None:
        """The newest that is whole; None where there is none at all.

        Raises:
            DamagedCheckpointError: there are some, and all are damaged.
        """
        refused: list[str] = []
        for path in reversed(self.paths()):
            state, complaint = _read(path)
            if state is not None:
                return Loaded(path, state, refused)
            refused.append(complaint)
        if refused:
            raise DamagedCheckpointError("\n".join(refused))
        return None


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Some tensors in a word: the beginning of the SHA-256 digest of their bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def check_same_run(saved: dict[str, Any], chosen: dict[str, Any]) -> None:
    """What a checkpoint's run had ``chosen``, against what this one has.

    Raises:
        ResumeError: something differs.
    """
    for name, value in chosen.items():
        if saved.get(name) != value:
            raise ResumeError(
                f"--resume: the checkpoint has {name} = {saved.get(name)}, this run {value}"
            )


class Journal:
    """What a run of several parts has computed so far, by their names: what checkpoints hold.

    Args:
        folder: of the checkpoints.
        chosen: what has to be the same in a run that goes on.
    """

    def __init__(self, folder: Path, chosen: dict[str, Any]) -> None:
        self.checkpoints, self.chosen = Checkpoints(folder), chosen
        self.parts: dict[str, dict[str, Any]] = {}

    def resume(self) -> str:
        """Go on from the newest checkpoint that is whole; says from which.

        Raises:
            DamagedCheckpointError: there are some, and all are damaged.
            ResumeError: it is of a run with other options.
        """
        found = self.checkpoints.load()
        if found is None:
            return f"No checkpoint in {self.checkpoints.folder}: from the beginning"
        check_same_run(found.state["chosen"], self.chosen)
        self.parts = found.state["parts"]
        return "\n".join([*found.refused, f"Going on from {found.path}"])

    def part(self, name: str) -> Part:
        return Part(self, name)


@dataclass(frozen=True)
class Part:
    """One of them."""

    journal: Journal
    name: str

    @property
    def state(self) -> dict[str, Any] | None:
        """As it was kept last; None where nothing was."""
        return self.journal.parts.get(self.name)

    def keep(self, state: dict[str, Any]) -> None:
        """A checkpoint with this part's state, of tensors and plain values, and the others'."""
        self.journal.parts[self.name] = state
        self.journal.checkpoints.save({"chosen": self.journal.chosen, "parts": self.journal.parts})


def generator_states() -> dict[str, torch.Tensor]:
    """Of PyTorch's own generators, which dropout draws from: the CPU's and the current GPU's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: dict[str, torch.Tensor]) -> None:
    """They draw on from there."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
