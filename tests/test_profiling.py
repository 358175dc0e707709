"""What is benchmarked, and how: the counts, the comparison itself, the statistics, the reports."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpunn
from gpunn.kernels.launch import device_of
from gpunn.profiling import bench, command, results
from gpunn.profiling.case import Case, difference, tolerated_difference
from gpunn.profiling.cases import CASES, CHECKED_AS
from gpunn.profiling.results import Roof, Row, Timing
from kit import OPS

ROOT = Path(__file__).resolve().parent.parent
ALL = [case for cases in CASES.values() for case in cases]
NAMES = [f"{c.op}: {c.name}, {c.shapes}, {c.precision}" for c in ALL]
each_case = pytest.mark.parametrize("case", ALL, ids=NAMES)


def find(op: str, name: str, shapes: str) -> Case:
    """The one bfloat16 case with this name."""
    (case,) = [
        c for c in CASES[op] if (c.name, c.shapes, c.dtype) == (name, shapes, torch.bfloat16)
    ]
    return case


def row_of(**times: float) -> Row:
    """A row whose contenders took these microseconds, at a roof of 50."""
    row = Row("linear", "gelu", "M=1", "bfloat16", bytes=10**6, flops=10**9, roof=50.0)
    row.times = {name: Timing(value, value - 1, value + 1, 9) for name, value in times.items()}
    return row


# The cases


def test_every_family_of_functions_has_cases() -> None:
    assert set(CASES) == {*OPS, "models"}
    assert set(CHECKED_AS) == {"models"}
    assert set(CHECKED_AS["models"]) <= set(OPS)
    assert all(case.op == op for op, cases in CASES.items() for case in cases)
    assert len(set(NAMES)) == len(NAMES)


# Counted by hand for M, K, N = 8192, 1024, 4096: x 8388608, W 4194304, b 4096, y 33554432 elements.
@pytest.mark.parametrize(
    ("name", "elements", "products"),
    [
        ("bare", 8388608 + 4194304 + 33554432, 1),
        ("bias + gelu", 8388608 + 4194304 + 4096 + 33554432, 1),
        # and the residual is read
        ("bias + gelu + dropout + residual", 8388608 + 4194304 + 4096 + 33554432 * 2, 1),
        # dy, z, W, x are read; dx, dW, db are written
        ("bias + gelu: dx, dW, db", 33554432 * 2 + (4194304 + 8388608) * 2 + 4096, 2),
        # both of the above, and z is written
        (
            "bias + gelu: forward and backward",
            (8388608 + 4194304 + 4096 + 33554432 * 2)
            + (33554432 * 2 + (4194304 + 8388608) * 2 + 4096),
            3,
        ),
    ],
)
def test_the_work_of_linear(name: str, elements: int, products: int) -> None:
    case = find("linear", name, "M=8192 K=1024 N=4096")
    assert case.bytes == 2 * elements
    assert case.flops == products * 68719476736


@pytest.mark.parametrize(
    ("op", "name", "shapes", "n_bytes"),
    [
        ("activation", "gelu", "8192 × 8192", 268435456),
        ("activation", "silu: dx", "8192 × 8192", 402653184),
        ("glu", "swiglu", "8192 × 28672", 704643072),
        ("glu", "swiglu: dx", "8192 × 28672", 1174405120),
    ],
)
def test_the_work_of_elementwise_ops(op: str, name: str, shapes: str, n_bytes: int) -> None:
    case = find(op, name, shapes)
    assert case.bytes == n_bytes
    assert case.flops == 0


def test_the_work_of_networks() -> None:
    """Counted by hand, layer by layer; ResNet-50's normalisations are in float32."""
    resnet, alexnet, gpt, decoding, *_ = CASES["models"]
    parameters, of_norms, multiply_adds, in_first_layer = 25557032, 53120, 4089184256, 118013952
    assert resnet.bytes == 3 * 2 * (parameters + of_norms) + 2 * 128 * 3 * 224**2
    assert resnet.flops == 2 * 128 * (3 * multiply_adds - in_first_layer)
    parameters, multiply_adds, in_first_layer = 60965224, 724406816, 105415200
    assert alexnet.bytes == 3 * 2 * parameters + 2 * 128 * 3 * 227**2
    assert alexnet.flops == 2 * 128 * (3 * multiply_adds - in_first_layer)
    # A token attends to 512 others in the mean, when decoding to 1024.
    parameters, multiply_adds, pairs = 124439808, 123532032, 12 * 2 * 768 * 512
    assert gpt.bytes == 3 * 2 * parameters + 2 * 8 * 8 * 1024
    assert gpt.flops == 2 * 8 * 1024 * (3 * multiply_adds + 3.5 * pairs)
    assert decoding.bytes == 2 * (parameters + 2 * pairs + 50257) + 2 * 8
    assert decoding.flops == 2 * (multiply_adds + 2 * pairs)


