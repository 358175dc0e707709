"""What torch.compile and torch.export ask of every op alike: repeated tensors, changing lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gpunn
import gpunn.functional as GF
import gpunn.nn
from gpunn import models


def turned(x: Tensor) -> Tensor:
    """Queries and keys that are one."""
    cos, sin = GF.rotary_tables(x.shape[-2], x.shape[-1], device=x.device)
    query, key = GF.rotary_embedding(x, x, cos, sin)
    return query + 2 * key


# Functions of one tensor (4, 4), which they are given in two places.
REPEATED: dict[str, Callable[[Tensor], Any]] = {
    "linear, residual": lambda x: GF.linear(
        x, torch.eye(4, device=x.device), activation="relu", residual=x
    ),
    "linear, weight": lambda x: GF.linear(x, x, activation="gelu"),
    "conv2d": lambda x: GF.conv2d(
        x[None, None], x.new_ones(1, 1, 1, 1), activation="relu", residual=x[None, None]
    ),
    "batch_norm": lambda x: GF.batch_norm(x, None, None, training=True, residual=x),
    "layer_norm": lambda x: GF.layer_norm(x, (4,), residual=x),
    "layer_norm, weight": lambda x: GF.layer_norm(x, (4,), x[0], x[0]),
    "group_norm": lambda x: GF.group_norm(x, 2, x[0], x[0]),
    "attention": lambda x: GF.scaled_dot_product_attention(x[None], x[None], x[None]),
    "rotary": lambda x: turned(x[None, None]),
    "mse_loss": lambda x: GF.mse_loss(x, x) + x.sum(),
}


@pytest.mark.parametrize("name", REPEATED)
def test_one_tensor_in_two_places_breaks_no_graph(name: str, device: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 4, device=device, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        value: Tensor = REPEATED[name](x)
        return value.square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = [f(x) for f in (compiled, function)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(value, x) for value in results))
    assert results[0] != 0


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "LayerNorm": lambda: gpunn.nn.LayerNorm(4),
    "RMSNorm": lambda: gpunn.nn.RMSNorm(4),
    "Linear": lambda: gpunn.nn.Linear(4, 3, activation="relu"),
    "encoder": lambda: gpunn.nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_few_graphs_for_all_lengths(name: str, device: str) -> None:
    torch._dynamo.reset()
    layer, graphs = LAYERS[name]().to(device), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, dynamic=True, fullgraph=True)
    for length in range(2, 14):
        x = torch.randn(2, length, 4, device=device)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) <= 2


def test_two_graphs_for_all_lengths_of_a_model(device: str) -> None:
    """One for the first length, one for all others."""
    torch._dynamo.reset()
    model = models.GPT(11, 16, 8, n_layer=1, n_head=2).to(device).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in range(2, 14):
        tokens = torch.randint(11, (2, length), device=device)
        torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.usefixtures("one_precision")
@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "InstanceNorm", "rotary"])
def test_exported_with_a_length_that_changes(name: str, device: str) -> None:
    layers: dict[str, Callable[[], torch.nn.Module]] = {
        **LAYERS,
        "GroupNorm": lambda: gpunn.nn.GroupNorm(2, 4),
        "InstanceNorm": lambda: gpunn.nn.InstanceNorm1d(4),
        "rotary": lambda: Turned(),
    }
    layer, last = layers[name]().to(device), name in ("LayerNorm", "rotary")
    shapes = [(2, 3, n, 4) if last else (2, 4, n) for n in (5, 9)]
    first, second = (torch.randn(shape, device=device) for shape in shapes)
    program = torch.export.export(layer, (first,), dynamic_shapes=({2: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(second), layer(second))


@pytest.mark.usefixtures("one_precision")
def test_a_loss_of_logits_is_exported_with_a_batch_that_changes(device: str) -> None:
    layer = gpunn.nn.LinearCrossEntropyLoss(4, 7).to(device)
    batches = [
        (torch.randn(n, 4, device=device), torch.randint(7, (n,), device=device)) for n in (5, 9)
    ]
    first, second = batches
    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, first, dynamic_shapes=(rows, rows))
    torch.testing.assert_close(program.module()(*second), layer(*second))


class Masked(torch.nn.Module):
    """As many bits as its input has elements."""

    def forward(self, x: Tensor) -> Tensor:
        return GF.dropout_mask(x.shape, 0.5, device=x.device)


@pytest.mark.usefixtures("one_precision")
def test_a_dropout_mask_is_exported_with_a_length_that_changes(device: str) -> None:
    first, second = (torch.randn(n, 4, device=device) for n in (5, 9))
    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Masked(), (first,), dynamic_shapes=(rows,))
    assert program.module()(second).shape == Masked()(second).shape == (5,)


class Windowed(torch.nn.Module):
    """Attention to as many positions back as half of the length."""

    def forward(self, x: Tensor) -> Tensor:
        window = x.shape[-2] // 2, 0
        y: Tensor = GF.scaled_dot_product_attention(x, x, x, window=window)
        return y


@pytest.mark.usefixtures("one_precision")
def test_a_window_follows_a_length_that_changes(device: str) -> None:
    """Exported, and compiled with gradients."""
    torch._dynamo.reset()
    layer, (first, *others) = Windowed(), (torch.randn(2, n, 4, device=device) for n in (6, 9, 13))
    lengths = ({1: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(layer, (first,), dynamic_shapes=lengths).module()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for x in others:
        torch.testing.assert_close(exported(x), layer(x))
        leaf = x.requires_grad_()
        values = [f(leaf).square().sum() for f in (compiled, layer)]
        torch.testing.assert_close(*(torch.autograd.grad(value, leaf) for value in values))


class Turned(torch.nn.Module):
    """Rotary embedding of one tensor, and its attention to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = gpunn.nn.RotaryEmbedding(4)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.rotary(x, x)
        y: Tensor = GF.scaled_dot_product_attention(query, key, x)
        return y


def test_rotary_tables_of_a_traced_model_are_not_kept(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer, x = gpunn.nn.RotaryEmbedding(4), torch.randn(1, 2, 3, 4, device=device)
    with gpunn.backend("auto"), FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(1, 2, 3, 4, device=device), torch.randn(1, 2, 3, 4, device=device))
    with gpunn.backend("auto"):
        torch.func.functionalize(lambda x: layer(x, x)[0])(x)
    query, _ = layer(x, x)
    expected, _ = gpunn.nn.RotaryEmbedding(4)(x, x)
    assert torch.equal(query, expected)
