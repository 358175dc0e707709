"""Multi-head attention under PyTorch's modes, of sequences of different lengths, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from kit import launched
from test_multihead_attention import batch, layers, results

pytestmark = pytest.mark.usefixtures("one_path_of_torchs")


def test_backward_again_and_a_gradient_penalty(device: str) -> None:
    ours, theirs = layers(device, 8, 2)
    x, dy, _ = batch(device)
    x.requires_grad_()
    y = ours(x, x, x)[0]
    first, again = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    penalties = []
    for layer in (ours, theirs):
        y, weights = layer(x, x, x)
        loss = (y * dy).sum() + weights.pow(2).sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        penalties.append(torch.autograd.grad(dx.norm(), [x, layer.in_proj_weight]))
    for mine, torchs in zip(*penalties, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(need_weights: bool, device: str) -> None:
    ours, theirs = layers(device, 8, 2, add_zero_attn=True)
    x, _, _ = batch(device)
    mask = torch.randn(5, 5, device=device)
    call = {"attn_mask": mask, "need_weights": need_weights}
    with torch.autocast(device, torch.bfloat16):
        found = [layer(x, x, x, **call) for layer in (ours, theirs)]
    for mine, torchs in zip(*found, strict=True):
        assert mine is torchs is None or mine.dtype == torchs.dtype
        torch.testing.assert_close(mine, torchs, rtol=3e-2, atol=3e-2)


def test_compiles(device: str) -> None:
    torch._dynamo.reset()
    layer, _ = layers(device, 8, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2], device=device)
    x, *upstream = batch(device)
    found = [
        results(each, {"query": x}, upstream, key_padding_mask=padding)
        for each in (compiled, layer)
    ]
    for mine, eager in zip(*(each.values() for each in found), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_backend_is_torchs_function(batch_first: bool, device: str) -> None:
    ours, theirs = layers(device, 8, 2, batch_first=batch_first)
    x, memory = (torch.randn(shape, device=device) for shape in ((2, 3, 8), (2, 3, 8)))
    with gpunn.backend("torch"), gpunn.trace() as trace:
        for tensors in ((x, x, x), (x, memory, memory), (x[0], x[0], x[0])):
            for mine, torchs in zip(ours(*tensors), theirs(*tensors), strict=True):
                assert torch.equal(mine, torchs)
    assert {fallback.reason for fallback in trace.fallbacks} == {"backend('torch')"}


def test_what_is_left_to_torch_is_in_the_trace(device: str) -> None:
    wide, x = torch.randn(3, 2, 264, device=device), torch.randn(3, 2, 8, device=device)
    ours, theirs = layers(device, 264, 1)
    layer, _ = layers(device, 8, 2)
    keys = torch.randn(4, 4, 4, device=device)
    call: Any = (
        x, x, x, 8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
        layer.out_proj.weight, layer.out_proj.bias,
    )  # fmt: skip
    static: Any = {"static_k": keys, "static_v": keys}
    with gpunn.backend("auto"), gpunn.trace() as trace:
        assert torch.equal(ours(wide, wide, wide)[0], theirs(wide, wide, wide)[0])
        y, _ = GF.multi_head_attention_forward(*call, **static)
    assert torch.equal(y, F.multi_head_attention_forward(*call, **static)[0])
    reasons = [fallback.reason for fallback in trace.fallbacks]
    assert reasons == ["no kernel for heads of size 264, over 256", "static keys or values"]
    with pytest.raises(RuntimeError, match="no kernel for heads of size 264"):
        ours(wide, wide, wide)


def test_symbolic_tracing(device: str) -> None:
    layer, theirs = layers(device, 8, 2)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(Itself(layer)))
    x, _, _ = batch(device)
    torch.testing.assert_close(traced(x), theirs(x, x, x)[0])


class Itself(torch.nn.Module):
    """Self-attention as a layer of one argument."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x, x, x)[0]


# --- sequences of different lengths ---


def test_jagged_sequences(device: str) -> None:
    """As each sequence alone, in training too; keys and values of another length."""
    layer, _ = layers(device, 8, 2, batch_first=True)
    query, memory = (
        torch.nested.nested_tensor(
            [torch.randn(n, 8, device=device) for n in lengths], layout=torch.jagged
        ).requires_grad_()
        for lengths in ((3, 6), (5, 2))
    )
    for memories, is_causal in ((query, False), (query, True), (memory, False)):
        tensors = query, memories, memories
        with gpunn.trace() as trace:
            y = layer(*tensors, need_weights=False, is_causal=is_causal)[0]
        launched(trace, "attention_forward", "linear_forward")
        alone = []
        for each in zip(*(t.unbind() for t in tensors), strict=True):
            n = len(each[0])
            mask = torch.ones(n, n, device=device).triu(1) > 0 if is_causal else None
            alone.append(layer(*each, need_weights=False, attn_mask=mask)[0])
        for mine, expected in zip(y.unbind(), alone, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        dy = torch.randn_like(y.values())
        wanted = [query, *layer.parameters()]
        gradients = [
            torch.autograd.grad(output, wanted, dy) for output in (y.values(), torch.cat(alone))
        ]
        for mine, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    layer.dropout = 1.0
    y = layer(query, query, query, need_weights=False)[0].values()
    torch.testing.assert_close(y, layer.out_proj.bias.expand_as(y))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_nested_tensors_that_are_not_jagged_are_torchs(device: str) -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    layer, theirs = layers(device, 8, 2, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(n, 8, device=device) for n in (3, 6)])
    with gpunn.backend("auto"), gpunn.trace() as trace:
        with torch.no_grad():
            y = layer.eval()(x, x, x)[0]
        with pytest.raises(AssertionError, match="outside of its fast path"):
            layer(x, x, x)
    with torch.no_grad():
        expected = theirs.eval()(x, x, x)[0]
    for mine, torchs in zip(y.unbind(), expected.unbind(), strict=True):
        assert torch.equal(mine, torchs)
    assert [f.reason for f in trace.fallbacks] == ["a nested tensor that is not jagged"] * 2


