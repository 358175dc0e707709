"""CUDA C++ kernels as machine code: compiled by NVRTC, loaded by CuPy.

CuPy's own ``RawModule`` compiles with ``-ftz=true``, which takes numbers below 1.2e-38 for zero, so
that a maximum of such would not be PyTorch's. So its NVRTC is called here, without that; a binary
is the same whether it is to be launched or, on a machine without a GPU, to be read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from gpunn.kernels import host

# Triton brings the headers of the 16-bit types, so nobody need have the CUDA toolkit.
HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
OPTIONS = ("--std=c++17", f"-I{HEADERS}", "--ptxas-options=-v")


class NoCompilerError(RuntimeError):
    """What would compile a kernel is not installed here, which is no fault of the kernel."""


@dataclass(frozen=True)
class Binary:
    """One kernel, compiled for one chip."""

    name: str
    """The kernel's in the binary."""
    cubin: bytes
    ptx: str
    log: str
    """What the assembler said."""


@functools.cache
def nvrtc() -> Any:
    """CuPy's way to NVRTC, which needs no GPU.

    Raises:
        NoCompilerError: one of the two is not here.
    """
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise NoCompilerError(f"CUDA C++ is compiled with CuPy and NVRTC: {reason}") from error
    return nvrtc


def architecture(capability: int) -> str:
    """The newest that NVRTC knows whose code a chip of this compute capability can run."""
    family = range(capability // 10 * 10, capability + 1)
    known = [supported for supported in nvrtc().getSupportedArchs() if supported in family]
    if not known:
        version = ".".join(map(str, nvrtc().getVersion()))
        raise NoCompilerError(f"NVRTC {version} knows no compute capability {capability / 10}")
    return f"sm_{max(known)}"


def compiled(source: str, instantiation: str, capability: int) -> Binary:
    """The instantiation of a kernel in a source, for a compute capability such as 90.

    Raises:
        NoCompilerError: CuPy or NVRTC is not here, or NVRTC does not know the chip.
        RuntimeError: NVRTC refuses the source.
    """
    library = nvrtc()
    program = library.createProgram(source, "kernel.cu", (), ())
    try:
        library.addNameExpression(program, instantiation)
        library.compileProgram(program, (*OPTIONS, f"-arch={architecture(capability)}"))
        return Binary(
            library.getLoweredName(program, instantiation),
            library.getCUBIN(program) + b"\0",  # CuPy cuts off the last byte, as of a text
            library.getPTX(program).decode(),
            library.getProgramLog(program),
        )
    except library.NVRTCError as error:
        said = library.getProgramLog(program).strip()
        raise RuntimeError(f"NVRTC refuses {instantiation}: {said or error}") from error
    finally:
        library.destroyProgram(program)


def loaded(source: str, instantiation: str, capability: int) -> Any:
    """The kernel on the current device, as a ``cupy.cuda.Function``; kept in ``host.cached``."""
    import cupy

    def made() -> bytes:
        binary = compiled(source, instantiation, capability)
        return binary.name.encode() + b"\n" + binary.cubin

    version = ".".join(map(str, nvrtc().getVersion()))
    identity = "\0".join((source, instantiation, architecture(capability), version, *OPTIONS))
    kept = host.content_of(host.cached(identity, ".cubin", made))
    name, _, cubin = kept.partition(b"\n")
    module = cupy.cuda.Module()
    module.load(cubin)
    return module.get_function(name.decode())
