"""``gpunn doctor``: the hardware and the versions here, and how each op's kernels can run."""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import torch

import gpunn
from gpunn.check import CHECKS, device_here, kernels_run_here, run_check
from gpunn.kernels import host
from gpunn.kernels.cuda import cupy_extra, why_no_cupy

Lines = list[tuple[str, str]]
ATTEMPT = "from gpunn.doctor import attempts; import json; print(json.dumps(attempts()))"


def report() -> str:
    """What ``gpunn doctor`` prints."""
    sections = {"Hardware": hardware(), "Versions": versions(), "Kernels": kernels()}
    width = max(len(name) for lines in sections.values() for name, _ in lines)
    text = []
    for title, lines in sections.items():
        text += [title, *(f"  {name:{width}}  {value}" for name, value in lines), ""]
    return "\n".join(text).rstrip()


def hardware() -> Lines:
    """The processor and the GPUs."""
    lines = [("CPU", f"{cpu_name()}, {os.cpu_count()} cores")]
    if not torch.cuda.is_available():
        return [*lines, ("GPU", f"no GPU: {why_no_gpu()}")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {found.major}.{found.minor}"
        lines.append((f"GPU {index}", f"{found.name}, {capability}, {memory}"))
    return lines


def cpu_name() -> str:
    """The processor's own name on Linux, else what Python knows."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def why_no_gpu() -> str:
    """What torch can say of why it has no GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return f"torch was built for CUDA {torch.version.cuda}, but finds no device or driver"


def versions() -> Lines:
    """Of Python, gpunn and what it stands on."""
    lines = [("Python", platform.python_version()), ("gpunn", gpunn.__version__)]
    lines += [(name, version_of(name)) for name in ("torch", "triton", "numpy", "cupy")]
    return [*lines, ("C++ compiler", compiler())]


def version_of(package: str) -> str:
    """The version of a package, or how to get it."""
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError as error:
        if package == "cupy" and isinstance(error, ModuleNotFoundError):
            return f'not installed (optional: pip install "gpunn[{cupy_extra()}]")'
        return f"cannot be imported: {error}"


def compiler() -> str:
    """The C++ compiler that PyTorch, Triton and the host execution would find."""
    path = host.find_compiler()
    if path is None:
        return "none (CUDA C++ and torch.compile on a CPU, and Triton on a GPU, need one)"
    return f"{(host.version_of(path).splitlines() or ['unknown'])[0]} ({path})"


def attempts() -> dict[str, str]:
    """Every op, with the verdict of its first check in float32: a kernel really runs."""
    return {
        op: run_check(checks[0], torch.float32, device_here()).verdict
        for op, checks in CHECKS.items()
    }


def interpreted_attempts() -> dict[str, str]:
    """The same in a process that interprets kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPT], env=environment, capture_output=True, text=True
    )
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    reason = (done.stderr.strip().splitlines() or ["the process said nothing"])[-1]
    return dict.fromkeys(CHECKS, f"FAIL: {reason}")


def kernels() -> Lines:
    """How the kernels of either language run here, and for each op whether they do."""
    on_gpu = torch.cuda.is_available()
    found = attempts() if kernels_run_here() else interpreted_attempts()
    lines = [
        ("Triton", "on the GPU" if on_gpu else "on the CPU, through Triton's interpreter"),
        ("CUDA C++", cuda_cpp()),
        *((op, "runs" if said == "ok" else f"not at all: {said}") for op, said in found.items()),
    ]
    if on_gpu:
        return lines
    return [*lines, ("", "(in tests and gpunn check; the layers themselves use PyTorch on a CPU)")]


def cuda_cpp() -> str:
    """How the kernels in CUDA C++ run here."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the line says it
            reason = why_no_cupy()
        return "on the GPU, through CuPy" if reason is None else f"left to PyTorch: {reason}"
    path = host.find_compiler()
    return f"on the CPU, compiled by {path}" if path else "not at all: there is no C++ compiler"
