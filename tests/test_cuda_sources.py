"""The house's rules for CUDA C++: budgets, includes, and the form of a kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cuda_source import CudaFunction, cuda_kernels_of
from test_architecture import KERNELS, ROOT

CUDA_SOURCES = sorted((ROOT / "kernels").glob("*.cu"))
CUDA_HEADERS = sorted((ROOT / "kernels").glob("*.h"))


def test_cuda_sources_keep_their_budget_and_their_form() -> None:
    wrong = []
    for path in (*CUDA_SOURCES, *CUDA_HEADERS):
        text = path.read_text()
        if (n := text.count("\n")) > 400:
            wrong.append(f"{path.name}: {n} lines, over 400")
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > 100 or "\t" in line or line != line.rstrip():
                wrong.append(f"{path.name}:{number}: over 100 columns, a tab, or a trailing space")
        wrong += [
            f"{path.name}: {kernel.name} has {kernel.n_lines} lines, over 80"
            for kernel in cuda_kernels_of(path)
            if kernel.n_lines > 80
        ]
    assert not wrong, "\n".join(wrong)


def test_a_cuda_source_belongs_to_its_launchers_and_holds_all_kernels() -> None:
    stems = {path.stem for path in KERNELS}
    for path in CUDA_SOURCES:
        assert path.stem in stems, f"{path.name} has no kernels/{path.stem}.py"
        kernels = path.read_text().count("__global__")
        assert len(cuda_kernels_of(path)) == kernels > 0, f"{path.name}: a kernel of another form"
    for path in CUDA_HEADERS:
        assert "#pragma once\n" in path.read_text(), path.name
        assert not cuda_kernels_of(path), f"{path.name}: kernels belong to a .cu"


def test_cuda_sources_include_the_headers_of_the_folder_alone() -> None:
    """NVRTC finds no others; vector.h and host.h bring what the two compilers need."""
    names = {path.name for path in CUDA_HEADERS}
    for path in (*CUDA_SOURCES, *CUDA_HEADERS):
        if path.name not in ("vector.h", "host.h"):
            for line in re.findall(r"^\s*#\s*include.*", path.read_text(), flags=re.MULTILINE):
                found = re.fullmatch(r'#include "([^"]+)"', line)
                assert found, f"{path.name}: {line}"
                assert found[1] in names, f"{path.name}: {line}"


def faults_of(kernel: CudaFunction) -> list[str]:
    """What is wrong with the form of a kernel in CUDA C++."""
    order = ("pointer", "struct", "long long", "double")
    kinds = kernel.kinds()
    unknown = [kind for kind in kinds if kind not in order]
    faults = {
        "its name does not end in _kernel": not kernel.name.endswith("_kernel"),
        "no comment above it says what it computes": not kernel.comment,
        "the comment has over eight lines": kernel.comment.count("\n") > 8,
        "it is no template": not kernel.constants,
        "a template parameter is not in capitals": "".join(kernel.constants).upper()
        != "".join(kernel.constants),
        f"parameters of other types: {unknown}": bool(unknown),
        f"parameters come in this order: {', '.join(order)}": (
            not unknown and kinds != sorted(kinds, key=order.index)
        ),
    }
    return [fault for fault, holds in faults.items() if holds]


@pytest.mark.parametrize("path", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_kernels_are_templates_named_documented_and_in_order(path: Path) -> None:
    """Their parameters as ``CudaKernel`` passes them, so each is of its width on host and GPU."""
    for kernel in cuda_kernels_of(path):
        assert not faults_of(kernel), f"{path.name}: {kernel.name}: {faults_of(kernel)}"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("// y = x.\ntemplate <typename T>\n__global__ void copy(const T* x, T* y) {\n}\n",
         "its name does not end in _kernel"),
        ("template <typename T>\n__global__ void copy_kernel(const T* x, T* y) {\n}\n",
         "no comment above it says what it computes"),
        ("// y = 0.\n__global__ void zero_kernel(float* y, long long n) {\n}\n",
         "it is no template"),
        ("// y = x.\ntemplate <typename T>\n__global__ void fill_kernel(T* y, T x) {\n}\n",
         "parameters of other types: ['T']"),
        ("// y = x.\ntemplate <int n>\n__global__ void fill_kernel(int* y) {\n}\n",
         "a template parameter is not in capitals"),
        ("// y = 1.\ntemplate <int N>\n__global__ void ones_kernel(double p, int* y) {\n}\n",
         "parameters come in this order: pointer, struct, long long, double"),
    ],
)  # fmt: skip
def test_a_kernel_of_another_form_is_told(source: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "source.cu"
    path.write_text(source)
    (kernel,) = cuda_kernels_of(path)
    assert faults_of(kernel) == [fault]
