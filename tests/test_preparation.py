"""What is checked and compiled before a benchmark, with threads for its processes."""

from __future__ import annotations

import os
import threading
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest
import torch

from gpunn.profiling import preparation
from gpunn.profiling.cases import CASES, CHECKED_AS

Seen = list[tuple[str, int]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The cases that were compiled.

    linear is right; dropout is wrong, and pooling's check crashes, in bfloat16.
    """
    seen: Seen = []

    def fault(op: str, dtype: torch.dtype) -> str:
        if op == "pooling" and dtype == torch.bfloat16:
            raise RuntimeError("a kernel brought the process down")
        return "of a reason" * (op == "dropout" and dtype == torch.bfloat16)

    monkeypatch.setattr(preparation, "require_gpu", lambda: None)
    monkeypatch.setattr(preparation, "get_context", lambda kind: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(preparation, "_first_fault", fault)
    monkeypatch.setattr(preparation, "_compile", lambda op, index: seen.append((op, index)))
    return seen


def test_every_case_is_compiled_and_every_check_made(compiled: Seen) -> None:
    said: list[str] = []
    assert preparation.prepare(["linear", "dropout"], 60, said.append) == {
        "linear": "", "dropout": "of a reason",
    }  # fmt: skip
    n_cases = len(CASES["linear"]) + len(CASES["dropout"])
    assert len(set(compiled)) == len(compiled) == n_cases
    assert said[-1] == f"compiled: {n_cases} of {n_cases} cases"


def test_what_crashes_is_left_to_the_benchmark(compiled: Seen) -> None:
    assert preparation.prepare(["pooling", "linear"], 60, lambda line: None) == {"linear": ""}


def test_networks_come_first_and_their_ops_are_checked(compiled: Seen) -> None:
    faults = preparation.prepare(["dropout", "models"], 60, lambda line: None)
    assert set(faults) == {"dropout", *CHECKED_AS["models"]} - {"pooling"}
    assert {op for op, _ in compiled[: len(CASES["models"]) // 2]} == {"models"}


def test_time_runs_out(compiled: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done by then counts, and the rest is not waited for."""
    never = threading.Event()
    monkeypatch.setattr(preparation, "_compile", lambda op, index: never.wait(20))
    said: list[str] = []
    assert preparation.prepare(["linear"], 0.5, said.append) == {"linear": ""}
    assert said[-1].startswith("compiled: 0 of")
    never.set()


def test_the_environment_is_as_before(compiled: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    inside: list[str | None] = []
    names = "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"
    compile_ = lambda op, index: inside.extend(map(os.environ.get, names))  # noqa: E731
    monkeypatch.setattr(preparation, "_compile", compile_)
    preparation.prepare(["glu"], 60, lambda line: None)
    assert set(inside) == {"1"}
    assert [os.environ.get(name) for name in names] == ["7", None]


def test_a_case_is_compiled_by_all_its_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(preparation, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(preparation, "Match", lambda case, sets: made.append(case.name))
    monkeypatch.setattr(preparation, "CASES", {"glu": [CASES["glu"][0].small()]})
    preparation._compile("glu", 0)
    assert made == ["swiglu"]
