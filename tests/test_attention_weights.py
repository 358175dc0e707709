"""The probabilities of attention, and their gradients, which PyTorch's operations compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from kit import as_numpy, each_dtype, launched


@each_dtype
def test_weights_are_what_values_are_multiplied_by(dtype: torch.dtype, device: str) -> None:
    query, key = (torch.randn(2, 4, n, 8).to(device, dtype) for n in (19, 70))
    with gpunn.trace() as trace:
        weights = GF.attention_weights(query, key, is_causal=True)
    launched(trace, "attention_weights")
    identity = torch.eye(70, device=device, dtype=dtype).expand(2, 4, 70, 70)
    y = F.scaled_dot_product_attention(query, key, identity, is_causal=True)
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), identity.double(), is_causal=True
    )
    assert_accurate(weights, as_numpy(exact), y)


def test_weights_of_chosen_heads(device: str) -> None:
    query, key = (torch.randn(4, n, 8, device=device) for n in (5, 7))
    every = GF.attention_weights(query, key)
    assert torch.equal(GF.attention_weights(query, key, heads=[3, -4]), every[[3, 0]])


@pytest.mark.parametrize("heads", [None, [2, 0, 2]])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_of_weights(softcap: float | None, heads: list[int] | None, device: str) -> None:
    """By PyTorch's operations, once and twice: of query, of keys that heads share, of the mask."""
    query, key = torch.randn(4, 5, 8, device=device), torch.randn(2, 7, 8, device=device)
    mask = torch.randn(5, 7, device=device)
    inputs = [tensor.requires_grad_() for tensor in (query, key, mask)]
    call = {"attn_mask": mask, "heads": heads, "softcap": softcap, "enable_gqa": True}
    with gpunn.trace() as trace:
        weights = GF.attention_weights(query, key, **call)  # type: ignore[arg-type]
        launched(trace, "attention_weights")
        dweights = torch.randn_like(weights)
        got = torch.autograd.grad(weights, inputs, dweights, retain_graph=True)
    assert [fallback.reason for fallback in trace.fallbacks] == ["a gradient: PyTorch's operations"]
    twice = torch.autograd.grad(weights, inputs, dweights, create_graph=True)
    s = query @ key.repeat_interleave(2, 0).mT / 8**0.5
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    expected = torch.softmax(s + mask, -1)[slice(None) if heads is None else heads]
    theirs = torch.autograd.grad(expected, inputs, dweights, create_graph=True)
    penalties = [torch.autograd.grad(each[0].pow(2).sum(), inputs) for each in (twice, theirs)]
    for mine, torchs in zip(
        (weights, *got, *twice, *penalties[0]), (expected, *theirs, *theirs, *penalties[1]),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 1, 5, 7), (1, 3, 4, 1, 7)])
def test_gradient_of_a_mask_that_some_batches_share(shape: Any, device: str) -> None:
    """Those along one of two dimensions of batches: a table says which batch has which mask."""
    query, key = (torch.randn(2, 3, 4, n, 8, device=device) for n in (5, 7))
    mask = torch.randn(shape, device=device).requires_grad_()
    weights = GF.attention_weights(query, key, attn_mask=mask)
    expected = torch.softmax(query @ key.mT / 8**0.5 + mask, -1)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    dweights = torch.randn_like(weights)
    gradients = [torch.autograd.grad(each, mask, dweights)[0] for each in (weights, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_weights_refuse(device: str) -> None:
    query, key = (torch.randn(4, n, 8, device=device) for n in (5, 7))
    with pytest.raises(IndexError, match="heads: expected numbers below 4, got 4"):
        GF.attention_weights(query, key, heads=[4])
    with pytest.raises(RuntimeError, match="lse: expected shape"):
        GF.attention_weights(query, key, torch.zeros(4, 6, device=device))
