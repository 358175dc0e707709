"""CUDA C++ kernels on a CPU: compiled by the machine's C++ compiler, one fiber a thread.

``host.h`` stands in for the parts of CUDA that the kernels use. A kernel, with its template
arguments, is compiled once into a shared library that is kept in ``$GPUNN_CACHE``, or in the
user's cache folder; another process may be doing the same, and whatever is there may be damaged.
This module imports neither torch nor triton, so that it runs where they cannot, as under the
address sanitizer.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).resolve().parent
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w"),
    "-fvisibility=hidden",  # else two kernels of one name would share their shared memory
)
DIGEST_SIZE = hashlib.sha256().digest_size

Order = Literal["ascending", "reversed", "random"]
ORDERS: tuple[Order, ...] = ("ascending", "reversed", "random")
_order: tuple[Order, int] = ("ascending", 0)
_running = threading.Lock()  # a library's state is the process's, and ctypes lets go of the GIL


@contextmanager
def thread_order(order: Order, seed: int = 0) -> Iterator[None]:
    """Run the blocks, and the threads of each, in this order inside the ``with``.

    A kernel whose result depends on it lacks a barrier.

    Raises:
        ValueError: an unknown order.
    """
    global _order
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    previous, _order = _order, (order, seed)
    try:
        yield
    finally:
        _order = previous


def with_includes(text: str, included: set[str] | None = None) -> str:
    """A source with the headers of this folder in place of their ``#include``, each once.

    So the text is all that a compiled kernel depends on, and caches need look at nothing else.
    """
    seen = set() if included is None else included

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return with_includes((FOLDER / name).read_text().replace("#pragma once\n", ""), seen)

    return re.sub(r'^#include "([^"]+)"$', replaced, text, flags=re.MULTILINE)


def find_compiler() -> str | None:
    """The path of a C++ compiler: ``$CXX``, or the first of the usual names that is there."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$GPUNN_CACHE``, else below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GPUNN_CACHE") or Path(base) / "gpunn")


def translation_unit(source: str, instantiation: str) -> str:
    """C++ that holds one instantiation of a kernel, and an entry to launch it by.

    The source has its headers in it, ``host.h`` (by way of ``vector.h``) among them.
    """
    return (
        f"{source}\n"
        'extern "C" __attribute__((visibility("default"))) const char* gpunn_entry('
        "void** arguments, const long long* grid, const long long* block, int order, "
        "unsigned long long seed) {\n"
        f"    return host::launch<{instantiation}>(arguments, grid, block, order, seed);\n}}\n"
    )


@functools.cache
def version_of(compiler: str) -> str:
    """What a compiler says of itself."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def cached(identity: str, suffix: str, make: Callable[[], bytes]) -> Path:
    """A file with what ``make`` gives and its digest, from the cache where it is there and whole.

    ``identity`` is all that the content depends on.
    """
    file = cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}{suffix}"
    if not _is_whole(file):
        content = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            whole = Path(folder, file.name)
            whole.write_bytes(content + hashlib.sha256(content).digest())
            whole.replace(file)  # at once, whoever else is at it
    return file


def content_of(file: Path) -> bytes:
    """What ``cached`` was given to keep."""
    return file.read_bytes()[:-DIGEST_SIZE]


def _is_whole(file: Path) -> bool:
    """Whether a file is there and ends in the digest of what precedes."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST_SIZE]).digest() == content[-DIGEST_SIZE:]


def compiled(unit: str, extra_flags: Sequence[str] = ()) -> Path:
    """The shared library of a translation unit.

    Raises:
        RuntimeError: there is no C++ compiler, or it refuses the source.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError(
            "CUDA C++ kernels run on a CPU by a C++ compiler, and there is none: install g++ or "
            "clang++, or name one in CXX"
        )
    command = [compiler, *FLAGS, *extra_flags]
    identity = "\0".join((unit, version_of(compiler), *command))
    return cached(identity, ".so", lambda: _compile(unit, command))


def _compile(unit: str, command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(unit)
        done = subprocess.run(
            [*command, str(source), "-o", str(library)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} refuses a kernel:\n{done.stderr[:4000]}")
        return library.read_bytes()


@functools.cache
def entry(source: str, instantiation: str) -> Any:
    """The function that launches a kernel, loaded; compiled first where it must be."""
    function = ctypes.CDLL(str(compiled(translation_unit(source, instantiation)))).gpunn_entry
    function.restype = ctypes.c_char_p
    return function


def _in_memory(value: int | float | bytes | None) -> Any:
    """An argument as the kernel reads it."""
    if isinstance(value, bytes):
        return ctypes.create_string_buffer(value, len(value))
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_longlong(value or 0)


def launch(
    function: Any,
    grid: Sequence[int],
    n_threads: int,
    arguments: Sequence[int | float | bytes | None],
) -> None:
    """Run a kernel on blocks of ``n_threads`` in a row; pointers are integers, structs bytes.

    Raises:
        RuntimeError: an assertion in the kernel failed, or its threads wait for each other.
    """
    values = [_in_memory(value) for value in arguments]
    pointers = (ctypes.c_void_p * len(values))(
        *(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values)
    )
    numbers = ctypes.c_longlong * 3
    order, seed = _order
    with _running:
        failure = function(
            pointers,
            numbers(*(*grid, 1, 1)[:3]),
            numbers(n_threads, 1, 1),
            ctypes.c_int(ORDERS.index(order)),
            ctypes.c_ulonglong(seed),
        )
    if failure:
        raise RuntimeError(f"CUDA C++ kernel: {failure.decode()}")
