"""Attention: values and gradients against the NumPy reference, in the configurations it chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.checks.comparison import any_algorithm
from gpunn.kernels.philox import draw_seed
from gpunn.reference.attention import (
    Rules,
    attention_backward,
    attention_forward,
    attention_probabilities,
)
from gpunn.reference.dropout import kept_elements
from kit import as_numpy, check_gradients, each_dtype, launched, layouts

OPERATORS = ("attention_forward", "attention_backward")


def operands(
    device: str,
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, int] = (37, 21),
    heads: tuple[int, int] = (2, 2),
    sizes: tuple[int, int] = (16, 16),
) -> list[torch.Tensor]:
    """query, key and value of two batches, and an upstream gradient."""
    (n_queries, n_keys), (n_heads, n_key_heads), (head, head_v) = lengths, heads, sizes
    shapes = [
        (2, n_heads, n_queries, head), (2, n_key_heads, n_keys, head),
        (2, n_key_heads, n_keys, head_v), (2, n_heads, n_queries, head_v),
    ]  # fmt: skip
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def gradients_of(
    function: Any, tensors: list[torch.Tensor], mask: torch.Tensor | None, dy: torch.Tensor
) -> list[torch.Tensor]:
    """Value and gradients of query, key, value and an additive mask."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().requires_grad_()
        wanted = [*leaves, mask]
    else:
        wanted = leaves
    y = function(*leaves, mask)
    return [y, *torch.autograd.grad(y, wanted, dy)]


def assert_right(
    tensors: list[torch.Tensor],
    mask: torch.Tensor | None = None,
    *,
    rules: Rules | None = None,
    factors: torch.Tensor | None = None,
    by_torch: Any = None,
    **arguments: Any,
) -> gpunn.Trace:
    """Values and gradients, no worse than twice torch's own error."""
    *tensors, dy = tensors
    rules = rules or Rules(tensors[0].shape[-1] ** -0.5)
    with gpunn.trace() as trace:
        got = gradients_of(
            lambda q, k, v, m: GF.scaled_dot_product_attention(q, k, v, m, **arguments),
            tensors, mask, dy,
        )  # fmt: skip
    launched(trace, *OPERATORS)
    theirs = by_torch or (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, **arguments)
    )
    with any_algorithm():
        baseline = gradients_of(theirs, tensors, mask, dy)
    bias = None
    if mask is not None:
        is_boolean = mask.dtype == torch.bool
        bias = as_numpy(torch.zeros(()).where(mask.cpu(), -torch.inf) if is_boolean else mask)
    arrays = [as_numpy(t) for t in tensors]
    kept = None if factors is None else as_numpy(factors)
    q, k, v = arrays
    y = attention_forward(q, k, v, bias, None, kept, rules)
    found = attention_backward(as_numpy(dy), q, k, v, bias, None, kept, rules)
    truths = [y, *found[: len(got) - 1]]
    for name, mine, truth, torchs in zip(
        ("y", "dq", "dk", "dv", "dmask"), got, truths, baseline, strict=False
    ):
        assert truth is not None
        assert_accurate(mine, truth, torchs, name)
    return trace


SHAPES: dict[str, dict[str, Any]] = {
    "one query, one key less than a tile": {"lengths": (1, 63)},
    "one more than a tile of keys": {"lengths": (5, 65)},
    "several tiles of queries and keys": {"lengths": (140, 150), "heads": (1, 1)},
    "heads of one number": {"sizes": (1, 1)},
    "heads that fill no tile, values wider": {"sizes": (20, 40)},
    "values narrower": {"sizes": (40, 7)},
    "the widest heads": {"sizes": (256, 256), "heads": (1, 1)},
}


@each_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    assert_right(operands(device, dtype, **shape))


@each_dtype
def test_causal(dtype: torch.dtype, device: str) -> None:
    tensors = operands(device, dtype, (40, 70))
    assert_right(tensors, rules=Rules(0.25, after=0), is_causal=True)


