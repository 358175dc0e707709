"""``accelerate`` and ``restore``: which layers of a model they change or leave, and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import gpunn
import gpunn.nn
from gpunn import models


def model() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.LocalResponseNorm(2), torch.nn.Linear(8, 3)
    )


def test_accelerate_and_restore(device: str) -> None:
    net = model().to(device)
    x = torch.randn(4, 2, 6, device=device)
    expected, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    record = gpunn.accelerate(net)
    assert set(record.replaced) == {"0", "1", "3"}
    assert set(record.kept) == {"2"}
    assert "LocalResponseNorm" in str(record)
    assert type(net[0]) is gpunn.nn.Linear
    with gpunn.trace() as trace:
        torch.testing.assert_close(net(x), expected)
    assert {r.operator for r in trace.launches} == {"linear_forward", "activation_forward"}
    net(x).sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, state["0.weight"])
    net.load_state_dict(state)
    restored = gpunn.restore(net)
    assert set(restored.replaced) == {"0", "1", "3"}
    assert all(type(layer).__module__.startswith("torch") for layer in net)
    assert torch.equal(net(x), expected)


def test_accelerate_leaves_subclasses_and_restore_leaves_fused_layers() -> None:
    class Special(torch.nn.Linear):
        pass

    net = torch.nn.Sequential(Special(2, 2), gpunn.nn.Linear(2, 2, activation="relu"))
    assert not gpunn.accelerate(net).replaced
    assert not gpunn.restore(net).replaced
    assert type(net[0]) is Special


def test_accelerate_says_what_it_leaves_and_why() -> None:
    named = torch.nn.Linear(2, 2)
    vars(named)["activation"] = "relu"
    net = torch.nn.ModuleDict(
        {
            "named": named,
            "normed": torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)),
            "encoder": type("Encoder", (torch.nn.TransformerEncoderLayer,), {})(2, 1, 4),
        }
    )
    kept = gpunn.accelerate(net).kept
    assert "attribute" in kept["named"]
    assert "parametrization" in kept["normed"]
    assert "fused path" in kept["encoder"]
    assert "no such layer" in gpunn.restore(torch.nn.Sequential(gpunn.nn.SwiGLU())).kept["0"]


def test_accelerate_leaves_a_layer_whose_attributes_are_a_users_own(device: str) -> None:
    """By gpunn's names: a scale to divide by, or a layer that the module around it calls."""

    class Quantised(torch.nn.Linear):
        scale: torch.Tensor

    quantised = Quantised(2, 2)
    quantised.register_buffer("scale", torch.ones(2))
    layers: list[Any] = [quantised, *(torch.nn.Linear(2, 2) for _ in range(4))]
    layers[1].scale = torch.nn.Parameter(torch.ones(2))
    layers[2].scale = np.ones(3)
    layers[3].activation = torch.nn.ReLU()
    layers[4].dropout_p = torch.zeros(2)
    layers.append(torch.nn.Embedding(5, 2))
    layers[5].positional = torch.nn.Embedding(7, 2)
    net = torch.nn.ModuleList(layers).to(device)
    record = gpunn.accelerate(net)
    assert set(record.replaced) == {"3.activation", "5.positional"}
    assert all("attribute" in record.kept[str(i)] for i in range(6))
    assert type(layers[3].activation) is gpunn.nn.ReLU
    assert layers[5](torch.tensor([1], device=device)).shape == (1, 2)


def test_accelerate_says_who_computes_the_projection_of_attention() -> None:
    record = gpunn.accelerate(torch.nn.MultiheadAttention(4, 2))
    assert set(record.replaced) == {""}
    assert "the attention around it" in record.kept["out_proj"]


def test_accelerate_leaves_a_layer_with_a_method_of_its_own(device: str) -> None:
    """As a patch that lets a convolution's images go on at their other edge."""
    first: Any = torch.nn.Conv2d(2, 2, 3)
    net = torch.nn.Sequential(first, torch.nn.Conv2d(2, 2, 3)).to(device)
    x, before = torch.randn(1, 2, 5, 5, device=device), first._conv_forward

    first._conv_forward = lambda *arguments: 2 * before(*arguments)
    expected = net(x)
    record = gpunn.accelerate(net)
    assert set(record.replaced) == {"1"}
    assert "a method of its own" in record.kept["0"]
    torch.testing.assert_close(net(x), expected)


def test_a_layer_that_was_compiled_in_place_is_replaced(device: str) -> None:
    """What was compiled for the old class is compiled anew for the other."""
    layer = torch.nn.Linear(2, 2).to(device)
    layer.compile(backend="eager")
    x = torch.randn(3, 2, device=device)
    expected = layer(x)
    assert set(gpunn.accelerate(layer).replaced) == {""}
    with gpunn.trace() as trace:
        torch.testing.assert_close(layer(x), expected)
    assert {r.operator for r in trace.launches} == {"linear_forward"}


def test_what_was_restored_can_be_accelerated() -> None:
    net = torch.nn.Sequential(gpunn.nn.Linear(2, 2), gpunn.nn.LayerNorm(2), gpunn.nn.GELU())
    assert set(gpunn.restore(net).replaced) == {"0", "1", "2"}
    assert set(gpunn.accelerate(net).replaced) == {"0", "1", "2"}


def test_models_that_need_gpunn_keep_its_layers(device: str) -> None:
    """By themselves, and as part of another."""
    gpt = models.GPT(11, 8, 8, n_layer=1, n_head=2, dropout=0.0).to(device).eval()
    net = torch.nn.ModuleDict({"gpt": gpt, "head": gpunn.nn.Linear(2, 2)})
    tokens = torch.randint(11, (1, 3), device=device)
    expected = gpt(tokens)
    record = gpunn.restore(net)
    assert set(record.replaced) == {"head"}
    assert "needs gpunn's" in record.kept["gpt.ln_f"]
    assert torch.equal(gpt(tokens), expected)


def test_parts_of_a_gpt_keep_its_layers_by_themselves(device: str) -> None:
    block = models.GPTBlock(8, 2, 0, dropout=0.0).to(device).eval()
    x = torch.randn(1, 3, 8, device=device)
    expected = block(x)
    assert "needs gpunn's" in gpunn.restore(block).kept["mlp.c_proj"]
    assert torch.equal(block(x), expected)
