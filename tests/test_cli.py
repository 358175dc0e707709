"""The command line: doctor, check and profile, and that check fails when it should."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import gpunn
import gpunn.functional as GF
from gpunn import check, doctor
from gpunn.check import Row
from gpunn.checks.comparison import Check, Comparison
from gpunn.cli import main
from gpunn.kernels.activation import ACTIVATIONS
from gpunn.kernels.launch import record_fallback
from kit import OPS, each_dtype

ROOT = Path(gpunn.__file__).resolve().parent.parent
Capture = pytest.CaptureFixture[str]


def rows_of(output: str) -> dict[tuple[str, ...], str]:
    """The printed table, by op, case and dtype: the verdict."""
    lines = output.splitlines()
    header = next(line for line in lines if line.startswith("op "))
    starts = [header.index(title) for title in check.HEADER]
    ends = [*starts[1:], None]
    cells = [
        [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
        for line in lines[lines.index(header) + 1 : -2]
    ]
    return {tuple(row[:3]): row[5] for row in cells}


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only relu's, so that a test of the machinery is quick."""
    relu = [c for c in check.checks_of("activation") if c.case == "relu"]
    monkeypatch.setattr(check, "CHECKS", {"activation": relu})
    monkeypatch.setattr(check, "n_processes_here", lambda: 1)  # where they are these, too


@pytest.fixture
def fresh_verdicts() -> Iterator[None]:
    check.first_fault.cache_clear()
    yield
    check.first_fault.cache_clear()


# --- check ---


@each_dtype
@pytest.mark.parametrize("op", check.CHECKS)
def test_checks_pass(op: str, dtype: torch.dtype, device: str) -> None:
    rows = [check.run_check(each, dtype, device) for each in check.checks_of(op)]
    assert not [row for row in rows if not row.ok]


def test_everything_is_checked() -> None:
    assert set(check.CHECKS) == set(OPS)
    cases = [each.case for checks in check.CHECKS.values() for each in checks]
    named = {word for case in cases for word in re.findall(r"\w+", case)}
    # linear's cases name what it fuses, conv3d has no kernel, sync_batch_norm needs processes, and
    # attention of several heads is made of other functions
    made = {"multi_head_attention_forward", "split_heads", "merge_heads"}
    missing = set(GF.__all__) - made - {"linear", "conv3d", "sync_batch_norm"} - named
    assert not missing, f"no Check's case names {missing}, as a word"
    assert set(ACTIVATIONS) <= named


def test_several_processes_find_the_same() -> None:
    found: list[Row] = []
    rows = check.run_checks(["rotary_embedding"], found.append, n_processes=2)
    assert rows == found == check.run_checks(["rotary_embedding"])
    assert {row.dtype for row in rows} == {"float32", "float16", "bfloat16"}
    assert len(rows) == 3 * len(check.CHECKS["rotary_embedding"])


