"""Attention of packed sequences, of one query to a cache, and its probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.kernels import attention_decode, attention_problem
from gpunn.kernels.attention_tiles import SMALLEST
from gpunn.kernels.philox import draw_seed
from gpunn.reference.attention import Rules, attention_forward, varlen_forward
from gpunn.reference.dropout import kept_elements
from kit import as_numpy, check_gradients, each_dtype, launched, layouts

# Sequences of one row, of none, and of several tiles; another one is as long as a tile.
LENGTHS_Q, LENGTHS_K = [1, 35, 0, 16], [4, 20, 3, 16]


def starts_of(lengths: list[int], device: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=dtype, device=device)


def packed(
    device: str, dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (2, 2)
) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    """query, key, value and an upstream gradient; and the rest of the arguments."""
    n_queries, n_keys = sum(LENGTHS_Q), sum(LENGTHS_K)
    shapes = [
        (n_queries, heads[0], 16), (n_keys, heads[1], 16), (n_keys, heads[1], 8),
        (n_queries, heads[0], 8),
    ]  # fmt: skip
    starts = starts_of(LENGTHS_Q, device), starts_of(LENGTHS_K, device)
    tensors = [torch.randn(shape).to(device, dtype) for shape in shapes]
    return tensors, (*starts, max(LENGTHS_Q), max(LENGTHS_K))


def by_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any
) -> torch.Tensor:
    """torch's attention of each."""
    parts = zip(query.split(LENGTHS_Q), key.split(LENGTHS_K), value.split(LENGTHS_K), strict=True)
    results = [
        F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in one), **arguments)
        for one in parts
    ]
    return torch.cat([y[0].transpose(0, 1) for y in results])


@each_dtype
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_every_sequence_by_itself(
    is_causal: bool,
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_problem, "launch_for", lambda shape, device: SMALLEST)
    (*tensors, dy), rest = packed(device, dtype, heads)
    results: list[list[torch.Tensor]] = []
    arguments: Any = dict(is_causal=is_causal)
    for function in (
        lambda q, k, v: GF.attention_varlen(q, k, v, *rest, **arguments),
        lambda q, k, v: by_sequence(q, k, v, is_causal=is_causal, enable_gqa=heads[0] > heads[1]),
        lambda q, k, v: by_sequence(q, k, v, is_causal=is_causal, enable_gqa=heads[0] > heads[1]),
    ):
        doubled = len(results) == 2
        leaves = [(t.double() if doubled else t).detach().requires_grad_() for t in tensors]
        with gpunn.trace() as trace:
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, dy.double() if doubled else dy)])
        if not len(results) > 1:
            launched(trace, "attention_forward", "attention_backward")
    ours, theirs, exact = results
    q, k, v = (as_numpy(t) for t in tensors)
    rules = Rules(0.25, after=0 if is_causal else None)
    truth = varlen_forward(q, k, v, rest[0].tolist(), rest[1].tolist(), rules)
    assert_accurate(ours[0], truth, theirs[0])
    for mine, torchs, expected in zip(ours, theirs, exact, strict=True):
        assert_accurate(mine, as_numpy(expected), torchs)


def between_others(numbers: torch.Tensor) -> torch.Tensor:
    """The same numbers, with others between them in memory."""
    return torch.stack([numbers, numbers + 1], -1)[..., 0]


def test_starts_between_other_numbers(device: str) -> None:
    (query, key, value, _), (starts_q, starts_k, *longest) = packed(device, torch.float32)
    apart = between_others(starts_q), between_others(starts_k)
    expected = GF.attention_varlen(query, key, value, starts_q, starts_k, *longest)
    assert torch.equal(GF.attention_varlen(query, key, value, *apart, *longest), expected)


def test_rows_behind_the_last_sequence_give_zero(device: str) -> None:
    """And get gradients of zero, wherever those of the others go."""
    query, key, value = (torch.randn(9, 2, 4, device=device).requires_grad_() for _ in range(3))
    starts = torch.tensor([0, 3, 7], device=device)
    y, lse = GF.attention_varlen(query, key, value, starts, starts, 4, 4, return_lse=True)
    assert not y[7:].any()
    assert (lse[:, 7:] == -math.inf).all()
    assert lse[:, :7].isfinite().all()
    for gradient in torch.autograd.grad(y.sum(), [query, key, value]):
        assert not gradient[7:].any()
        assert gradient.isfinite().all()


