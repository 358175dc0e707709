"""Launches past Triton's search for a variant: the same variant, with the same arguments."""

from __future__ import annotations

import importlib
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gpunn.kernels import compiled
from gpunn.kernels.compiled import examined, launch_compiled
from gpunn.kernels.elementwise import ElementwiseLaunch

BASE = torch.zeros(2**10)


def scale_kernel(x_ptr, y_ptr, n, s, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A kernel's parameters; it is never compiled."""


TENSORS = [
    BASE.view(dtype)[start:]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64)
    for start in (0, 1, 2, 4, 8)
]
DESCRIPTORS = [
    TensorDescriptor.from_tensor(BASE.view(dtype).view(16, -1), [rows, inner])
    for dtype in (torch.float32, torch.float16)
    for rows in (16, 32)
    for inner in (16, 32)
]
INTEGERS = [
    limit + offset
    for limit in (0, 16, 32, -(2**31), 2**31, 2**32, -(2**63) + 2, 2**63, 2**64 - 3)
    for offset in (-2, -1, 0, 1, 2)
]
ARGUMENTS = [*TENSORS, *DESCRIPTORS, *INTEGERS, 0.0, 1.0, 2.5, None]


def test_equal_kinds_mean_the_same_to_triton() -> None:
    """Of any argument beside any other: whatever its variant is remembered by tells it apart."""
    if not compiled.KNOWN:
        pytest.skip("another version of Triton, whose own search is used")
    specialised = importlib.import_module("triton._C.libtriton").native_specialize_impl
    seen = [specialised(BaseBackend, argument, False, True, True) for argument in ARGUMENTS]
    meanings: dict[Any, Any] = {}
    for (one, first), (other, second) in product(zip(ARGUMENTS, seen, strict=True), repeat=2):
        found = examined((one, other))
        assert found is not None
        assert meanings.setdefault(tuple(found[0]), (first, second)) == (first, second)


def test_tensors_are_passed_by_their_addresses() -> None:
    for argument in ARGUMENTS:
        found = examined((argument,))
        assert found is not None
        (value,) = found[1]
        assert value is argument or value == argument.data_ptr()


@pytest.mark.parametrize("argument", [True, "relu", (1, 2), torch.float32])
def test_arguments_of_other_types_are_left_to_triton(argument: object) -> None:
    assert examined((BASE, argument)) is None


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Launches that Triton was asked for, and those of the variants that it gave."""
    made = SimpleNamespace(by_triton=[], direct=[], kernel=JITFunction(scale_kernel))

    def run(*arguments: Any, grid: Any, warmup: bool, **constants: Any) -> SimpleNamespace:
        made.by_triton.append((grid, arguments, constants))
        variant = len(made.by_triton)
        return SimpleNamespace(
            run=lambda *given: made.direct.append((variant, given)),
            function="function",
            packed_metadata="metadata",
        )

    monkeypatch.setattr(made.kernel, "run", run)
    monkeypatch.setattr(compiled, "_variants", {})
    monkeypatch.setattr(compiled, "KNOWN", True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, False)
    return made


def launch(
    made: SimpleNamespace,
    *arguments: Any,
    device: int = 0,
    configuration: ElementwiseLaunch = ElementwiseLaunch(),  # noqa: B008
    **constants: Any,
) -> None:
    constants = constants or {"DOUBLE": True}
    launch_compiled(made.kernel, (5, 2), device, arguments, constants, configuration)


def test_a_second_launch_is_of_the_variant_of_the_first(launches: SimpleNamespace) -> None:
    x, y = BASE[:4], BASE[4:8]
    launch(launches, x, None, 7, 0.5)
    assert launches.by_triton == [
        ((5, 2), (x, None, 7, 0.5), {"DOUBLE": True, "num_warps": 4, "BLOCK": 1024})
    ]
    assert not launches.direct
    launch(launches, y, None, 9, 1.5)
    assert len(launches.by_triton) == 1
    ((variant, given),) = launches.direct
    assert variant == 1
    assert given == (
        5, 2, 1, 70, "function", "metadata", None, None, None, y.data_ptr(), None, 9, 1.5,
        None, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((BASE.half(), None, 7, 0.5), {}),
        ((BASE[1:], None, 7, 0.5), {}),
        ((BASE, BASE, 7, 0.5), {}),
        ((BASE, None, 1, 0.5), {}),
        ((BASE, None, 48, 0.5), {}),
        ((BASE, None, 2**31 + 1, 0.5), {}),
        ((BASE, None, 7, 3), {}),
        ((BASE, None, 7, 0.5), {"DOUBLE": 1}),
        ((BASE, None, 7, 0.5), {"DOUBLE": False}),
        ((BASE, None, 7, 0.5), {"DOUBLY": True}),
        ((BASE, None, 7, 0.5), {"device": 1}),
        ((BASE, None, 7, 0.5), {"configuration": ElementwiseLaunch(8)}),
    ],
)
def test_a_variant_serves_no_others(
    launches: SimpleNamespace, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    launch(launches, BASE, None, 7, 0.5)
    launch(launches, *arguments, **options)
    assert len(launches.by_triton) == 2
    launch(launches, *arguments, **options)
    assert len(launches.by_triton) == 2
    assert [variant for variant, _ in launches.direct] == [2]


@pytest.mark.parametrize("where", ["enter", "exit", "kernel"])
def test_whoever_wants_to_be_told_of_launches_is_told(
    launches: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    launch(launches, BASE, None, 7, 0.5)
    if where == "kernel":
        launches.kernel.add_pre_run_hook(lambda *arguments, **constants: None)
    else:
        hooks = SimpleNamespace(calls=[print])
        monkeypatch.setattr(knobs.runtime, f"launch_{where}_hook", hooks)
    launch(launches, BASE, None, 7, 0.5)
    assert len(launches.by_triton) == 2
    assert not launches.direct


def test_what_is_not_known_is_left_to_triton(
    launches: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version; a constexpr by position; debugging, which is another variant."""
    for _ in range(2):
        launch(launches, BASE, None, 7, 0.5, 3)
    launch(launches, BASE, None, 7, 0.5)
    with knobs.runtime.scope():
        knobs.runtime.debug = True
        launch(launches, BASE, None, 7, 0.5)
    monkeypatch.setattr(compiled, "KNOWN", False)
    launch(launches, BASE, None, 7, 0.5)
    assert len(launches.by_triton) == 5
    assert not launches.direct
