"""The Transformer that translates: torch's values, a training step, and what the paper counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gpunn
import gpunn.functional as GF
from gpunn import models
from gpunn.kernels.launch import Backend
from kit import launched
from small_transformer import (
    PADDING,
    SIZES,
    assert_same_sentences,
    sentences,
    small,
    words,
)


def torchs(model: models.TranslationTransformer, device: str) -> Callable[..., Tensor]:
    """Its logits with ``torch.nn.Transformer``, and embeddings and positions by the formula."""
    d_model, norm_first = model.transformer.d_model, model.transformer.encoder.layers[0].norm_first
    twin = torch.nn.Transformer(
        d_model, SIZES["n_heads"], 2, 2, SIZES["d_hidden"], 0.0, batch_first=True,
        norm_first=norm_first, device=device,
    )  # fmt: skip
    twin.load_state_dict(model.transformer.state_dict(), strict=True)

    def embedded(tokens: Tensor, weight: Tensor) -> Tensor:
        position = torch.arange(tokens.shape[1], device=device)[:, None]
        rate = 10000 ** (-torch.arange(0, d_model, 2, device=device) / d_model)
        table = torch.stack([(position * rate).sin(), (position * rate).cos()], 2).flatten(1)
        return weight[tokens] * math.sqrt(d_model) + table

    def logits(source: Tensor, target: Tensor) -> Tensor:
        padding = source == PADDING
        y: Tensor = twin(
            embedded(source, model.source_embedding.weight),
            embedded(target, model.target_embedding.weight),
            tgt_mask=twin.generate_square_subsequent_mask(target.shape[1], target.device),
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return y @ model.output.weight.T

    return logits


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # of torch's own
@pytest.mark.parametrize("norm_first", [False, True])
def test_values_are_those_of_torchs_transformer(
    norm_first: bool, device: str, one_path_of_torchs: None
) -> None:
    """Its checkpoint is the inner transformer's; the greedy translation is torch's, too."""
    model, (source, target) = small(device, norm_first=norm_first), sentences(device)
    logits = torchs(model, device)
    with gpunn.backend("torch"), torch.no_grad():
        expected = logits(source, target)
        torch.testing.assert_close(model(source, target), expected, rtol=1e-4, atol=1e-4)
        said, ours = target[:, :1], model.translate(source, 5)
        for _ in range(5):
            best = logits(source, said)[:, -1]
            best[:, PADDING] = -math.inf
            said = torch.cat([said, best.argmax(-1, keepdim=True)], 1)
    assert_same_sentences(ours, said[:, 1:])


def test_attention_maps_are_torchs_weights(device: str) -> None:
    """Of the second layer alone, and of all; those of torch's layers, called one by one."""
    model, (source, target) = small(device), sentences(device)
    padding = source == PADDING
    later = torch.ones(4, 4, dtype=torch.bool, device=device).triu(1)
    with torch.no_grad():
        maps = model.attention_maps(source, target)
        second = model.attention_maps(source, target, [1])
    for some, every in zip(second, maps, strict=True):
        torch.testing.assert_close(some, every[1:])
    call: Any = {"need_weights": True, "average_attn_weights": False}
    with gpunn.backend("torch"), torch.no_grad():
        x, y = model.source_embedding(source), model.target_embedding(target)
        memory = model.transformer.encoder(x, src_key_padding_mask=padding)
        for i in range(2):
            encoder: Any = model.transformer.encoder.layers[i]
            decoder: Any = model.transformer.decoder.layers[i]
            expected = encoder.self_attn(x, x, x, key_padding_mask=padding, **call)[1]
            torch.testing.assert_close(maps.encoder[i], expected, rtol=1e-4, atol=1e-5)
            own, expected = decoder.self_attn(y, y, y, attn_mask=later, **call)
            torch.testing.assert_close(maps.decoder[i], expected, rtol=1e-4, atol=1e-5)
            query = decoder.norm1(y + own)
            expected = decoder.multihead_attn(
                query, memory, memory, key_padding_mask=padding, **call
            )[1]
            torch.testing.assert_close(maps.cross[i], expected, rtol=1e-4, atol=1e-5)
            assert expected.shape == (2, 3, 4, 5)
            x = encoder(x, src_key_padding_mask=padding)
            y = decoder(y, memory, later, None, None, padding, True)
    assert not any(attention._forward_hooks for attention in model.modules())


@pytest.mark.parametrize(
    "options",
    [{}, {"share_output": True}, {"share_embeddings": True, "source_size": 9}],
    ids=["apart", "output", "embeddings"],
)
def test_a_training_step_on_the_kernels(options: dict[str, Any], device: str) -> None:
    """The loss and all gradients no further from float64's than twice torch's in float32."""
    model = small(device, **options).train()
    source, target = sentences(device)
    source = source.clamp(max=8)
    wanted = target.roll(-1, 1)
    wanted[1, 2:] = PADDING

    def step(choice: Backend, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model.to(dtype)
        with gpunn.backend(choice):
            logits = model(source, target)
            loss = GF.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=PADDING, label_smoothing=0.1
            )
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        return loss.double(), torch.cat([g.flatten().double() for g in gradients])

    exact_loss, exact = step("torch", torch.float64)
    torch_loss, baseline = step("torch", torch.float32)
    with gpunn.trace() as trace:
        loss, got = step("kernels", torch.float32)
    launched(
        trace, "embedding_forward", "attention_forward", "attention_backward", "row_norm_forward",
        "row_norm_backward", "linear_forward", "cross_entropy_with_gradient",
    )  # fmt: skip
    assert (loss - exact_loss).abs() <= 2 * (torch_loss - exact_loss).abs() + 1e-6
    assert (got - exact).norm() <= 2 * (baseline - exact).norm() + 1e-6 * exact.norm()
    assert exact.norm() > 0.1


