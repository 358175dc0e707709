"""Every kernel, in each configuration it can choose, compiles for three generations of GPUs.

Machine code for sm_80 (A100), sm_90 (H100, H200) and sm_100 (B200) is made on any machine; what the
assembler says of it and its PTX are read: no register spills, shared memory within the chip's limit
(which the compiler does not check), tensor-core instructions where there should be some, no
serialised WGMMA, 128-bit accesses.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from compile_scenarios import SCENARIOS, reports_of
from cuda_source import cuda_kernels_of
from gpunn.kernels.cuda import CudaKernel, CudaLaunch
from gpunn.kernels.launch import Call, Launch, backend, captured
from gpunn.kernels.nvrtc import NoCompilerError
from gpunn.kernels.product import MatmulLaunch
from gpunn.profiling import static_report
from gpunn.profiling.static_report import Report
from kit import CudaText
from scenario import Scenario
from test_architecture import KERNELS, functions_of, is_kernel, parsed
from test_cuda_sources import CUDA_SOURCES

PAIRS = [(name, chip) for name, scenario in SCENARIOS.items() for chip in scenario.capabilities]


@pytest.fixture(scope="session")
def compiled() -> Iterator[Callable[..., list[Report]]]:
    """Compile in a process without TRITON_INTERPRET, which turns kernels into Python functions."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            pool.submit(os.getpid).result()  # the process starts, and takes the environment, now
        finally:
            if interpret is not None:
                os.environ["TRITON_INTERPRET"] = interpret
        yield lambda *arguments: pool.submit(reports_of, *arguments).result()


@pytest.mark.parametrize(("name", "chip"), PAIRS, ids=[f"{n}-sm_{c}" for n, c in PAIRS])
def test_compiles(name: str, chip: int, compiled: Callable[..., list[Report]]) -> None:
    scenario = SCENARIOS[name]
    try:
        reports = compiled(name, chip)
    except NoCompilerError as reason:
        pytest.skip(str(reason))
    assert reports, "the scenario launches nothing"
    for report in reports:
        assert not scenario.faults(report), f"{scenario.faults(report)}\n{report}"
    if scenario.reads_code and any(report.mma is None for report in reports):
        pytest.skip("no disassembler here can read the code: its instructions are not known")


@pytest.mark.parametrize("name", ["product-tf32-64x64x16-odd-all-mish", "attention-packed"])
def test_ptx_and_machine_code_tell_the_same(
    name: str, compiled: Callable[..., list[Report]]
) -> None:
    for read, assembled in zip(compiled(name, 90), compiled(name, 90, False), strict=True):
        if assembled.instructions is None:
            pytest.skip("no disassembler here can read the code: its instructions are not known")
        assert read.wgmma or read.kernel == "attention_delta_kernel"
        assert assembled.instructions > 100
        assert replace(assembled, instructions=None) == read


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """What the scenarios launch."""
    found = []
    for capability in (80, 90):
        with captured(static_report.chip(capability)) as calls, backend("kernels"):
            for scenario in SCENARIOS.values():
                if capability in scenario.capabilities:
                    scenario.launch()
        found += calls
    return found


def test_every_kernel_is_compiled(calls: list[Call]) -> None:
    kernels = {
        function.name
        for path in KERNELS
        for function in functions_of(parsed(path))
        if is_kernel(function) and function.name.endswith("_kernel")
    }
    kernels |= {kernel.name for path in CUDA_SOURCES for kernel in cuda_kernels_of(path)}
    missing = kernels - {call.kernel.__name__ for call in calls}
    assert not missing, (
        f"no scenario for {', '.join(sorted(missing))} in tests/compile_scenarios.py"
    )


def test_every_configuration_is_compiled(calls: list[Call]) -> None:
    """Every Launch that a module of kernels/ holds, by itself or in a tuple, among others.

    One of CUDA C++ must be compiled with a kernel of the module's own source.
    """
    compiled = {(source_of(call), unsplit(call.launch)) for call in calls}
    found = 0
    for path in KERNELS:
        module = importlib.import_module(f"gpunn.kernels.{path.stem}")
        for name, value in vars(module).items():
            for launch in value if isinstance(value, tuple) else (value,):
                if isinstance(launch, Launch):
                    found += 1
                    source = path.stem if isinstance(launch, CudaLaunch) else None
                    assert (source, unsplit(launch)) in compiled, (
                        f"no scenario for {path.stem}.{name}: {launch}"
                    )
    assert found > 10