def test_rows_beyond_the_longest_are_not_computed(device: str) -> None:
    query, key, value = (torch.randn(9, 2, 4, device=device).requires_grad_() for _ in range(3))
    starts = torch.tensor([0, 9], device=device)
    y = GF.attention_varlen(query, key, value, starts, starts, 5, 5)
    torch.testing.assert_close(y[:5], GF.attention_varlen(
        query[:5], key[:5], value[:5], starts.clamp(max=5), starts.clamp(max=5), 5, 5
    ))  # fmt: skip
    assert not y[5:].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [query, key, value]))


def test_dropout_of_packed_sequences(device: str) -> None:
    """Element (head, row, key) of all rows by the longest keys."""
    (query, key, _, _), rest = packed(device)
    value = torch.eye(20, device=device)[torch.cat([torch.arange(n) for n in LENGTHS_K])]
    value = value[:, None].expand(-1, 2, -1)
    torch.manual_seed(4)
    seed = int(draw_seed(torch.device(device)))
    kept = torch.from_numpy(kept_elements(seed, (2, sum(LENGTHS_Q), 20), 0.4)).to(device)
    torch.manual_seed(4)
    dropped: Any = dict(dropout_p=0.4)
    seen = GF.attention_varlen(query, key, value, *rest, **dropped) != 0
    rows = 0
    for n_queries, n_keys in zip(LENGTHS_Q, LENGTHS_K, strict=True):
        span = slice(rows, rows + n_queries)
        assert torch.equal(seen[span, :, :n_keys].transpose(0, 1), kept[:, span, :n_keys])
        rows += n_queries


