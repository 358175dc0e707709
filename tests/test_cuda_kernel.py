"""CudaKernel: its template arguments, its launches, and what happens where there is no CuPy."""

from __future__ import annotations

import functools
import random
import struct
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpunn
from gpunn.kernels import cuda
from gpunn.kernels.cuda import CudaKernel, CudaLaunch, divisor, takes_cuda, why_no_cupy
from gpunn.kernels.launch import Device, LaunchRecord, captured, run
from kit import CudaText, launched

SOURCE = """
#include "vector.h"

struct Pair {
    int first;
    double second;
};

template <typename T, int N, bool NEGATIVE>
__global__ void fill_kernel(T* y, const T* absent, Pair pair, long long n, double s) {
    if (absent != nullptr || blockIdx.x != gridDim.x - 1) return;
    double values[4] = {double(pair.first), pair.second, double(n), s};
    if (threadIdx.x < N) y[threadIdx.x] = T(NEGATIVE ? -values[threadIdx.x] : values[threadIdx.x]);
}

template<typename T>
__global__ void __launch_bounds__(256) bounded_kernel(T* y) {}

template <int N>
__global__ void turn_kernel(const double* half_turns, double* y) {
    for (int i = threadIdx.x; i < N; i += blockDim.x) sincospi(half_turns[i], y + i, y + N + i);
}

template <int N>
__global__ void mark_kernel(int* y) {
    atomicOr(y + threadIdx.x % N, 1 << threadIdx.x / N);
}

template <typename S, typename T>
__global__ void convert_kernel(const S* x, T* y, long long n) {
    for (long long i = threadIdx.x; i < n; i += blockDim.x) y[i] = narrow<T>(widen(x[i]));
}
"""
FILL = CudaText(SOURCE, "fill_kernel")
PAIR = struct.pack("id", 3, 0.25)


def fill(device: str, **constants: Any) -> torch.Tensor:
    """What the kernel writes from one argument of every kind."""
    if device == "cuda":
        pytest.importorskip("cupy", reason="CUDA C++ kernels run on a GPU through CuPy")
    y = torch.zeros(4, dtype=constants["T"], device=device)
    run("fill", FILL, (2,), y, None, PAIR, 2**21 + 1, 0.5, launch=CudaLaunch(2), **constants)
    return y


def launch(name: str, *arguments: Any, **constants: Any) -> None:
    """One block of 64 threads of a kernel above."""
    if arguments[0].is_cuda:
        pytest.importorskip("cupy", reason="CUDA C++ kernels run on a GPU through CuPy")
    run("test", CudaText(SOURCE, name), (1,), *arguments, launch=CudaLaunch(2), **constants)


def test_sine_and_cosine_of_half_turns_are_exact_at_quarters(device: str) -> None:
    """And elsewhere those of the angle, whatever whole turns are beside it."""
    quarters = torch.arange(-6, 7) / 2
    others = torch.tensor([0.1, -0.3, 1 / 3, 0.7, 1.9, -2.4, 100.25, -77.875])
    x = torch.cat([quarters, others]).double().to(device)
    y = torch.empty(2, len(x), dtype=torch.float64, device=device)
    launch("turn_kernel", x, y, N=len(x))
    exact = [[0, 1, 0, -1][k % 4] for k in range(-6, 8)]
    assert y[0, : len(quarters)].tolist() == exact[:-1]
    assert y[1, : len(quarters)].tolist() == exact[1:]
    turns = (x % 2) * torch.pi
    torch.testing.assert_close(y, torch.stack([turns.sin(), turns.cos()]), rtol=0, atol=1e-15)


def test_marks_of_all_threads_are_kept(device: str) -> None:
    y = torch.zeros(3, dtype=torch.int32, device=device)
    y[1] = 2**30
    launch("mark_kernel", y, N=3)
    assert y.tolist() == [2**22 - 1, 2**30 | 2**21 - 1, 2**21 - 1]