def source_of(call: Call) -> str | None:
    """The stem of the source of a kernel in CUDA C++."""
    is_cuda = isinstance(call.kernel, CudaKernel)
    return call.kernel.file.removesuffix(".cu") if is_cuda else None


def unsplit(launch: Launch) -> Launch:
    """The configuration without the number of parts of a split product."""
    return replace(launch, split_inner=1) if isinstance(launch, MatmulLaunch) else launch


# --- the gate can fail ---

FAULTY = """
#include "vector.h"

template <typename T, int N>
__global__ void copy_kernel(const T* x, T* y) {
    store(y + threadIdx.x * N, load<N>(x + threadIdx.x * N));
}

// All values wait for the others: N registers a thread, and no more than THREADS leave it.
template <int THREADS, int N>
__global__ void __launch_bounds__(THREADS) waiting_kernel(const float* x, float* y) {
    float values[N];
#pragma unroll
    for (int k = 0; k < N; k++) values[k] = x[k * blockDim.x + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < N; k++) y[k * blockDim.x + threadIdx.x] = values[k] / values[(k + 1) % N];
}

template <int N>
__global__ void indexed_kernel(const float* x, float* y, long long k) {
    float values[N];
    for (int i = 0; i < N; i++) values[i] = x[i];
    values[k] = 0;
    for (int i = 0; i < N; i++) y[i] = values[i * k % N];
}
"""
WIDE = Scenario(lambda: None, wide_only=True)
PLAIN = Scenario(lambda: None)


def report_on(name: str, n_warps: int, chip: int = 90, **constants: Any) -> Report:
    """The report on one of the kernels above."""
    launch = CudaLaunch(n_warps)
    keywords = {**constants, **launch.arguments()}
    try:
        return static_report.report(Call(CudaText(FAULTY, name), (1,), (), keywords, launch), chip)
    except NoCompilerError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("chip", [80, 90, 100])
def test_what_is_counted_in_a_copy(chip: int) -> None:
    report = report_on("copy_kernel", 8, chip, T=torch.float16, N=8)
    assert report.kernel == "copy_kernel<__half, 8>"
    assert (report.registers > 4, report.shared_memory, report.occupancy) == (True, 0, 1)
    if report.instructions is None:
        pytest.skip("no disassembler here can read the code: its instructions are not known")
    assert (report.wide_accesses, report.narrow_accesses) == (2, 0)
    assert 6 < report.instructions < 20
    assert not replace(WIDE, most_instructions=20).faults(report)


@pytest.mark.parametrize(
    ("name", "n_warps", "constants", "scenario", "fault"),
    [
        ("copy_kernel", 8, {"T": torch.float16, "N": 4}, WIDE, "2 narrow accesses, 0 allowed"),
        ("copy_kernel", 8, {"T": torch.float16, "N": 4}, WIDE, "no 128-bit access"),
        ("copy_kernel", 8, {"T": torch.float16, "N": 8}, replace(PLAIN, most_instructions=5),
         "too many instructions"),
        ("copy_kernel", 8, {"T": torch.float16, "N": 8}, replace(PLAIN, tensor_cores=True),
         "no tensor cores"),
        ("waiting_kernel", 32, {"THREADS": 1024, "N": 96}, PLAIN, "spills registers"),
        ("waiting_kernel", 32, {"THREADS": 256, "N": 96}, PLAIN, "a block does not fit"),
        ("indexed_kernel", 8, {"N": 32}, PLAIN, "has memory of a thread's own"),
    ],
)  # fmt: skip
def test_a_fault_is_found(
    name: str, n_warps: int, constants: dict[str, Any], scenario: Scenario, fault: str
) -> None:
    report = report_on(name, n_warps, **constants)
    if scenario.reads_code and report.mma is None:
        pytest.skip("no disassembler here can read the code: its instructions are not known")
    assert fault in scenario.faults(report), report
    assert not PLAIN.faults(report_on("copy_kernel", 8, T=torch.float32, N=4))


def test_allowed_narrow_accesses_are_no_fault() -> None:
    report = report_on("waiting_kernel", 8, THREADS=256, N=8)
    assert "16 narrow" not in str(replace(WIDE, narrow_allowed=16).faults(report))
    if report.instructions is not None:
        assert "16 narrow accesses, 15 allowed" in replace(WIDE, narrow_allowed=15).faults(report)
