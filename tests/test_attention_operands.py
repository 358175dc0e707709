"""Attention that reads by descriptors, in whole tiles and others; and what is read by pointers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.kernels import attention, attention_operands, attention_problem
from gpunn.kernels.attention_operands import (
    head_block,
    operand,
    read_by_descriptor,
    takes_descriptor,
    unit_of,
)
from gpunn.kernels.attention_tiles import AttentionLaunch
from gpunn.kernels.launch import Device, captured
from kit import as_numpy, launched

H100 = Device(90, 132)
SMALL = AttentionLaunch(4, 2, 16, 32)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Any size is worth a descriptor, tiles are small; and which operands were descriptors."""
    found: list[bool] = []

    def noted(tensor: torch.Tensor, block_rows: int, by_descriptor: bool) -> Any:
        found.append(by_descriptor)
        return operand(tensor, block_rows, by_descriptor)

    monkeypatch.setattr(attention_operands, "LEAST_FLOPS", 0)
    monkeypatch.setattr(attention_problem, "launch_for", lambda shape, device: SMALL)
    for module in (attention, attention_problem):
        monkeypatch.setattr(module, "operand", noted)
    return found


def made(shape: tuple[int, ...], layout: str, device: str) -> torch.Tensor:
    """A random (batch, heads, rows, columns): contiguous, in torch's order of layers, or padded."""
    batch, heads, n_rows, n_cols = shape
    if layout == "layers":
        return torch.randn(batch, n_rows, heads, n_cols).to(device).bfloat16().transpose(1, 2)
    padded = n_cols + (8 if layout == "padded" else 0)
    return torch.randn(batch, heads, n_rows, padded).to(device).bfloat16()[..., :n_cols]


@pytest.mark.parametrize("layout", ["contiguous", "layers", "padded"])
@pytest.mark.parametrize(
    ("lengths", "heads", "sizes", "causal"),
    [
        # tiles all whole, some across the diagonal; several rows of tiles
        ((64, 96), (2, 2), (16, 16), True),
        # the last tiles reach past the end, and more columns than a head has; query heads share
        ((41, 70), (4, 2), (24, 40), True),
        ((70, 41), (2, 1), (16, 24), False),
    ],
)
def test_descriptors(
    lengths: tuple[int, int],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    causal: bool,
    layout: str,
    device: str,
    read: list[bool],
) -> None:
    (n, m), (h, g), (e, f) = lengths, heads, sizes
    shapes = [(2, h, n, e), (2, g, m, e), (2, g, m, f), (2, h, n, f)]
    *tensors, dy = (made(shape, layout, device) for shape in shapes)
    results: list[list[torch.Tensor]] = []
    functions: list[tuple[Any, torch.dtype]] = [
        (GF.scaled_dot_product_attention, torch.bfloat16),
        (F.scaled_dot_product_attention, torch.float64),
        (F.scaled_dot_product_attention, torch.bfloat16),
    ]
    for function, dtype in functions:
        leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in tensors]
        with gpunn.backend("kernels"), gpunn.trace() as trace:
            y = function(*leaves, is_causal=causal, enable_gqa=h > g)
            results.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
        if not results[1:]:
            launched(trace, "attention_forward", "attention_backward")
    assert len(read) == 11
    assert all(read)
    for got, exact, baseline in zip(*results, strict=True):
        assert_accurate(got, as_numpy(exact.detach()), baseline)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 0.3])
