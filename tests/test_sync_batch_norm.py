"""Batch normalisation over the processes of torch.distributed equals one process with it all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gpunn
import gpunn.functional as GF

ROOT = Path(__file__).resolve().parent.parent


def test_two_and_four_processes_equal_one(device: str, tmp_path: Path) -> None:
    """Over gloo; with uneven parts of the batch, an empty one among them."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    script, size = str(ROOT / "tests" / "sync_processes.py"), 4
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(size), str(tmp_path / "store"), device],
            cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        for process in processes:
            output, errors = process.communicate(timeout=240)
            assert output.strip() == "all agree", errors
    finally:
        for process in processes:
            process.kill()


def environment() -> dict[str, str]:
    """This process's, with the checkout first on the path and a thread each."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_alone_it_is_batch_norm(device: str) -> None:
    layer = gpunn.nn.SyncBatchNorm(5, activation="relu").to(device)
    twin = gpunn.nn.BatchNorm2d(5, activation="relu").to(device)
    x, residual = torch.randn(2, 3, 5, 4, 4, device=device)
    assert torch.equal(layer(x, residual), twin(x, residual))
    for ours, theirs in zip(layer.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_conversion_keeps_what_a_layer_has() -> None:
    model = torch.nn.Sequential(
        gpunn.nn.BatchNorm2d(3, activation="relu", momentum=None),
        torch.nn.Sequential(torch.nn.BatchNorm1d(4, affine=False), torch.nn.Linear(4, 4)),
    ).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted: Any = gpunn.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[0], gpunn.nn.SyncBatchNorm)
    assert isinstance(converted[1][0], gpunn.nn.SyncBatchNorm)
    assert (converted[0].activation, converted[0].momentum) == ("relu", None)
    assert not converted[0].training
    assert list(converted.state_dict()) == list(state)
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_refusals(device: str) -> None:
    x = torch.randn(2, 3, 4, device=device)
    with pytest.raises(RuntimeError, match="weight"):
        GF.sync_batch_norm(x, None, None, torch.ones(4, device=device))
    with pytest.raises(RuntimeError, match="residual"):
        GF.sync_batch_norm(x, None, None, residual=x[:1])
    with pytest.raises(RuntimeError, match=r"residual: expected torch\.float32"):
        GF.sync_batch_norm(x, None, None, residual=x.half())
    with gpunn.backend("torch"), pytest.raises(ValueError, match="GPU"):
        GF.sync_batch_norm(x.cpu(), None, None)
