"""A captured launch compiled to machine code for a chip, and disassembled: no GPU needed.

Triton compiles its kernels and NVRTC those in CUDA C++, as a launch on that chip would have them
compiled. What the assembler says comes with the code; where no disassembler here can read it, the
instructions stay unknown.
"""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
import subprocess
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from gpunn.kernels import nvrtc
from gpunn.kernels.cuda import CudaKernel
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import Call

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class MachineCode:
    """One kernel, compiled for one chip."""

    kernel: str
    n_threads: int
    """Threads a block."""
    registers: int
    shared_memory: int
    log: str
    """What the assembler said."""
    ptx: str
    cubin: bytes


def compiled(call: Call, capability: int) -> MachineCode:
    """Compile a captured launch for a chip, specialised exactly as the launch would be.

    Raises:
        nvrtc.NoCompilerError: CuPy or NVRTC, which CUDA C++ is compiled with, is not here.
        RuntimeError: the compiler refuses the kernel, or TRITON_INTERPRET is set.
    """
    if isinstance(call.kernel, CudaKernel):
        return _by_nvrtc(call.kernel, call, capability)
    return _by_triton(call, capability)


def disassemblers() -> list[Path]:
    """Every nvdisasm here: Triton's, those of NVIDIA's wheels, the one on the path."""
    wheels = importlib.util.find_spec("nvidia")
    folders = (wheels and wheels.submodule_search_locations) or ()
    in_wheels = (path for folder in folders for path in Path(folder).glob("*/bin/nvdisasm"))
    on_path = shutil.which("nvdisasm")
    found = [TOOLS / "nvdisasm", *sorted(in_wheels), *([Path(on_path)] if on_path else [])]
    return [path for path in found if path.exists()]


def disassembled(cubin: bytes) -> str | None:
    """The instructions of a binary, by the first disassembler that can read it."""
    return _disassembled(cubin, tuple(disassemblers()))


@lru_cache(64)  # launches that differ in numbers alone have the same code
def _disassembled(cubin: bytes, tools: tuple[Path, ...]) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        for tool in tools:
            # without its analysis of the data flow, which takes as long and is not looked at
            done = subprocess.run([tool, "-c", "-ndf", file], capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout
    return None


# --- Triton ---


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


def _by_triton(call: Call, capability: int) -> MachineCode:
    if INTERPRETING:
        raise RuntimeError("static_report: unset TRITON_INTERPRET; it compiles the kernels")
    active, said = triton.runtime.driver, io.StringIO()
    previous = active._active
    active.set_active(_CompileOnly(capability))
    try:
        with knobs.nvidia.scope(), redirect_stdout(said):
            knobs.nvidia.dump_ptxas_log = True
            found = call.kernel.warmup(*call.arguments, grid=call.grid, **call.keywords)
    finally:
        active._active = previous
    # what Triton has in a cache it does not assemble
    log = said.getvalue() or _assembled(found.asm["ptx"], capability)
    return MachineCode(
        kernel=found.name,
        n_threads=32 * found.metadata.num_warps,
        registers=_registers(log),
        shared_memory=found.metadata.shared,
        log=log,
        ptx=found.asm["ptx"],
        cubin=found.asm["cubin"],
    )


@lru_cache(64)
def _assembled(ptx: str, capability: int) -> str:
    """What Triton's assembler says of a kernel."""
    architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
    tool = TOOLS / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={architecture}", str(file), "-o", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"static_report: {tool.name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _registers(log: str) -> int:
    return int(re.findall(r"Used (\d+) registers", log)[0])


# --- CUDA C++ ---


def _by_nvrtc(kernel: CudaKernel, call: Call, capability: int) -> MachineCode:
    constants = {name: value for name, value in call.keywords.items() if name != "num_warps"}
    instantiation = kernel.instantiation(constants)
    binary = nvrtc.compiled(kernel.source, instantiation, capability)
    shared_memory = re.search(r"(\d+) bytes smem", binary.log)
    return MachineCode(
        kernel=instantiation,
        n_threads=32 * call.launch.num_warps,
        registers=_registers(binary.log),
        shared_memory=int(shared_memory[1]) if shared_memory else 0,
        log=binary.log,
        ptx=binary.ptx,
        cubin=binary.cubin,
    )