def test_bytes_are_the_nearest_in_their_range(device: str) -> None:
    x = torch.tensor([-3.0, 0.5, 1.5, 2.5, 2.6, 254.5, 255.4, 255.5, 1e30], device=device)
    y = torch.empty(len(x), dtype=torch.uint8, device=device)
    launch("convert_kernel", x, y, len(x), S=torch.float32, T=torch.uint8)
    assert y.tolist() == [0, 0, 2, 2, 3, 254, 255, 255, 255]
    back = torch.empty(len(x), device=device)
    launch("convert_kernel", y, back, len(x), S=torch.uint8, T=torch.float32)
    assert torch.equal(back, y.float())


def test_every_kind_of_argument_arrives(device: str) -> None:
    expected = torch.tensor([3, 0.25, 2**21 + 1, 0.5])
    assert torch.equal(fill(device, T=torch.float32, N=4, NEGATIVE=False).cpu(), expected)
    double = fill(device, T=torch.float64, N=4, NEGATIVE=True)
    assert torch.equal(double.cpu(), -expected.double())
    first = fill(device, T=torch.int64, N=3, NEGATIVE=False)
    assert first.tolist() == [3, 0, 2**21 + 1, 0]


def test_a_launch_is_recorded(device: str) -> None:
    with gpunn.trace() as trace:
        fill(device, T=torch.float32, N=4, NEGATIVE=False)
    assert launched(trace, "fill") == [LaunchRecord("fill", "fill_kernel", (2,), CudaLaunch(2))]


def test_a_captured_launch_is_not_made() -> None:
    y = torch.empty(4, device="meta")
    with captured(Device(90, 132)) as calls:
        run("fill", FILL, (2,), y, None, PAIR, 1, 0.5, launch=CudaLaunch(2), T=y.dtype, N=4)
    (call,) = calls
    assert call.kernel is FILL
    assert call.keywords == {"T": torch.float32, "N": 4, "num_warps": 2}


def test_an_instantiation_names_its_arguments_in_the_templates_order() -> None:
    constants = {"NEGATIVE": True, "N": 8, "T": torch.bfloat16}
    assert FILL.parameters == ("T", "N", "NEGATIVE")
    assert FILL.instantiation(constants) == "fill_kernel<__nv_bfloat16, 8, true>"
    types = [CudaText(SOURCE, "bounded_kernel").instantiation({"T": t}) for t in cuda.TYPES]
    assert types[:3] == [f"bounded_kernel<{t}>" for t in ("__half", "__nv_bfloat16", "float")]
    assert len(set(types)) == len(cuda.TYPES)


@pytest.mark.parametrize(
    "constants",
    [
        {"T": torch.float32, "N": 1},
        {"T": torch.float32, "N": 1, "NEGATIVE": False, "BLOCK": 2},
        {"T": torch.float32, "N": 1, "POSITIVE": True},
        {},
    ],
    ids=["missing", "unknown", "another", "none"],
)
def test_missing_and_unknown_template_arguments_are_refused(constants: dict[str, Any]) -> None:
    got = ", ".join(constants)
    expected = f"^fill_kernel: template parameters T, N, NEGATIVE, got {got}$"
    with pytest.raises(TypeError, match=expected):
        FILL.instantiation(constants)


def test_a_kernel_that_the_source_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"text\.cu has no template of a kernel full_kernel"):
        _ = CudaText(SOURCE, "full_kernel").parameters


def test_a_source_is_read_from_the_folder_with_its_headers() -> None:
    source = CudaKernel("dropout.cu", "dropout_kernel").source
    assert '#include "' not in source
    assert "namespace host {" in source


# --- without CuPy ---


@pytest.fixture
def unasked() -> Iterator[None]:
    """Nobody has asked for CuPy yet, nor after the test."""
    why_no_cupy.cache_clear()
    yield
    why_no_cupy.cache_clear()


def broken_cupy(where: str) -> SimpleNamespace:
    """CuPy that imports, and fails when the driver or NVRTC is asked."""

    def fail() -> None:
        raise RuntimeError(f"{where}:\nversion is insufficient")

    runtime = SimpleNamespace(getDeviceCount=fail if where == "runtime" else int)
    nvrtc = SimpleNamespace(getVersion=fail if where == "nvrtc" else tuple)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, nvrtc=nvrtc))