@pytest.mark.parametrize("case", CASES["models"], ids=lambda case: case.name)
def test_networks_compute_the_same_in_float32(case: Case, device: str) -> None:
    """In bfloat16, roundings decide too much for a comparison of gradients to be a strict one."""
    small = replace(case.small(), dtype=torch.float32, tolerance=None)
    inputs = small.make(torch.device(device), small.dtype, 0)
    with small.settings():
        expected = small.prepared(small.theirs, inputs)()
        got = small.prepared(small.ours, inputs)()
    assert difference(small, inputs, got, expected) <= tolerated_difference(small)


@each_case
def test_ours_and_theirs_compute_the_same_with_the_launches_of_the_static_report(
    case: Case, device: str
) -> None:
    small = case.small()
    assert (small.op, small.name, small.dtype, small.mode) == (
        case.op, case.name, case.dtype, case.mode,
    )  # fmt: skip
    inputs = small.make(torch.device(device), small.dtype, 0)
    with small.settings():
        expected = small.prepared(small.theirs, inputs)()
        call = small.prepared(small.ours, inputs)
        with gpunn.trace() as trace:
            got = call()
    assert difference(small, inputs, got, expected) <= tolerated_difference(small)
    wrong = tuple((1 - 2 * tolerated_difference(small)) * tensor for tensor in got)
    assert difference(small, inputs, wrong, expected) > tolerated_difference(small)
    planned = small.launches(device_of(inputs[0]))
    assert [(c.kernel.__name__, c.launch) for c in planned] == [
        (r.kernel, r.launch) for r in trace.launches
    ]
    assert not trace.fallbacks
    if small.mode == "forward" and small.reads_all:
        assert small.bytes == sum(tensor.nbytes for tensor in (*inputs, *got))
    if small.library is not None:
        product = (small.library(*inputs),)
        assert difference(small, inputs, product, expected) <= tolerated_difference(small)


def test_a_difference_of_dropouts_is_that_of_what_both_kept() -> None:
    case = find("linear", "bias + gelu + dropout + residual", "M=8192 K=1024 N=4096")
    residual, kept = torch.ones(4), torch.full((4,), 3.0)
    kept[0] = 1.0  # dropped
    assert difference(case, (residual,), (kept,), (torch.full((4,), 3.0),)) == 0
    assert difference(case, (residual,), (kept,), (torch.full((4,), 2.0),)) == 0.5


def test_a_nan_is_never_close() -> None:
    case = ALL[0]
    tensor, broken = torch.ones(2), torch.tensor([1.0, math.nan])
    assert not difference(case, (), (broken,), (tensor,)) <= tolerated_difference(case)


def test_settings_are_given_back() -> None:
    before = torch.get_float32_matmul_precision()
    with replace(ALL[0], dtype=torch.float32, tf32=True).settings():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == before


# The statistics


def test_percentiles_lie_between_the_neighbouring_samples() -> None:
    samples = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert results.percentile(samples, 0.5) == 3
    assert results.percentile(samples, 0.2) == pytest.approx(1.8)
    assert results.percentile([1.0, 2.0], 0.5) == 1.5
    assert results.percentile([7.0], 0.8) == 7
    timing = Timing.of(samples)
    assert (timing.median, timing.n_samples) == (3, 5)
    assert [timing.p20, timing.p80] == pytest.approx([1.8, 4.2])
    assert timing.spread == pytest.approx(0.8)


def test_the_roof_is_the_longer_of_moving_and_computing() -> None:
    roof = Roof({"bfloat16": 100e12, "tf32": 10e12}, bandwidth=1e12)
    case = replace(ALL[0], bytes=10**6, flops=10**9)
    assert roof.microseconds(case) == pytest.approx(10)  # 1 µs to move, 10 µs to compute
    assert roof.microseconds(replace(case, bytes=10**8)) == pytest.approx(100)
    slower = replace(case, dtype=torch.float32, tf32=True)
    assert roof.microseconds(slower) == pytest.approx(100)


