"""What gpunn adds to a call on a CPU: ``python -m gpunn.profiling.overhead``.

PyTorch computes there; the tensors are small, so that the time is Python's and the dispatcher's.
Ours and PyTorch's take turns, block by block, in the thread's own CPU time; the added time is the
median of the differences between neighbouring blocks. A busy machine makes all of it slower, so
the difference of the fastest blocks is told too.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

import gpunn.functional as GF
import gpunn.nn
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.profiling.results import number, table

REPETITIONS = 300
CALLS_A_BLOCK = 100
TARGET = 5.0
"""Microseconds that gpunn.functional.linear may add."""


@dataclass(frozen=True)
class Pair:
    """The same call, ours and PyTorch's."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    with_gradients: bool = False


@dataclass(frozen=True)
class Overhead:
    """Microseconds a call: medians, those of the differences, the difference of the fastest."""

    name: str
    with_gradients: bool
    ours: float
    theirs: float
    added: float
    added_at_best: float


def pairs(with_gradients: bool) -> list[Pair]:
    """linear, relu and nn.Linear, in a forward that records no graph, or one that does."""
    x = torch.randn(4, 16, requires_grad=with_gradients)
    layer, torch_layer = gpunn.nn.Linear(16, 16), torch.nn.Linear(16, 16)
    weight, bias = torch_layer.weight, torch_layer.bias
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "linear": (lambda: GF.linear(x, weight, bias), lambda: F.linear(x, weight, bias)),
        "linear, activation": (
            lambda: GF.linear(x, weight, bias, activation="relu"),
            lambda: F.relu(F.linear(x, weight, bias)),
        ),
        "relu": (lambda: GF.relu(x), lambda: F.relu(x)),
        "nn.Linear": (lambda: layer(x), lambda: torch_layer(x)),
    }
    return [Pair(name, *both, with_gradients) for name, both in calls.items()]


def seconds_of(call: Callable[[], object], n_calls: int) -> float:
    """Seconds of this thread that ``n_calls`` calls take."""
    turns = range(n_calls)
    started = time.thread_time()
    for _ in turns:
        call()
    return time.thread_time() - started


def measure(pair: Pair, repetitions: int = REPETITIONS, n_calls: int = CALLS_A_BLOCK) -> Overhead:
    """Time both sides of a pair in turn."""
    scale = 1e6 / n_calls
    ours, theirs = [], []
    with nullcontext() if pair.with_gradients else torch.no_grad():
        for _ in range(repetitions + 1):
            theirs.append(seconds_of(pair.theirs, n_calls) * scale)
            ours.append(seconds_of(pair.ours, n_calls) * scale)
    del ours[0], theirs[0]  # the warm-up
    added = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
    times = statistics.median(ours), statistics.median(theirs)
    return Overhead(pair.name, pair.with_gradients, *times, added, min(ours) - min(theirs))


def overhead_table(found: list[Overhead]) -> str:
    """The overheads as text."""
    lines = [
        [
            row.name,
            "requires_grad" if row.with_gradients else "no_grad",
            *(number(value) for value in (row.theirs, row.ours, row.added, row.added_at_best)),
        ]
        for row in found
    ]
    return table(("forward of", "mode", "torch µs", "gpunn µs", "added µs", "at best µs"), lines)


def machine() -> str:
    """The CPU and the versions, on one line."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{model}, {os.cpu_count()} cores, {versions}, Python {platform.python_version()}"


def main(given: list[str] | None = None) -> int:
    """Measure and print; always 0, since a busy machine is no fault of the code."""
    parser = argparse.ArgumentParser(prog="gpunn.profiling.overhead", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    repetitions = parser.parse_args(given).repetitions
    if INTERPRETING:
        print("overhead: not measured: unset TRITON_INTERPRET, which runs kernels on the CPU")
        return 2
    torch.set_num_threads(1)
    found = [measure(pair, repetitions) for mode in (False, True) for pair in pairs(mode)]
    print(f"{overhead_table(found)}\n{machine()}, one thread")
    worst = max(row.added for row in found if row.name == "linear")
    verdict = "met" if worst <= TARGET else "missed"
    print(f"target: linear adds at most {TARGET:.0f} µs: {verdict} ({worst:.2f} µs)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
