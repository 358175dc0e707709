"""Attention under PyTorch's modes, at its limits, and its configurations."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import gpunn
import gpunn.functional as GF
from gpunn.checks.comparison import any_algorithm
from gpunn.functional.attention_arguments import Given, Rules, composed
from gpunn.kernels import attention, attention_problem, launch
from gpunn.kernels.attention_tiles import (
    HOPPER,
    PARTIAL,
    SMALLEST,
    AttentionLaunch,
    Kind,
    Shape,
    launch_for,
)
from gpunn.kernels.launch import Device
from kit import launched
from test_convolution_memory import Nowhere, peak_on_cpu, peak_on_cuda

sdpa = GF.scaled_dot_product_attention


def operands(device: str, n: int = 3, shape: tuple[int, ...] = (2, 2, 9, 8)) -> list[torch.Tensor]:
    """query, key, value, all of one shape, which want gradients."""
    return [torch.randn(shape, device=device).requires_grad_() for _ in range(n)]


def agree(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(theirs)
    for mine, torchs in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True
    ):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)


def test_backward_twice_and_bit_identical(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several tiles of queries and keys, and a mask whose gradient is a sum of many."""
    monkeypatch.setattr(attention_problem, "launch_for", lambda shape, device: SMALLEST)
    tensors = [*operands(device, 3, (2, 2, 40, 8)), torch.randn(1, 40, device=device)]
    tensors[3].requires_grad_()
    before = [tensor.detach().clone() for tensor in tensors]
    y, dy = sdpa(*tensors), torch.randn(2, 2, 40, 8, device=device)  # type: ignore[arg-type]
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    again = torch.autograd.grad(y, tensors, dy)
    anew = torch.autograd.grad(sdpa(*tensors), tensors, dy)  # type: ignore[arg-type]
    for a, b, c in zip(first, again, anew, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), (0, 3), (3,)])
def test_only_what_is_wanted_is_computed(wanted: tuple[int, ...], device: str) -> None:
    """Keys and values have one kernel, queries and masks one each; that of queries finds delta."""
    leaves = [*operands(device), torch.randn(9, 9, device=device)]
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
    query, key, value, mask = leaves
    with gpunn.trace() as trace:
        y = sdpa(query, key, value, mask)
        got = torch.autograd.grad(y, [leaves[i] for i in wanted], dy := torch.randn_like(y))
    names = ("query_gradient", "key_gradients", "key_gradients", "mask_gradient")
    kernels = ["forward", "query_gradient", *sorted({names[i] for i in wanted})]
    launched_kernels = Counter(record.kernel for record in trace.launches)
    assert launched_kernels == Counter(f"attention_{name}_kernel" for name in kernels)
    with any_algorithm():
        theirs = F.scaled_dot_product_attention(query, key, value, mask)
        expected = torch.autograd.grad(theirs, [leaves[i] for i in wanted], dy)
    for mine, torchs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)


def test_without_gradients_nothing_is_kept(device: str) -> None:
    query, key, value = operands(device)
    with torch.no_grad(), gpunn.trace() as trace:
        y = sdpa(query, key, value)
    assert not y.requires_grad
    assert len(launched(trace, "attention_forward")) == 1
    rest = attention.attention_forward(
        False, query.half(), key.half(), value.half(), None, None, None, None, None, None, 9, 9,
        1.0, 0.0, 0.0, -1, -1, False,
    )[1]  # fmt: skip
    assert rest.numel() == 0


