"""Launches past Triton's search for a variant: the same variant, with the same arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gpunn.kernels import compiled
from gpunn.kernels.compiled import examined, launch_compiled
from gpunn.kernels.elementwise import ElementwiseLaunch

BASE = torch.zeros(2**10)


def scale_kernel(x_ptr, y_ptr, n, s, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A kernel's parameters; it is never compiled."""


def tensors() -> st.SearchStrategy[torch.Tensor]:
    """Of several types, beginning at any multiple of two bytes."""
    types = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64])
    return st.builds(lambda start, dtype: BASE.view(dtype)[start:], st.integers(0, 16), types)


def descriptors() -> st.SearchStrategy[TensorDescriptor]:
    """Of two types and several blocks."""
    return st.builds(
        lambda dtype, rows, inner: TensorDescriptor.from_tensor(
            BASE.view(dtype).view(16, -1), [rows, inner]
        ),
        st.sampled_from([torch.float32, torch.float16]),
        st.sampled_from([16, 32]),
        st.sampled_from([16, 32]),
    )


def integers() -> st.SearchStrategy[int]:
    """Around all limits of what an integer may be."""
    near = [st.integers(m - 2, m + 2) for m in (0, 16, 32, -(2**31), 2**31, 2**32, 2**63)]
    return st.one_of(st.integers(-(2**63), 2**64 - 1), *near)


ARGUMENT = st.one_of(tensors(), descriptors(), integers(), st.floats(), st.none())


@given(st.lists(ARGUMENT, max_size=3), st.lists(ARGUMENT, max_size=3))
def test_equal_kinds_mean_the_same_to_triton(first: list[Any], second: list[Any]) -> None:
    native = pytest.importorskip("triton._C.libtriton", reason="no Triton to ask")
    if not compiled.KNOWN:
        pytest.skip("another version of Triton, whose own search is used")

    def triton_sees(arguments: list[Any]) -> list[Any]:
        from triton.backends.compiler import BaseBackend

        return [
            native.native_specialize_impl(BaseBackend, argument, False, True, True)
            for argument in arguments
        ]

    ours = [examined(tuple(arguments)) for arguments in (first, second)]
    assert ours[0] is not None
    assert ours[1] is not None
    if ours[0][0] == ours[1][0]:
        assert triton_sees(first) == triton_sees(second)
    for argument, value in zip(first, ours[0][1], strict=True):
        is_tensor = isinstance(argument, torch.Tensor)
        assert value is argument or (is_tensor and value == argument.data_ptr())


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