@each_dtype
def test_causal_aligned_at_the_lower_right(dtype: torch.dtype, device: str) -> None:
    """Of more queries than keys, the first see nothing and get 0."""
    tensors = operands(device, dtype, (40, 30))
    keep = torch.ones(40, 30, dtype=torch.bool, device=device).tril(-10)
    assert_right(
        tensors, rules=Rules(0.25, after=0, lower_right=True), is_causal=True,
        alignment="lower_right",
        by_torch=lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, keep),
    )  # fmt: skip
    query, key, value, _ = tensors
    y = GF.scaled_dot_product_attention(query, key, value, is_causal=True, alignment="lower_right")
    assert not y[:, :, :10].any()
    assert y[:, :, 10:].all()


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_torchs_causal_bias_is_a_rule(device: str) -> None:
    query, key, value, _ = operands(device)
    for bias, alignment in (
        (causal_upper_left(37, 21), "upper_left"), (causal_lower_right(37, 21), "lower_right"),
    ):  # fmt: skip
        got = GF.scaled_dot_product_attention(query, key, value, bias)
        rule: Any = dict(is_causal=True, alignment=alignment)
        assert torch.equal(got, GF.scaled_dot_product_attention(query, key, value, **rule))


@each_dtype
@pytest.mark.parametrize("n_key_heads", [1, 2])
def test_grouped_heads(n_key_heads: int, dtype: torch.dtype, device: str) -> None:
    """Nothing of the size of the repeated keys is made."""
    tensors = operands(device, dtype, heads=(4, n_key_heads), lengths=(9, 21))
    assert_right(tensors, enable_gqa=True)


def windowed(rules: Rules, n_queries: int, n_keys: int, device: str) -> torch.Tensor:
    """The same as a mask."""
    offset = n_keys - n_queries if rules.lower_right else 0
    own = torch.arange(n_queries, device=device)[:, None] + offset
    distance = torch.arange(n_keys, device=device) - own
    assert rules.before is not None
    assert rules.after is not None
    return (distance >= -rules.before) & (distance <= rules.after)