# --- refusals ---

X = torch.randn(5, 2, 8)
PADDING, MASK = torch.zeros(2, 5) > 0, torch.zeros(5, 5) > 0


@pytest.mark.parametrize(
    ("tensors", "call", "error", "message"),
    [
        ((X[None],) * 3, {}, AssertionError, "query, key, value"),
        ((X, X[0], X[0]), {}, AssertionError, "query, key, value"),
        ((X[..., :4],) * 3, {}, AssertionError, "query: multi-head attention expects 8"),
        ((X, X, X[:3]), {}, AssertionError, "value: multi-head attention expects"),
        ((X, X[:, :1], X[:, :1]), {}, RuntimeError, "key: multi-head attention expects 2"),
        ((X.double(),) * 3, {}, RuntimeError, "in_proj_weight"),
        ((X, X.double(), X.double()), {}, RuntimeError, "key: multi-head attention expects"),
        ((X,) * 3, {"key_padding_mask": PADDING[:1]}, AssertionError, "key_padding_mask"),
        ((X,) * 3, {"key_padding_mask": PADDING[0]}, AssertionError, "key_padding_mask"),
        ((X,) * 3, {"key_padding_mask": PADDING.long()}, AssertionError, "key_padding_mask"),
        ((X,) * 3, {"attn_mask": MASK.long()}, AssertionError, "attn_mask"),
        ((X,) * 3, {"attn_mask": MASK[0]}, AssertionError, "attn_mask"),
        ((X,) * 3, {"attn_mask": MASK[:4]}, RuntimeError, "attn_mask"),
        ((X,) * 3, {"attn_mask": MASK[None]}, RuntimeError, "attn_mask"),
        ((X[:, 0],) * 3, {"attn_mask": MASK[None]}, AssertionError, "attn_mask"),
        ((X,) * 3, {"is_causal": True}, RuntimeError, "is_causal"),
    ],
)
def test_refuses_as_torch_does(
    tensors: tuple[torch.Tensor, ...], call: Any, error: type[Exception], message: str
) -> None:
    ours, theirs = layers("cpu", 8, 2)
    with gpunn.trace() as trace, pytest.raises(error, match=message):
        ours(*tensors, **call)
    assert not trace.launches
    with pytest.raises(error):
        theirs(*tensors, **call)


def test_other_refusals(device: str) -> None:
    layer, _ = layers(device, 8, 2)
    x = X.to(device)
    for call in ({"attn_mask": [[0.0]]}, {"key_padding_mask": [[0.0]]}):
        with pytest.raises(TypeError, match="expected a tensor, got list"):
            layer(x, x, x, **call)
    with pytest.raises(TypeError, match="query: multi-head attention expects a tensor"):
        layer(None, x, x)
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        y, _ = layer(x, x, x, PADDING.to(device), attn_mask=MASK.float().to(device))
    torch.testing.assert_close(y, layer(x, x, x)[0])
    separate, _ = layers(device, 8, 2, kdim=6)
    with pytest.raises(AssertionError, match="k_proj_weight: multi-head attention expects"):
        separate(x, x, x)
    layer.bias_k = torch.nn.Parameter(torch.zeros(1, 1, 8, device=device))
    with pytest.raises(AssertionError, match="bias_k, bias_v"):
        layer(x, x, x)


def test_jagged_sequences_are_refused_with_more(device: str) -> None:
    x: Any = torch.nested.nested_tensor(
        [torch.randn(n, 8, device=device) for n in (3, 6)], layout=torch.jagged
    )
    layer, _ = layers(device, 8, 2, batch_first=True)
    dense = torch.randn(2, 6, 8, device=device)
    with pytest.raises(AssertionError, match="takes no masks, returns no weights"):
        layer(x, x, x)
    with pytest.raises(AssertionError, match="value: multi-head attention expects three jagged"):
        layer(x, x, dense, need_weights=False)
    with pytest.raises(AssertionError, match=r"value: .* the sequences of key"):
        layer(x, x, torch.nested.nested_tensor(
            [torch.randn(n, 8, device=device) for n in (6, 3)], layout=torch.jagged
        ), need_weights=False)  # fmt: skip
    layer.batch_first = False
    with pytest.raises(AssertionError, match="expects batch_first"):
        layer(x, x, x, need_weights=False)
