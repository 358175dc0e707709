"""Multi-head attention beside torch's module with the same weights, on calls that are drawn."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gpunn
import gpunn.functional as GF
from drawing import drawing
from gpunn.functional import multihead_attention
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.reference.closeness import judge
from kit import LAYOUTS, as_numpy, each_dtype

N_CHUNKS = 4
N_EACH = 7 if INTERPRETING else 4

pytestmark = pytest.mark.usefixtures("one_path_of_torchs")


def layers(device: str, *arguments: Any, **keywords: Any) -> tuple[Any, Any]:
    """Ours and torch's with the same parameters, of which none is zero as torch's biases are."""
    ours = gpunn.nn.MultiheadAttention(*arguments, **keywords).to(device)
    theirs = torch.nn.MultiheadAttention(*arguments, **keywords).to(device)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def results(
    layer: Any, inputs: dict[str, torch.Tensor], upstream: list[torch.Tensor], **call: Any
) -> dict[str, torch.Tensor]:
    """Output, probabilities, and the gradients of inputs and parameters, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    q = leaves["query"]
    k = leaves.get("key", q)
    found = dict(zip(("y", "weights"), layer(q, k, leaves.get("value", k), **call), strict=True))
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    wanted = leaves | dict(layer.named_parameters())
    pairs = list(zip(found.values(), upstream, strict=False))  # of weights there may be none
    dys = [dy.to(y.dtype) for y, dy in pairs]
    gradients = torch.autograd.grad([y for y, _ in pairs], list(wanted.values()), dys)
    return {**found, **{f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}}


@dataclass
class Problem:
    """A layer and a call of it."""

    layer: dict[str, Any]
    batch: int | None
    n_queries: int
    n_keys: int
    inputs: str
    """Self-attention of "one" tensor, of queries to a "memory", or of "three" tensors."""
    kind: str
    """Of its masks: "boolean" or "float"."""
    padding: bool
    mask: str | None
    """Of all heads ("flat"), of "each" head of each sequence, or "causal"."""
    call: dict[str, Any]
    looked_at: bool
    """Whether the probabilities get a gradient, where they are returned."""
    layouts: tuple[str, str]
    """Of query and of the upstream gradient."""


