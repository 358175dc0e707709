"""CUDA C++ kernels: sources in ``*.cu``, launched by CuPy on a GPU and by ``host.py`` on a CPU.

A ``CudaKernel`` is launched as a Triton kernel is, through ``launch.run``: tensors, structs,
integers and floats in order, then template arguments by name. It is compiled for those when it is
first launched (``nvrtc.py``), and runs on torch's current device and stream.
"""

from __future__ import annotations

import functools
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpunn.kernels import host, nvrtc
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import Launch, assume_constant_result, decline, takes

TYPES = {
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.float32: "float",
    torch.float64: "double",
    torch.uint8: "unsigned char",
    torch.int32: "int",
    torch.int64: "long long",
}


@dataclass(frozen=True)
class CudaLaunch(Launch):
    """A launch configuration of a CUDA C++ kernel: 32 ``num_warps`` threads a block."""

    num_warps: int = 8

    @property
    def n_threads(self) -> int:
        """Threads a block."""
        return 32 * self.num_warps


class _Stream:
    """A stream as CuPy's launcher wants it: an object with the address as ``ptr``."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class CudaKernel:
    """A ``__global__`` template of a source file in this folder.

    Its parameters are pointers, structs, ``long long`` and ``double``, which is what tensors,
    bytes, integers and floats are passed as; None is a null pointer.
    """

    def __init__(self, file: str, name: str) -> None:
        self.file, self.__name__ = file, name
        self._functions: dict[tuple[object, ...], Any] = {}

    @functools.cached_property
    def source(self) -> str:
        """The source with its headers in it."""
        return host.with_includes((host.FOLDER / self.file).read_text())

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of the template parameters, in order."""
        qualifiers = r"__global__\s+void\s+(?:__launch_bounds__\(\w+\)\s+)?"
        pattern = rf"template\s*<([^<>]*)>\s*{qualifiers}{self.__name__}\("
        found = re.search(pattern, self.source)
        if found is None:
            raise ValueError(f"{self.file} has no template of a kernel {self.__name__}")
        return tuple(part.split()[-1] for part in found[1].split(","))

    def instantiation(self, constants: dict[str, Any]) -> str:
        """``name<arguments>``: tensors' types are written as CUDA's, the rest as it is in C++."""
        if set(constants) != set(self.parameters):
            raise TypeError(
                f"{self.__name__}: template parameters {', '.join(self.parameters)}, "
                f"got {', '.join(constants)}"
            )
        given = (constants[name] for name in self.parameters)
        return f"{self.__name__}<{', '.join(map(_in_cpp, given))}>"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(
        self, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any
    ) -> None:
        device = None if INTERPRETING else torch.cuda.current_device()
        key = device, *constants.items()
        function = self._functions.get(key)
        if function is None:  # of two threads' the first stays: freed, one would be unloaded
            compiled = self._compiled(self.instantiation(constants), device)
            function = self._functions.setdefault(key, compiled)
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        if device is None:
            host.launch(function, grid, 32 * num_warps, values)
            return
        values = [_struct(value) if isinstance(value, bytes) else value for value in values]
        stream = torch._C._cuda_getCurrentRawStream(device)
        function(grid, (32 * num_warps,), values, stream=_Stream(stream))

    def _compiled(self, instantiation: str, device: int | None) -> Any:
        if device is None:
            return host.entry(self.source, instantiation)
        major, minor = torch.cuda.get_device_capability(device)
        return nvrtc.loaded(self.source, instantiation, 10 * major + minor)


@functools.lru_cache(maxsize=4096)
def divisor(number: int) -> bytes:
    """``Divisor`` of ``vector.h``: a number from 1 on, and how to divide by it with a product.

    Source: Granlund and Montgomery, "Division by invariant integers using multiplication" (1994).
    """
    if not 1 < number < 2**31:
        return struct.pack("qII", number, 0, 0)
    shift = (number - 1).bit_length() - 1
    return struct.pack("qII", number, -(-(1 << 32 + shift) // number), shift)


@functools.lru_cache(maxsize=4096)
def _struct(content: bytes) -> NDArray[np.void]:
    """The bytes of a struct as what CuPy passes by value: an array of one element."""
    return np.frombuffer(content, dtype=f"V{len(content)}")


def _in_cpp(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return TYPES[value]
    return str(value).lower() if isinstance(value, bool) else str(value)


def cupy_extra() -> str:
    """The extra of gpunn's that brings CuPy for the CUDA of this PyTorch."""
    return "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda13"


@functools.cache
def why_no_cupy() -> str | None:
    """Why CuPy cannot launch kernels here; None when it can. Warns, once, where it cannot.

    It can be there and fail: for want of NVRTC, or with a driver older than what it is built for.
    """
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        extra = cupy_extra()
        absent = isinstance(error, ModuleNotFoundError)
        problem = "is not installed" if absent else f"fails: {' '.join(str(error).split())}"
        reason = f'CuPy {problem}; pip install "gpunn[{extra}]"'
        warnings.warn(
            f"gpunn: CUDA C++ kernels are left to PyTorch: {reason}", RuntimeWarning, stacklevel=2
        )
        return reason
    return None


@assume_constant_result
def _why_no_cupy() -> str | None:  # torch.compile looks past the memory of what is cached
    return why_no_cupy()


def takes_cuda(
    operator: str, *tensors: torch.Tensor | None, also: Sequence[torch.dtype] = ()
) -> bool:
    """``takes`` for an operator whose kernels are CUDA C++: on a GPU they need CuPy, too."""
    if not takes(operator, *tensors, also=also):
        return False
    on_a_gpu = any(tensor is not None and tensor.is_cuda for tensor in tensors)
    reason = _why_no_cupy() if on_a_gpu else None
    if reason is not None:
        decline(operator, reason)
    return reason is None
