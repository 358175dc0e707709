"""What test_cuda_sources.py reads in a CUDA C++ source: its kernels, by their form alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

KERNEL = re.compile(
    r"(?P<comment>(?:^//.*\n)*)"
    r"(?P<template>^template\s*<(?P<constants>[^<>]*)>\s*)?"
    r"__global__\s+void\s+(?:__launch_bounds__\(\w+\)\s+)?(?P<name>\w+)"
    r"\((?P<parameters>[^()]*)\)\s*\{",
    flags=re.MULTILINE,
)


@dataclass(frozen=True)
class CudaFunction:
    """A ``__global__`` function as its source has it."""

    name: str
    comment: str
    """The lines of comment right above it."""
    constants: tuple[str, ...]
    """The names of its template parameters; empty where it is no template."""
    parameters: tuple[str, ...]
    """Its parameters, with their types."""
    n_lines: int

    def kinds(self) -> list[str]:
        """What each parameter is: pointer, struct, long long or double; else, how it is written."""
        return [self._kind(parameter) for parameter in self.parameters]

    def _kind(self, parameter: str) -> str:
        if "*" in parameter:
            return "pointer"
        kind = " ".join(parameter.split()[:-1])
        is_struct = re.fullmatch(r"[A-Z]\w*", kind) and kind not in self.constants
        return "struct" if is_struct else kind


def cuda_kernels_of(path: Path) -> list[CudaFunction]:
    """The kernels of a source. A kernel ends at the first brace that starts a line."""
    text = path.read_text()
    found = []
    for match in KERNEL.finditer(text):
        start, end = match.end("comment"), text.index("\n}", match.end())
        found.append(
            CudaFunction(
                match["name"],
                match["comment"],
                tuple(part.split()[-1] for part in (match["constants"] or "").split(",") if part),
                tuple(" ".join(part.split()) for part in match["parameters"].split(",")),
                text.count("\n", start, end) + 2,
            )
        )
    return found