LAYOUT_NAMES = ("contiguous", "transposed", "every second element", "not 16-byte aligned")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A call with a result that is not empty, and no row of which everything is ruled out."""
    head, num_heads = draw(st.sampled_from(((4, 2), (8, 1), (3, 3), (3, 4), (5, 2))))
    inputs = draw(st.sampled_from(("one", "one", "memory", "three")))
    sizes = st.sampled_from((None, 6, 7))
    layer = {
        "embed_dim": head * num_heads,
        "num_heads": num_heads,
        "bias": draw(st.booleans()),
        "add_bias_kv": draw(st.integers(0, 3)) == 0,
        "add_zero_attn": draw(st.integers(0, 3)) == 0,
        "kdim": draw(sizes) if inputs == "three" else None,
        "vdim": draw(sizes) if inputs == "three" else None,
        "batch_first": draw(st.booleans()),
    }
    mask = draw(st.sampled_from((None, None, "flat", "each", "causal", "causal")))
    n_queries = draw(st.integers(1, 9))
    return Problem(
        layer,
        batch=draw(st.sampled_from((None, 1, 2, 2))),
        n_queries=n_queries,
        n_keys=n_queries if inputs == "one" else draw(st.integers(1, 9)),
        inputs=inputs,
        kind=draw(st.sampled_from(("boolean", "float"))),
        padding=draw(st.booleans()),
        mask=mask,
        call={
            "need_weights": draw(st.booleans()),
            "average_attn_weights": draw(st.booleans()),
            "is_causal": mask == "causal" and draw(st.booleans()),
        },
        looked_at=draw(st.booleans()),
        layouts=(draw(st.sampled_from(LAYOUT_NAMES)), draw(st.sampled_from(LAYOUT_NAMES))),
    )


def masks_of(p: Problem, device: str) -> dict[str, torch.Tensor]:
    """True, or a large negative number beside small ones, where a key is not seen."""
    n = (1 if p.batch is None else p.batch) * p.layer["num_heads"]
    pairs = p.n_queries, p.n_keys
    hidden = {}
    shape: tuple[int, ...]
    if p.padding:
        shape = pairs[1:] if p.batch is None else (p.batch, p.n_keys)
        hidden["key_padding_mask"] = torch.rand(shape, device=device) < 0.4
    if p.mask == "causal":
        hidden["attn_mask"] = torch.ones(pairs, device=device).triu(1) > 0
    elif p.mask is not None:
        shape = pairs if p.mask == "flat" else (n, *pairs)
        hidden["attn_mask"] = torch.rand(shape, device=device) < 0.4
    for name, mask in hidden.items():
        mask[..., 0] = False
        if p.kind == "float":
            noise = 0.0 if p.call["is_causal"] else torch.randn(mask.shape, device=device)
            hidden[name] = (torch.zeros(mask.shape, device=device) + noise).masked_fill(
                mask, -torch.inf
            )
    return hidden


def operands_of(p: Problem, device: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Inputs by name, and upstream gradients of the output and of the probabilities."""

    def sequences(length: int, features: int, layout: str = "contiguous") -> torch.Tensor:
        shape: tuple[int, ...] = (length, features)
        if p.batch is not None:
            shape = (p.batch, *shape) if p.layer["batch_first"] else (length, p.batch, features)
        return LAYOUTS[layout][2](torch.randn(shape, device=device))

    width = p.layer["embed_dim"]
    inputs = {"query": sequences(p.n_queries, width, p.layouts[0])}
    if p.inputs != "one":
        inputs["key"] = sequences(p.n_keys, p.layer["kdim"] or width)
    if p.inputs == "three":
        inputs["value"] = sequences(p.n_keys, p.layer["vdim"] or width)
    n_keys = p.n_keys + p.layer["add_bias_kv"] + p.layer["add_zero_attn"]
    shape: tuple[int, ...] = () if p.batch is None else (p.batch,)
    shape += () if p.call["average_attn_weights"] else (p.layer["num_heads"],)
    dweights = torch.randn((*shape, p.n_queries, n_keys), device=device)
    return inputs, [sequences(p.n_queries, width, p.layouts[1])] + [dweights] * p.looked_at


def judged(
    got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], baseline: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """Errors, and what is allowed: by the rule of ``closeness.py``, or, of terms that may cancel,
    two units in the last place of the largest result.
    """
    assert list(got) == list(exact) == list(baseline)
    largest = max(float(tensor.detach().abs().max()) for tensor in exact.values())
    shown, found = 0, {}
    for name, mine in got.items():
        assert mine.dtype == baseline[name].dtype
        eps = torch.finfo(mine.dtype).eps
        verdict = judge(as_numpy(mine), as_numpy(exact[name]), as_numpy(baseline[name]), eps)
        shown += verdict.vacuous is None
        found[name] = verdict.error, max(verdict.allowed, 2 * eps * largest)
    assert shown >= 4, "too few results that show anything"
    return found


def agree(
    got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], baseline: dict[str, torch.Tensor]
) -> None:
    """No error is larger than allowed."""
    for name, (error, allowed) in judged(got, exact, baseline).items():
        assert error <= allowed, f"{name}: {error:.3e}, allowed {allowed:.3e}"


def compare(
    ours: Any, theirs: Any, inputs: dict[str, torch.Tensor], upstream: list[torch.Tensor],
    **call: Any,
) -> gpunn.Trace:  # fmt: skip
    """Everything that the layers give, and what ran."""
    double = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value for name, value in call.items()
    }  # fmt: skip
    with gpunn.trace() as trace:
        got = results(ours, inputs, upstream, **call)
    exact = results(
        copy.deepcopy(theirs).double(), {name: x.double() for name, x in inputs.items()},
        [dy.double() for dy in upstream], **double,
    )  # fmt: skip
    agree(got, exact, results(theirs, inputs, upstream, **call))
    return trace


