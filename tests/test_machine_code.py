"""Compiling CUDA C++ without a GPU: where tools are missing, and what gpunn profile makes of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpunn.kernels import nvrtc as compiler
from gpunn.kernels.cuda import CudaLaunch
from gpunn.kernels.launch import Call
from gpunn.kernels.nvrtc import NoCompilerError
from gpunn.profiling import command, machine_code
from gpunn.profiling.command import StaticRow
from gpunn.profiling.machine_code import disassembled, disassemblers
from gpunn.profiling.static_report import Report, counts_in_ptx, report
from kit import CudaText

SOURCE = """
#include "vector.h"

template <typename T, int N>
__global__ void turn_kernel(const T* x, T* y, long long n) {
    __shared__ T tile[N];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[N - 1 - threadIdx.x];
}
"""
LAUNCH = CudaLaunch(8)


def call_of(n: int = 5, launch: CudaLaunch = LAUNCH, **constants: Any) -> Call:
    """A captured launch of the kernel above."""
    y = torch.empty(256, device="meta")
    keywords = {"T": torch.float32, "N": 256, **constants, **launch.arguments()}
    return Call(CudaText(SOURCE, "turn_kernel"), (1,), (y, y, n), keywords, launch)


@pytest.fixture
def nvrtc() -> Iterator[None]:
    """NVRTC, looked for anew; skips where it is not."""
    compiler.nvrtc.cache_clear()
    try:
        compiler.nvrtc()
    except NoCompilerError as reason:
        pytest.skip(str(reason))
    compiler.nvrtc.cache_clear()
    yield
    compiler.nvrtc.cache_clear()


def test_registers_and_shared_memory_are_read(nvrtc: None) -> None:
    found = report(call_of(), 90)
    assert found.kernel == "turn_kernel<float, 256>"
    assert found.launch == "CudaLaunch(num_warps=8)"
    # since sm_90 the compiler may keep 1 KiB of a block's memory for itself, and says so
    assert found.shared_memory in (1024, 2048)
    assert 4 < found.registers < 32
    assert found.occupancy == 1
    assert found.fits


def test_nvrtcs_own_words_are_shown(nvrtc: None) -> None:
    with pytest.raises(RuntimeError, match=r"^NVRTC refuses turn_kernel<float, 0>:(.|\n)*error: "):
        report(call_of(N=0), 90)
    with pytest.raises(RuntimeError, match=r"^NVRTC refuses (.|\n)*too much shared data"):
        report(call_of(N=2**16), 90)


def test_without_cupy_there_is_no_compiler(nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    with pytest.raises(NoCompilerError, match=r"^CUDA C\+\+ is compiled with CuPy .* import"):
        report(call_of(), 90)


def test_without_nvrtc_there_is_no_compiler(nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> None:
        raise RuntimeError("no such file:\nlibnvrtc.so")

    monkeypatch.setattr("cupy_backends.cuda.libs.nvrtc.getVersion", version)
    with pytest.raises(NoCompilerError, match=r"no such file: libnvrtc\.so$"):
        report(call_of(), 90)


def test_without_a_disassembler_only_counts_are_unknown(
    nvrtc: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = report(call_of(), 90)
    monkeypatch.setattr(machine_code, "disassemblers", list)
    found = report(call_of(), 90)
    assert (found.registers, found.shared_memory) == (known.registers, known.shared_memory)
    assert (found.spilled_bytes, found.stack_bytes, found.occupancy) == (0, 0, 1)
    counts = (found.wgmma, found.mma, found.wide_accesses, found.narrow_accesses)
    assert (*counts, found.instructions) == (None,) * 5
    row = StaticRow("pooling", "turn_kernel", "8 warps", 90, ["a case"], found)
    cells = command._static_cells(row)
    assert cells[7:12] == ["-"] * 5
    assert cells[3] == str(found.registers)
    assert row.remarks() == ""


def tool(path: Path, script: str) -> Path:
    """An executable at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_first_disassembler_that_can_read_the_code_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's, those of NVIDIA's wheels, and one on the path."""
    tools = [
        tool(tmp_path / "triton" / "nvdisasm", "echo 'an invalid ELF file' >&2; exit 1"),
        tool(tmp_path / "nvidia" / "cu13" / "bin" / "nvdisasm", 'echo "read $1"; cat "$3"'),
        tool(tmp_path / "path" / "nvdisasm", "echo the last"),
    ]
    monkeypatch.setattr(machine_code, "TOOLS", tools[0].parent)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setenv("PATH", f"{tools[2].parent}:/usr/bin:/bin")
    assert [path for path in disassemblers() if tmp_path in path.parents] == tools
    assert disassembled(b"code") == "read -c\ncode"
    tools[1].unlink()
    assert [path for path in disassemblers() if tmp_path in path.parents] == [tools[0], tools[2]]


def test_unreadable_code_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [path for path in disassemblers() if path.exists()]
    assert machine_code.TOOLS / "nvdisasm" in found
    assert disassembled(b"this is no ELF file") is None


# --- NVRTC ---


def test_the_newest_architecture_that_the_chip_can_run_is_compiled_for(nvrtc: None) -> None:
    assert [compiler.architecture(c) for c in (80, 86, 90, 100)] == [
        "sm_80", "sm_86", "sm_90", "sm_100",
    ]  # fmt: skip
    assert compiler.architecture(85) == "sm_80"  # there is none such
    with pytest.raises(NoCompilerError, match=r"^NVRTC \d+\.\d+ knows no compute capability 3\.5$"):
        compiler.architecture(35)


def test_numbers_below_the_normal_ones_are_not_taken_for_zero(nvrtc: None) -> None:
    """As CuPy's own way of compiling does, with -ftz=true."""
    source = """
    template <typename T>
    __global__ void scale_kernel(T* x, double s) { x[0] *= T(s); }
    """
    ptx = compiler.compiled(source, "scale_kernel<float>", 90).ptx
    assert "mul.rn.f32" in ptx or "mul.f32" in ptx
    assert ".ftz" not in ptx


