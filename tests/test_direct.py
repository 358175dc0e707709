"""Launchers called past the dispatcher: only where it would do nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gpunn.functional as GF
from gpunn.kernels.direct import directly
from gpunn.kernels.softmax import softmax_forward

X = torch.randn(3, 4)
PLAIN: tuple[Any, ...] = (X, None, 2, 0.5, True, "relu", [0.5], [True])


class Op:
    """A schema, and whether the op was called, or else its launcher."""

    def __init__(self) -> None:
        schema = (
            "test(Tensor x, Tensor? y, int n, float s, bool b, str f, float[] p, bool[] needs) "
            "-> Tensor"
        )
        self._schema = torch._C.parse_schema(schema)
        self.called = ""

    def __call__(self, *arguments: Any) -> torch.Tensor:
        self.called = "op"
        return X

    def launcher(self, *arguments: Any) -> torch.Tensor:
        self.called = "launcher"
        return X


def called(*arguments: Any) -> str:
    """What a call ends in."""
    op = Op()
    function = directly(op, op.launcher)
    function(*arguments)
    first = op.called
    function(*arguments)
    assert op.called == first, "a second call goes another way"
    return first


def test_plain_arguments_go_to_the_launcher() -> None:
    assert called(*PLAIN) == "launcher"
    assert called(torch.nn.Parameter(X).detach(), X, *PLAIN[2:]) == "launcher"
    assert called(*PLAIN[:6], (), (True, False)) == "launcher"
    with torch.no_grad():
        assert called(torch.nn.Parameter(X), *PLAIN[1:]) == "launcher"


class Tagged(torch.Tensor):
    """A tensor subclass."""


@pytest.mark.parametrize(
    ("place", "argument"),
    [
        (0, X.as_subclass(Tagged)),
        (0, torch._neg_view(X)),
        (1, torch._neg_view(X)),
        (0, torch._efficientzerotensor(3)),
        (0, X.clone().requires_grad_()),
        (0, None),
        (2, 2.0),
        (2, True),
        (3, 1),
        (3, X[0, 0]),
        (4, 1),
        (6, [1]),
        (6, [0.5, 1]),
        (7, True),
    ],
)
def test_the_dispatcher_converts_resolves_records_and_refuses(place: int, argument: object) -> None:
    arguments = list(PLAIN)
    arguments[place] = argument
    assert called(*arguments) == "op"
    assert called(*PLAIN[:-1]) == "op"


class Functions(TorchFunctionMode):
    """A mode that sees functions."""


class Operations(TorchDispatchMode):
    """A mode that sees operations."""


@pytest.mark.parametrize(
    "watcher",
    [
        Functions,
        Operations,
        lambda: torch.device("cpu"),
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    ],
    ids=["function mode", "dispatch mode", "default device", "profiler"],
)
def test_whoever_watches_sees_the_op(watcher: Callable[[], AbstractContextManager[Any]]) -> None:
    with watcher():
        assert called(*PLAIN) == "op"
    assert called(*PLAIN) == "launcher"


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_transform_and_a_tracer_see_the_op() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(called(*PLAIN))
        return x

    torch.func.vmap(function)(X)
    torch.jit.trace(function, (X,), check_trace=False)
    assert seen == ["op", "op"]


def test_the_profiler_sees_the_ops_of_a_function(device: str) -> None:
    x = torch.randn(3, 5, device=device, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        GF.softmax(x, -1).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"gpunn::softmax_forward", "gpunn::softmax_backward"} <= names


def test_a_negated_view_is_read_with_its_sign(device: str) -> None:
    x = torch.randn(3, 5, device=device)
    forward: Any = softmax_forward
    expected = forward(-x, None, 1, 1.0, False, torch.float32)
    assert torch.equal(forward(torch._neg_view(x), None, 1, 1.0, False, torch.float32), expected)
