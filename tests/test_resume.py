"""The demos that train, killed in any step and resumed: as if nothing was, and nothing twice."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import gpunn
from test_gan_resume import assert_same

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
Kept = dict[tuple[str, int | None], Any]


class Demo(NamedTuple):
    """A demo in small: its options, and what it would otherwise take too long with."""

    module: str
    options: str
    small: dict[str, Any]
    trains: str = ""
    """The module whose ``train_step`` it calls, where that is another."""
    parts: int = 1
    also: tuple[str, ...] = ()
    """An option of its own that a resumed run cannot change."""


DEMOS = (
    Demo("digits_mlp", "--steps 25", {}),
    Demo("lenet_digits", "--steps 14", {}, trains="digits_mlp", also=("--modern",)),
    Demo("alexnet", "--steps 14", {
        "BATCH": 4, "N_MEASURED": 8,
        "full_size_speed": lambda *_: importlib.import_module("alexnet").Speed(1.0, gpunn.Trace()),
    }),
    Demo("resnet_vs_plain", "--quick --steps 14", {"QUICK_DEPTHS": (8,), "DEEP": 8}, parts=2),
    Demo("gpt_text", "--steps 14", {
        "BATCH": 2, "CONTEXT": 16, "N_MEASURED": 8, "write": lambda *_: "",
        "reference": lambda: " ".join(map(str, range(400))),
    }, also=("--text", __file__)),
    Demo("tricks", "--seeds 1 --steps 6", {"N_THINNED": 2}, parts=8),
    Demo("activations", "--quick --steps 2", {"LAYERS": 3}, parts=16),
)  # fmt: skip


@pytest.fixture(params=DEMOS, ids=lambda demo: demo.module)
def demo(
    request: pytest.FixtureRequest, demo_folder: Path, monkeypatch: Patch
) -> Iterator[ModuleType]:
    """Each of them, in small, by PyTorch; pictures are of few dots, and as fast."""
    chosen: Demo = request.param
    module = importlib.import_module(chosen.module)
    for name, value in chosen.small.items():
        monkeypatch.setattr(module, name, value)
    figure = importlib.import_module("matplotlib.figure").Figure
    drawn = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: drawn(self, path, dpi=30))
    monkeypatch.setattr(module, "small", chosen, raising=False)
    monkeypatch.setattr(module, "SAVE_EVERY", 3, raising=False)  # activations has none
    checkpoint = importlib.import_module("checkpoint")
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: None)  # no power is cut here
    with gpunn.backend("torch"):
        yield module


@pytest.fixture
def kept(demo: ModuleType, monkeypatch: Patch) -> Kept:
    """What checkpoints held of each part, after each step and in the end (None)."""
    found: Kept = {}
    part = importlib.import_module("checkpoint").Part
    keep = part.keep

    def spy(self: Any, state: dict[str, Any]) -> None:
        found[self.name, state.get("step")] = deepcopy(state)  # as a file is nobody else's
        keep(self, state)

    monkeypatch.setattr(part, "keep", spy)
    return found


def steps_until(demo: ModuleType, n: int, monkeypatch: Patch) -> list[int]:
    """The run is killed in its n-th step, before it has an effect; the steps that it took."""
    taken = list[int]()
    owner = importlib.import_module(demo.small.trains or demo.small.module)
    real = owner.train_step

    def train_step(*given: Any) -> Any:
        taken.append(len(taken) + 1)
        if len(taken) == n:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(owner, "train_step", train_step)
    return taken


def run(demo: ModuleType, out: Path, *more: str) -> int:
    options = [*demo.small.options.split(), "--device", "cpu", "--out", str(out), *more]
    status: int = demo.main(options)
    return status


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def test_killed_and_resumed_is_uninterrupted(
    demo: ModuleType, kept: Kept, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Twice or more, in drawn steps: every checkpoint, the figures, the pictures, bit for bit."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    with monkeypatch.context() as patch:
        taken = steps_until(demo, -1, patch)
        assert run(demo, whole) == 0
    said, expected = capsys.readouterr().out.splitlines()[-1], dict(kept)
    assert len({name for name, _ in expected}) == demo.small.parts
    kept.clear()
    drawn = torch.Generator().manual_seed(len(taken))
    for life in range(30):
        torch.manual_seed(life)  # as another process's generator is in another state
        n = int(torch.randint(2, len(taken) // 2, (), generator=drawn))
        with monkeypatch.context() as patch:
            lived = steps_until(demo, n, patch)
            try:
                assert run(demo, out, "--resume") == 0
                break
            except KeyboardInterrupt:
                assert len(lived) == n
    printed = capsys.readouterr()
    assert f"No checkpoint in {out / 'checkpoints'}: from the beginning" in printed.err
    assert f"Going on from {out / 'checkpoints'}" in printed.err
    assert printed.out.splitlines()[-1] == said
    assert_same(kept, expected)
    assert pictures(out) == pictures(whole) != {}


def test_nothing_is_computed_again_or_for_others(
    demo: ModuleType, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """A run that had ended takes no step; one with other options is refused."""
    assert run(demo, tmp_path) == 0
    said, drawn = capsys.readouterr().out.splitlines()[-1], pictures(tmp_path)
    taken = steps_until(demo, -1, monkeypatch)
    assert run(demo, tmp_path, "--resume") == 0
    assert not taken
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == said
    always = demo.small.module == "alexnet"  # a step of the full size is no part of the training
    assert always or "none was taken, as all was in the checkpoint" in printed
    assert pictures(tmp_path) == drawn
    for other in filter(None, (("--seed", "1"), ("--steps", "40"), demo.small.also)):
        assert run(demo, tmp_path, "--resume", *other) == 1
        complaint = capsys.readouterr().err
        assert f"--resume: the checkpoint has {other[0].removeprefix('--')}" in complaint
    assert not taken
