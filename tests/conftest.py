"""What every test runs under: kernels on the GPU, or through Triton's interpreter on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

# Read when a kernel is decorated, so before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


# CPython keeps frames in chunks of 16 KiB. Where a loop's calls cross the end of one, each maps
# memory and unmaps it again: up to two thirds of the time that Triton's interpreter takes. A frame
# that fills half of a larger chunk leaves the rest of it to the calls below.
def _with_room(test: Callable[..., None], **arguments: object) -> None:
    test(**arguments)


_with_room.__code__ = _with_room.__code__.replace(co_stacksize=2**16 + 1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give the test room for its frames."""
    if isinstance(item, pytest.Function):
        item.obj = functools.wraps(item.obj)(functools.partial(_with_room, item.obj))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests' tensors live."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(20240229)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN (integers: their largest), so an unwritten element shows."""
    # On a GPU some of PyTorch's own, which tests compare with, have no deterministic version.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    previous = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.utils.deterministic.fill_uninitialized_memory = previous  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Products of float32 are not TF32's, which a GPU's convolutions are unless they are told."""
    from gpunn.checks.comparison import full_precision

    with full_precision():
        yield


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    """On a GPU, torch's attention is the formula unless a test asks for one of its fused ones.

    Those give rows of which all is ruled out a value, and warn that they are not deterministic.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_available() else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _kernels_alone() -> Iterator[None]:
    """No answer comes from PyTorch unless a test asks for another backend."""
    import gpunn

    with gpunn.backend("kernels"):
        yield


@pytest.fixture
def demo_folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Demos import what they share as scripts do, from their folder; their packages are here."""
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package, reason=f"no {package}: pip install 'gpunn[demo]'")
    folder = Path(__file__).resolve().parent.parent / "examples"
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def one_precision() -> Iterator[None]:
    """Of cuDNN's convolutions and recurrent layers, as torch is when it starts: export asks."""
    settings: Any = torch.backends.cudnn
    parts = settings.conv, settings.rnn
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "tf32"
    yield
    for part, precision in zip(parts, before, strict=True):
        part.fp32_precision = precision


@pytest.fixture
def one_path_of_torchs() -> Iterator[None]:
    """torch's modules without their path for inference, whose numbers are a little different."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)