def test_one_tensor_as_query_key_and_value(device: str) -> None:
    (x,) = operands(device, 1)
    agree(sdpa(x, x, x), F.scaled_dot_product_attention(x, x, x), [x])
    (dx,) = torch.autograd.grad(sdpa(x, x, x).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).sum(), x)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_penalty(device: str) -> None:
    query, key, value = operands(device)
    results = []
    for function in (sdpa, lambda q, k, v: torch.softmax(q @ k.mT / 8**0.5, -1) @ v):
        (dx,) = torch.autograd.grad(
            function(query, key, value).pow(2).sum(), query, create_graph=True
        )
        results.append(torch.autograd.grad((dx.norm() - 1) ** 2, [query, key, value]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_autocast(device: str) -> None:
    query, key, value = operands(device)
    with torch.autocast(device, torch.bfloat16):
        y = sdpa(query, key, value)
        theirs = F.scaled_dot_product_attention(query, key, value)
    assert y.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(y, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "arguments", [{"is_causal": True}, {"softcap": 2.0, "window": (3, 3)}, {"dropout_p": 0.2}]
)
def test_compiles(arguments: dict[str, Any], device: str) -> None:
    torch._dynamo.reset()

    def function(query: Any, key: Any, value: Any) -> torch.Tensor:
        y: torch.Tensor = sdpa(query, key, value, **arguments) * 2
        return y

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (9, 11):
        tensors = operands(device, 3, (2, 2, length, 8))
        torch.manual_seed(1)
        ours = compiled(*tensors)
        torch.manual_seed(1)
        agree(ours, function(*tensors), tensors)


def test_the_layer_drops_in_training_alone(device: str) -> None:
    layer = gpunn.nn.ScaledDotProductAttention(dropout_p=0.5, is_causal=True, window=(3, 0))
    query, key, value = operands(device)
    assert (layer(query, key, value) != layer(query, key, value)).any()
    layer.eval()
    expected = sdpa(query, key, value, is_causal=True, window=(3, 0))
    assert torch.equal(layer(query, key, value), expected)
    assert "dropout_p=0.5, is_causal=True" in repr(layer)
    assert "window=(3, 0)" in repr(layer)


# --- limits ---


def test_rows_of_which_everything_is_ruled_out_give_zero(device: str) -> None:
    query, key, value = operands(device)
    for mask in (
        torch.full((9, 9), -math.inf, device=device),
        torch.zeros(9, 9, dtype=torch.bool, device=device),
    ):
        mask[4:] = mask[4:].logical_not() if mask.dtype == torch.bool else 0.0
        y = sdpa(query, key, value, mask)
        theirs = F.scaled_dot_product_attention(query, key, value, mask)
        assert not y[:, :, :4].any()
        agree(y, theirs, [query, key, value])


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e30, -1e9])
def test_a_row_of_equal_large_negative_biases_is_a_row_of_equal_weights(
    lowest: float, device: str
) -> None:
    """As masks made of the smallest number have them; 1 / n is not lost beside it."""
    query, key, value = operands(device)
    mask = torch.zeros(9, 9, device=device)
    mask[3] = lowest
    mask[5, 4:] = lowest
    mask.requires_grad_()
    y = sdpa(query, key, value, mask)
    theirs = F.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(y[:, :, 3], value.mean(2), rtol=1e-4, atol=1e-5)
    agree(y, theirs, [query, key, value, mask])


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores(size: float, device: str) -> None:
    """No overflow, and no NaN where torch has none."""
    query, key, value = operands(device)
    scale = size / float((query @ key.mT).detach().abs().max())
    y = sdpa(query, key, value, scale=scale)
    exact = torch.softmax(query.double() @ key.double().mT * scale, -1) @ value.double()
    assert y.isfinite().all()
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)
    for gradient in torch.autograd.grad(y.sum(), [query, key, value]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_nan_and_infinity_go_where_torchs_go(poison: float, position: int, device: str) -> None:
    tensors = [t.detach() for t in operands(device)]
    tensors[position][0, 1, 2, 3] = poison
    query, key, value = tensors
    expected = torch.softmax(query @ key.mT / 8**0.5, -1) @ value
    y = sdpa(query, key, value)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert y[1].isfinite().all()


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 2, 0, 8), (2, 2, 5, 8), (2, 2, 5, 8)],
        [(2, 2, 5, 8), (2, 2, 0, 8), (2, 2, 0, 8)],
        [(0, 2, 5, 8), (0, 2, 5, 8), (0, 2, 5, 8)],
        [(2, 2, 5, 0), (2, 2, 4, 0), (2, 2, 4, 8)],
        [(2, 2, 5, 8), (2, 2, 4, 8), (2, 2, 4, 0)],
    ],
)
def test_empty(shapes: list[tuple[int, ...]], device: str) -> None:
    tensors = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    query, key, value = tensors
    mask = torch.randn(query.shape[2], key.shape[2], device=device).requires_grad_()
    y = sdpa(query, key, value, mask)
    assert y.shape == (*query.shape[:3], value.shape[3])
    scale = query.shape[3] ** -0.5 if query.shape[3] else 1.0
    expected = torch.softmax(query @ key.mT * scale + mask, -1) @ value
    agree(y, expected, [*tensors, mask])


