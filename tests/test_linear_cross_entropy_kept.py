"""linear_cross_entropy that keeps its logits: the same numbers, of three products, not of four."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gpunn
import gpunn.functional as GF
from gpunn.models import gpt
from kit import each_dtype
from small_gpt import small_gpt, tokens_for
from test_linear_cross_entropy import layer_of, with_gradients

N_ROWS, N_FEATURES, N_CLASSES = 7, 12, 37


def problem(dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x, W and b, and the classes of rows: three chunks of 16, the last of which is not full."""
    target = torch.tensor([0, 15, 16, 31, 32, 36, 4], device=device)
    return layer_of(N_ROWS, N_FEATURES, N_CLASSES, dtype, device), target


@each_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bit_for_bit(smoothing: float, dtype: torch.dtype, device: str) -> None:
    layer, target = problem(dtype, device)
    arguments: Any = dict(
        weight=torch.rand(N_CLASSES, device=device).to(dtype), label_smoothing=smoothing,
        ignore_index=4, chunk_size=16,
    )  # fmt: skip
    found, launches = [], []
    for keep in (False, True):
        arguments["keep_logits"] = keep
        with gpunn.trace() as trace:
            found.append(with_gradients(GF.linear_cross_entropy, layer, None, target, **arguments))
        launches.append([r.operator for r in trace.launches])
    assert len(found[0]) == 4
    for computed, kept in zip(*found, strict=True):
        assert torch.equal(computed, kept)
        assert kept.abs().max() > 1e-3
    backward = [ran.count("linear_cross_entropy_backward") for ran in launches]
    assert backward[0] == backward[1] + 3, "a product a chunk"


def test_a_second_backward_pass_finds_the_logits(device: str) -> None:
    layer, target = problem(torch.float32, device)
    leaves = x, weight, bias = [t.requires_grad_() for t in layer]
    loss = GF.linear_cross_entropy(
        x, weight, target, linear_bias=bias, chunk_size=16, keep_logits=True
    )
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(("keep", "products"), [(True, 3), (False, 4)])
def test_floating_point_operations_are_counted(keep: bool, products: int, device: str) -> None:
    layer, target = problem(torch.float32, device)
    with FlopCounterMode(display=False) as counter:
        with_gradients(
            GF.linear_cross_entropy, layer, None, target, chunk_size=16, keep_logits=keep
        )
    assert counter.get_total_flops() == products * 2 * N_ROWS * N_FEATURES * N_CLASSES


def test_nothing_is_kept_that_has_no_backward_pass(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("gpunn.functional.linear_cross_entropy")
    forward, kept = module.linear_cross_entropy_forward, []

    def noted(*given: Any) -> Any:
        found = forward(*given)
        kept.append(found[-1].numel())
        return found

    monkeypatch.setattr(module, "linear_cross_entropy_forward", noted)
    (x, weight, _), target = problem(torch.float32, device)
    for needed in (False, True):
        x = x.detach().requires_grad_(needed)
        GF.linear_cross_entropy(x, weight, target, chunk_size=16, keep_logits=True)
    assert kept == [0, N_ROWS * N_CLASSES]


def test_gpt_keeps_logits_that_are_not_too_many(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = importlib.import_module("gpunn.kernels.linear_cross_entropy")
    monkeypatch.setattr(chunks, "MOST_LOGITS", 0)
    monkeypatch.setattr(chunks, "LEAST_CLASSES", 9)
    model = small_gpt(device)
    tokens, targets = tokens_for(model, 2, 7), tokens_for(model, 2, 7)
    n_logits, found, flops = 2 * 7 * model.wte.num_embeddings, [], []
    for most in (n_logits, n_logits - 1):
        monkeypatch.setattr(gpt, "MOST_KEPT", most)
        with FlopCounterMode(display=False) as counter:
            loss = model(tokens, targets)
            model.zero_grad()
            loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
        flops.append(counter.get_total_flops())
    assert all(map(torch.equal, *found))
    assert flops[1] - flops[0] == 2 * n_logits * model.wte.embedding_dim