@pytest.mark.parametrize(
    "arguments",
    [{"window": (3, 1), "softcap": 1.5}, {"alibi_slopes": torch.rand(4, 2)}, {"dropout_p": 0.3}],
)
def test_by_torch_every_option_is_the_kernels(arguments: dict[str, Any], device: str) -> None:
    """And the differentiable gradient is that of the kernels."""
    (*tensors, dy), rest = packed(device)
    if "alibi_slopes" in arguments:
        arguments = {"alibi_slopes": arguments["alibi_slopes"].to(device)}
    results = []
    for backend, twice in (("kernels", False), ("kernels", True), ("torch", False)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        query, key, value = leaves
        torch.manual_seed(2)
        with gpunn.backend(backend):  # type: ignore[arg-type]
            y, lse = GF.attention_varlen(query, key, value, *rest, return_lse=True, **arguments)
            results.append([y, *torch.autograd.grad(y, leaves, dy, create_graph=twice), lse])
    compared = results[1:2] if "dropout_p" in arguments else results[1:]
    for other in compared:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradcheck_of_packed_sequences() -> None:
    starts = torch.tensor([0, 2, 3])

    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = GF.attention_varlen(query, key, value, starts, starts, 2, 2)
        return y

    check_gradients(function, *(torch.randn(3, 1, 2) for _ in range(3)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_tensors_are_packed_sequences(device: str) -> None:
    parts = [torch.randn(n, 2, 8, device=device) for n in (3, 5, 2)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    jagged = nested.transpose(1, 2)
    with gpunn.trace() as trace:
        y = GF.scaled_dot_product_attention(jagged, jagged, jagged, is_causal=True)
        (gradient,) = torch.autograd.grad(y.transpose(1, 2).values().sum(), nested)
    launched(trace, "attention_forward", "attention_backward")
    assert y.shape[:2] == (3, 2)
    for part, got, its in zip(parts, y.unbind(), gradient.unbind(), strict=True):
        x = part.transpose(0, 1).requires_grad_()
        expected = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        (dx,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(its, dx.transpose(0, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="nested"):
        GF.scaled_dot_product_attention(jagged, jagged, jagged, return_lse=True)
    with pytest.raises(RuntimeError, match="key: attention expects three jagged"):
        GF.scaled_dot_product_attention(jagged, parts[0], parts[0])


# --- one query to a cache ---


def cache(
    device: str, dtype: torch.dtype, n_key_heads: int = 2
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A query, keys and values of three sequences of up to 100 positions, and their lengths."""
    shapes = [(3, 4, 16), (3, n_key_heads, 100, 16), (3, n_key_heads, 100, 8)]
    tensors = [torch.randn(shape).to(device, dtype) for shape in shapes]
    return tensors, torch.tensor([100, 1, 37], device=device)


def paged(tensor: torch.Tensor, page_size: int, order: torch.Tensor) -> torch.Tensor:
    """The pages of a cache, the i-th of them at place order[i]."""
    n_batches, n_heads, n_positions, head = tensor.shape
    pages = tensor.view(n_batches, n_heads, n_positions // page_size, page_size, head)
    flat = pages.transpose(1, 2).flatten(0, 1)
    return torch.empty_like(flat).index_copy_(0, order.flatten(), flat)


def exact_of(
    tensors: list[torch.Tensor], lengths: torch.Tensor, rules: Rules, slopes: Any = None
) -> Any:
    query, key, value = (as_numpy(t) for t in tensors)
    found = [
        attention_forward(
            query[i : i + 1, :, None], key[i : i + 1, :, :n], value[i : i + 1, :, :n], None,
            None if slopes is None else as_numpy(slopes), None, rules,
        )[0, :, 0]
        for i, n in enumerate(lengths.tolist())
    ]  # fmt: skip
    return np.stack(found)


@each_dtype
@pytest.mark.parametrize("n_key_heads", [4, 2, 1])
@pytest.mark.parametrize("page_size", [None, 20, 4])
def test_decoding(
    page_size: int | None,
    n_key_heads: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In parts, of which some have no keys."""
    monkeypatch.setattr(attention_decode, "LEAST_KEYS_A_PART", 8)
    monkeypatch.setattr(attention_decode, "n_parts_for", lambda *numbers: 4)
    tensors, lengths = cache(device, dtype, n_key_heads)
    query, key, value = tensors
    table, caches = None, (key, value)
    if page_size is not None:
        order = torch.randperm(3 * 100 // page_size, device=device).view(3, -1)
        table, caches = order, (paged(key, page_size, order), paged(value, page_size, order))
    with gpunn.trace() as trace:
        y = GF.attention_decode(query, *caches, lengths, block_table=table)
    launched(trace, "attention_decode")
    assert {r.kernel for r in trace.launches} == {
        "attention_decode_kernel", "attention_combine_kernel"
    }  # fmt: skip
    keep = torch.arange(100, device=device) < lengths[:, None, None, None]
    baseline = F.scaled_dot_product_attention(query[:, :, None], key, value, keep, enable_gqa=True)[
        :, :, 0
    ]
    rules = Rules(0.25, lower_right=True)
    assert_accurate(y, exact_of(tensors, lengths, rules), baseline)
    with gpunn.backend("torch"):
        by_torch = GF.attention_decode(query, *caches, lengths, block_table=table)
    torch.testing.assert_close(y, by_torch, rtol=2e-2, atol=2e-2)


def test_lengths_and_pages_between_other_numbers(device: str) -> None:
    (query, key, value), lengths = cache(device, torch.float32)
    table = torch.randperm(15, device=device).view(3, -1)
    pages = paged(key, 20, table), paged(value, 20, table)
    expected = GF.attention_decode(query, *pages, lengths, block_table=table)
    for given in (between_others(table), table.t().contiguous().t()):
        got = GF.attention_decode(query, *pages, between_others(lengths), block_table=given)
        assert torch.equal(got, expected)


def test_decoding_with_every_option(device: str) -> None:
    tensors, lengths = cache(device, torch.float32)
    query, key, value = tensors
    slopes = torch.rand(4, device=device)
    arguments: Any = dict(window=20, softcap=1.5, alibi_slopes=slopes, scale=0.5)
    y = GF.attention_decode(query, key, value, lengths, **arguments)
    rules = Rules(0.5, softcap=1.5, before=20, lower_right=True)
    with gpunn.backend("torch"):
        baseline = GF.attention_decode(query, key, value, lengths, **arguments)
    assert_accurate(y, exact_of(tensors, lengths, rules, slopes), baseline)


def test_sequences_of_one_length_are_decoded_by_torch_as_if_alone(device: str) -> None:
    query, slopes = torch.randn(6, 4, 16, device=device), torch.rand(6, 4, device=device)
    key, value = (torch.randn(6, 2, 9, 16, device=device) for _ in range(2))
    lengths = torch.tensor([3, 7, 7, 3, 0, 3], dtype=torch.int32, device=device)
    with gpunn.backend("torch"):
        y = GF.attention_decode(query, key, value, lengths, alibi_slopes=slopes)
        for i in range(6):
            only = slice(i, i + 1)
            alone = GF.attention_decode(
                query[only], key[only], value[only], lengths[only], alibi_slopes=slopes[only]
            )
            torch.testing.assert_close(y[only], alone)


def test_a_sequence_without_keys_gives_zero(device: str) -> None:
    (query, key, value), lengths = cache(device, torch.float32)
    key[0] = math.nan  # what is not in use may hold anything
    value[0] = math.nan
    lengths[0] = 0
    y = GF.attention_decode(query, key, value, lengths)
    assert not y[0].any()
    assert y[1:].all()


def test_a_query_of_any_layout(device: str) -> None:
    (query, key, value), lengths = cache(device, torch.float32)
    expected = GF.attention_decode(query, key, value, lengths)
    for name, laid_out in layouts(query):
        if "expanded" not in name:
            got = GF.attention_decode(laid_out, key, value, lengths)
            assert torch.equal(got, expected), name
    rows_first = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(GF.attention_decode(query, key, rows_first, lengths), expected)


def test_decoding_with_a_gradient_is_torchs(device: str) -> None:
    (query, key, value), lengths = cache(device, torch.float32)
    query.requires_grad_()
    with gpunn.backend("auto"), gpunn.trace() as trace:
        y = GF.attention_decode(query, key, value, lengths)
    assert trace.fallbacks[0].reason == "a gradient: PyTorch's operations"
    assert torch.autograd.grad(y.sum(), query)[0].any()


def test_parts_fill_the_chip() -> None:
    assert attention_decode.n_parts_for(8, 16384, 132) == 32
    assert attention_decode.n_parts_for(512, 16384, 132) == 1
    assert attention_decode.n_parts_for(1, 1024, 132) == 4
    assert attention_decode.n_parts_for(1, 2**20, 132) == attention_decode.MOST_PARTS


# --- refusals ---


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda t: t[None], "query: attention_varlen expects"),
        (1, lambda t: t[:, :1].repeat(1, 3, 1), "key, value: their heads"),
        (2, lambda t: t[1:], "value: attention expects"),
        (3, lambda t: t.float(), "cu_seqlens_q: attention_varlen expects int32"),
        (4, lambda t: t[1:], "cu_seqlens_k: attention_varlen expects one dimension"),
        (4, lambda t: t.tolist(), "cu_seqlens_k: expected a tensor"),
        (5, lambda n: 1.5, "max_q: expected an integer"),
        (6, lambda n: -1, "max_k: expected 0 or more"),
    ],
)
def test_varlen_refuses(position: int, change: Any, message: str, device: str) -> None:
    (query, key, value, _), rest = packed(device)
    arguments = [query, key, value, *rest]
    arguments[position] = change(arguments[position])
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        GF.attention_varlen(*arguments)


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda t: t[0], "query: attention_decode expects 3 dimensions"),
        (1, lambda t: t.half(), "key_cache: attention_decode expects torch.float32"),
        (1, lambda t: t[..., :8], "key_cache, value_cache"),
        (2, lambda t: t[:, :1], "key_cache, value_cache"),
        (3, lambda t: t.float(), "cache_lengths: attention_decode expects torch.int32"),
        (3, lambda t: t[:2], "cache_lengths: expected 3 rows"),
        (3, lambda t: None, "cache_lengths: expected a tensor"),
        (4, lambda t: torch.zeros(2, 4).long(), "block_table: expected 3 rows"),
    ],
)
def test_decoding_refuses(position: int, change: Any, message: str, device: str) -> None:
    tensors, lengths = cache("cpu", torch.float32)
    arguments: list[Any] = [*tensors, lengths, None]
    arguments[position] = change(arguments[position])
    with pytest.raises((RuntimeError, TypeError), match=message):
        GF.attention_decode(*arguments[:4], block_table=arguments[4])