def test_heads_over_the_widest_are_torchs(device: str) -> None:
    query, key, value = operands(device, 3, (1, 1, 4, 264))
    with gpunn.backend("auto"), gpunn.trace() as trace:
        y = sdpa(query, key, value, window=(1, 1))
    assert [record.reason for record in trace.fallbacks] == [
        "no kernel for heads of size 264, over 256"
    ]
    keep = (torch.arange(4)[:, None] - torch.arange(4)).abs().to(device) <= 1
    agree(y, F.scaled_dot_product_attention(query, key, value, keep), [query, key, value])
    with pytest.raises(RuntimeError, match="heads of size 264"):
        sdpa(query, key, value)


def test_slopes_with_a_gradient_are_torchs(device: str) -> None:
    query, key, value = operands(device)
    slopes = torch.rand(2, device=device).requires_grad_()
    with gpunn.backend("auto"), gpunn.trace() as trace:
        y = sdpa(query, key, value, alibi_slopes=slopes)
    assert "a gradient for alibi_slopes" in trace.fallbacks[0].reason
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs().to(device)
    bias = -slopes[:, None, None] * distance
    agree(y, F.scaled_dot_product_attention(query, key, value, bias), [query, value, slopes])


def test_auto_leaves_plain_halves_to_torch(device: str) -> None:
    query, key, value = (t.detach().bfloat16() for t in operands(device))
    with gpunn.backend("auto"), gpunn.trace() as trace:
        sdpa(query, key, value, is_causal=True)
        sdpa(query, key, value, window=(2, 2))
        sdpa(query.float(), key.float(), value.float())
    assert [r.reason for r in trace.fallbacks] == ["16 bits, no mask: PyTorch's fused attention"]
    assert [r.operator for r in trace.launches] == ["attention_forward"] * 2


def test_by_torch_every_option_is_the_kernels(device: str) -> None:
    """What runs on a CPU without the interpreter gives the same numbers."""
    query, key, value = operands(device)
    arguments: dict[str, Any] = dict(
        window=(4, 2), softcap=2.0, alibi_slopes=torch.rand(2, device=device), return_lse=True
    )
    ours = sdpa(query, key, value, **arguments)
    with gpunn.backend("torch"):
        theirs = sdpa(query, key, value, **arguments)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
    agree(ours[0], theirs[0], [query, key, value])
    rules = Rules(1.0, 0.0, 0.5, -1, -1, False)
    query, key, value = (t.detach() for t in (query, key, value))
    given = Given(query, key, value, None, None, None, None, None, 9, 9)
    dropped = composed(given, rules, None)
    assert (dropped != composed(given, rules, None)).any()


def test_floating_point_operations_are_counted(device: str) -> None:
    """As torch counts its own: two products forward, five backward."""
    query, key, value = operands(device)
    with FlopCounterMode(display=False) as counter:
        sdpa(query, key, value).sum().backward()
    one = 2 * 2 * 2 * 9 * 9 * 8
    assert counter.get_total_flops() == 7 * one


