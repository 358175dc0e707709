"""Decoding a translation: the cache, the greedy choice, and beams against all translations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gpunn
from gpunn.kernels.launch import Backend
from gpunn.models import decoding
from kit import launched
from small_transformer import (
    END,
    PADDING,
    START,
    assert_same_sentences,
    sentences,
    small,
    words,
)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("choice", ["torch", "kernels"])
def test_cached_decoding_is_the_uncached(choice: Backend, norm_first: bool, device: str) -> None:
    """The logits after one token more each time, and after several for a new cache."""
    model, (source, target) = small(device, norm_first=norm_first), sentences(device)
    with torch.no_grad():
        with gpunn.backend("torch"):
            expected = model(source, target)
        with gpunn.backend(choice), gpunn.trace() as trace:
            for first in (1, 3):
                cache = model.read(source, 4)
                for start, end in ((0, first), *((i, i + 1) for i in range(first, 4))):
                    got = model.next_logits(target[:, start:end], cache)
                    torch.testing.assert_close(got, expected[:, end - 1], rtol=1e-4, atol=1e-4)
    if choice == "kernels":
        launched(trace, "attention_forward", "attention_decode", "embedding_forward")


@pytest.mark.parametrize("norm_first", [False, True])
def test_what_is_the_users_own_in_a_layer_is_not_passed_by(norm_first: bool, device: str) -> None:
    """A hook, and another class of layer."""

    class Louder(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    model, (source, target) = small(device, norm_first=norm_first), sentences(device)
    layers: Any = model.transformer.decoder.layers
    with torch.no_grad(), gpunn.backend("torch"):
        before = model(source, target)[:, -1]
        layers[0].linear1.register_forward_hook(lambda module, args, output: output + 5)
        layers[1].norm3.register_forward_hook(lambda module, args, output: 2 * output)
        layers[1].linear2.__class__ = Louder
        expected = model(source, target)[:, -1]
        assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-2)
        got = model.next_logits(target, model.read(source))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["self_attn", "multihead_attn", "multihead_attn.out_proj", ""])
def test_a_cache_refuses_hooks_that_it_would_pass_by(part: str, device: str) -> None:
    model, (source, _) = small(device), sentences(device)
    layers: Any = model.transformer.decoder.layers
    layers[0].get_submodule(part).register_forward_hook(lambda module, args, output: None)
    with pytest.raises(RuntimeError, match=r"cache of keys and values .* without hooks"):
        model.translate(source)


@pytest.mark.parametrize("block", ["_sa_block", "_mha_block", "_ff_block"])
@pytest.mark.parametrize("is_the_instances", [False, True])
def test_a_cache_refuses_blocks_that_it_would_pass_by(
    is_the_instances: bool, block: str, device: str
) -> None:
    model, (source, _) = small(device), sentences(device)
    layers: Any = model.transformer.decoder.layers
    if is_the_instances:
        setattr(layers[1], block, lambda x, *_: x)
    else:
        layers[1].__class__ = type("Special", (type(layers[1]),), {block: lambda _, x, *__: x})
    with pytest.raises(RuntimeError, match=r"cache of keys and values .* methods of its own"):
        model.translate(source)


def test_no_sentences(device: str) -> None:
    model, nothing = small(device), words(11, 0, 4).to(device)
    assert model.translate(nothing, 5).shape == (0, 1)
    tokens, scores = model.beam_search(nothing, 5)
    assert (tokens.shape, scores.shape) == ((0, 1), (0,))


def test_padding_changes_nothing(device: str) -> None:
    """Logits, translations and beams of a short sentence, alone or padded beside a longer one."""
    model, (source, target) = small(device), sentences(device)
    with gpunn.backend("torch"), torch.no_grad():
        alone = source[1:, :3]
        torch.testing.assert_close(model(source, target)[1:], model(alone, target[1:]))
        assert_same_sentences(model.translate(source, 6)[1:], model.translate(alone, 6))
        found, scores = model.beam_search(source, 6, n_beams=3)
        mine, score = model.beam_search(alone, 6, n_beams=3)
        assert_same_sentences(found[1:], mine)
        torch.testing.assert_close(scores[1:], score)


def all_translations(model: Any, source: Tensor) -> dict[tuple[int, ...], float]:
    """log p of every translation of one sentence that ends, or is cut, at three tokens."""
    choices = [token for token in range(len(model.output.weight)) if token != PADDING]
    begun = list(itertools.product(choices, repeat=2))
    target = torch.tensor([[START, *tokens] for tokens in begun], device=source.device)
    logits = model(source.expand(len(begun), -1), target)
    logits[..., PADDING] = -math.inf
    found: dict[tuple[int, ...], float] = {}
    for before, logs in zip(begun, logits.log_softmax(-1).tolist(), strict=True):
        for last in choices:
            tokens = (*before, last)
            n = tokens.index(END) + 1 if END in tokens else 3
            found[tokens[:n]] = sum(logs[i][tokens[i]] for i in range(n))
    return found


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_of_all_translations(penalty: float, device: str) -> None:
    """Of four words and three tokens; a beam that drops nothing, and a greedy one beside it."""
    greedy = 0
    with gpunn.backend("torch"), torch.no_grad():
        for _ in range(8):
            model = small(device, target_size=4)
            source = words(11, 1, 4).to(device)
            scores = {
                tokens: log / ((5 + len(tokens)) / 6) ** penalty
                for tokens, log in all_translations(model, source).items()
            }
            assert len(scores) == 1 + 2 + 4 * 3
            best = max(scores, key=lambda tokens: scores[tokens])
            options: Any = {"n_beams": 15, "length_penalty": penalty}
            found, score = model.beam_search(source, 3, **options)
            assert tuple(t for t in found[0].tolist() if t != PADDING) == best
            assert score.item() == pytest.approx(scores[best], rel=1e-4)
            greedy += found.tolist() == model.translate(source, 3).tolist()
    assert greedy < 8, "no sentence needs a beam"


def score_of(model: Any, source: Tensor, found: Tensor) -> Tensor:
    """Of translations, all computed anew, for a length_penalty of 2."""
    start = torch.full_like(found[:, :1], START)
    logits = model(source, torch.cat([start, found[:, :-1]], 1))
    logits[..., PADDING] = -math.inf
    logs = logits.log_softmax(-1).gather(2, found[..., None])[..., 0]
    real = found != PADDING
    total: Tensor = logs.masked_fill(~real, 0).sum(1)
    return total / ((5 + real.sum(1)) / 6) ** 2


def test_a_beam_that_overtakes_takes_its_cache_along(device: str) -> None:
    """Scores are those of the translations, for networks that are unlike in what they prefer."""
    with gpunn.backend("torch"), torch.no_grad():
        for _ in range(6):
            model, source = small(device), words(11, 8, 4).to(device)
            found, scores = model.beam_search(source, 6, n_beams=4, length_penalty=2)
            torch.testing.assert_close(scores, score_of(model, source, found), rtol=1e-4, atol=1e-5)


def test_a_beam_of_one_is_greedy_and_a_wider_one_no_worse(device: str) -> None:
    model = small(device)
    source = words(11, 8, 5).to(device)
    with gpunn.backend("torch"):
        greedy = model.translate(source, 8)
        one, score = model.beam_search(source, 8, n_beams=1)
        assert_same_sentences(one, greedy)
        assert greedy.shape == one.shape
        _, better = model.beam_search(source, 8, n_beams=5)
    assert (better >= score - 1e-5).all()
    assert (better > score + 1e-3).any(), "no sentence shows what a beam is for"


def scripted(rows: dict[tuple[int, ...], list[float]], n_tokens: int) -> Any:
    """A step whose logits are log probabilities given by what was said, without the start."""
    said: list[tuple[int, ...]] = [()]

    def step(tokens: Tensor, cache: Any) -> Tensor:
        if cache.length:
            before = [said[i] for i in cache.origin]
            said[:] = [(*b, t) for b, t in zip(before, tokens[:, 0].tolist(), strict=True)]
        else:
            said[:] = [()] * len(tokens)
        cache.length += 1
        uniform = [1 / n_tokens] * n_tokens
        return torch.tensor([rows.get(words, uniform) for words in said]).log()

    return step


class Tracked:
    """In place of a cache: from which sequence each goes on."""

    def __init__(self, max_length: int) -> None:
        self.max_length, self.length = max_length, 0
        self.real, self.origin = torch.ones(1, 1, 1, 1, dtype=torch.bool), [0]

    def repeat(self, n: int) -> None:
        self.origin = list(range(n))

    def select(self, rows: Tensor) -> None:
        self.origin = rows.tolist()


def test_a_beam_goes_on_while_a_longer_translation_can_overtake() -> None:
    """Counted by hand: "end" has log 0.5 / 1; "3 end", 0.45, divided by 7/6 to a power, wins.

    Without a penalty the first is the better one, and the search ends with it after one token.
    """
    rows = {(): [0, 0, 0.5, 0.5 - 0.04], (3,): [0, 0, 0.99, 0.01]}
    special = decoding.Special(PADDING, START, END)
    for penalty, expected, n_steps in ((0.0, [END], 1), (2.0, [3, END], 3)):
        cache: Any = Tracked(4)
        with gpunn.backend("auto"):  # the logits are a CPU's
            found, score = decoding.beam_search(scripted(rows, 4), cache, 1, special, 2, penalty)
        tokens = [t for t in found[0].tolist() if t != PADDING]
        assert tokens == expected
        logs = math.log(0.5 / 0.96) if len(tokens) == 1 else math.log(0.46 / 0.96 * 0.99)
        assert score.item() == pytest.approx(logs / ((5 + len(tokens)) / 6) ** penalty, rel=1e-4)
        assert cache.length <= n_steps


def test_translation_leaves_the_model_as_it_was(device: str) -> None:
    """It is without dropout in training mode, too, and ends when all have."""
    model = small(device, dropout=0.9).train()
    model.transformer.encoder.eval()
    modes = [module.training for module in model.modules()]
    source, _ = sentences(device)
    with gpunn.backend("torch"):
        first = model.translate(source, 12)
        assert torch.equal(first, model.translate(source, 12))
        assert [module.training for module in model.modules()] == modes
        with torch.no_grad():
            norm: Any = model.transformer.decoder.norm
            norm.weight.zero_()
            model.output.weight.zero_()[END] = norm.bias
        assert model.translate(source).tolist() == [[END], [END]]
        assert model.beam_search(source)[0].shape[1] < 12
    assert not first.requires_grad