@pytest.mark.parametrize("chunk", range(N_CHUNKS))
def test_drawn_calls(chunk: int, device: str) -> None:
    @drawing(chunk, N_EACH)
    @given(problem=problems())
    def holds(problem: Problem) -> None:
        ours, theirs = layers(device, **problem.layer)
        inputs, upstream = operands_of(problem, device)
        call = problem.call | masks_of(problem, device)
        trace = compare(ours, theirs, inputs, upstream, **call)
        names = [record.operator for record in trace.launches]
        n_products = {"one": 1, "memory": 2, "three": 3}[problem.inputs]
        assert names.count("linear_forward") == n_products + 1
        assert names.count("attention_forward") == 1
        assert names.count("attention_weights") == problem.call["need_weights"]
        looked_at = problem.call["need_weights"] and problem.looked_at
        reasons = ["a gradient: PyTorch's operations"] * looked_at
        assert [fallback.reason for fallback in trace.fallbacks] == reasons

    holds()


# --- what a call of one kind shows ---


def batch(device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """An input (5, 2, 8) and two upstream gradients, of outputs and of averaged probabilities."""
    shapes = (5, 2, 8), (5, 2, 8), (2, 5, 5)
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


@each_dtype
@pytest.mark.parametrize("need_weights", [False, True])
def test_dtypes(need_weights: bool, dtype: torch.dtype, device: str) -> None:
    """With both keys that can be added, in their order."""
    ours, theirs = (layer.to(dtype) for layer in layers(device, 8, 2, 0.0, True, True, True))
    x, dy, _ = batch(device, dtype)
    mask = torch.rand(4, 5, 5, device=device) < 0.3
    compare(ours, theirs, {"query": x}, [dy], attn_mask=mask, need_weights=need_weights)


@pytest.mark.parametrize("kind", ["boolean", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_of_which_everything_is_ruled_out(need_weights: bool, kind: str, device: str) -> None:
    """0 where torch's function gives 0, NaN where its softmax does; the other sequence is right."""
    ours, theirs = layers(device, 8, 2)
    x, dy, dweights = batch(device)
    padding = torch.tensor([[True] * 5, [False] * 4 + [True]], device=device)
    mask = padding.float().masked_fill(padding, -torch.inf) if kind == "float" else padding
    call = {"key_padding_mask": mask, "need_weights": need_weights}
    got, expected = (
        results(layer, {"query": x}, [dy, dweights], **call) for layer in (ours, theirs)
    )
    assert expected["y"].isnan().any() == need_weights
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_learnt_mask(need_weights: bool, device: str) -> None:
    """Has its gradient, summed over what repeats it, also beside padding."""
    ours, theirs = layers(device, 8, 2, batch_first=True)
    x, dy = (torch.randn(2, 5, 8, device=device) for _ in range(2))
    padding = torch.tensor([[0.0] * 5, [0.0] * 3 + [-torch.inf] * 2], device=device)
    for shape in ((5, 5), (4, 5, 5)):
        bias = torch.randn(shape, device=device).requires_grad_()
        call = {"attn_mask": bias, "key_padding_mask": padding, "need_weights": need_weights}
        gradients = []
        for layer in (ours, theirs):
            y = layer(x, x, x, **call)[0]
            gradients.append(torch.autograd.grad(y, bias, dy)[0])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_learnt_mask_is_as_fine_with_weights_as_without(device: str) -> None:
    """In float32 beside 16 bits, where attention itself computes all in float32."""
    layer = layers(device, 8, 2)[0].half()
    x, dy, _ = batch(device, torch.float16)
    bias, found = torch.randn(5, 5, device=device).requires_grad_(), []
    for need_weights in (False, True):
        y = layer(x, x, x, attn_mask=bias, need_weights=need_weights)[0]
        found.append(torch.autograd.grad(y, bias, dy)[0])
    assert torch.equal(*found)


def test_dropout_is_that_of_the_functions(device: str) -> None:
    """The same bits, and the weights that are returned are those that v was multiplied by."""
    layer, _ = layers(device, 8, 2, dropout=0.4, batch_first=True)
    x, dy = (torch.randn(2, 5, 8, device=device) for _ in range(2))
    x.requires_grad_()
    parts = GF.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    q, k, v = (GF.split_heads(part, 2) for part in parts)
    wanted = [x, *layer.parameters()]
    for need_weights in (False, True):
        torch.manual_seed(3)
        y, weights = layer(x, x, x, need_weights=need_weights, average_attn_weights=False)
        torch.manual_seed(3)
        heads = GF.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
        expected = GF.linear(GF.merge_heads(heads), layer.out_proj.weight, layer.out_proj.bias)
        gradients = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        for mine, theirs in zip(
            (y, *gradients), (expected, *torch.autograd.grad(expected, wanted, dy)), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        parts = GF.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
        q, k, v = (GF.split_heads(part, 2) for part in parts)
    assert 0 < (weights == 0).double().mean() < 1
    again = GF.linear(GF.merge_heads(weights @ v), layer.out_proj.weight, layer.out_proj.bias)
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-5)
    kept = torch.softmax(q @ k.mT / 2, -1) * (weights != 0) / 0.6
    dweights = torch.randn_like(weights)
    for mine, theirs in zip(
        torch.autograd.grad(weights, wanted[:2], dweights),
        torch.autograd.grad(kept, wanted[:2], dweights),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert (layer.eval()(x, x, x)[1] != 0).all()


def test_masks_are_not_larger_than_they_are_made(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What attention is given: no mask is repeated for each head, none where is_causal says all."""
    seen: list[tuple[Any, ...]] = []

    def spy(q: Any, k: Any, v: Any, mask: Any, *rules: Any, window: Any) -> Any:
        strides = {tensor.stride(-1) for tensor in (q, k, v)}
        seen.append((mask if mask is None else tuple(mask.shape), rules[1], window, strides))
        return q

    monkeypatch.setattr(multihead_attention, "scaled_dot_product_attention", spy)
    layer, _ = layers(device, 8, 2)
    x = torch.randn(5, 3, 8, device=device)
    padding = torch.zeros(3, 5, device=device) > 0
    causal = torch.ones(5, 5, device=device).triu(1) > 0
    for call in (
        {"key_padding_mask": padding},
        {"attn_mask": causal},
        {"attn_mask": causal, "key_padding_mask": padding},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
    ):
        y, _ = layer(x, x, x, need_weights=False, **call)
        assert y.is_contiguous()
    assert seen == [
        ((3, 1, 1, 5), False, None, {1}),
        ((5, 5), False, None, {1}),
        ((3, 1, 5, 5), False, None, {1}),
        (None, True, None, {1}),
        ((3, 1, 1, 5), False, (None, 0), {1}),
    ]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_mask_is_not_read(padded: bool, need_weights: bool, device: str) -> None:
    """Where is_causal says what is in it: the numbers may be any."""
    layer, theirs = layers(device, 8, 2)
    x, _, _ = batch(device)
    hidden = torch.ones(5, 5, device=device).triu(1) > 0
    mask = torch.zeros(5, 5, device=device).masked_fill(hidden, -torch.inf)
    call: dict[str, Any] = {"need_weights": need_weights}
    if padded:
        call["key_padding_mask"] = torch.zeros(2, 5, device=device)
        call["key_padding_mask"][1, 3:] = -torch.inf
    wrong = torch.full_like(mask, torch.nan)
    found = layer(x, x, x, attn_mask=wrong, is_causal=True, **call)
    for mine, torchs in zip(found, theirs(x, x, x, attn_mask=mask, **call), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)


def test_heads_are_views(device: str) -> None:
    x = torch.randn(3, 5, 8, device=device)
    heads = GF.split_heads(x, 2)
    assert heads.shape == (3, 2, 5, 4)
    assert torch.equal(heads[1, 1, 2], x[1, 2, 4:])
    merged = GF.merge_heads(heads)
    assert torch.equal(merged, x)
    assert heads.data_ptr() == merged.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("sizes", [(0, 3, 2), (3, 0, 2), (3, 4, 0)])
@pytest.mark.parametrize("need_weights", [False, True])
def test_no_elements(sizes: tuple[int, int, int], need_weights: bool, device: str) -> None:
    n_queries, n_keys, n = sizes
    ours, theirs = layers(device, 8, 2)
    query, key = (torch.randn(rows, n, 8, device=device) for rows in (n_queries, n_keys))
    query.requires_grad_()
    y, weights = ours(query, key, key, need_weights=need_weights)
    expected, torchs = theirs(query, key, key, need_weights=need_weights)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert weights is torchs is None or weights.shape == torchs.shape
    assert torch.autograd.grad(y.sum(), query)[0].shape == query.shape