def test_ratios_and_rates() -> None:
    row = row_of(kernels=100.0, auto=80.0, eager=120.0, compile=90.0)
    assert row.ratio("kernels", "eager") == pytest.approx(1.2)
    assert row.ratio("kernels", "compile") == pytest.approx(0.9)
    assert row.ratio("auto", "library") is None
    assert row.share_of_roof() == 0.5
    assert row.rate(row.bytes) == pytest.approx(10e9)
    assert row.rate(row.flops, "auto") == pytest.approx(12.5e12)


def test_sets_of_inputs_exceed_twice_the_cache() -> None:
    assert bench.n_sets(100, cache_bytes=1000) * 100 > 2000
    assert bench.n_sets(5000, cache_bytes=1000) == 1
    assert bench.n_sets(1, cache_bytes=10**9) == bench.MOST_SETS


def test_the_number_of_samples_fits_the_time() -> None:
    assert bench.n_samples(1.0, 0.02) == 50
    assert bench.n_samples(1.0, 1.0) == bench.FEWEST_SAMPLES
    assert bench.n_samples(1e3, 1e-6) == bench.MOST_SAMPLES


# The benchmark


def test_bench_refuses_to_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "gpunn.check", SimpleNamespace(first_fault=lambda op: ""))
    with pytest.raises(RuntimeError, match="not measured: PyTorch finds no CUDA GPU here"):
        bench.bench(["linear"], 10)


def test_bench_refuses_to_time_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "INTERPRETING", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        bench.require_gpu()


