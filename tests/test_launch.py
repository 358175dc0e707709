"""The record of what ran, the choice of backend, refusals, configurations, captured launches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import gpunn
import gpunn.functional as GF
from gpunn.functional.dispatch import AGAIN
from gpunn.kernels.elementwise import ElementwiseLaunch, activation_forward_kernel
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import (
    Device,
    FallbackRecord,
    Launch,
    captured,
    chosen_backend,
    device_of,
    launchers,
    refusal,
    takes,
)
from kit import launched

ROOT = Path(gpunn.__file__).resolve().parent.parent


class Tagged(torch.Tensor):
    """A tensor subclass, whose operations may mean something of their own."""


# --- trace ---


def test_trace_records_launches_forward_and_backward(device: str) -> None:
    x = torch.randn(3000, device=device, requires_grad=True)
    with gpunn.trace() as trace:
        GF.silu(x).backward(torch.randn(3000, device=device))
    forward, backward = trace.launches
    assert (forward.operator, forward.kernel) == ("activation_forward", "activation_forward_kernel")
    assert forward.grid == (3,)
    assert forward.launch == ElementwiseLaunch()
    assert (backward.operator, backward.kernel, backward.grid) == (
        "activation_backward", "activation_backward_kernel", (3,),
    )  # fmt: skip
    assert not trace.fallbacks


@pytest.mark.parametrize(
    "function",
    [
        GF.gelu,
        GF.sigmoid,
        lambda x: GF.linear(x, x, activation="relu"),
        lambda x: GF.layer_norm(x, (3,)),
        lambda x: GF.embedding(torch.zeros(2, dtype=torch.int64, device=x.device), x),
    ],
)
def test_trace_says_that_a_gradient_for_another_is_torchs(function: Any, device: str) -> None:
    x = torch.randn(3, 3, device=device, requires_grad=True)
    with gpunn.trace() as trace:
        torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    assert [record.reason for record in trace.fallbacks] == [AGAIN]


def test_trace_records_fallbacks_with_their_reason(device: str) -> None:
    with gpunn.backend("torch"), gpunn.trace() as trace:
        GF.relu(torch.ones(3, device=device))
    assert trace.fallbacks == [FallbackRecord("relu", "backend('torch')")]
    assert not trace.launches


def test_trace_is_over_at_the_end_of_its_block_even_after_an_error(device: str) -> None:
    x = torch.ones(3, device=device)
    with pytest.raises(ZeroDivisionError), gpunn.trace() as trace:
        raise ZeroDivisionError
    GF.relu(x)
    assert not trace.launches


def test_traces_nest(device: str) -> None:
    x = torch.ones(3, device=device)
    with gpunn.trace() as outer:
        GF.relu(x)
        with gpunn.trace() as inner:
            GF.tanh(x)
        GF.sigmoid(x)
    assert len(outer.launches) == 3
    assert inner.launches == outer.launches[1:2]


def test_two_empty_traces_are_told_apart(device: str) -> None:
    """They are equal, so leaving the inner one must not stop the outer."""
    with gpunn.trace() as outer:
        with gpunn.trace():
            pass
        GF.relu(torch.ones(3, device=device))
    assert len(outer.launches) == 1


def test_printed_trace_is_a_table(device: str) -> None:
    x = torch.ones(3, device=device)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        GF.relu(x)
        GF.relu(x)
        GF.elu(x.clone(), inplace=True)
    first, second = str(trace).splitlines()
    launch = ElementwiseLaunch()
    assert first == f"    2 × activation_forward  activation_forward_kernel  grid (1,)  {launch}"
    assert second == "    1 × elu                 torch                      inplace=True"
    assert str(gpunn.Trace()) == "nothing was launched"


# --- backend ---


def test_unknown_backend_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"backend: expected 'auto', .*, got 'triton'"),
        gpunn.backend("triton"),  # type: ignore[arg-type]
    ):
        pass
    assert chosen_backend() == "kernels"


def test_backends_of_threads_may_end_in_any_order() -> None:
    """Each block takes back its own choice, not the one that it found."""
    first, second = gpunn.backend("torch"), gpunn.backend("auto")
    before = chosen_backend()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert chosen_backend() == "auto"
    second.__exit__(None, None, None)
    assert chosen_backend() == before


def test_backend_is_restored_even_after_an_error() -> None:
    with gpunn.backend("auto"):
        with gpunn.backend("torch"):
            assert chosen_backend() == "torch"
        with pytest.raises(ZeroDivisionError), gpunn.backend("torch"):
            raise ZeroDivisionError
        assert chosen_backend() == "auto"
    assert chosen_backend() == "kernels"


def test_each_backend_does_what_it_says(device: str) -> None:
    x = torch.ones(3, device=device)
    ran = {}
    for choice in ("auto", "kernels", "torch"):
        with gpunn.backend(choice), gpunn.trace() as trace:
            GF.relu(x)
        ran[choice] = (len(trace.launches), len(trace.fallbacks))
    assert ran == {"auto": (1, 0), "kernels": (1, 0), "torch": (0, 1)}


# --- refusal ---


def test_refusal_names_the_reason(device: str) -> None:
    x = torch.ones(3, device=device)
    assert refusal([x, None, x.half(), x.bfloat16(), torch.nn.Parameter(x)]) is None
    assert refusal([x, x.int()]) == f"no kernel for torch.int32 on {device}"
    assert refusal([x, x.byte()], also=(torch.uint8,)) is None
    assert (
        refusal([x.byte(), x.int()], also=(torch.uint8,))
        == f"no kernel for torch.int32 on {device}"
    )
    assert refusal([x.to(torch.complex64)]) == f"no kernel for torch.complex64 on {device}"
    assert refusal([x.as_subclass(Tagged)]) == "tensor subclass Tagged"
    assert refusal([torch.ones(3, device="meta")]) == "meta tensor"
    double = refusal([x.double()])
    assert double is None if INTERPRETING else double == "no kernel for torch.float64 on cuda"


def test_cpu_tensors_are_torchs_without_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen before the first import."""
    script = (
        "import torch, gpunn, gpunn.functional as GF\n"
        "x = torch.tensor([-1.0, 2.0], requires_grad=True)\n"
        "with gpunn.trace() as trace:\n"
        "    GF.relu(x).sum().backward()\n"
        "assert x.grad.tolist() == [0, 1]\n"
        "assert not trace.launches\n"
        "print([r.reason for r in trace.fallbacks])\n"
    )
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\['cpu tensor,? and TRITON_INTERPRET is not 1'\]", done.stdout.strip())


