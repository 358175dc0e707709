"""What a kernel costs, read from its machine code: no GPU needed.

A launcher is called on meta tensors while its launches are captured (``launch.captured``); each
captured launch is compiled for a chip, and registers, spills, shared memory and instructions are
read with the disassembler that comes with Triton. This cannot say how fast a kernel is; it says
that it builds, fits, does not spill, and uses the instructions it should.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import Call, Device

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
# Bytes of shared memory that one block may have; the compiler does not check it. And the
# registers, threads and shared memory of one multiprocessor. Source: CUDA C++ programming guide,
# "Technical specifications per compute capability".
SHARED_MEMORY_A_BLOCK = {80: 166912, 90: 232448, 100: 232448}
SHARED_MEMORY_RESERVED = 1024
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32


def chip(capability: int) -> Device:
    """The A100, H200 or B200 for capability 80, 90 or 100."""
    return Device(capability, MULTIPROCESSORS[capability])


@dataclass(frozen=True)
class Report:
    """The static facts of one compiled kernel."""

    kernel: str
    launch: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_memory: int
    occupancy: float
    """The share of a multiprocessor's threads that can be resident, as registers and memory go."""
    wgmma: int
    """HGMMA instructions: the warp-group tensor cores of Hopper."""
    mma: int
    """Other tensor-core instructions: HMMA, DMMA, or UTCHMMA on Blackwell."""
    wide_accesses: int
    """Global loads and stores of 128 bits, and asynchronous copies of 128 bits or by TMA."""
    narrow_accesses: int
    """Other global loads and stores."""
    serialised_wgmma: bool
    """Whether the assembler had to wait after every HGMMA (its warning C75xx)."""
    register_operand_in_pipeline: bool
    """Whether a WGMMA with its left operand in registers is left in flight: a compiler hazard."""

    @property
    def fits(self) -> bool:
        """Whether a block's shared memory is within the chip's limit."""
        return self.shared_memory <= SHARED_MEMORY_A_BLOCK[self.capability]


class _CompileOnly:
    """A stand-in for Triton's driver: it names a target, and there is nothing to launch on."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_call(call: Call, capability: int) -> Any:
    """Compile a captured launch for a chip, specialised exactly as the launch would be."""
    if INTERPRETING:
        raise RuntimeError("static_report: unset TRITON_INTERPRET; it compiles the kernels")
    active = triton.runtime.driver
    previous = active._active
    active.set_active(_CompileOnly(capability))
    try:
        return call.kernel.warmup(*call.arguments, grid=call.grid, **call.keywords)
    finally:
        active._active = previous


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"static_report: {name} failed: {result.stderr.strip()}")
    return result.stdout + result.stderr


def _occupancy(registers: int, shared_memory: int, n_threads: int, capability: int) -> float:
    per_thread = -(-max(registers, 1) // 8) * 8
    by_registers = REGISTERS // (per_thread * n_threads)
    whole = SHARED_MEMORY_A_BLOCK[capability] + SHARED_MEMORY_RESERVED
    by_memory = whole // (shared_memory + SHARED_MEMORY_RESERVED)
    return min(by_registers, by_memory, THREADS // n_threads, BLOCKS) * n_threads / THREADS


def report(call: Call, capability: int) -> Report:
    """Compile a captured launch and read its machine code."""
    compiled = compile_call(call, capability)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        code = _tool("nvdisasm", "-c", str(cubin))
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        ptxas = "ptxas-blackwell" if capability >= 100 else "ptxas"
        log = _tool(ptxas, "-v", f"--gpu-name={architecture}", str(ptx), "-o", f"{folder}/out")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    metadata = compiled.metadata
    wide = count(r"\b(?:LDG|STG|LDGSTS)\.[\w.]*128") + count(r"\bUTMA(?:LDG|STG)")
    return Report(
        kernel=compiled.name,
        launch=str(call.launch),
        capability=capability,
        registers=registers,
        spilled_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        shared_memory=metadata.shared,
        occupancy=_occupancy(registers, metadata.shared, 32 * metadata.num_warps, capability),
        wgmma=count(r"\bHGMMA"),
        mma=count(r"\b(?:HMMA|DMMA|UTCHMMA|UTCQMMA)"),
        wide_accesses=wide,
        narrow_accesses=count(r"\b(?:LDG|STG|LDGSTS)\.")
        - count(r"\b(?:LDG|STG|LDGSTS)\.[\w.]*128"),
        serialised_wgmma=bool(re.search(r"C75\d\d", log)) or "serializ" in log,
        register_operand_in_pipeline=_register_operand_in_pipeline(compiled.asm["ptx"]),
    )


def _register_operand_in_pipeline(ptx: str) -> bool:
    """A wgmma whose left operand is a list of registers, with a wait that leaves one in flight."""
    in_registers = re.search(r"wgmma\.mma_async[^;]*?\}\s*,\s*\{", ptx)
    in_flight = re.search(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", ptx)
    return bool(in_registers and in_flight)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor with a shape and no memory, for launchers whose launches are captured."""
    return torch.empty(shape, dtype=dtype, device="meta")
