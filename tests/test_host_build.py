"""How the host compiles CUDA C++: the cache, what is refused and in which words, the sanitizer."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpunn.kernels import host
from gpunn.kernels.interpreter import INTERPRETING

pytestmark = pytest.mark.skipif(
    not INTERPRETING, reason="the kernels run on the GPU here, not on the host"
)

SOURCE = """
#include "vector.h"

// y = 2 x; one of its writes is ``beyond`` its place, in shared memory or in y.
template <int N, bool SHARED>
__global__ void double_kernel(const float* x, float* y, long long beyond) {
    __shared__ float tile[N];
    int t = threadIdx.x;
    float own[2] = {x[t], x[t]};  // on the fiber's stack
    tile[t + (SHARED ? beyond : 0)] = own[t % 2];
    __syncthreads();
    y[t + (SHARED ? 0 : beyond)] = 0;
    __syncthreads();
    y[t] = own[t % 2] + tile[t];
}

template <int N>
__global__ void int_kernel(float* y, int n) {}
"""
# Compiles, loads and runs a kernel without torch, triton or gpunn.
SCRIPT = """
import ctypes, importlib.util, json, sys

spec = importlib.util.spec_from_file_location("host", sys.argv[1])
host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host)
instantiation, flags, beyond = json.loads(sys.argv[2])
unit = host.translation_unit(host.with_includes(sys.stdin.read()), instantiation)
function = ctypes.CDLL(str(host.compiled(unit, flags))).gpunn_entry
function.restype = ctypes.c_char_p
assert not {"torch", "triton", "numpy"} & sys.modules.keys()
print("compiled", flush=True)
x, y = (ctypes.c_float * 64)(*range(64)), (ctypes.c_float * 64)()
host.launch(function, (3,), 64, [ctypes.addressof(x), ctypes.addressof(y), beyond])
assert list(y) == [2 * i for i in range(64)], list(y)
print("done")
"""


def unit_of(instantiation: str, source: str = SOURCE) -> str:
    return host.translation_unit(host.with_includes(source), instantiation)


UNIT = unit_of("double_kernel<64, false>")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("GPUNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that has a line for each time that the compiler was called to compile."""
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    log.touch()
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *kernel.cpp*) echo compiled >> {log};; esac\n'
        f'exec {host.find_compiler()} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    yield log
    host.version_of.cache_clear()