@pytest.mark.parametrize(
    ("cupy", "cuda_version", "reason"),
    [
        (None, "13.0", 'CuPy is not installed; pip install "gpunn[cuda13]"'),
        (None, "12.8", 'CuPy is not installed; pip install "gpunn[cuda12]"'),
        (None, None, 'CuPy is not installed; pip install "gpunn[cuda13]"'),
        (broken_cupy("runtime"), "12.8",
         'CuPy fails: runtime: version is insufficient; pip install "gpunn[cuda12]"'),
        (broken_cupy("nvrtc"), "13.0",
         'CuPy fails: nvrtc: version is insufficient; pip install "gpunn[cuda13]"'),
        (broken_cupy("nothing"), "13.0", None),
    ],
    ids=["absent", "cuda12", "no cuda", "driver", "nvrtc", "well"],
)  # fmt: skip
def test_why_no_cupy_warns_once_and_names_the_extra(
    cupy: Any,
    cuda_version: str | None,
    reason: str | None,
    unasked: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert [why_no_cupy(), why_no_cupy()] == [reason, reason]
    expected = [f"gpunn: CUDA C++ kernels are left to PyTorch: {reason}"] if reason else []
    assert [str(warning.message) for warning in heard] == expected


def on_a_gpu() -> Any:
    """What takes_cuda looks at in a tensor that is on a GPU."""
    return SimpleNamespace(is_cuda=True)


def test_without_cupy_a_gpus_tensors_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "takes", lambda operator, *tensors, also: True)
    monkeypatch.setattr(cuda, "why_no_cupy", lambda: "no CuPy today")
    with gpunn.backend("auto"), gpunn.trace() as trace:
        assert not takes_cuda("pool", None, on_a_gpu())
        assert takes_cuda("pool", torch.ones(1), None)
    assert [(r.operator, r.reason) for r in trace.fallbacks] == [("pool", "no CuPy today")]
    with (
        gpunn.backend("kernels"),
        pytest.raises(RuntimeError, match=r"^pool: backend\('kernels'\).*no CuPy today$"),
    ):
        takes_cuda("pool", on_a_gpu())
    monkeypatch.setattr(cuda, "why_no_cupy", lambda: None)
    assert takes_cuda("pool", on_a_gpu())


def test_a_compiler_does_not_look_into_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would, with a warning, in a function that is cached."""
    monkeypatch.setattr(cuda, "takes", lambda operator, *tensors, also: True)
    monkeypatch.setattr(cuda, "why_no_cupy", functools.cache(lambda: None))
    torch._dynamo.reset()
    tensor = on_a_gpu()

    @torch.compile(fullgraph=True, backend="eager")
    def negated(x: torch.Tensor) -> torch.Tensor:
        return -x if takes_cuda("pool", tensor) else x

    assert negated(torch.ones(1)).item() == -1


def test_what_takes_refuses_is_refused_before_cupy_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "why_no_cupy", lambda: pytest.fail("asked"))
    with gpunn.backend("torch"):
        assert not takes_cuda("pool", torch.ones(1))
    with gpunn.backend("auto"):
        assert not takes_cuda("pool", torch.ones(1, device="meta"))


def test_a_product_divides() -> None:
    """Around every multiple that is tried, for divisors around every power of two."""
    draw = random.Random(20240229)
    numbers = {2**k + step for k in range(32) for step in (-1, 0, 1)} | {3, 7, 100, 2**33}
    for number in sorted(numbers - {0}):
        found, multiplier, shift = struct.unpack("qII", divisor(number))
        assert found == number
        assert (multiplier == 0) == (number == 1 or number >= 2**31)
        assert multiplier < 2**32
        multiples = [draw.randrange(2**31) // number * number for _ in range(50)]
        for a in (0, 2**31 - 1, *(m + step for m in multiples for step in (-1, 0, number - 1))):
            if multiplier and 0 <= a < 2**31:
                assert a * multiplier >> 32 + shift == a // number