def n_parameters(d_model: int, d_hidden: int, n_layers: int, vocabularies: int) -> int:
    """Counted layer by layer."""
    attention = 4 * (d_model**2 + d_model)
    dense = 2 * d_model * d_hidden + d_model + d_hidden
    encoder, decoder = attention + dense + 4 * d_model, 2 * attention + dense + 6 * d_model
    return n_layers * (encoder + decoder) + 2 * 2 * d_model + vocabularies * d_model


def test_parameters_are_counted() -> None:
    """The paper's table 3: 65 and 213 million, with one vocabulary of 37,000 and shared weights."""
    with torch.device("meta"):
        base = models.transformer_base(37000, 37000, share_embeddings=True)
        big = models.transformer_big(37000, 37000, share_embeddings=True)
        apart = models.transformer_small(50, 70)
    counted = [sum(p.numel() for p in model.parameters()) for model in (base, big, apart)]
    assert counted == [
        n_parameters(512, 2048, 6, 37000),
        n_parameters(1024, 4096, 6, 37000),
        n_parameters(128, 256, 2, 50 + 2 * 70),
    ]
    assert counted[0] == 63_084_544
    dropouts = [model.transformer.encoder.layers[0].dropout.p for model in (base, big, apart)]
    assert dropouts == [0.1, 0.3, 0.05]
    assert [model.source_embedding.dropout_p for model in (base, big, apart)] == dropouts
    heads = [m.transformer.decoder.layers[1].multihead_attn.num_heads for m in (base, big, apart)]
    assert heads == [8, 16, 4]


def test_how_it_starts() -> None:
    """Embeddings of deviation 1 / √d_model; matrices within Xavier's bound; shared ones once."""
    model = models.transformer_small(300, 300)
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            assert parameter.std().item() == pytest.approx(128**-0.5, rel=0.03), name
        elif parameter.dim() == 2:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.97 * bound < parameter.abs().max() <= bound, name
    assert model.source_embedding.weight is not model.target_embedding.weight
    shared = models.transformer_small(300, 300, share_embeddings=True)
    assert shared.target_embedding.weight is shared.source_embedding.weight
    assert shared.output.weight is shared.source_embedding.weight
    assert shared.output.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    tied = models.transformer_small(200, 300, share_output=True)
    assert tied.output.weight is tied.target_embedding.weight
    assert tied.source_embedding.weight.shape == (200, 128)
    assert tied.output.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)


def test_from_meta_tensors_positions_are_computed(device: str) -> None:
    """As no checkpoint holds them."""
    model, (source, target) = small(device), sentences(device)
    with torch.device("meta"):
        empty = small("meta")
    empty.to_empty(device=device).load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(empty(source, target), model(source, target))


def test_the_learning_rate_rises_and_falls() -> None:
    """By hand: a quarter of the warm-up gives a quarter of its end's rate; four times it, half."""
    peak = 512**-0.5 * 4000**-0.5
    for step, expected in ((4000, peak), (1000, peak / 4), (16000, peak / 2), (1, peak / 4000)):
        assert models.noam_rate(step, 512) == pytest.approx(expected)
    assert models.noam_rate(8, 64, warm_up=2, factor=0.4) == pytest.approx(0.4 / 8 / 8**0.5)


def test_it_compiles_without_a_graph_break(device: str) -> None:
    model, (source, target) = small(device, n_layers=1), sentences(device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, expected = (
        torch.autograd.grad(function(source, target).square().sum(), list(model.parameters()))
        for function in (compiled, model)
    )
    torch.testing.assert_close(got, expected)


REFUSED: dict[str, Any] = {
    r"n_heads: .*divisor of d_model = 24, got 5": lambda model: small(n_heads=5),
    r"share_embeddings: .*got 11 and 9": lambda model: small(share_embeddings=True),
    r"dropout_p: .*from 0 to 1, got 1.5": lambda model: small(dropout=1.5),
    r"source: .*L up to 12, got \(1, 13\)":
        lambda model: model(words(9, 1, 13), words(9, 1, 2)),
    r"target: .*shape \(N, L\).*got \(3,\)": lambda model: model(words(9, 1, 2), words(9, 3)),
    r"source: .*got \(2,\)": lambda model: model.translate(words(9, 2), 3),
    r"max_length: expected 1 to 12, got 13": lambda model: model.translate(words(9, 1, 2), 13),
    r"max_length: .*got 0": lambda model: model.beam_search(words(9, 1, 2), 0),
    r"n_beams: .*got 0": lambda model: model.beam_search(words(9, 1, 2), 3, n_beams=0),
    r"length_penalty: .*got -1":
        lambda model: model.beam_search(words(9, 1, 2), 3, length_penalty=-1),
    r"step, warm_up: .*got 0 and 4000": lambda model: models.noam_rate(0, 512),
    r"step, warm_up: .*got 3 and 0": lambda model: models.noam_rate(3, 512, 0),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_refused_by_name(message: str) -> None:
    with gpunn.backend("torch"), pytest.raises(ValueError, match=message):
        REFUSED[message](small())