def test_a_loaded_binary_is_compiled_once(
    nvrtc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bytes] = []

    class Module:
        """CuPy's, which needs a GPU."""

        def load(self, cubin: bytes) -> None:
            given.append(cubin)

        def get_function(self, name: str) -> str:
            return name

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Module=Module)))
    monkeypatch.setenv("GPUNN_CACHE", str(tmp_path))
    kernel = CudaText(SOURCE, "turn_kernel")
    names = [
        compiler.loaded(kernel.source, f"turn_kernel<float, {n}>", chip)
        for n, chip in [(64, 90), (64, 90), (32, 90), (64, 80)]
    ]
    assert names[0] == names[1] == names[3] != names[2]
    assert all(name.startswith("_Z11turn_kernelIfLi") for name in names)
    assert given[0] == given[1]
    assert len(set(given)) == len(list(tmp_path.iterdir())) == 3
    assert all(cubin.startswith(b"\x7fELF") for cubin in given)


# --- gpunn profile ---


def test_the_code_is_the_same_for_other_sizes_alone() -> None:
    same = command._identity(call_of(n=5))
    assert command._identity(call_of(n=2**40)) == same
    others = [call_of(T=torch.float16), call_of(N=128), call_of(launch=CudaLaunch(4))]
    identities = {same, *map(command._identity, others)}
    assert len(identities) == 4


def test_a_launch_of_cuda_cpp_is_described() -> None:
    assert command.described_launch(CudaLaunch(4)) == "4 warps"


def test_a_missing_compiler_is_told_and_does_not_fail() -> None:
    row = StaticRow("pooling", "turn_kernel", "8 warps", 90, ["a case"])
    future: Future[Report] = Future()
    future.set_exception(NoCompilerError("CUDA C++ is compiled with CuPy and NVRTC: no"))
    command._collect(row, future, time.perf_counter() + 1)
    assert "CUDA C++ is compiled with CuPy and NVRTC: no" in command.static_table([row])
    assert not command._failed(row)


def test_memory_of_a_threads_own_is_remarked(nvrtc: None) -> None:
    source = """
    template <int N>
    __global__ void indexed_kernel(const float* x, float* y, long long k) {
        float values[N];
        for (int i = 0; i < N; i++) values[i] = x[i];
        values[k] = 0;
        for (int i = 0; i < N; i++) y[i] = values[i * k % N];
    }
    """
    keywords = {"N": 32, **LAUNCH.arguments()}
    call = Call(CudaText(source, "indexed_kernel"), (1,), (), keywords, LAUNCH)
    row = StaticRow("pooling", "indexed_kernel", "8 warps", 90, ["a case"], report(call, 90))
    assert row.remarks() == "128 bytes of stack"


def test_accesses_and_tensor_cores_are_counted_in_ptx_as_well(nvrtc: None) -> None:
    """Without a disassembler, and to the same numbers."""
    for n, dtype in ((8, torch.float16), (4, torch.float32)):
        call = call_of(n, T=dtype)
        assembled, ptx = report(call, 90), report(call, 90, from_ptx=True)
        assert ptx.instructions is None
        assert (ptx.wgmma, ptx.mma) == (0, 0)
        accesses = ptx.wide_accesses, ptx.narrow_accesses
        assert accesses == (0, 2)
        if assembled.instructions is not None:
            assert accesses == (assembled.wide_accesses, assembled.narrow_accesses)


def test_what_counts_as_an_access_in_ptx() -> None:
    wide = """
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
        @%p1 ld.global.L1::evict_first.L2::cache_hint.v2.b64 {%rd1, %rd2}, [%rd3], %rd4;
        st.global.v8.b32 [%rd1], {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8};
        ld.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];
        cp.async.cg.shared.global [%r1], [%rd1], 0x10, %r2;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [%rd1, {%r2, %r3}], [%r4];
    """
    narrow = """
        ld.global.nc.v2.f32 {%f1, %f2}, [%rd1];
        st.global.b16 [%rd1], %rs1;
        cp.async.ca.shared.global [%r1], [%rd1], 0x4;
    """
    neither = """
        ld.param.b64 %rd1, [p];
        st.shared.v4.b32 [%r1], {%r1, %r2, %r3, %r4};
        tcgen05.ld.sync.aligned.32x32b.x64.b32 {%r1}, [%r2];
        tcgen05.st.sync.aligned.32x32b.x64.b32 [%r2], {%r1};
    """
    tensor_cores = """
        wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
        tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, 1;
    """
    assert counts_in_ptx(wide + narrow + neither + tensor_cores) == {
        "wgmma": 1,
        "mma": 2,
        "wide_accesses": 6,
        "narrow_accesses": 3,
        "instructions": None,
    }
