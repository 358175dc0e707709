"""``gpunn profile`` and the overhead's script: what they print, write and return."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from gpunn.kernels.interpreter import INTERPRETING
from gpunn.profiling import command, overhead
from gpunn.profiling.cases import CASES
from gpunn.profiling.static_report import Report

ROOT = Path(__file__).resolve().parent.parent


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(given)


def test_profile_compiles_and_says_that_speed_was_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "found.json"
    assert command.run(arguments("glu", "--json", str(path))) == 0
    assert ("TRITON_INTERPRET" in os.environ) == INTERPRETING
    printed = capsys.readouterr().out
    assert "sm_90" in printed
    assert "glu_forward_kernel" in printed
    assert "glu_backward_kernel" in printed
    assert "speed: not measured: PyTorch finds no CUDA GPU here" in printed
    content = json.loads(path.read_text())
    assert content["speed"] == []
    assert "no CUDA GPU" in content["why speed was not measured"]
    for row in content["static"]:
        assert row["error"] is None
        assert row["report"]["registers"] > 0
        assert row["report"]["spilled_bytes"] == 0


def test_profile_names_the_ops_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(arguments("liner")) == 2
    assert f"no such op: liner; there are {', '.join(CASES)}" in capsys.readouterr().err
    assert command.run(arguments()) == 2
    assert "no op was given" in capsys.readouterr().err


def test_a_kernel_that_does_not_compile_is_told_and_fails() -> None:
    row = command.StaticRow("linear", "a_kernel", "64×64 4 warps", 90, ["a case", "another"])
    future: Future[Report] = Future()
    future.set_exception(ValueError("no such instruction"))
    command._collect(row, future, time.perf_counter() + 1)
    text = command.static_table([row])
    assert "a_kernel" in text
    assert "a case and 1 more" in text
    assert "ValueError: no such instruction" in text
    assert command._failed(row)


def test_a_kernel_that_time_ran_out_for_is_told_and_does_not_fail() -> None:
    row = command.StaticRow("linear", "a_kernel", "64×64 4 warps", 90)
    command._collect(row, Future(), time.perf_counter() - 1)
    assert row.remarks() == "time ran out"
    assert not command._failed(row)


def test_overhead_is_the_difference() -> None:
    pair = overhead.Pair("a call", lambda: sum(range(50_000)), lambda: None)
    found = overhead.measure(pair, repetitions=3, n_calls=2)
    assert found.added > 50
    assert found.added_at_best > 50
    assert found.ours > found.added > found.theirs
    assert "a call" in overhead.overhead_table([found])


def test_overhead_is_printed_with_the_machine_and_the_versions() -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "gpunn.profiling.overhead", "--repetitions", "2"],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    for expected in (
        "linear",
        "nn.Linear",
        "requires_grad",
        "added µs",
        torch.__version__,
        "target",
    ):
        assert expected in done.stdout


@pytest.mark.skipif(not INTERPRETING, reason="kernels are compiled in this process")
def test_overhead_refuses_to_time_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().out
