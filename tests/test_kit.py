"""The kit itself: memory is poisoned, layouts are what they say, no fallback slips through."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

import gpunn
import gpunn.functional as GF
from gpunn.checks.comparison import full_precision, on_cpu
from gpunn.kernels.interpreter import INTERPRETING
from kit import check_gradients, launched, layouts


def test_uninitialised_memory_is_nan(device: str) -> None:
    x = torch.ones(3, 4, device=device)
    made = {
        "empty": torch.empty(3, 4, device=device),
        "empty_like": torch.empty_like(x),
        "empty_like transposed": torch.empty_like(x.T),
        "new_empty": x.new_empty(3, 4),
        "new_empty float64": x.new_empty((3, 4), dtype=torch.float64),
        "empty_strided": torch.empty_strided((3, 4), (4, 1), device=device),
        "bfloat16": torch.empty(3, 4, dtype=torch.bfloat16, device=device),
    }
    assert [name for name, tensor in made.items() if not tensor.isnan().all()] == []


def test_interpreter_runs_the_kernels_where_there_is_no_gpu() -> None:
    assert INTERPRETING or torch.cuda.is_available()


def test_a_fallback_to_torch_is_an_error_by_default(device: str) -> None:
    with pytest.raises(RuntimeError, match=r"relu: backend\('kernels'\) was asked for"):
        GF.relu(torch.ones(3, device=device), inplace=True)


def test_layouts_have_the_values_and_the_strides_that_they_say() -> None:
    x = torch.randn(2, 3, 4, 5)
    variants = dict(layouts(x))
    strides = {name: variant.stride() for name, variant in variants.items()}
    assert strides == {
        "contiguous": (60, 20, 5, 1),
        "transposed": (1, 8, 2, 24),
        "every second element": (120, 40, 10, 2),
        "not 16-byte aligned": (60, 20, 5, 1),
        "one row expanded": (0, 20, 5, 1),
        "one element expanded, as sum().backward() gives": (0, 0, 0, 0),
        "channels_last": (60, 1, 15, 3),
    }
    for name, variant in variants.items():
        if "expanded" not in name:
            assert torch.equal(variant, x), name
    assert variants["not 16-byte aligned"].data_ptr() % 16
    assert torch.equal(variants["one row expanded"][1], x[0])
    assert (variants["one element expanded, as sum().backward() gives"] == x[0, 0, 0, 0]).all()


def test_layouts_of_a_scalar() -> None:
    assert [name for name, _ in layouts(torch.tensor(1.0))] == ["contiguous"]


@pytest.mark.skipif(not INTERPRETING, reason="only the interpreter's kernels take float64")
def test_check_gradients_rejects_a_wrong_gradient() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return GF.relu(x)

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
            return dy * 1.1

    with pytest.raises(GradcheckError):
        check_gradients(Wrong.apply, torch.tensor([1.0, 2.0]))
    with pytest.raises(AssertionError, match="no kernel ran"):
        check_gradients(torch.relu, torch.tensor([1.0, 2.0]))


def test_launched_wants_the_kernel_and_no_fallback(device: str) -> None:
    x = torch.ones(3, device=device)
    with gpunn.trace() as trace:
        GF.relu(x)
    assert len(launched(trace, "activation_forward")) == 1
    with pytest.raises(AssertionError, match="no kernel ran for activation_backward"):
        launched(trace, "activation_forward", "activation_backward")
    with gpunn.trace() as trace, gpunn.backend("auto"):
        GF.relu(x)
        GF.relu(x, inplace=True)
    with pytest.raises(AssertionError, match="left to PyTorch"):
        launched(trace, "activation_forward")


def test_products_are_compared_in_full_precision() -> None:
    """In the tests by a fixture, in ``gpunn check`` by itself; and what was set stays so."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
    for setting in settings:
        setting.fp32_precision = "tf32"
    with full_precision():
        assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
    assert [setting.fp32_precision for setting in settings] == ["tf32", "tf32"]


def test_a_baseline_on_the_cpu(device: str) -> None:
    x = torch.ones(3, device=device, requires_grad=True)
    seen: list[torch.Tensor] = []

    def twice(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return 2 * x

    y = on_cpu(twice)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert seen[0].is_cpu
    assert (y.device, dx.device) == (x.device, x.device)
    assert dx.tolist() == [2, 2, 2]