def test_scales_of_any_sign(scale: float, device: str) -> None:
    """The largest product has the smallest score where the scale is negative.

    By the definition, since torch's own causal attention gives NaN on a CPU for scales up to 0.
    """
    tensors = [torch.randn(1, 2, 40, 16, device=device) for _ in range(4)]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    wide = [tensor.double().requires_grad_() for tensor in tensors[:3]]
    query, key, value = leaves
    y = GF.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    later = torch.ones(40, 40, device=device).triu(1).bool()
    scores = (wide[0] @ wide[1].mT * scale).masked_fill(later, -math.inf)
    exact = scores.softmax(-1) @ wide[2]
    mine = [y, *torch.autograd.grad(y, leaves, tensors[3])]
    theirs = [exact, *torch.autograd.grad(exact, wide, tensors[3].double())]
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_what_a_descriptor_is_made_of() -> None:
    memory = torch.zeros(2**14).bfloat16()
    shape = (2, 3, 16, 24)

    def viewed(*strides: int, at: int = 0, shape: tuple[int, ...] = shape) -> bool:
        return takes_descriptor(memory.as_strided(shape, strides, at))

    first = memory.data_ptr() % 16 // 2
    assert first == 0
    assert viewed(1152, 384, 24, 1)
    assert viewed(1152, 24, 72, 1)
    assert viewed(1152, 384, 24, 1, at=8)
    assert not viewed(1152, 384, 24, 1, at=4), "16 bytes are the least alignment"
    assert not viewed(1152, 384, 25, 1)
    assert not viewed(1152, 384, 24, 2)
    assert not viewed(1152, 0, 24, 1), "a head that is repeated"
    assert viewed(5, 7, 24, 1, shape=(1, 1, 16, 24)), "strides that are never used"
    assert not viewed(24, 24, 24, 1, shape=(1, 1, 0, 24))


def test_what_is_loaded_together() -> None:
    def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    assert unit_of(rows(2, 3, 5, 72), rows(2, 3, 7, 40)) == 8
    assert unit_of(rows(2, 3, 5, 72), rows(2, 3, 7, 64)) == 8
    assert unit_of(rows(2, 3, 5, 64), rows(2, 3, 7, 16)) == 1, "left to Triton"
    assert unit_of(rows(2, 3, 5, 72), rows(2, 3, 7, 36)) == 4
    assert unit_of(rows(2, 3, 5, 73)[..., :72]) == 1
    assert unit_of(rows(2, 5, 3, 24).transpose(1, 2)) == 8
    assert unit_of(rows(2, 3, 5, 36, dtype=torch.float32)) == 4
    assert unit_of(rows(2, 3, 5, 38, dtype=torch.float32)) == 2


def test_what_is_read_by_descriptors() -> None:
    q, least = torch.zeros(1, 1, 16, 16).bfloat16(), attention_operands.LEAST_FLOPS
    assert read_by_descriptor((q, q), least, H100)
    assert not read_by_descriptor((q, q), least - 1, H100)
    assert not read_by_descriptor((q, q), least, Device(80, 108))
    assert not read_by_descriptor((q, q), least, Device(100, 148))
    assert not read_by_descriptor((q, q.float()), least, H100)
    assert not read_by_descriptor((q, q[..., ::2]), least, H100)


@pytest.mark.parametrize("kind", ["mask", "packed"])
def test_what_a_descriptor_cannot_do(kind: str, device: str, read: list[bool]) -> None:
    """Rows past the end of a packed sequence must be zeros; a mask's tiles may be passed over."""
    if kind == "mask":
        q = torch.randn(1, 2, 16, 16, device=device).bfloat16()
        GF.scaled_dot_product_attention(q, q, q, torch.ones(16, 16, device=device).bool())
    else:
        q = torch.randn(16, 2, 16, device=device).bfloat16()
        starts = torch.tensor([0, 5, 16], dtype=torch.int32, device=device)
        with gpunn.backend("kernels"):
            GF.attention_varlen(q, q, q, starts, starts, 11, 11)
    assert read == [False] * 3


def test_narrow_heads_of_16_bits_have_wide_tiles() -> None:
    """In tiles of 16 a GPU computed wrong values of 7 and 8 columns; the interpreter does not."""
    halves, singles = torch.bfloat16, torch.float32
    assert [head_block(n, halves) for n in (1, 7, 15, 16, 17, 40)] == [64, 64, 64, 16, 32, 64]
    assert [head_block(n, singles) for n in (1, 7, 15, 16, 17, 40)] == [16, 16, 16, 16, 32, 64]
    query, key = (torch.empty(1, 1, 8, 40, dtype=halves, device="meta") for _ in range(2))
    value = torch.empty(1, 1, 8, 7, dtype=halves, device="meta")
    with captured(H100) as calls:
        GF.scaled_dot_product_attention(query, key, value)
    assert [(c.keywords["BLOCK_HEAD"], c.keywords["BLOCK_HEAD_V"]) for c in calls] == [(64, 64)]
