"""Attention's masks: additive and boolean, of fewer dimensions, repeated in any pattern."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import gpunn.functional as GF
from gpunn.kernels import launch
from kit import each_dtype
from test_attention import assert_right, gradients_of, operands
from test_convolution_memory import Nowhere, peak_on_cpu, peak_on_cuda

sdpa: Any = GF.scaled_dot_product_attention

MASKS = {
    "whole": (2, 2, 37, 21),
    "a matrix": (37, 21),
    "of heads": (2, 37, 21),
    "of keys": (2, 1, 1, 21),
    "of keys alone": (1, 21),
}


@each_dtype
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS.keys())
def test_additive_masks(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    tensors = operands(device, dtype)
    assert_right(tensors, torch.randn(shape).to(device, dtype))


@pytest.mark.parametrize("shape", [(1, 2, 37, 1), (2, 1, 1), (1, 1)])
def test_a_mask_that_adds_the_same_to_a_row_changes_nothing(
    shape: tuple[int, ...], device: str
) -> None:
    query, key, value, dy = operands(device)
    mask = torch.randn(shape, device=device).requires_grad_()
    y = GF.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(y, GF.scaled_dot_product_attention(query, key, value))
    (dmask,) = torch.autograd.grad(y, mask, dy)
    assert dmask.shape == shape
    assert dmask.abs().max() < 1e-4


@each_dtype
def test_a_mask_in_float32_for_queries_of_any_type(dtype: torch.dtype, device: str) -> None:
    mask = torch.randn(2, 37, 21, device=device)
    assert_right(operands(device, dtype), mask)


@each_dtype
@pytest.mark.parametrize("shape", [(2, 2, 37, 21), (37, 21), (2, 1, 1, 21)])
def test_boolean_masks(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """True keeps; some rows keep nothing."""
    mask = (torch.rand(shape) < 0.4).to(device)
    if len(shape) == 2:
        mask[3] = False
    assert_right(operands(device, dtype), mask)


# Of masks over batches (2, 3, 2), heads 2, queries 5 and keys 7.
REPEATED = [
    (2, 1, 2, 1, 5, 7),
    (1, 3, 1, 2, 1, 7),
    (2, 3, 1, 1, 5, 1),
    (3, 2, 2, 5, 7),
    (1, 2, 1, 1, 7),
]


@pytest.mark.parametrize("shape", REPEATED, ids=str)
def test_masks_repeated_along_some_batches(shape: tuple[int, ...], device: str) -> None:
    """In any pattern, with the gradient, the probabilities, and once more differentiated."""
    tensors: Any = [torch.randn(2, 3, 2, 2, n, 8, device=device) for n in (5, 7, 7)]
    query, key, _value = tensors
    mask, dy = torch.randn(shape, device=device), torch.randn(2, 3, 2, 2, 5, 8, device=device)

    def definition(q: Any, k: Any, v: Any, m: Any) -> Any:
        return torch.softmax(q @ k.mT / 8**0.5 + m, -1) @ v

    defined: Any = definition
    ours = gradients_of(sdpa, tensors, mask, dy)
    theirs = gradients_of(definition, tensors, mask, dy)
    keep = mask > -0.5
    ours += [sdpa(*tensors, keep)]
    theirs += [defined(*tensors, torch.zeros_like(mask).masked_fill(~keep, -math.inf))]
    ours += [GF.attention_weights(query, key, attn_mask=mask)]
    theirs += [torch.softmax(query @ key.mT / 8**0.5 + mask, -1)]
    for function, found in ((sdpa, ours), (defined, theirs)):
        leaf = mask.clone().requires_grad_()
        y = function(*tensors, leaf)
        (dmask,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
        found += torch.autograd.grad(dmask.square().sum(), leaf)
    for mine, torchs in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torchs.nan_to_num(), rtol=1e-4, atol=1e-5)


def test_no_mask_is_copied_along_what_it_is_repeated_along(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.use_deterministic_algorithms(False)  # or filling what is new would take memory of its own
    tensors: Any = [
        torch.randn(2, 8, 2, 1, 512, 1, device=device).requires_grad_() for _ in range(3)
    ]
    mask = torch.randn(2, 1, 2, 1, 512, 512, device=device).requires_grad_()
    dy = torch.randn_like(tensors[0])

    def run() -> object:
        y = sdpa(*tensors, mask)
        return y, torch.autograd.grad(y, [*tensors, mask], dy)

    if device == "cpu":
        monkeypatch.setattr(launch, "_capture", (launch.Device(90, 132), Nowhere()))
    peak = peak_on_cuda(run) if device == "cuda" else peak_on_cpu(run)
    assert mask.nbytes <= peak < 1.2 * mask.nbytes  # the gradient's, and little else
