"""Checking and compiling before a benchmark, in several processes.

Timing a case takes a fraction of a second, compiling its kernels and torch.compile's many. What
these processes compile stays in the caches on the disk, where the process that times finds it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult
from typing import Any

import torch

from gpunn.checks.comparison import DTYPES
from gpunn.profiling.bench import Match, conditions, require_gpu
from gpunn.profiling.cases import CASES, CHECKED_AS

MOST_WORKERS = 14
ALONE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""One thread a process."""


def prepare(ops: Sequence[str], seconds: float, progress: Callable[[str], None]) -> dict[str, str]:
    """What ``gpunn check`` finds wrong with each op and, of a network, with those that it needs.

    An op that is right has an empty entry.

    What is not done within about so many seconds is left to the benchmark: an op without an entry
    is still to be checked.
    """
    require_gpu()
    deadline = time.perf_counter() + seconds
    cases = [(op, index) for op in ops for index in range(len(CASES[op]))]
    cases.sort(key=lambda task: task[0] != "models")  # they take longest
    checks = dict.fromkeys(part for op in ops for part in CHECKED_AS.get(op, (op,)))
    n_workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))
    progress(f"{n_workers} processes check {len(checks)} ops and compile {len(cases)} cases")
    with _environment(ALONE), get_context("spawn").Pool(n_workers) as pool:
        checked = {
            op: [pool.apply_async(_first_fault, (op, dtype)) for dtype in DTYPES] for op in checks
        }
        compiled = [pool.apply_async(_compile, task) for task in cases]
        tasks: list[AsyncResult[Any]] = [*chain.from_iterable(checked.values()), *compiled]
        for task in tasks:
            task.wait(max(0.0, deadline - time.perf_counter()))
        progress(f"compiled: {sum(task.ready() for task in compiled)} of {len(compiled)} cases")
        return {
            op: next(filter(None, (part.get() for part in parts)), "")
            for op, parts in checked.items()
            if all(part.ready() and part.successful() for part in parts)
        }


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables in the environment that new processes inherit."""
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_fault(op: str, dtype: torch.dtype) -> str:
    from gpunn.check import first_fault

    return first_fault(op, (dtype,))


def _compile(op: str, index: int) -> None:
    """Run every contender once; what raises will do so again when it is timed."""
    case = CASES[op][index]
    torch._dynamo.reset()
    with conditions(case):
        Match(case, [case.make(require_gpu(), case.dtype, 0)])
    torch.cuda.empty_cache()