def test_memory_is_linear_in_the_length(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of keys, a window and a dropout make nothing of the size of the pairs."""
    torch.use_deterministic_algorithms(False)  # or filling what is new would take memory of its own

    def peak(length: int) -> int:
        query, key, value = (
            torch.randn(1, 2, length, 64, device=device).bfloat16().requires_grad_()
            for _ in range(3)
        )
        mask = torch.randn(1, 1, 1, length, device=device).bfloat16().requires_grad_()
        inputs = [query, key, value, mask]
        dy = torch.randn_like(query)

        def run() -> object:
            y = sdpa(query, key, value, mask, dropout_p=0.1, window=(100, 100))
            return y, torch.autograd.grad(y, inputs, dy)

        return peak_on_cuda(run) if device == "cuda" else peak_on_cpu(run)

    if device == "cpu":
        monkeypatch.setattr(launch, "_capture", (launch.Device(90, 132), Nowhere()))
    short, long = peak(4096), peak(16384)
    assert long < 4.1 * short
    # y, its rest and four gradients; three float32 numbers a row; and next to nothing else
    row = 2 * 64 * 2 * (2 + 3) + 2 * 4 * 3 + 2
    assert long <= 1.02 * 16384 * row


@pytest.mark.parametrize("kind", ["causal", "window", "booleans", "added"])
def test_tiles_that_are_ruled_out_are_skipped(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward: NaN in what they would read does not show."""
    monkeypatch.setattr(attention_problem, "launch_for", lambda shape, device: SMALLEST)
    (query,), (key, value) = operands(device, 1, (1, 1, 48, 8)), operands(device, 2, (1, 1, 64, 8))
    with torch.no_grad():
        key[:, :, 48:] = math.nan
        value[:, :, 48:] = math.nan
    mask = torch.zeros(48, 64, device=device)
    mask[:, 48:] = -math.inf
    mask.requires_grad_(kind == "added")
    ways: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "window": {"window": (9, 0)},
        "booleans": {"attn_mask": mask == 0},
        "added": {"attn_mask": mask},
    }
    y = sdpa(query, key, value, **ways[kind])
    assert y.isfinite().all()
    wanted = [query, mask] if kind == "added" else [query]
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), wanted))


# --- configurations ---


def test_what_does_not_fit_gets_smaller_tiles() -> None:
    shape = Shape("forward", (128, 128), torch.bfloat16, "ieee", 0)
    assert launch_for(shape, Device(90, 132)) == AttentionLaunch(8, 3, 128, 128)
    small = launch_for(shape, Device(89, 100, 101376))
    assert small.block_queries <= 64
    assert launch_for(shape, Device(89, 100, 1024)) == SMALLEST


@pytest.mark.parametrize("kind", ["forward", "key_gradients", "query_gradient", "mask_gradient"])
@pytest.mark.parametrize("precision", ["16 bits", "tf32", "ieee"])
def test_every_size_of_heads_has_tiles(kind: Kind, precision: str) -> None:
    dtype = torch.float16 if precision == "16 bits" else torch.float32
    for widest, column in ((1, 64), (64, 64), (65, 128), (128, 128), (200, 256), (256, 256)):
        key = precision, column, kind
        light, heavy = HOPPER[key]
        tiles: tuple[AttentionLaunch, ...] = light, light, heavy
        if widest != column:
            tiles = PARTIAL[90].get(key, tiles)
        for options in range(3):
            shape = Shape(kind, (widest, widest), dtype, precision, options)
            assert launch_for(shape, Device(90, 132)) == tiles[options]


def test_slopes_take_the_registers_that_masks_of_columns_leave() -> None:
    whole, *others = PARTIAL[90]["16 bits", 128, "forward"]
    for heads, expected in (((128, 128), whole), ((72, 72), others[0]), ((128, 72), others[0])):
        shape = Shape("forward", heads, torch.bfloat16, "ieee", 1)
        assert launch_for(shape, Device(90, 132)) == expected
        assert launch_for(replace(shape, options=0), Device(90, 132)) == whole
