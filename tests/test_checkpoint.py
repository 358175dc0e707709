"""Checkpoints of the demos: whole or not there, and a training that goes on as if nothing was."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gpunn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("checkpoint")


@pytest.fixture
def small() -> Any:
    """A small training; the test is skipped where the demos' packages are missing."""
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package, reason=f"no {package}: pip install 'gpunn[demo]'")
    return importlib.import_module("small_translation")


def test_the_last_two_are_kept(checkpoint: ModuleType, tmp_path: Path) -> None:
    """Numbered on by a later run; what a killed process left half-written is no checkpoint."""
    folder = tmp_path / "new" / "folder"
    for i in range(3):
        checkpoint.Checkpoints(folder).save({"i": i, "x": torch.arange(i)})
    (folder / "checkpoint-000004.tmp").write_bytes(b"half")
    checkpoints = checkpoint.Checkpoints(folder)
    assert [path.name for path in checkpoints.paths()] == [
        "checkpoint-000002.pt",
        "checkpoint-000003.pt",
    ]
    found = checkpoints.load()
    assert (found.state["i"], found.refused) == (2, [])
    assert torch.equal(found.state["x"], torch.arange(2))
    checkpoints.save({"i": 3})
    assert not list(folder.glob("*.tmp"))
    assert checkpoints.load().path.name == "checkpoint-000004.pt"


def test_nothing_is_lost_when_writing_fails(
    checkpoint: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the new one has its name, nothing but a temporary file has changed."""
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for i in range(2):
        checkpoints.save({"i": i})
    before = {path: path.read_bytes() for path in checkpoints.paths()}
    synced: list[int] = []

    def killed(*paths: Any) -> None:
        assert synced, "the content is not on the disk yet"
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", synced.append)
    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"i": 2})
    assert {path: path.read_bytes() for path in checkpoints.paths()} == before
    assert checkpoints.load().state == {"i": 1}


def truncated(content: bytes) -> bytes:
    return content[:-1]


def changed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def emptied(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, changed, emptied])
def test_a_damaged_one_is_refused_and_the_one_before_it_used(
    damage: Any, checkpoint: ModuleType, tmp_path: Path
) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path)
    first, second = (checkpoints.save({"i": i}) for i in range(2))
    second.write_bytes(damage(second.read_bytes()))
    found = checkpoints.load()
    assert (found.path, found.state) == (first, {"i": 0})
    assert len(found.refused) == 1
    assert f"{second} is damaged" in found.refused[0]
    first.write_bytes(damage(first.read_bytes()))
    with pytest.raises(checkpoint.DamagedCheckpointError) as caught:
        checkpoints.load()
    assert all(f"{path} is damaged" in str(caught.value) for path in (first, second))


def test_an_empty_folder_has_none(checkpoint: ModuleType, tmp_path: Path) -> None:
    assert checkpoint.Checkpoints(tmp_path / "nowhere").load() is None


def test_a_journal_keeps_its_parts(checkpoint: ModuleType, tmp_path: Path) -> None:
    """What was done and what was begun; a run with other options cannot have them."""
    journal = checkpoint.Journal(tmp_path, {"seed": 1})
    assert journal.resume() == f"No checkpoint in {tmp_path}: from the beginning"
    journal.part("first").keep({"x": torch.ones(2)})
    journal.part("second").keep({"step": 1})
    journal.part("second").keep({"step": 2})
    resumed = checkpoint.Journal(tmp_path, {"seed": 1})
    assert resumed.part("first").state is None
    assert resumed.resume() == f"Going on from {tmp_path / 'checkpoint-000003.pt'}"
    assert torch.equal(resumed.part("first").state["x"], torch.ones(2))
    assert resumed.part("second").state == {"step": 2}
    other = checkpoint.Journal(tmp_path, {"seed": 2})
    with pytest.raises(checkpoint.ResumeError, match="has seed = 1, this run 2"):
        other.resume()
    assert other.parts == {}


def test_a_digest_is_of_values(checkpoint: ModuleType) -> None:
    """Whatever their strides; of all tensors, to the last value."""
    x = torch.arange(6.0).view(2, 3)
    other = x + torch.tensor([[0.0] * 3, [0.0, 0.0, 1.0]])
    assert checkpoint.digest([x.T]) == checkpoint.digest([x.T.contiguous()])
    assert len({checkpoint.digest(given) for given in ([x], [x, x], [other])}) == 3


def assert_same_training(got: Any, expected: Any) -> None:
    """Weights, moments and curve, bit for bit; the curve's first training loss is NaN in both."""
    state, exact = got.state(), expected.state()
    assert state["step"] == exact["step"]
    for name, value in exact["model"].items():
        assert torch.equal(state["model"][name], value), name
    for name, moments in exact["optimizer"]["state"].items():
        for moment, value in moments.items():
            assert torch.equal(state["optimizer"]["state"][name][moment], value), name
    assert str(state["curve"]) == str(exact["curve"])
    assert torch.equal(state["generators"][0]["cpu"], exact["generators"][0]["cpu"])


@pytest.mark.parametrize("choice", ["torch", "kernels"])
def test_killed_and_resumed_is_uninterrupted(choice: Any, small: Any, tmp_path: Path) -> None:
    """Past the end of a pass over the data, with dropout; on the kernels, by smaller batches."""
    steps, killed, batch = (9, 8, 8) if choice == "torch" else (3, 3, 2)
    with gpunn.backend(choice):
        expected = small.trained(small.options(tmp_path / "whole", steps, {}, batch))
        given = small.options(tmp_path / "killed", steps, {}, batch)
        small.kill(given, killed, small.Processes())
        torch.manual_seed(99)
        given = small.options(tmp_path / "killed", steps, {}, batch, resume=True)
        assert_same_training(small.trained(given), expected)


def test_from_the_checkpoint_before_a_damaged_one(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says so, and ends with the same weights."""
    with gpunn.backend("torch"):
        expected = small.trained(small.options(tmp_path, 6, {}))
        newest = max((tmp_path / "checkpoints").iterdir())
        newest.write_bytes(changed(newest.read_bytes()))
        resumed = small.trained(small.options(tmp_path, 6, {}, resume=True))
    said = capsys.readouterr().err
    assert f"{newest} is damaged" in said
    assert "step 4" in said
    assert_same_training(resumed, expected)


def test_a_run_with_other_options_is_refused(
    checkpoint: ModuleType, small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gpunn.backend("torch"):
        small.trained(small.options(tmp_path, 2, {}))
        for name, changes in (
            ("seed = 3, this run 4", {"seed": 4}),
            ("pair = en-de, this run en-fr", {"pair": "en-fr"}),
            ("steps = 2, this run 3", {"steps": 3}),
        ):
            given: Any = small.options(
                tmp_path, **{"steps": 2, "network": {}, **changes}, resume=True
            )
            with pytest.raises(checkpoint.ResumeError, match=f"--resume: .*{name}"):
                small.trained(given)
        small.trained(small.options(tmp_path / "none", 1, {}, resume=True))
    assert "from the beginning" in capsys.readouterr().err


def test_two_processes_learn_as_one(small: Any, tmp_path: Path) -> None:
    """As torchrun starts them, over gloo: DistributedDataParallel, then FSDP2, all resumed."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "examples"))),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    shared.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "small_together.py"), str(tmp_path)]
    started = [
        subprocess.Popen(
            command, env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        for process in started:
            output, errors = process.communicate(timeout=240)
            assert output.rstrip().endswith("all agree"), errors
    finally:
        for process in started:
            process.kill()
