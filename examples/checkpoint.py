"""Checkpoints of a training that is killed and goes on with nothing lost.

A checkpoint is written to a temporary file, flushed to the disk and then renamed, so that at any
moment each name holds a whole one; a SHA-256 digest shows what was damaged later. The last two are
kept: where the newest is damaged, the one before it is used.

Most demos have a ``Journal`` of their parts, be it one or many. A ``Loop`` makes the steps of a
part; what a part has computed in the end, it has computed ``once``. A training in several processes
calls ``go_on`` before its loop instead, and ``save`` after every so many steps. On
``CANNOT_RESUME`` a demo's ``main`` prints the message and returns 1.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import gpunn
from processes import Processes

HEADER = b"gpunn checkpoint 1\n"
N_KEPT = 2
ALONE = Processes()


class DamagedCheckpointError(Exception):
    """No checkpoint is what was written."""


class ResumeError(Exception):
    """A checkpoint is not of this run."""


CANNOT_RESUME = DamagedCheckpointError, ResumeError


class Resumable(Protocol):
    """A training that can be put away and taken up again."""

    step: int

    def chosen(self) -> dict[str, Any]:
        """By name: what has to be the same in a run that goes on."""

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as tensors and plain values.

        All processes call it; what the first gets is what is written.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave, on the CPU."""


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


def newest(checkpoints: Checkpoints, chosen: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """What the newest checkpoint that is whole has, if there is one; and what to say of it.

    Raises:
        DamagedCheckpointError: there are some, and all are damaged.
        ResumeError: it is of a run that had not ``chosen`` the same.
    """
    found = checkpoints.load()
    if found is None:
        return None, f"No checkpoint in {checkpoints.folder}: from the beginning"
    check_same_run(found.state["chosen"], chosen)
    return found.state, "\n".join([*found.refused, f"Going on from {found.path}"])


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
        state, said = newest(self.checkpoints, self.chosen)
        if state is not None:
            self.parts = state["parts"]
        return said

    def part(self, name: str) -> Part:
        return Part(self, name)


def open_journal(out: Path, resume: bool, chosen: dict[str, Any]) -> Journal:
    """The journal in ``out``/checkpoints, which goes on, and says so, where ``resume`` asks for it.

    Raises:
        DamagedCheckpointError: there are checkpoints, and all are damaged.
        ResumeError: the newest is of a run with other options.
    """
    journal = Journal(out / "checkpoints", chosen)
    if resume:
        print(journal.resume(), file=sys.stderr)
    return journal


def what_ran(step: str, trace: gpunn.Trace) -> str:
    """What a step of that kind ran, to be printed; the trace of one that was not taken is empty."""
    if trace.launches or trace.fallbacks:
        return f"{step} ran:\n{trace}"
    return f"{step}: none was taken, as all was in the checkpoint"


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

    def once(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """What ``compute`` returns, tensors or plain values; or what it did before a resumption.

        It takes the place of what was kept on the way to it.
        """
        if self.state is None or "result" not in self.state:
            self.keep({"result": compute(*arguments)})
        return self.journal.parts[self.name]["result"]


class Loop:
    """The steps of a training: ``for step in loop`` numbers those that are left, of 1 to ``steps``.

    After every so many, and the last, a checkpoint keeps what the rest depends on. Where ``part``
    was begun, the loop goes on from there: all that it was given has the state that it had.

    Args:
        part: what keeps it, of a run's journal.
        steps: how many there are.
        every: from one checkpoint to the next.
        generator: one that is drawn from, beside PyTorch's own.
        changing: by name, the network, its optimiser, its schedule.
    """

    def __init__(
        self,
        part: Part,
        steps: int,
        every: int,
        generator: torch.Generator | None = None,
        **changing: torch.nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        self.part, self.steps, self.every = part, steps, every
        self.generator, self.changing = generator, changing
        self.step = 0
        """How many are done."""
        self.curve: list[Any] = []
        """What is measured on the way, as plain values; the loop keeps what is put here."""
        if part.state is not None:
            self._restore(part.state)

    def __iter__(self) -> Iterator[int]:
        while self.step < self.steps:
            yield self.step + 1
            self.step += 1
            if self.step % self.every == 0 or self.step == self.steps:
                self.part.keep(self._state())

    def _state(self) -> dict[str, Any]:
        """All that the rest of the training, and its curve, depend on."""
        return {
            **{name: each.state_dict() for name, each in self.changing.items()},
            "step": self.step,
            "curve": list(self.curve),
            "generators": generator_states(),
            "own generator": self.generator and self.generator.get_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        for name, each in self.changing.items():
            each.load_state_dict(state[name])
        self.step, self.curve = state["step"], list(state["curve"])
        set_generator_states(state["generators"])
        if self.generator is not None:
            self.generator.set_state(state["own generator"])


def save(training: Resumable, checkpoints: Checkpoints, group: Processes = ALONE) -> None:
    """One more checkpoint, which the first process writes; all call it."""
    state = {"chosen": training.chosen(), **training.state()}
    if group.first:
        checkpoints.save(state)
    group.wait()


def go_on(training: Resumable, checkpoints: Checkpoints, group: Processes = ALONE) -> None:
    """Go on from the newest checkpoint that is whole, and say so, or that there is none.

    Raises:
        DamagedCheckpointError: there are some, and all are damaged.
        ResumeError: it is of a run with other options.
    """
    state, said = newest(checkpoints, training.chosen())
    if state is not None:
        training.restore(state)
        said += f", step {training.step}"
    if group.first:
        print(said, file=sys.stderr)


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