def start(
    instantiation: str = "double_kernel<64, false>", flags: str = "[]", beyond: int = 0
) -> subprocess.Popen[str]:
    """The script in a process of its own."""
    code = [sys.executable, "-c", SCRIPT, host.__file__]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*code, f'["{instantiation}", {flags}, {beyond}]'],
        stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(SOURCE)
    process.stdin.close()
    process.stdin = None
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status and what it printed."""
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def loads(library: Path) -> bool:
    return bool(ctypes.CDLL(str(library)).gpunn_entry)


# --- the cache ---


def test_a_kernel_is_compiled_once_for_all_processes(compilations: Path, cache: Path) -> None:
    library = host.compiled(UNIT)
    assert library.parent == cache
    assert host.compiled(UNIT) == library
    assert finish(start()) == (0, "compiled\ndone\n")
    assert compilations.read_text() == "compiled\n"
    assert list(cache.iterdir()) == [library]


def test_processes_may_compile_the_same_kernel_at_once(compilations: Path, cache: Path) -> None:
    processes = [start() for _ in range(3)]
    assert [finish(process) for process in processes] == [(0, "compiled\ndone\n")] * 3
    (library,) = cache.iterdir()
    assert loads(library)
    assert 1 <= compilations.read_text().count("compiled") <= 3


@pytest.mark.parametrize("damage", ["truncated", "emptied", "corrupted", "without its digest"])
def test_a_damaged_library_is_compiled_again(damage: str, compilations: Path) -> None:
    library = host.compiled(UNIT)
    whole = library.read_bytes()
    middle = len(whole) // 2
    library.write_bytes(
        {
            "truncated": whole[:middle],
            "emptied": b"",
            "corrupted": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "without its digest": whole[: -host.DIGEST_SIZE],
        }[damage]
    )
    assert host.compiled(UNIT) == library
    assert compilations.read_text().count("compiled") == 2
    assert library.stat().st_size == len(whole)
    assert loads(library)


def test_every_difference_gives_another_library(
    compilations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = [
        host.compiled(UNIT),
        host.compiled(unit_of("double_kernel<32, false>")),
        host.compiled(unit_of("double_kernel<64, false>", SOURCE.replace("2 x", "x + x"))),
        host.compiled(UNIT, ("-O0",)),
    ]
    for header in ("vector.h", "host.h"):
        text = (host.FOLDER / header).read_text()
        (tmp_path / header).write_text(text)
    (tmp_path / "host.h").write_text((tmp_path / "host.h").read_text() + "// more\n")
    monkeypatch.setattr(host, "FOLDER", tmp_path)
    libraries.append(host.compiled(unit_of("double_kernel<64, false>")))
    with monkeypatch.context() as patch:
        patch.setattr(host, "version_of", lambda path: f"{path} 99")
        libraries.append(host.compiled(UNIT))
    compiler = Path(str(host.find_compiler()))
    monkeypatch.setenv("CXX", str(compiler.rename(tmp_path / "other")))
    libraries.append(host.compiled(UNIT))
    assert len(set(libraries)) == len(libraries)
    assert compilations.read_text().count("compiled") == len(libraries)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.cache_folder() == Path(os.environ["GPUNN_CACHE"])
    monkeypatch.delenv("GPUNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert host.cache_folder() == Path("/elsewhere/gpunn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert host.cache_folder() == Path.home() / ".cache" / "gpunn"


def test_a_header_is_included_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "FOLDER", tmp_path)
    (tmp_path / "a.h").write_text('#pragma once\n#include "b.h"\nint a;\n')
    (tmp_path / "b.h").write_text("#pragma once\nint b;\n")
    text = host.with_includes('#include "a.h"\n#include "b.h"\n#include <math.h>\nint c;\n')
    assert text.split() == "int b; int a; #include <math.h> int c;".split()


# --- what is refused ---


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    expected = r"by a C\+\+ compiler, and there is none: install g\+\+"
    with pytest.raises(RuntimeError, match=expected):
        host.compiled(UNIT)


def test_the_compilers_own_words_are_shown(cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"refuses a kernel:(.|\n)*undeclared_thing"):
        host.compiled(unit_of("double_kernel<1, undeclared_thing>"))
    assert not list(cache.glob("*"))


def test_parameters_of_another_width_are_refused() -> None:
    with pytest.raises(RuntimeError, match="parameters are pointers, structs, long long or double"):
        host.compiled(unit_of("int_kernel<1>"))


# --- under the address sanitizer ---


@pytest.fixture(scope="module")
def sanitizer() -> str:
    """The sanitizer's library, which must come first in a process that is not built with it."""
    compiler = host.find_compiler()
    assert compiler is not None
    command = [compiler, "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{compiler} has no libasan.so")
    return path


@pytest.mark.parametrize(
    ("instantiation", "beyond", "error"),
    [
        ("double_kernel<64, false>", 0, None),
        ("double_kernel<64, false>", 1, "heap-buffer-overflow"),
        ("double_kernel<64, false>", -1, "heap-buffer-overflow"),
        ("double_kernel<64, true>", 1, "global-buffer-overflow"),
    ],
)
def test_writes_out_of_bounds_are_found(
    instantiation: str,
    beyond: int,
    error: str | None,
    sanitizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And fibers, which change stacks, are not taken for errors."""
    monkeypatch.setenv("LD_PRELOAD", sanitizer)
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0")
    monkeypatch.setenv("PYTHONMALLOC", "malloc")
    status, output = finish(start(instantiation, '["-fsanitize=address"]', beyond))
    assert output.startswith("compiled\n"), output
    assert (status == 0) == (error is None) == output.endswith("done\n"), output
    assert error is None or f"AddressSanitizer: {error}" in output
