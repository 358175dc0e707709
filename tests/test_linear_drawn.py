"""linear on shapes and options that Hypothesis draws, and on offsets past 2^31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpunn
import gpunn.functional as GF
from gpunn.functional.activation import TORCH
from gpunn.kernels.activation import ACTIVATIONS
from kit import far_apart

N_DRAWN = 120
dimension = st.integers(1, 40)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, strides and options of a call of linear."""
    return {
        "leading": draw(st.lists(st.integers(0, 4), max_size=3)),
        "n_inner": draw(st.integers(0, 40)),
        "n_cols": draw(dimension),
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "has_bias": draw(st.booleans()),
        "has_residual": draw(st.booleans()),
        "transposed_weight": draw(st.booleans()),
        "gaps": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def tensors_of(problem: dict[str, Any], device: str) -> list[torch.Tensor | None]:
    """x, weight, bias and residual, with gaps between x's elements where the problem says so."""
    torch.manual_seed(problem["seed"])
    leading, n_inner, n_cols = problem["leading"], problem["n_inner"], problem["n_cols"]
    x = torch.randn(*leading, 2 * n_inner if problem["gaps"] else n_inner, device=device)
    x = x[..., ::2] if problem["gaps"] else x
    weight = torch.randn(n_cols, n_inner, device=device)
    if problem["transposed_weight"]:
        weight = weight.T.contiguous().T
    bias = torch.randn(n_cols, device=device) if problem["has_bias"] else None
    residual = torch.randn(*leading, n_cols, device=device) if problem["has_residual"] else None
    return [x, weight, bias, residual]


@settings(
    max_examples=N_DRAWN,
    deadline=None,
    derandomize=True,  # the same problems in every run
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problem=problems())
def test_agrees_with_torch_on_drawn_problems(problem: dict[str, Any], device: str) -> None:
    given_tensors = tensors_of(problem, device)
    name = problem["activation"]

    def run(double: bool) -> list[torch.Tensor]:
        leaves = [
            None if t is None else (t.double() if double else t).detach().requires_grad_()
            for t in given_tensors
        ]
        x, weight, bias, residual = leaves
        assert x is not None
        assert weight is not None
        if double:
            y = TORCH[name](F.linear(x, weight, bias), *ACTIVATIONS[name].defaults)
            y = y if residual is None else y + residual
        else:
            y = GF.linear(x, weight, bias, activation=name, residual=residual)
        torch.manual_seed(1)
        dy = torch.randn(y.shape, device=device).to(y.dtype)
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [y, *torch.autograd.grad(y, wanted, dy)]

    with gpunn.trace() as trace:
        got = run(double=False)
    assert not trace.fallbacks
    assert got[0].numel() == 0 or "linear_forward" in {r.operator for r in trace.launches}
    for mine, exact in zip(got, run(double=True), strict=True):
        # a kink of the activation may fall between float32 and float64: none of these has one
        # where a random number is likely to be
        torch.testing.assert_close(mine, exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aligned", [True, False], ids=["by descriptor", "by pointer"])
@pytest.mark.parametrize("which", ["x", "weight", "residual", "dy"])
def test_offsets_past_two_to_the_31(which: str, aligned: bool, device: str) -> None:
    """Three rows, 2^30 elements apart: row times stride, kept in 32 bits, would overflow."""
    shapes = {"x": (3, 8), "weight": (3, 8), "residual": (3, 3), "dy": (3, 3)}
    tensors = {
        name: torch.randn(shape, device=device).half().requires_grad_()
        for name, shape in shapes.items()
    }
    far = far_apart(tensors[which].detach(), (2**30, 1), 0 if aligned else 1)

    def run(replaced: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = {**tensors, **replaced}
        y = GF.linear(given["x"], given["weight"], activation="gelu", residual=given["residual"])
        inputs = [given[name] for name in ("x", "weight", "residual")]
        return y, *torch.autograd.grad(y, inputs, given["dy"])

    near = run({})
    apart = run({which: far.detach().requires_grad_()})
    for a, b in zip(near, apart, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes 9 GB of a GPU's memory")
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    x[-4096:] = torch.randn(4096, device="cuda")
    assert torch.equal(GF.gelu(x)[-4096:], GF.gelu(x[-4096:].clone()))
    weight = torch.randn(2**16 + 16, 16, dtype=torch.bfloat16, device="cuda")
    rows = torch.randn(2**15 + 64, 16, dtype=torch.bfloat16, device="cuda")
    y = GF.linear(rows, weight, activation="relu")
    torch.testing.assert_close(y[-64:], GF.linear(rows[-64:], weight, activation="relu"))
