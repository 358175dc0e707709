"""What the loops in which the demos learn have in common: threads, a bar, the trace of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import gpunn

try:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None


@contextmanager
def threads(at_most: int) -> Iterator[None]:
    """So many CPU threads, or fewer where torch has been given fewer, as by torchrun.

    Small networks are no faster with more than one; and as many on any machine give the same
    numbers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(at_most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress_bar(doing: str = "training", live: str = "loss {task.fields[loss]:.4f}") -> Progress:
    """A bar with the loss of the mini-batch beside it, or with what else is to be seen live."""
    return Progress(
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(live),
        TimeElapsedColumn(),
    )


@contextmanager
def first_traced(trace: gpunn.Trace) -> Iterator[None]:
    """What runs is recorded in the trace, if nothing is yet."""
    if trace.launches or trace.fallbacks:
        yield
        return
    with gpunn.trace() as found:
        yield
    trace.launches.extend(found.launches)
    trace.fallbacks.extend(found.fallbacks)
