"""accelerate and restore with models of torch's Transformer, and layers that only torch's calls."""

from __future__ import annotations

import copy

import pytest
import torch

import gpunn
from test_transformer import compare

pytestmark = [
    pytest.mark.usefixtures("one_path_of_torchs"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def test_accelerate_and_restore(device: str) -> None:
    """The same outputs, gradients and state_dict, in training and in inference; and back."""
    model = torch.nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True).to(device)
    theirs, state = copy.deepcopy(model), model.state_dict()
    inputs = {n: torch.randn(2, n_rows, 8, device=device) for n, n_rows in (("s", 3), ("t", 4))}
    dy = torch.randn(2, 4, 8, device=device)
    record = gpunn.accelerate(model)
    assert set(record.kept) == {name for name, _ in theirs.named_modules() if "out_proj" in name}
    assert type(model.encoder.layers[0].self_attn) is gpunn.nn.MultiheadAttention
    assert list(model.state_dict()) == list(state)
    errors, trace = compare(model, theirs, inputs, dy)
    assert all(error <= allowed for error, allowed in errors.values()), errors
    assert not trace.fallbacks
    with torch.no_grad():
        y, expected = (each.eval()(*inputs.values()) for each in (model, theirs))
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    gpunn.restore(model)
    types = [[type(module) for module in each.modules()] for each in (model, theirs)]
    assert types[0] == types[1]
    assert torch.equal(model(*inputs.values()), theirs(*inputs.values()))


def test_layers_inside_of_torchs_own_layer(device: str) -> None:
    """A subclass keeps torch's forward, which calls, or in inference reads, what is inside."""

    class Special(torch.nn.TransformerEncoderLayer):
        pass

    torch.backends.mha.set_fastpath_enabled(True)
    layer = Special(8, 2, 12, dropout=0.0, batch_first=True).to(device)
    x, plain = torch.randn(2, 4, 8, device=device), copy.deepcopy(layer)
    assert "fused path" in gpunn.accelerate(layer).kept[""]
    assert type(layer.self_attn) is gpunn.nn.MultiheadAttention
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_layers_inside_of_torchs_own_stack(device: str) -> None:
    """In inference it leaves padding out, in nested tensors that the layers leave to torch."""

    class Special(torch.nn.TransformerEncoder):
        pass

    torch.backends.mha.set_fastpath_enabled(True)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    stack = Special(layer, 2).to(device).eval()
    plain, x = copy.deepcopy(stack), torch.randn(2, 4, 8, device=device)
    padding = torch.tensor([[False] * 4, [False] * 2 + [True] * 2], device=device)
    gpunn.accelerate(stack)
    assert type(stack.layers[1]) is gpunn.nn.TransformerEncoderLayer
    with torch.no_grad(), gpunn.backend("auto"), gpunn.trace() as trace:
        y = stack(x, src_key_padding_mask=padding)
    assert {fallback.reason for fallback in trace.fallbacks} == {
        "a nested tensor that is not jagged"
    }
    with torch.no_grad():
        torch.testing.assert_close(y, plain(x, src_key_padding_mask=padding))