class Stopwatch:
    """Where there is no GPU: a CUDA event that reads the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Stopwatch) -> float:
        return 1000 * (later.at - self.at)


@pytest.fixture
def measured(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> Callable[[dict[str, list[Case]], float], list[Row]]:
    """bench on given cases, quickly; with stand-ins for what a machine without a GPU lacks."""
    fast = {"PRODUCT_SIZE": 64, "COPY_BYTES": 4096, "SAMPLES_OF_ROOF": 2, "ROUNDS": 2}
    fast |= {"FEWEST_SAMPLES": 2, "MOST_SAMPLES": 4, "WARM_UP_SECONDS": 0}
    for name, value in fast.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    if device == "cpu":
        monkeypatch.setattr(bench, "require_gpu", lambda: torch.device(device))
        monkeypatch.setattr(torch.cuda, "Event", Stopwatch)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        properties = SimpleNamespace(L2_cache_size=4096)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(bench, "in_graph", lambda calls: lambda: bench.one_pass(calls)[0])
    else:
        monkeypatch.setattr(bench, "MOST_SETS", 3)
    check = SimpleNamespace(first_fault=lambda op: "of a reason" * (op == "red"))
    monkeypatch.setitem(sys.modules, "gpunn.check", check)

    def run(cases: dict[str, list[Case]], seconds: float) -> list[Row]:
        monkeypatch.setattr(bench, "CASES", cases)
        return bench.bench(list(cases), seconds).rows

    return run


def test_a_case_that_raises_has_a_row_and_the_others_go_on(measured: Any) -> None:
    good = ALL[0].small()

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise ValueError("of a reason\nand more")

    def other(*inputs: torch.Tensor) -> torch.Tensor:
        return good.theirs(*inputs) * 1.5

    cases = [
        replace(good, name="theirs raises", theirs=broken),
        replace(good, name="ours raises", ours=broken),
        replace(good, name="ours differs", ours=other),
        replace(good, name="good", library=good.theirs),
    ]
    rows = measured({"linear": cases, "red": [replace(good, op="red")]}, 60)
    first, second, third, fourth, red = rows
    assert first.errors == {"case": "ValueError: of a reason"}
    assert not first.times
    assert second.errors == dict.fromkeys(("kernels", "auto"), "ValueError: of a reason")
    assert list(second.times) == ["eager", "compile"]
    assert all("differs from PyTorch's result by 5.0e-01" in e for e in third.errors.values())
    assert list(third.times) == ["eager", "compile"]
    assert not fourth.errors
    assert list(fourth.times) == ["kernels", "auto", "eager", "compile", "library"]
    assert all(timing.median > 0 and timing.n_samples >= 2 for timing in fourth.times.values())
    assert fourth.roof > 0
    assert "gpunn check red" in red.errors["case"]
    text = results.speed_table(rows)
    assert all(row.case in text for row in rows)
    assert "linear, ours raises" in text.partition("not measured:")[2]


def test_rivals_are_compared_and_timed_as_the_others_are(measured: Any) -> None:
    good = ALL[0].small()

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise ValueError("not built")

    def other(*inputs: torch.Tensor) -> torch.Tensor:
        return good.theirs(*inputs) * 1.5

    rivals = {"raises": broken, "differs": other, "same": good.theirs}
    row, plain = measured({"linear": [replace(good, rivals=rivals), good]}, 60)
    assert list(row.times) == [*plain.times, "same"]
    assert row.errors["raises"] == "ValueError: not built"
    assert "differs from PyTorch's result by 5.0e-01" in row.errors["differs"]
    assert row.errors.keys() == {"raises", "differs"}
    assert not command._failed(row)
    assert (row.rivals, plain.rivals) == (("raises", "differs", "same"), ())


def test_networks_wait_for_the_checks_of_all_their_ops(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHECKED_AS, "models", ("linear", "red", "pooling"))
    (row,) = measured({"models": [CASES["models"][0]]}, 60)
    assert row.errors["case"].endswith("a wrong kernel is not timed: of a reason")


@pytest.mark.parametrize("mode", ["backward", "step"])
def test_backward_is_timed(mode: str, measured: Any) -> None:
    case = next(c for c in CASES["linear"] if c.mode == mode).small()
    (row,) = measured({"linear": [case]}, 60)
    assert not row.errors
    assert list(row.times) == ["kernels", "auto", "eager", "compile"]


def test_short_kernels_are_also_timed_in_a_graph(measured: Any) -> None:
    case = next(c for c in CASES["linear"] if c.launch_bound).small()
    plain, graph = measured({"linear": [case]}, 60)
    assert (plain.in_graph, graph.in_graph) == (False, True)
    assert graph.case == f"{plain.case} (CUDA graph)"
    assert plain.times.keys() == graph.times.keys() == set(results.CONTENDERS)
    assert not graph.errors


def test_what_time_ran_out_for_has_a_row(measured: Any) -> None:
    case = ALL[0].small()
    rows = measured({"linear": [case, case]}, -1)
    assert [row.errors for row in rows] == [{"case": "time ran out"}] * 2
    assert not any(command._failed(row) for row in rows)


def test_rivals_have_a_table_and_ratios_of_their_own() -> None:
    row, plain = row_of(kernels=100.0, eager=120.0, flash=50.0), row_of(kernels=90.0)
    row.rivals, row.errors = ("flash", "flex"), {"flex": "RuntimeError: not built"}
    text = results.speed_table([row, plain])
    first, second, errors, _ = text.split("\n\n")
    title, header, _, line = second.splitlines()
    assert "flash" not in first
    assert title == "linear, further rivals"
    names = ["kernels", "flash", "flex", "k/flash", "k/flex"]
    assert header.split() == ["case", "shapes", "type", *names]
    assert line.split() == ["gelu", "M=1", "bf16", "100.0", "50.0", "-", "0.50", "-"]
    assert "gelu, M=1, bfloat16: flex: RuntimeError: not built" in errors
    assert "further rivals" not in results.speed_table([plain]).partition("roof to")[0]
    ratios = row.as_dict()["ratios"]
    assert ratios == {"kernels to eager": 1.2, "kernels to flash": 0.5}
    assert json.loads(json.dumps(row.as_dict()))["rivals"] == ["flash", "flex"]


def test_the_json_holds_everything(tmp_path: Path) -> None:
    row = row_of(kernels=100.0, eager=120.0)
    unmeasured = Row("glu", "swiglu", "8", "bfloat16", 1, 0, errors={"case": "a reason"})
    found = results.Results(Roof({"bfloat16": 1e12}, 2e12), [row, unmeasured])
    path = tmp_path / "folder" / "found.json"
    results.write_json(path, found.as_dict())
    content = json.loads(path.read_text())
    expected = {"device", "driver", "torch", "triton", "python", "commit", "command", "date"}
    assert expected <= content["environment"].keys()
    assert content["environment"]["torch"] == torch.__version__
    assert content["roof"] == {"flops": {"bfloat16": 1e12}, "bandwidth": 2e12}
    first, second = content["speed"]
    assert first["times"]["kernels"] == {"median": 100, "p20": 99, "p80": 101, "n_samples": 9}
    assert first["ratios"] == {"kernels to eager": 1.2}
    assert first["share_of_roof"]["kernels"] == 0.5
    assert second["errors"] == {"case": "a reason"}
    assert second["roof"] is None
    assert list(path.parent.iterdir()) == [path]
