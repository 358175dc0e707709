"""GPT: GPT-2's parameters and values, its checkpoints, a training step, and what is fused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gpunn
from gpunn import models
from gpunn.kernels import linear_cross_entropy
from gpunn.kernels.launch import Backend
from kit import launched
from small_gpt import SIZES, small_gpt, tokens_for

Values = dict[str, Tensor]


def normalised(values: Values, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y * values[f"{name}.weight"] + values[f"{name}.bias"]


def dense(values: Values, name: str, x: Tensor) -> Tensor:
    """With the weight as OpenAI's and transformers' Conv1D has it: (in, out)."""
    return x @ values[f"{name}.weight"] + values[f"{name}.bias"]


def by_hand(values: Values, tokens: Tensor, n_layer: int, n_head: int) -> Tensor:
    """The logits, from a checkpoint of transformers' GPT2Model, by the formulas."""
    (_, length), width = tokens.shape, values["wte.weight"].shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
    x = values["wte.weight"][tokens] + values["wpe.weight"][:length]
    for i in range(n_layer):
        packed = dense(values, f"h.{i}.attn.c_attn", normalised(values, f"h.{i}.ln_1", x))
        heads = []
        for q, k, v in zip(*(t.split(width // n_head, -1) for t in packed.split(width, -1)),
                           strict=True):  # fmt: skip
            scores = (q @ k.mT / math.sqrt(width // n_head)).masked_fill(later, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + dense(values, f"h.{i}.attn.c_proj", torch.cat(heads, -1))
        z = dense(values, f"h.{i}.mlp.c_fc", normalised(values, f"h.{i}.ln_2", x))
        z = 0.5 * z * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())
        x = x + dense(values, f"h.{i}.mlp.c_proj", z)
    return normalised(values, "ln_f", x) @ values["wte.weight"].T


def checkpoint_of(model: torch.nn.Module) -> Values:
    """The model's parameters as transformers' GPT2Model has them."""
    return {
        name: value.detach().clone().t() if ".c_" in name and value.dim() == 2 else value.clone()
        for name, value in model.state_dict().items()
    }


def gpt2_state() -> dict[str, tuple[int, ...]]:
    """Names and shapes in transformers' GPT2Model of the smallest size."""
    state: dict[str, tuple[int, ...]] = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    for i in range(12):
        for name, shape in {
            "ln_1": (768,), "attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "ln_2": (768,),
            "mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768),
        }.items():  # fmt: skip
            state |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    return state | {"ln_f.weight": (768,), "ln_f.bias": (768,)}


def test_parameters_are_those_of_gpt2() -> None:
    """Their number, their names in order, and, but for Conv1D's transposition, their shapes."""
    with torch.device("meta"):
        model = models.gpt2()
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert list(shapes) == list(gpt2_state())
    assert {
        name: shape[::-1] if ".c_" in name else shape for name, shape in shapes.items()
    } == gpt2_state()
    with gpunn.backend("torch"):
        assert model(torch.zeros(2, 5, dtype=torch.int64, device="meta")).shape == (2, 5, 50257)


@pytest.mark.parametrize("deviation", [0.02, 0.06])
def test_how_a_gpt_starts(deviation: float) -> None:
    options = {"initializer_range": deviation} if deviation != 0.02 else {}
    model: Any = models.GPT(200, 64, 128, 4, 2, **options)
    shares = {"wpe": 0.5, "c_proj": 1 / math.sqrt(8)}
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "ln_" in name:
            assert (value == 1).all(), name
        else:
            expected = deviation * shares.get(name.split(".")[-2], 1)
            assert value.std().item() == pytest.approx(expected, rel=0.03), name
    assert model.wte.dropout_p == model.h[0].mlp.c_proj.dropout_p == 0.1


def test_values_and_gradients_are_those_of_the_formulas(device: str) -> None:
    """In double precision; one target is left out of the loss."""
    model = small_gpt(device).double()
    tokens, targets = tokens_for(model, 2, 7), tokens_for(model, 2, 7)
    targets[0, 3] = -100
    values = {name: value.requires_grad_() for name, value in checkpoint_of(model).items()}
    expected = by_hand(values, tokens, 2, 3)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    theirs = torch.autograd.grad(loss, list(values.values()))
    with gpunn.backend("torch"):
        torch.testing.assert_close(model(tokens), expected)
        ours = model(tokens, targets)
        torch.testing.assert_close(ours, loss)
        got = torch.autograd.grad(ours, list(model.parameters()))
    for name, mine, exact in zip(values, got, theirs, strict=True):
        assert exact.abs().max() > 1e-2, name
        torch.testing.assert_close(mine, exact.t() if ".c_" in name and exact.dim() == 2 else exact)


def test_a_training_step_on_the_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and all gradients no further from float64's than twice torch's in float32.

    The words are two chunks of logits, and one that is not full.
    """
    monkeypatch.setattr(linear_cross_entropy, "MOST_LOGITS", 0)
    monkeypatch.setattr(linear_cross_entropy, "LEAST_CLASSES", 9)
    model = small_gpt(device)
    tokens, targets = tokens_for(model, 2, 7), tokens_for(model, 2, 7)

    def step(choice: Backend, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model.to(dtype)
        with gpunn.backend(choice):
            loss = model(tokens, targets)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        return loss.double(), torch.cat([g.flatten().double() for g in gradients])

    exact_loss, exact = step("torch", torch.float64)
    torch_loss, baseline = step("torch", torch.float32)
    with gpunn.trace() as trace:
        loss, got = step("kernels", torch.float32)
    launched(
        trace, "embedding_forward", "embedding_backward", "linear_forward", "attention_forward",
        "attention_backward", "row_norm_forward", "row_norm_backward",
        "linear_cross_entropy_forward", "linear_cross_entropy_backward",
    )  # fmt: skip
    assert (loss - exact_loss).abs() <= 2 * (torch_loss - exact_loss).abs() + 1e-6
    assert (got - exact).norm() <= 2 * (baseline - exact).norm() + 1e-6 * exact.norm()
    assert exact.norm() > 0.1


def test_what_is_fused(device: str) -> None:
    """No activation, dropout or sum of embeddings or of the stream is an operation of its own."""
    model = small_gpt(device, dropout=0.1, n_layer=1)
    tokens = tokens_for(model, 1, 5)
    with gpunn.trace() as trace, torch.profiler.profile() as profile:
        model(tokens, tokens).backward()
    launched(trace, "embedding_forward", "linear_forward", "linear_epilogue_backward")
    operators = {record.operator for record in trace.launches}
    assert not any("activation" in name or "dropout" in name for name in operators)
    names = [event.name for event in profile.events()]
    # Of the embeddings' sum, attention's probabilities and both projections, a seed each.
    assert names.count("aten::randint") == 4
    # Of the gradients of the tokens' embedding, which is the output's weight, too.
    assert names.count("aten::add") + names.count("aten::add_") == 1


def variants(model: models.GPT, values: Values) -> dict[str, Values]:
    """The checkpoint as the classes and versions of transformers write it, and our own."""
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    prefixed = {f"transformer.{name}": value for name, value in values.items()}
    headless = {n: v for n, v in prefixed.items() if n != "transformer.wte.weight"}
    head = {"lm_head.weight": values["wte.weight"].clone()}
    return {
        "GPT2Model": values,
        "GPT2Model with masks": {**masks, **values},
        "GPT2LMHeadModel": prefixed | head,
        "the head alone": headless | head,
        "our own": dict(model.state_dict()),
        "our own, prefixed": {f"transformer.{n}": v for n, v in model.state_dict().items()},
    }


@pytest.mark.parametrize("inside", ["", "inner."])
def test_checkpoints_load(inside: str) -> None:
    """Strictly, whether the model stands alone or inside of another; the checkpoint is not changed.

    A projection of 24×24 has no shape to tell its transposition by.
    """
    source = small_gpt()
    values = checkpoint_of(source)
    for name, state in variants(source, values).items():
        given = {inside + key: value for key, value in state.items()}
        before = {key: (value, value.clone()) for key, value in given.items()}
        target = small_gpt()
        assert not torch.equal(target.wte.weight, source.wte.weight)
        whole: Any = torch.nn.ModuleDict({"inner": target}) if inside else target
        whole.load_state_dict(given, strict=True)
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value), f"{name}: {key}"
        assert list(given) == list(before)
        for key, value in given.items():
            same, copy = before[key]
            assert value is same
            assert torch.equal(value, copy)


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    model = small_gpt()
    values = checkpoint_of(model)
    head = {"lm_head.weight": values["wte.weight"] + 1}
    with pytest.raises(RuntimeError, match=r"lm_head.weight: expected wte.weight, to which"):
        model.load_state_dict(values | head)
    with pytest.raises(RuntimeError, match=r"Unexpected.*score.weight"):
        model.load_state_dict(values | {"score.weight": torch.ones(2, 24)})
    with pytest.raises(RuntimeError, match=r"Missing.*h.1.mlp.c_fc.bias"):
        model.load_state_dict({n: v for n, v in values.items() if n != "h.1.mlp.c_fc.bias"})


def test_logits_are_those_of_transformers(device: str) -> None:
    """Of its own model with its own weights, whose state_dict loads as it is.

    Not among what the tests install; passed with transformers 5.24.0 and torch 2.13.0, on a CPU.
    """
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: the formulas' test stands for it"
    )
    sizes = {**SIZES, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**sizes, initializer_range=0.3)
    theirs = transformers.GPT2LMHeadModel(config).to(device).eval()
    model = models.GPT(**SIZES).to(device).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    tokens = tokens_for(model, 2, 9)
    with gpunn.backend("torch"), torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)


def test_it_compiles_without_a_graph_break(device: str) -> None:
    model = small_gpt(device, n_layer=1)
    tokens = tokens_for(model, 2, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, expected = (
        torch.autograd.grad(function(tokens, tokens), list(model.parameters()))
        for function in (compiled, model)
    )
    torch.testing.assert_close(got, expected)


REFUSED: dict[str, Any] = {
    r"n_head: .*divisor of n_embd = 24, got 5": lambda model: small_gpt(n_head=5),
    r"dropout: .*from 0 to 1, got 1.5": lambda model: small_gpt(dropout=1.5),
    r"tokens: .*L up to 12, got \(1, 13\)": lambda model: model(tokens_for(model, 1, 13)),
    r"tokens: .*shape \(N, L\).*got \(3,\)": lambda model: model(tokens_for(model, 3)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_refused_by_name(message: str) -> None:
    with gpunn.backend("torch"), pytest.raises(ValueError, match=message):
        REFUSED[message](small_gpt())