def test_subclasses_and_transforms_are_torchs(device: str) -> None:
    x = torch.randn(4, 3, device=device)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        tagged = GF.relu(x.as_subclass(Tagged))
        mapped = torch.func.vmap(GF.relu)(x)
    assert type(tagged) is Tagged
    assert torch.equal(mapped, x.relu())
    assert not trace.launches
    reasons = [record.reason for record in trace.fallbacks]
    assert reasons == ["tensor subclass Tagged", "inside a torch.func transform"]


def test_refused_under_kernels_is_an_error_that_says_why(device: str) -> None:
    expected = r"^relu: backend\('kernels'\) was asked for, but: no kernel for torch.int64"
    with pytest.raises(RuntimeError, match=expected):
        takes("relu", torch.ones(3, dtype=torch.int64, device=device))


# --- configurations and captured launches ---


@dataclass(frozen=True)
class Tiles(Launch):
    """A configuration with block sizes."""

    num_stages: int = 3
    block_rows: int = 8
    block_cols: int = 128


def test_launch_arguments_are_the_kernels_keywords() -> None:
    assert Tiles(2, 1, block_cols=64).arguments() == {
        "num_warps": 2, "num_stages": 1, "BLOCK_ROWS": 8, "BLOCK_COLS": 64,
    }  # fmt: skip
    assert Launch(2).arguments() == {"num_warps": 2}


def test_captured_launches_are_not_made() -> None:
    hopper = Device(capability=90, n_multiprocessors=132)
    x = torch.empty(5000, device="meta", dtype=torch.bfloat16)
    with gpunn.trace() as trace, captured(hopper) as calls:
        assert device_of(x) == hopper
        y = launchers["activation_forward"](x, "elu", [2.0])
    assert y.device.type == "meta"
    assert not trace.launches
    (call,) = calls
    assert call.kernel is activation_forward_kernel
    assert call.grid == (5,)
    assert call.arguments[2] == 5000
    assert {name: call.keywords[name] for name in ("P0", "BLOCK", "num_warps")} == {
        "P0": 2.0, "BLOCK": 1024, "num_warps": 4,
    }  # fmt: skip


def test_functions_take_meta_tensors_while_their_launches_are_captured() -> None:
    """Forward and backward, with the results' shapes and dtypes; at any other time refused."""
    hopper = Device(capability=90, n_multiprocessors=132)
    x = torch.empty(6, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with captured(hopper) as calls:
        y = GF.swiglu(x)
        y.backward(torch.empty_like(y))
        assert refusal([x.int()]) == "no kernel for torch.int32 on meta"
    assert [call.kernel.__name__ for call in calls] == ["glu_forward_kernel", "glu_backward_kernel"]
    assert (y.device.type, y.shape, y.dtype) == ("meta", (6, 32), torch.bfloat16)
    assert x.grad is not None
    with pytest.raises(RuntimeError, match="but: meta tensor"):
        GF.swiglu(x)


def test_no_kernel_is_captured_for_a_chip_that_is_too_old() -> None:
    with captured(Device(capability=75, n_multiprocessors=40)):
        reason = refusal([torch.empty(3, device="meta")])
    assert reason == "no kernel below compute capability 8.0, and this is 7.5"


def test_launches_are_made_again_after_capturing(device: str) -> None:
    chip = Device(80, 108)
    x = torch.randn(3, device=device)
    with captured(chip):
        with pytest.raises(ZeroDivisionError), captured(Device(100, 148)):
            raise ZeroDivisionError
        assert device_of(x) == chip
    assert device_of(x) != chip
    with gpunn.trace() as trace:
        assert torch.equal(GF.relu(x), x.relu())
    launched(trace, "activation_forward")
