"""Embedding and PositionalEncoding, sinusoidal_encoding, what torch computes, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from gpunn.profiling.embedding_cases import Lookup
from gpunn.reference import embedding as reference
from kit import as_numpy, launched


def test_what_is_left_to_torch_and_why(device: str) -> None:
    indices, weight = torch.tensor([1, 1, 0], device=device), torch.randn(4, 3, device=device)
    table = torch.randn(3, 3, device=device)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("max_norm changes the weight", {"max_norm": 1.0}),
        ("a sparse gradient", {"sparse": True}),
        ("a gradient that is scaled by frequency", {"scale_grad_by_freq": True}),
    ]
    for reason, options in cases:
        leaf, torchs = (weight.clone().requires_grad_() for _ in range(2))
        with gpunn.backend("auto"), gpunn.trace() as trace:
            y = GF.embedding(indices, leaf, scale=2.0, positional=table, **options)
        assert [r.reason for r in trace.fallbacks] == [reason]
        expected = F.embedding(indices, torchs, **options) * 2.0 + table
        torch.testing.assert_close(y, expected)
        gradients = [torch.autograd.grad(v.sum(), t)[0] for v, t in ((y, leaf), (expected, torchs))]
        assert torch.equal(gradients[0].to_dense(), gradients[1].to_dense())
        with pytest.raises(RuntimeError, match="backend"):
            GF.embedding(indices, leaf, **options)
    weight.requires_grad_()
    with torch.no_grad(), gpunn.trace() as trace:
        GF.embedding(indices, weight, sparse=True, scale_grad_by_freq=True)
    launched(trace, "embedding_forward")
    with gpunn.backend("torch"):
        positions = torch.tensor([2, 2, 0], device=device)
        y = GF.embedding(indices, weight, positional=table, positions=positions, dropout_p=1.0)
        assert not y.any()
        y = GF.embedding(indices, weight, positional=table, positions=positions)
        torch.testing.assert_close(y, weight[indices] + table[positions])


def test_the_layer(device: str) -> None:
    indices = torch.tensor([[1, 0, 2]], device=device)
    learned = torch.nn.Parameter(torch.randn(4, 6))
    layer = gpunn.nn.Embedding(5, 6, 0, scale=2.0, positional=learned, dropout_p=0.5).to(device)
    assert list(layer.state_dict()) == ["weight", "positional"]
    assert (layer(indices) == 0).any()
    expected = F.embedding(indices, layer.weight) * 2.0 + learned.to(device)[:3]
    torch.testing.assert_close(layer.eval()(indices), expected)
    torch.testing.assert_close(
        layer(indices, torch.ones(3, 6, device=device), torch.tensor([2, 0, 1], device=device)),
        F.embedding(indices, layer.weight) * 2.0 + 1,
    )
    assert repr(layer) == (
        "Embedding(5, 6, padding_idx=0, scale=2.0, dropout_p=0.5, positional=(4, 6))"
    )
    weight, table = torch.randn(5, 6), GF.sinusoidal_encoding(7, 6)
    pretrained = gpunn.nn.Embedding.from_pretrained(weight, scale=3.0, positional=table).to(device)
    assert list(pretrained.state_dict()) == ["weight"]
    assert not pretrained.weight.requires_grad
    expected = (weight * 3)[indices.cpu()] + table[:3]
    torch.testing.assert_close(pretrained(indices).cpu(), expected)
    with pytest.raises(ValueError, match="dropout_p"):
        gpunn.nn.Embedding(3, 2, dropout_p=2.0)
    with pytest.raises(ValueError, match="positional"):
        gpunn.nn.Embedding(3, 2, positional=torch.ones(4, 3))


def test_layers_are_replaced_and_restored_where_nothing_is_fused(device: str) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 6, padding_idx=2)).to(device)
    indices = torch.tensor([1, 2], device=device)
    expected = model(indices)
    gpunn.accelerate(model)
    assert type(model[0]) is gpunn.nn.Embedding
    with gpunn.trace() as trace:
        assert torch.equal(model(indices), expected)
    launched(trace, "embedding_forward")
    assert repr(model[0]) == "Embedding(5, 6, padding_idx=2)"
    assert "0" in gpunn.restore(model).replaced
    for fused in ({"scale": 2.0}, {"positional": torch.ones(3, 6)}, {"dropout_p": 0.1}):
        layer: Any = gpunn.nn.Embedding(5, 6, **fused)
        assert "its fused parts" in gpunn.restore(torch.nn.Sequential(layer)).kept["0"]


@pytest.mark.parametrize("width", [1, 7, 8])
def test_sinusoidal_encoding(width: int, device: str) -> None:
    exact = reference.sinusoidal_encoding(40, width)
    table = GF.sinusoidal_encoding(40, width, device=device)
    assert table.is_contiguous()
    np.testing.assert_allclose(as_numpy(table), exact, atol=1e-7)
    assert GF.sinusoidal_encoding(3, width, dtype=torch.float16).dtype == torch.float16
    other = GF.sinusoidal_encoding(40, width, base=100.0, dtype=torch.float64)
    np.testing.assert_allclose(
        other.numpy(), reference.sinusoidal_encoding(40, width, 100.0), atol=1e-14
    )
    for length, columns in ((-1, 4), (3, 0)):
        with pytest.raises(ValueError, match="length, d_model"):
            GF.sinusoidal_encoding(length, columns)


def test_positional_encoding(device: str) -> None:
    layer = gpunn.nn.PositionalEncoding(6, dropout_p=0.5, max_len=9).to(device)
    assert not layer.state_dict()
    x = torch.randn(2, 4, 6, device=device)
    exact = torch.from_numpy(reference.sinusoidal_encoding(4, 6)).to(device, torch.float32)
    assert (layer(x) == 0).any()
    torch.testing.assert_close(layer.eval()(x), x + exact)
    assert repr(layer) == "PositionalEncoding(6, dropout_p=0.5, max_len=9)"
    with torch.device("meta"):
        empty = gpunn.nn.PositionalEncoding(6, max_len=9, base=100.0)
    filled = empty.to_empty(device=device).table
    assert torch.equal(filled, GF.sinusoidal_encoding(9, 6, base=100.0, device=device))
    for wrong in (torch.ones(2, 10, 6, device=device), torch.ones(2, 4, 5, device=device)):
        with pytest.raises(RuntimeError, match="input"):
            layer(wrong)
    with pytest.raises(ValueError, match="dropout_p"):
        gpunn.nn.PositionalEncoding(6, dropout_p=-0.1)


def test_the_cases_count_the_rows_that_are_looked_up(device: str) -> None:
    """As many as are among a thousand tokens drawn, about."""
    lookup = Lookup("embedding", 10, 100, 500, 8)
    tokens, weight = lookup.make(torch.device(device), torch.bfloat16, 0)
    counted = lookup.bytes() - tokens.nbytes - 2 * tokens.numel() * 8
    assert abs(counted / (2 * 8) - tokens.unique().numel()) < 0.1 * tokens.unique().numel()
    backward = replace(lookup, mode="backward")
    dy = backward.make(torch.device(device), torch.bfloat16, 0)[-1]
    assert backward.bytes() == tokens.nbytes + dy.nbytes + weight.nbytes


TOKENS, W = torch.tensor([[0, 1]]), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((TOKENS, W[0]), {}, RuntimeError, "weight"),
        ((TOKENS.float(), W), {}, RuntimeError, "input"),
        ((TOKENS.short(), W), {}, RuntimeError, "input"),
        ((TOKENS.to("meta"), W), {}, RuntimeError, "input"),
        ((TOKENS, W, 3), {}, AssertionError, "padding_idx"),
        ((TOKENS, W, -4), {}, AssertionError, "padding_idx"),
        ((TOKENS, W), {"positional": W[:1]}, RuntimeError, "positional"),
        ((TOKENS, W), {"positional": W[:, :3]}, RuntimeError, "positional"),
        ((TOKENS, W), {"positional": W[None]}, RuntimeError, "positional"),
        ((TOKENS[0, 0], W), {"positional": W}, RuntimeError, "positional"),
        ((TOKENS, W), {"positional": W.to("meta")}, RuntimeError, "positional"),
        ((TOKENS, W), {"positional": W, "positions": TOKENS.float()}, RuntimeError, "positions"),
        ((TOKENS, W), {"positional": W, "positions": TOKENS[None]}, RuntimeError, "positions"),
        ((TOKENS, W), {"positions": TOKENS}, ValueError, "positions"),
        ((TOKENS, W), {"scale": "2"}, TypeError, "scale"),
        ((TOKENS, W), {"dropout_p": 1.5}, ValueError, "dropout_p"),
        ((TOKENS, W), {"positional": [1.0]}, TypeError, "positional"),
        (([1], W), {}, TypeError, "input"),
        ((TOKENS, [1.0]), {}, TypeError, "weight"),
    ],
)
def test_refuses(
    arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with gpunn.trace() as trace, pytest.raises(error, match=f"^{message}"):
        GF.embedding(*arguments, **keywords)
    assert not trace.launches
