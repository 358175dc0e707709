"""Every kernel, in each configuration it can choose, compiles for three generations of GPUs.

Machine code for sm_80 (A100), sm_90 (H100, H200) and sm_100 (B200) is made and read on any machine:
no register spills, shared memory within the chip's limit (which the compiler does not check),
tensor-core instructions where there should be some, no serialised WGMMA, 128-bit accesses.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest

from compile_scenarios import SCENARIOS, report_of
from gpunn.kernels.launch import Call, Launch, backend, captured
from gpunn.kernels.product import MatmulLaunch
from gpunn.profiling import static_report
from gpunn.profiling.static_report import Report
from test_architecture import KERNELS, functions_of, is_kernel, parsed

PAIRS = [(name, chip) for name, scenario in SCENARIOS.items() for chip in scenario.capabilities]


@pytest.fixture(scope="session")
def compiled() -> Iterator[Callable[[str, int], Report]]:
    """Compile in a process without TRITON_INTERPRET, which turns kernels into Python functions."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            pool.submit(os.getpid).result()  # the process starts, and takes the environment, now
        finally:
            if interpret is not None:
                os.environ["TRITON_INTERPRET"] = interpret
        yield lambda name, chip: pool.submit(report_of, name, chip).result()


@pytest.mark.parametrize(("name", "chip"), PAIRS, ids=[f"{n}-sm_{c}" for n, c in PAIRS])
def test_compiles(name: str, chip: int, compiled: Callable[[str, int], Report]) -> None:
    scenario, report = SCENARIOS[name], compiled(name, chip)
    assert report.spilled_bytes == 0, report
    assert report.fits, report
    assert not report.serialised_wgmma, report
    assert not report.register_operand_in_pipeline, report
    if scenario.tensor_cores:
        assert report.wgmma if chip == 90 else report.mma, report
        assert chip != 90 or report.mma == 0, report
    if scenario.wide_only:
        assert report.wide_accesses, report
        assert report.narrow_accesses == 0, report


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """What the scenarios launch."""
    with captured(static_report.chip(90)) as calls, backend("kernels"):
        for scenario in SCENARIOS.values():
            scenario.launch()
    return calls


def test_every_kernel_is_compiled(calls: list[Call]) -> None:
    kernels = {
        function.name
        for path in KERNELS
        for function in functions_of(parsed(path))
        if is_kernel(function) and function.name.endswith("_kernel")
    }
    missing = kernels - {call.kernel.__name__ for call in calls}
    assert not missing, f"no scenario for {', '.join(sorted(missing))}"


def test_every_configuration_is_compiled(calls: list[Call]) -> None:
    """Every Launch that a module of kernels/ holds, by itself or in a tuple, among others."""
    compiled = {unsplit(call.launch) for call in calls}
    found = 0
    for path in KERNELS:
        module = importlib.import_module(f"gpunn.kernels.{path.stem}")
        for name, value in vars(module).items():
            for launch in value if isinstance(value, tuple) else (value,):
                if isinstance(launch, Launch):
                    found += 1
                    assert unsplit(launch) in compiled, (
                        f"no scenario for {path.stem}.{name}: {launch}"
                    )
    assert found > 10


def unsplit(launch: Launch) -> Launch:
    """The configuration without the number of parts of a split product."""
    return replace(launch, split_inner=1) if isinstance(launch, MatmulLaunch) else launch