@each_dtype
@pytest.mark.parametrize(
    ("rules", "lengths"),
    [
        (Rules(0.25, before=5, after=0), (70, 70)),
        (Rules(0.25, before=20, after=9, lower_right=True), (30, 80)),
        (Rules(0.25, before=1, after=0), (33, 33)),
        (Rules(0.25, before=70, after=3), (130, 140)),
    ],
)
def test_windows(rules: Rules, lengths: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Of tiles with none, some and all of their pairs in the window."""
    keep = windowed(rules, *lengths, device)
    alignment = "lower_right" if rules.lower_right else "upper_left"
    assert_right(
        operands(device, dtype, lengths, (1, 1)), rules=rules, alignment=alignment,
        window=(rules.before, rules.after),
        by_torch=lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, keep),
    )  # fmt: skip


@each_dtype
def test_softcap(dtype: torch.dtype, device: str) -> None:
    def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        return torch.softmax(0.5 * torch.tanh(q @ k.mT * 0.25 / 0.5), -1) @ v

    tensors = operands(device, dtype)
    assert_right(tensors, rules=Rules(0.25, softcap=0.5), softcap=0.5, by_torch=by_torch)


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_alibi(shape: tuple[int, ...], device: str) -> None:
    query, key, value, _ = operands(device)
    slopes = torch.rand(shape, device=device)
    with gpunn.trace() as trace:
        y, lse = GF.scaled_dot_product_attention(
            query, key, value, alibi_slopes=slopes, return_lse=True
        )
        weights = GF.attention_weights(query, key, alibi_slopes=slopes, heads=[1, 0])
        saved = GF.attention_weights(query, key, lse, alibi_slopes=slopes)
    launched(trace, "attention_forward", "attention_weights")
    q, k, v, exact_slopes = (as_numpy(t) for t in (query, key, value, slopes))
    rules = Rules(0.25)
    exact = attention_forward(q, k, v, None, exact_slopes, None, rules)
    p, exact_lse = attention_probabilities(q, k, None, exact_slopes, rules)
    distance = (torch.arange(21, device=device) - torch.arange(37, device=device)[:, None]).abs()
    bias = -slopes.view(-1, 2, 1, 1) * distance
    baseline = F.scaled_dot_product_attention(query, key, value, bias)
    scores = query @ key.mT * 0.25 + bias
    assert_accurate(y, exact, baseline)
    assert_accurate(lse, exact_lse, torch.logsumexp(scores, -1))
    torch.testing.assert_close(saved[:, [1, 0]], weights, rtol=1e-5, atol=1e-6)
    assert_accurate(weights, p[:, [1, 0]], torch.softmax(scores, -1)[:, [1, 0]])


@each_dtype
def test_dropout_is_that_of_the_packed_mask(dtype: torch.dtype, device: str) -> None:
    """Bit for bit: with values that are the identity, what is seen is the probabilities."""
    shape = (2, 2, 37, 21)
    torch.manual_seed(5)
    seed = int(draw_seed(torch.device(device)))
    torch.manual_seed(5)
    packed = GF.dropout_mask(shape, 0.4, device=device)
    bits = packed[:, None] >> torch.arange(8, device=device, dtype=torch.uint8) & 1
    kept = bits.flatten()[: 2 * 2 * 37 * 21].view(shape).bool()
    assert torch.equal(kept.cpu(), torch.from_numpy(kept_elements(seed, shape, 0.4)))
    factors = kept / 0.6
    query, key, _, _ = operands(device, dtype)
    value = torch.eye(21, device=device, dtype=dtype).expand(2, 2, 21, 21).contiguous()
    torch.manual_seed(5)
    y = GF.scaled_dot_product_attention(query, key, value, dropout_p=0.4)
    assert torch.equal(y != 0, kept)
    dy = torch.randn(shape).to(device, dtype)

    def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        return (torch.softmax(q @ k.mT * 0.25, -1) * factors.to(dtype)) @ v

    torch.manual_seed(5)
    assert_right([query, key, value, dy], factors=factors, by_torch=by_torch, dropout_p=0.4)


def test_every_probability_may_be_dropped(device: str) -> None:
    query, key, value, _ = operands(device)
    assert not GF.scaled_dot_product_attention(query, key, value, dropout_p=1.0).any()


@each_dtype
def test_layouts_of_inputs_and_gradients(dtype: torch.dtype, device: str) -> None:
    query, key, value, dy = operands(device, dtype, (19, 17), (2, 2), (8, 8))
    for position, tensor in enumerate((query, key, value, dy)):
        for name, laid_out in layouts(tensor):
            if "expanded" in name and position in (1, 2):
                continue  # of keys or values that are all alike, gradients are 0
            given = [query, key, value, dy]
            given[position] = laid_out
            assert_right(given)


def test_the_result_has_the_order_of_the_query(device: str) -> None:
    """As (batch, length, heads, size), what follows attention is then a view of it."""
    query = torch.randn(2, 9, 3, 8, device=device).transpose(1, 2).requires_grad_()
    y = GF.scaled_dot_product_attention(query, query, query)
    assert y.stride() == query.stride()
    (dq,) = torch.autograd.grad(y.sum(), query)
    assert dq.stride() == query.stride()


LEADING: dict[str, list[tuple[int, ...]]] = {
    "none": [(5, 8), (7, 8), (7, 4)],
    "heads alone": [(3, 5, 8), (3, 7, 8), (3, 7, 4)],
    "three": [(2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 4)],
    "broadcast": [(2, 1, 3, 5, 8), (4, 3, 7, 8), (1, 1, 7, 4)],
    "one key head": [(2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 4)],
    "none for keys": [(2, 3, 5, 8), (7, 8), (7, 4)],
}


@pytest.mark.parametrize("shapes", LEADING.values(), ids=LEADING.keys())
def test_leading_dimensions(shapes: list[tuple[int, ...]], device: str) -> None:
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    query, key, value = tensors
    mask = torch.randn(5, 7, device=device)
    expected = torch.softmax(query @ key.mT / 8**0.5 + mask, -1) @ value
    dy = torch.randn_like(expected)
    ours = gradients_of(GF.scaled_dot_product_attention, tensors, mask, dy)
    theirs = gradients_of(
        lambda q, k, v, m: torch.softmax(q @ k.mT / 8**0.5 + m, -1) @ v, tensors, mask, dy
    )
    for mine, torchs in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True},
        {"window": (2, 1), "softcap": 1.5, "scale": 0.7},
        {"dropout_p": 0.3, "alibi_slopes": torch.tensor([0.5, 0.25])},
        {"attn_mask": torch.tensor([[True, False, True, True]] * 5)},
    ],
)
def test_gradcheck(arguments: dict[str, Any]) -> None:
    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        y: torch.Tensor = GF.scaled_dot_product_attention(
            query, key, value, enable_gqa=True, **arguments
        )
        return y

    check_gradients(
        function, torch.randn(1, 2, 5, 3), torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 2)
    )


def test_gradcheck_of_a_mask() -> None:
    tensors = torch.randn(1, 2, 2, 2), torch.randn(1, 1, 5, 2), torch.randn(1, 1, 5, 2)
    check_gradients(GF.scaled_dot_product_attention, *tensors, torch.randn(1, 1, 1, 5))
