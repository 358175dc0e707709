"""Every kernel, in each configuration it can choose, compiles for three generations of GPUs.

Machine code for sm_80 (A100), sm_90 (H100, H200) and sm_100 (B200) is made and read on any machine:
no register spills, shared memory within the chip's limit (which the compiler does not check),
tensor-core instructions where there should be some, no serialised WGMMA, 128-bit accesses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from compile_scenarios import SCENARIOS, report_of
from gpunn.profiling.static_report import Report

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


def test_every_kernel_is_compiled() -> None:
    """No kernel of the library is missing from the scenarios."""
    from gpunn.kernels import launch
    from gpunn.profiling.static_report import chip

    launched = set()
    for scenario in SCENARIOS.values():
        with launch.captured(chip(90)) as calls:
            scenario.launch()
        launched |= {call.kernel.__name__ for call in calls}
    from test_architecture import KERNELS, functions_of, is_kernel, parsed

    kernels = {
        function.name
        for path in KERNELS
        for function in functions_of(parsed(path))
        if is_kernel(function) and function.name.endswith("_kernel")
    }
    assert launched == kernels