def test_check_of_one_op_has_only_that(capsys: Capture) -> None:
    assert main(["check", "glu"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert set(rows.values()) == {"ok"}
    assert {op for op, _, _ in rows} == {"glu"}
    assert len(rows) == 3 * len(check.CHECKS["glu"])


def test_check_finds_its_way_without_a_gpu() -> None:
    """In a process of its own, which has to start another to interpret the kernels."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "gpunn", "check", "glu"],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    n_rows = len(check.CHECKS["glu"]) * len(check.DTYPES)
    assert f"{n_rows} of {n_rows} checks passed" in done.stdout
    assert ("Triton's interpreter" in done.stdout) == (not torch.cuda.is_available())


def test_unknown_op_is_refused(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["check", "glu", "softmux"])
    assert refused.value.code == 2
    known = ", ".join(check.CHECKS)
    assert f"unknown op 'softmux'; known are {known}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"op: unknown name 'softmux'; allowed are {known}"):
        check.checks_of("softmux")


@pytest.mark.parametrize(("broken", "other"), [("forward", "silu"), ("gradient", "sigmoid")])
def test_a_wrong_kernel_fails_its_row(
    broken: str,
    other: str,
    few_checks: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    wrong: dict[str, Any] = {broken: getattr(ACTIVATIONS[other], broken)}
    monkeypatch.setitem(ACTIVATIONS, "relu", dataclasses.replace(ACTIVATIONS["relu"], **wrong))
    assert main(["check", "activation"]) == 1
    output = capsys.readouterr().out
    rows = rows_of(output)
    assert len(rows) == 3
    for verdict in rows.values():
        assert re.fullmatch("FAIL: (y|dx): the error is larger than allowed", verdict)
        assert broken == "forward" or "dx" in verdict
    assert "0 of 3 checks passed" in output


def test_a_fallback_fails_its_row(few_checks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = GF.relu

    def partly(x: torch.Tensor) -> torch.Tensor:
        record_fallback("relu", "it was Tuesday")
        return ours(x)

    monkeypatch.setattr(GF, "relu", partly)
    assert {row.verdict for row in check.run_checks()} == {
        "FAIL: relu was left to PyTorch: it was Tuesday"
    }
    monkeypatch.setattr(GF, "relu", torch.relu)
    assert {row.verdict for row in check.run_checks()} == {"FAIL: no kernel ran"}


def test_a_kernel_that_does_not_run_fails_its_row(
    few_checks: None, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of\nresource: shared memory")

    wanted = dataclasses.replace(check.checks_of("activation")[0], kernels=("split_kernel",))
    assert (
        check.run_check(wanted, torch.float32, device).verdict == "FAIL: split_kernel did not run"
    )
    monkeypatch.setattr(GF, "relu", broken)
    row = check.run_checks()[0]
    assert row.verdict == "FAIL: RuntimeError: out of resource: shared memory"
    assert not row.ok


def test_a_check_that_shows_nothing_fails_its_row(device: str) -> None:
    def vacuous(dtype: torch.dtype, device: str) -> list[Comparison]:
        zeros = GF.relu(torch.zeros(3, dtype=dtype, device=device))
        return [("y", zeros, np.zeros(3), zeros)]

    row = check.run_check(Check("relu", "zeros", vacuous), torch.float32, device)
    assert row.verdict.startswith("FAIL: y: the largest exact value is 0.0e+00")


def test_checking_leaves_the_random_numbers_alone(few_checks: None) -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    check.run_checks()
    assert torch.equal(torch.randn(3), expected)


def test_check_without_rich(
    few_checks: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert main(["check"]) == 0
    assert len(rows_of(capsys.readouterr().out)) == 3


# --- first_fault, for gpunn profile ---


def test_first_fault(
    few_checks: None, fresh_verdicts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not check.first_fault("activation")
    monkeypatch.setattr(GF, "relu", torch.relu)
    assert not check.first_fault("activation"), "found out once"
    check.first_fault.cache_clear()
    assert "no kernel ran" in check.first_fault("activation")
    with pytest.raises(ValueError, match="unknown name 'softmux'"):
        check.first_fault("softmux")


# --- doctor, profile, and the rest ---


def test_doctor_says_what_is_here(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line for line in lines if line.startswith("  ") and line.split()}
    assert {"CPU", "Python", "gpunn", "torch", "triton", "numpy", "cupy", "C++"} <= set(found)
    assert found["torch"].split()[1] == torch.__version__
    assert found["gpunn"].split()[1] == gpunn.__version__
    where = "on the GPU" if torch.cuda.is_available() else "on the CPU"
    assert where in found["Triton"]
    assert where in found["CUDA"] or "left to PyTorch: CuPy" in found["CUDA"]
    for op in check.CHECKS:
        assert found[op].split() == [op, "runs"], found[op]
    assert any(line.startswith("  GPU") for line in lines)


def test_doctor_runs_kernels_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as where there is no GPU
    assert doctor.interpreted_attempts() == dict.fromkeys(check.CHECKS, "ok")


def test_doctor_says_why_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "kernels_run_here", lambda: False)
    monkeypatch.setattr(doctor, "ATTEMPT", "raise SystemExit('no numpy today')")
    lines = dict(doctor.kernels())
    for op in check.CHECKS:
        assert lines[op] == "not at all: FAIL: no numpy today"


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert 'pip install "gpunn[cuda1' in doctor.version_of("cupy")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.compiler().startswith("none")


@pytest.mark.parametrize(
    ("gpu", "reason", "compiler", "expected"),
    [
        (True, None, None, "on the GPU, through CuPy"),
        (True, "CuPy is not installed", None, "left to PyTorch: CuPy is not installed"),
        (False, None, "/usr/bin/c++", "on the CPU, compiled by /usr/bin/c++"),
        (False, None, None, "not at all: there is no C++ compiler"),
    ],
)
def test_doctor_says_how_cuda_cpp_runs(
    gpu: bool,
    reason: str | None,
    compiler: str | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(doctor, "why_no_cupy", lambda: reason)
    monkeypatch.setattr("gpunn.kernels.host.find_compiler", lambda: compiler)
    assert doctor.cuda_cpp() == expected


def test_profile_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("ops", nargs="*")

    def run(arguments: argparse.Namespace) -> int:
        asked.append(arguments.ops)
        return 7

    command = SimpleNamespace(add_arguments=add_arguments, run=run)
    monkeypatch.setitem(sys.modules, "gpunn.profiling.command", command)
    assert main(["profile", "linear"]) == 7
    assert asked == [["linear"]]


def test_a_command_is_needed(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as refused:
        main([])
    assert refused.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_row_cells_are_the_headers() -> None:
    row = Row("glu", "swiglu", "float16", 1.2e-3, 2e-2, "ok")
    assert dict(zip(check.HEADER, row.cells(), strict=True)) == {
        "op": "glu", "case": "swiglu", "dtype": "float16",
        "error": "1.2e-03", "allowed": "2.0e-02", "verdict": "ok",
    }  # fmt: skip
