"""Generation: decoding from a cache gives what all tokens anew give; drawing the next one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gpunn
from gpunn import models
from gpunn.kernels.launch import Backend
from gpunn.models.generation import KeyValueCache, next_probabilities, sample
from kit import launched
from small_gpt import small_gpt, tokens_for


def uncached(model: models.GPT, prompt: Tensor, n_tokens: int) -> Tensor:
    """The likeliest tokens, all computed anew for each."""
    tokens = prompt
    for _ in range(n_tokens):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("choice", ["torch", "kernels"])
def test_cached_decoding_is_the_uncached(choice: Backend, device: str) -> None:
    """Logits and tokens, for prompts of one and of several tokens, up to the last position."""
    model = small_gpt(device).eval()
    for length in (1, 10):
        prompt, n_tokens = tokens_for(model, 2, length), 2
        with gpunn.backend("torch"), torch.no_grad():
            expected = uncached(model, prompt, n_tokens)
            logits = model(expected)
            assert torch.equal(model.generate(prompt, n_tokens, temperature=0), expected)
        with gpunn.backend(choice), gpunn.trace() as trace, torch.no_grad():
            cache = KeyValueCache(length + n_tokens)
            for start, end in ((0, length), *((i, i + 1) for i in range(length, length + 2))):
                got = model.next_logits(expected[:, start:end], cache)
                torch.testing.assert_close(got, logits[:, end - 1], rtol=1e-4, atol=1e-4)
        if choice == "kernels":
            launched(trace, "attention_forward", "attention_decode", "linear_forward")


def test_a_cache_keeps_the_dtype_of_autocast(device: str) -> None:
    model = small_gpt(device).eval()
    with gpunn.backend("torch"), torch.autocast(device, torch.bfloat16):
        tokens = model.generate(tokens_for(model, 2, 3), 4)
        cache = KeyValueCache(4)
        model.next_logits(tokens[:, :3], cache)
    assert tokens.shape == (2, 7)
    assert {keys.dtype for keys in (*cache.keys, *cache.values)} == {torch.bfloat16}


def test_generation_leaves_the_model_as_it_was(device: str) -> None:
    """It is without dropout in training mode, too, and no gradient is kept."""
    model = small_gpt(device, dropout=0.9)
    model.h[1].eval()
    modes = [module.training for module in model.modules()]
    prompt = tokens_for(model, 2, 3)
    with gpunn.backend("torch"):
        tokens = model.generate(prompt, 6, temperature=0)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(tokens, model.generate(prompt, 6, temperature=0))
        assert torch.equal(tokens, uncached(model.eval(), prompt, 6))
    assert torch.equal(tokens[:, :3], prompt)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_draws_are_reproducible(device: str) -> None:
    """By the generator; with one token to draw from, they are the likeliest ones."""
    model = small_gpt(device)
    prompt = tokens_for(model, 2, 2)

    def drawn(seed: int, **options: Any) -> list[Any]:
        generator = torch.Generator(device).manual_seed(seed)
        with gpunn.backend("torch"):
            return model.generate(prompt, 9, generator=generator, **options).tolist()

    first, greedy = drawn(1), drawn(1, temperature=0)
    assert first == drawn(1)
    assert len({str(tokens) for tokens in (first, drawn(2), drawn(3), greedy)}) == 4
    assert greedy == drawn(3, top_k=1) == drawn(3, top_p=1e-9)


PROBABILITIES = [0.1, 0.4, 0.05, 0.25, 0.2]
DRAWN_WITH: list[tuple[dict[str, Any], list[float]]] = [
    ({}, PROBABILITIES),
    ({"temperature": 0}, [0, 1, 0, 0, 0]),
    # Proportional to p², whose sum is 0.275.
    ({"temperature": 0.5}, [0.01 / 0.275, 0.16 / 0.275, 0.0025 / 0.275, 0.0625 / 0.275,
                            0.04 / 0.275]),
    ({"top_k": 1}, [0, 1, 0, 0, 0]),
    ({"top_k": 3}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
    ({"top_k": 9}, PROBABILITIES),
    # 0.4 + 0.25 = 0.65 reaches 0.6, and 0.4 does not.
    ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    ({"top_p": 0.3}, [0, 1, 0, 0, 0]),
    ({"top_p": 1.0}, PROBABILITIES),
    # Of the three largest, 0.4 / 0.85 and 0.25 / 0.85 sum up to 0.765.
    ({"top_k": 3, "top_p": 0.75}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
]  # fmt: skip


def test_tokens_are_drawn_with_their_probabilities(device: str) -> None:
    """Shares within four standard deviations."""
    p = torch.tensor(PROBABILITIES, device=device)
    with gpunn.backend("torch"):
        tokens = sample(p.log().expand(4000, 5))
    share = tokens.bincount(minlength=5) / 4000
    assert ((share - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all()


@pytest.mark.parametrize(
    ("options", "expected"), DRAWN_WITH, ids=[str(options) for options, _ in DRAWN_WITH]
)
def test_what_a_token_is_drawn_with(
    options: dict[str, Any], expected: list[float], device: str
) -> None:
    """Counted by hand; rows are independent, and the logits stay as they were."""
    p = torch.tensor([PROBABILITIES, PROBABILITIES[::-1]], device=device)
    logits = p.log() + 3
    before = logits.clone()
    got = next_probabilities(logits, **options)
    both = torch.tensor([expected, expected[::-1]], device=device, dtype=torch.float32)
    torch.testing.assert_close(got, both, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, before)
    assert got.dtype == torch.float32
    allowed = both > 0
    for seed in range(20):
        token = sample(logits, **options, generator=torch.Generator(device).manual_seed(seed))
        assert allowed.gather(1, token[:, None]).all()


def test_a_temperature_near_zero(device: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -math.inf]], device=device)
    p = next_probabilities(logits, temperature=1e-42)
    assert p.tolist() == [[0, 1, 0, 0]]


def test_no_prompts(device: str) -> None:
    model = small_gpt(device)
    assert model.generate(tokens_for(model, 0, 3), 4).shape == (0, 7)


def test_equal_logits_are_cut_to_the_number_asked_for(device: str) -> None:
    """The first of them stay, as argmax takes the first."""
    p = next_probabilities(torch.zeros(1, 4, device=device), top_k=2)
    assert p.tolist() == [[0.5, 0.5, 0, 0]]


def test_a_step_of_decoding_does_not_depend_on_the_hosts_numbers(device: str) -> None:
    """What a CUDA graph replays: with the device's numbers alone, the cache moves on."""
    model = small_gpt(device).eval()
    tokens = tokens_for(model, 2, 6)
    with gpunn.backend("torch"), torch.no_grad():
        expected, cache = model(tokens)[:, -1], KeyValueCache(8)
        model.next_logits(tokens[:, :4], cache)
        for i in (4, 5):
            cache.length = 4  # as it stays when a graph is replayed
            got = model.next_logits(tokens[:, i : i + 1], cache)
    torch.testing.assert_close(got, expected)
    assert cache.lengths.tolist() == [6, 6]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_of_decoding_can_be_captured_in_a_cuda_graph() -> None:
    model = small_gpt("cuda").eval()
    tokens = tokens_for(model, 2, 8)
    with torch.no_grad():
        expected, cache = model(tokens)[:, -1], KeyValueCache(12)
        model.next_logits(tokens[:, :4], cache)
        token = tokens[:, 4:5].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.next_logits(token, cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model.next_logits(token, cache)
        for i in (5, 6, 7):
            token.copy_(tokens[:, i : i + 1])
            graph.replay()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


REFUSED: dict[str, Any] = {
    r"prompt: .*L ≥ 1, got \(2, 0\)": lambda model: model.generate(tokens_for(model, 2, 0), 1),
    r"n_tokens: .*0 to 8, .*12 positions.*got 9":
        lambda model: model.generate(tokens_for(model, 1, 4), 9),
    r"n_tokens: .*got -1": lambda model: model.generate(tokens_for(model, 1, 4), -1),
    r"temperature: .*got -1": lambda model: drawn_from(model, temperature=-1),
    r"temperature: .*got nan": lambda model: drawn_from(model, temperature=math.nan),
    r"top_k: .*got 0": lambda model: drawn_from(model, top_k=0),
    r"top_p: .*got 0": lambda model: drawn_from(model, top_p=0),
    r"top_p: .*got 1.1": lambda model: drawn_from(model, top_p=1.1),
    r"cache: .*12 tokens at most.*got 13":
        lambda model: model.next_logits(tokens_for(model, 1, 1), KeyValueCache(13)),
    r"tokens: .*room for 2 of 2, got 3":
        lambda model: model.next_logits(tokens_for(model, 1, 3), KeyValueCache(2)),
    r"tokens: .*one beside 1 in the cache, got 2": lambda model: fed_twice(model, 2),
}  # fmt: skip


def drawn_from(model: models.GPT, **options: Any) -> Tensor:
    return model.generate(tokens_for(model, 1, 2), 1, **options)


def fed_twice(model: models.GPT, n_tokens: int) -> None:
    cache = KeyValueCache(5)
    for n in (1, n_tokens):
        model.next_logits(tokens_for(model, 1, n), cache)


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_refused_by_name(message: str) -> None:
    with gpunn.backend("torch"), pytest.raises(ValueError, match=message):
        REFUSED[message](small_gpt())
