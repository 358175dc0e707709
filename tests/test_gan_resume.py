"""The demo of adversarial networks, killed and resumed: as if nothing was."""

from __future__ import annotations

import importlib
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gpunn


@pytest.fixture
def gan(monkeypatch: pytest.MonkeyPatch, demo_folder: Path) -> ModuleType:
    """The demo, for games of ten steps: it measures, and writes a checkpoint, at every other."""
    module = importlib.import_module("gan")
    monkeypatch.setattr(module, "N_POINTS", 5)
    return module


@pytest.fixture
def small(gan: ModuleType) -> Any:
    return importlib.import_module("small_gan")


class Killed(Exception):  # noqa: N818 (nothing is wrong)
    """What ends a game."""


def play(small: Any, out: Path, killed_at: int | None = None, **arguments: Any) -> Any:
    """A game with all that is random; or a part of one, killed between D's step and G's."""
    resume, judge = (arguments.pop(name, None) for name in ("resume", "judge"))
    game = small.game_of(seed=3, dropout_p=0.3, noise=0.2, **arguments)
    teach = game.teach_generator

    def teach_or_die() -> torch.Tensor:
        if game.step + 1 == killed_at:
            raise Killed
        loss: torch.Tensor = teach()
        return loss

    game.teach_generator = teach_or_die
    checkpoints = importlib.import_module("checkpoint").Checkpoints(out)
    importlib.import_module("gan").train(game, judge, checkpoints, bool(resume))
    return game


def assert_same(got: Any, expected: Any, name: str = "state") -> None:
    """Bit for bit, in all that it holds."""
    assert type(got) is type(expected), name
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_same(got[key], value, f"{name}, {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), name
        for i, value in enumerate(expected):
            assert_same(got[i], value, f"{name}, {i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), name
    else:
        assert repr(got) == repr(expected), name  # the first point's losses are NaN in both


@pytest.mark.parametrize(
    ("name", "steps"), [("mlp", (1, 4, 5, 10)), ("dcgan", (7,)), ("wgan-gp", (7,))]
)
def test_killed_and_resumed_is_uninterrupted(
    small: Any, name: str, steps: tuple[int, ...], tmp_path: Path
) -> None:
    """Weights, moments, the average, generators, curves and samples.

    Killed before there is a checkpoint, where one was due, after one, and in the last step.
    """
    given: dict[str, Any] = {"name": name, "judge": small.Reader()}
    with gpunn.backend("torch"):
        expected = play(small, tmp_path / "whole", **given).state()
        assert expected["step"] == 10
        assert [point[0] for point in expected["curve"]] == [0, 2, 4, 6, 8, 10]
        for step in steps:
            out = tmp_path / str(step)
            with pytest.raises(Killed):
                play(small, out, killed_at=step, **given)
            torch.manual_seed(99)
            assert_same(play(small, out, resume=True, **given).state(), expected)


def test_nothing_is_lost_on_the_kernels(
    gan: ModuleType, small: Any, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gan, "N_POINTS", 2)
    given: dict[str, Any] = {"name": "mlp", "device": device, "steps": 2}
    with gpunn.backend("kernels"):
        expected = play(small, tmp_path / "whole", **given)
        with pytest.raises(Killed):
            play(small, tmp_path / "killed", killed_at=2, **given)
        torch.manual_seed(99)
        resumed = play(small, tmp_path / "killed", resume=True, **given)
    assert_same(resumed.state(), expected.state())


def test_the_state_is_whole_at_any_moment(small: Any) -> None:
    """Between two points of the curves, too; a game of another seed takes all of it."""
    with gpunn.backend("torch"):
        game, other = (small.game_of("mlp", seed=seed, dropout_p=0.3) for seed in (3, 4))
        game.measure(small.Reader())
        game.advance()
        state = deepcopy(game.state())  # as a file is none of the game's own
        other.restore(state)
        assert len(other.losses) == 1
        assert_same(other.state(), state)
        for either in (game, other):
            torch.set_rng_state(state["of each process"][0][0]["cpu"])
            either.advance()
            either.measure(small.Reader())
    assert_same(other.state(), game.state())


def test_from_the_checkpoint_before_a_damaged_one(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gpunn.backend("torch"):
        expected = play(small, tmp_path, name="mlp")
        before, newest = sorted(tmp_path.iterdir())
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        resumed = play(small, tmp_path, name="mlp", resume=True)
    said = capsys.readouterr().err
    assert f"{newest} is damaged" in said
    assert f"Going on from {before}, step 8" in said
    assert_same(resumed.state(), expected.state())


def test_a_run_with_other_options_is_refused(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = importlib.import_module("checkpoint")
    checkpoints = checkpoint.Checkpoints(tmp_path)
    game = small.game_of("mlp", seed=3)
    checkpoint.save(game, checkpoints)
    for attribute, value, said in (
        ("setting", small.setting("minimax", 0.0, {}), "setting = mlp, this run minimax"),
        ("setting", small.setting("mlp", 0.0, {"batch": 8}), "batch = 4, this run 8"),
        ("source", "MNIST", "data = digits, 8×8, this run MNIST"),
        ("seed", 4, "seed = 3, this run 4"),
        ("steps", 11, "steps = 10, this run 11"),
        ("group", small.Processes(0, 2), "processes = 1, this run 2"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(game, attribute, value)
            with pytest.raises(checkpoint.ResumeError, match=f"--resume: .*{said}"):
                checkpoint.go_on(game, checkpoints)


def test_damaged_checkpoints_end_the_demo_with_a_message(
    gan: ModuleType, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gan, "Judge", lambda images: small.Reader())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-000001.pt").write_bytes(b"nothing")
    given = ["--device", "cpu", "--resume", "--out", str(tmp_path)]
    assert gan.main(given) == 1
    assert "checkpoint-000001.pt is damaged" in capsys.readouterr().err
