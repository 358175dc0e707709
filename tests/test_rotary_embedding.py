"""rotary_embedding: values and gradients against NumPy float64, tables, layouts, the layer."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from drawing import drawing
from gpunn.checks.rotary_embedding import turned_by_torch
from gpunn.kernels.rotary_embedding import LAUNCHES
from gpunn.reference import rotary_embedding as reference
from kit import as_numpy, check_gradients, each_dtype, far_apart, launched, layouts

each_kind = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def assert_right(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dy: tuple[torch.Tensor, ...] | None = None,
    interleaved: bool = False,
) -> None:
    """Values and gradients; the baseline is what models write, in the inputs' own dtype.

    cos and sin (length, pairs).
    """
    leaves = [t.detach().requires_grad_() for t in (query, key)]
    with gpunn.trace() as trace:
        turned = GF.rotary_embedding(leaves[0], leaves[1], cos, sin, interleaved=interleaved)
        dy = dy or tuple(torch.randn_like(t) for t in turned)
        ours = [*turned, *torch.autograd.grad(turned, leaves, dy)]
    assert len(launched(trace, "rotary_embedding")) == 2
    tables = as_numpy(cos), as_numpy(sin), cos.shape[-1], interleaved
    for i, (x, upstream) in enumerate(zip((query, key), dy, strict=True)):
        leaf = x.detach().requires_grad_()
        y = turned_by_torch(leaf, cos.to(x.dtype), sin.to(x.dtype), interleaved)
        (dx,) = torch.autograd.grad(y, leaf, upstream)
        assert_accurate(ours[i], reference.rotary_forward(as_numpy(x), *tables), y)
        assert_accurate(ours[2 + i], reference.rotary_backward(as_numpy(upstream), *tables), dx)


def heads(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """(batch, heads, length, head), as a projection's (batch, length, heads, head) is seen."""
    batch, n_heads, length, head = shape
    return torch.randn(batch, length, n_heads, head, device=device).to(dtype).transpose(1, 2)


# A head that each tile holds, one more pair, and several tiles of pairs; more tokens than a tile's,
# and heads that fill no group.
@each_dtype
@each_kind
@pytest.mark.parametrize("pairs", [1, 16, 17, 33, 64, 129])
def test_heads(pairs: int, interleaved: bool, dtype: torch.dtype, device: str) -> None:
    length = 2 + max(tile.block_tokens for tile in LAUNCHES if tile.block_pairs >= min(pairs, 128))
    length = length if pairs > 16 else 5
    query = heads(1, 5, length, 2 * pairs, dtype=dtype, device=device)
    key = heads(1, 2, length, 2 * pairs, dtype=dtype, device=device)
    cos, sin = GF.rotary_tables(length, 2 * pairs, dtype=dtype, device=device)
    assert_right(query, key, cos, sin, interleaved=interleaved)
    assert GF.rotary_embedding(query, key, cos, sin)[0].stride() == query.stride()


@drawing(0, 20)
@given(
    n=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)),
    pairs=st.integers(1, 9),
    rest=st.sampled_from([0, 1, 2, 40]),
    interleaved=st.booleans(),
    whole=st.booleans(),
    batched=st.sampled_from(["", "one", "each"]),
    gaps=st.booleans(),
)
def test_drawn(
    n: tuple[int, int, int, int], pairs: int, rest: int, interleaved: bool, whole: bool,
    batched: str, gaps: bool, device: str,
) -> None:  # fmt: skip
    """Tables of which both columns of a pair differ, as those of no rotation do."""
    batch, n_query, n_key, length = n
    step, width = 2 if gaps else 1, 2 * pairs if whole else pairs
    query, key = (
        heads(batch, k, length, step * (2 * pairs + rest), dtype=torch.float32, device=device)
        for k in (n_query, n_key)
    )
    query, key = query[..., ::step].requires_grad_(), key[..., ::step].requires_grad_()
    first = {"": (), "one": (1,), "each": (batch,)}[batched]
    cos, sin = (torch.randn(*first, length, width, device=device) for _ in range(2))
    sin = sin.mT.contiguous().mT  # of other strides
    got = GF.rotary_embedding(query, key, cos, sin, interleaved=interleaved, rotary_dim=2 * pairs)
    dy = [torch.randn_like(t) for t in got]
    gradients = torch.autograd.grad(got, [query, key], dy)
    tables = as_numpy(cos), as_numpy(sin), pairs, interleaved
    for x, y, upstream, dx in zip((query, key), got, dy, gradients, strict=True):
        exact = torch.from_numpy(reference.rotary_forward(as_numpy(x), *tables))
        torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-5, atol=1e-5)
        exact = torch.from_numpy(reference.rotary_backward(as_numpy(upstream), *tables))
        torch.testing.assert_close(dx.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@each_kind
def test_in_half_precision_what_passes_through_is_not_touched(
    interleaved: bool, device: str
) -> None:
    """Infinities, NaN and every other bit; also beside a NaN in the part that turns."""
    query = heads(2, 2, 3, 12, dtype=torch.float16, device=device)
    query[..., 5], query[0, 0, 0, 8:11] = math.nan, torch.tensor([math.inf, -math.inf, math.nan])
    key = query[:, :1]
    cos, sin = GF.rotary_tables(3, 8, device=device)
    for x, y in zip(
        (query, key),
        GF.rotary_embedding(query, key, cos, sin, interleaved=interleaved, rotary_dim=8),
        strict=True,
    ):
        assert torch.equal(y[..., 8:].view(torch.int16), x[..., 8:].view(torch.int16))
        expected = turned_by_torch(x.float(), cos, sin, interleaved).half()
        torch.testing.assert_close(y, expected, equal_nan=True)
        assert y[..., :8].isnan().sum() == 2 * x[..., 0].numel()


def test_layouts(device: str) -> None:
    query, key, *dy = (torch.randn(2, n, 3, 8, device=device).half() for n in (3, 2, 3, 2))
    cos, sin = GF.rotary_tables(3, 8, device=device)
    for (_, a), (_, b) in zip(layouts(query), layouts(key), strict=True):
        assert_right(a, b, cos, sin)
    for (_, a), (_, b) in zip(layouts(dy[0]), layouts(dy[1]), strict=True):
        assert_right(query, key, cos, sin, (a, b))


def test_tables_of_models(device: str) -> None:
    """Both halves alike, of each sequence; and one narrower than a head, of what turns of it."""
    query, key = (torch.randn(2, n, 3, 16, device=device).bfloat16() for n in (4, 2))
    positions = torch.tensor([[5, 6, 7], [0, 1, 2]], device=device)
    half = GF.rotary_tables(positions, 16)
    cos, sin = (torch.cat((table, table), -1) for table in half)
    turned = GF.rotary_embedding(query, key, cos, sin)
    for ours, same in zip(turned, GF.rotary_embedding(query, key, *half), strict=True):
        assert torch.equal(ours, same)
    angles = half[0][:, None], half[1][:, None]
    expected = turned_by_torch(query.float(), *angles, False)
    torch.testing.assert_close(turned[0].float(), expected, rtol=1e-2, atol=1e-2)
    narrow = [torch.cat((t, t), -1) for t in GF.rotary_tables(positions, 6)]
    ours = GF.rotary_embedding(query, key, *narrow)[1]
    assert torch.equal(ours, GF.rotary_embedding(query, key, *narrow, rotary_dim=6)[1])
    assert torch.equal(ours[..., 6:], key[..., 6:])
    assert not torch.equal(ours[..., 4:6], key[..., 4:6])


def test_gradcheck() -> None:
    cos, sin = (torch.randn(1, 2).double() for _ in range(2))

    def both(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.cat(GF.rotary_embedding(query, key, cos, sin, rotary_dim=4), 1)

    check_gradients(both, torch.randn(1, 1, 1, 5), torch.randn(1, 1, 1, 5))


def test_one_gradient_of_two(device: str) -> None:
    """Of one input, or of one result; nothing is turned for the other."""
    query, key = torch.randn(1, 2, 3, 4, device=device), torch.randn(1, 1, 3, 4, device=device)
    tables = GF.rotary_tables(3, 4, device=device)
    inverse = tables[0], -tables[1]
    for i in (0, 1):
        inputs = [query, key]
        inputs[i] = inputs[i].clone().requires_grad_()
        turned = GF.rotary_embedding(inputs[0], inputs[1], *tables)
        dy = torch.randn_like(turned[i])
        for create_graph in (False, True):
            (dx,) = torch.autograd.grad(
                turned[i], inputs[i], dy, retain_graph=True, create_graph=create_graph
            )
            assert torch.equal(dx, GF.rotary_embedding(dy, dy, *inverse)[0])
        both = [t.clone().requires_grad_() for t in (query, key)]
        turned = GF.rotary_embedding(both[0], both[1], *tables)
        gradients = torch.autograd.grad(turned[i], both, dy, allow_unused=True)
        assert torch.equal(gradients[i], dx)
        assert gradients[1 - i] is None


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
def test_nothing(shape: tuple[int, ...], device: str) -> None:
    query = torch.randn(shape, device=device).requires_grad_()
    key = torch.randn(shape[0], 1, *shape[2:], device=device).requires_grad_()
    tables = GF.rotary_tables(shape[2], 4, device=device)
    turned = GF.rotary_embedding(query, key, *tables)
    assert [t.shape for t in turned] == [query.shape, key.shape]
    if key.numel():
        expected = turned_by_torch(key, *tables, False)
        torch.testing.assert_close(turned[1], expected)
    gradients = torch.autograd.grad([t.sum() for t in turned], [query, key])
    assert [g.shape for g in gradients] == [query.shape, key.shape]


@pytest.mark.parametrize("which", ["batch", "head", "token"])
def test_offsets_past_two_to_the_31(which: str, device: str) -> None:
    """Three of them, 2^30 elements apart."""
    shape = [3 if which == name else 1 for name in ("batch", "head", "token")]
    near = torch.randn(*shape, 8, device=device).half()
    far = far_apart(near, (*(2**30 if n == 3 else 8 for n in shape), 1))
    tables = GF.rotary_tables(shape[2], 8, device=device)
    tables = tables[0] + 1, tables[1] + 1
    for a, b in zip(
        GF.rotary_embedding(near, near, *tables), GF.rotary_embedding(near, far, *tables),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)


def test_compile_and_what_is_left_to_torch(device: str) -> None:
    torch._dynamo.reset()
    layer = gpunn.nn.RotaryEmbedding(6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (3, 5):
        given = [torch.randn(2, n, length, 8, device=device).requires_grad_() for n in (2, 1)]
        ours, expected = compiled(*given), layer(*given)
        dy = [torch.randn_like(t) for t in ours]
        results = [[*y, *torch.autograd.grad(y, given, dy)] for y in (ours, expected)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    query, key = (t.detach().bfloat16() for t in given)
    cos, sin = (t.requires_grad_() for t in GF.rotary_tables(5, 4, device=device))
    for interleaved in (False, True):
        options: Any = {"interleaved": interleaved, "rotary_dim": 4}
        with gpunn.backend("auto"), gpunn.trace() as trace:
            left = GF.rotary_embedding(query, key, cos, sin, **options)
        assert [r.reason for r in trace.fallbacks] == ["a gradient for cos or sin"]
        taken = GF.rotary_embedding(query, key, cos.detach(), sin.detach(), **options)
        for a, b in zip(left, taken, strict=True):
            torch.testing.assert_close(a, b)
        assert all(g.any() for g in torch.autograd.grad(left[0].sum(), [cos, sin]))
    with pytest.raises(RuntimeError, match="backend"):
        GF.rotary_embedding(query, key, cos, sin, rotary_dim=4)
    with torch.autocast(device, torch.bfloat16):
        assert layer(*given)[0].dtype == torch.float32


def test_the_layer(device: str) -> None:
    query, key = torch.randn(2, 3, 5, 8, device=device), torch.randn(2, 1, 5, 8, device=device)
    layer = gpunn.nn.RotaryEmbedding(6, 500.0, interleaved=True)
    assert not layer.state_dict()
    assert repr(layer) == "RotaryEmbedding(6, base=500.0, interleaved=True)"
    with torch.inference_mode():
        layer(query, key)
    tables = exact_tables(device)
    expected = [turned_by_torch(t, *tables, True) for t in (query, key)]
    leaves = [t.requires_grad_() for t in (query, key)]
    for copied in (layer, copy.deepcopy(layer).half()):
        for ours, theirs in zip(copied(*leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert torch.autograd.grad(copied(*leaves)[0].sum(), leaves[0])[0].any()
    kept = layer._kept
    last = layer(query[:, :, 3:], key[:, :, 3:], torch.tensor([[3, 4]], device=device))
    for ours, theirs in zip(last, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, 3:])
    layer(query[:, :, :2], key[:, :, :2])
    assert layer._kept is kept  # what is there serves shorter sequences
    turning = Turned(*tables)
    torch.testing.assert_close(torch.fx.symbolic_trace(turning)(query), turning(query))


class Turned(torch.nn.Module):
    """Queries turned by themselves, for a tracer."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.cos, self.sin = cos, sin

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        return GF.rotary_embedding(query, query, self.cos, self.sin, rotary_dim=6)[0]


def exact_tables(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of five positions and three pairs, with another base than usual."""
    cos, sin = reference.rotary_tables(np.arange(5, dtype=np.float64), 6, 500.0)
    return tuple(torch.from_numpy(t).to(device, torch.float32) for t in (cos, sin))  # type: ignore[return-value]


def test_tables(device: str) -> None:
    """Of float64 angles: those of position 100,000 have no digits left in float32's product."""
    positions = torch.tensor([[0, 7], [99_999, 3]], device=device)
    for table, exact in zip(
        GF.rotary_tables(positions, 10, base=20.0),
        reference.rotary_tables(as_numpy(positions).reshape(-1), 10, 20.0),
        strict=True,
    ):
        assert table.dtype == torch.float32
        np.testing.assert_allclose(as_numpy(table).reshape(4, 5), exact, atol=1e-7)
    assert GF.rotary_tables(3, 4, dtype=torch.float16)[1].dtype == torch.float16
    for dim in (0, 3):
        with pytest.raises(ValueError, match="dim"):
            GF.rotary_tables(3, dim)


Q, C = torch.randn(2, 3, 4, 8), torch.randn(4, 8)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((Q[0], Q, C, C), {}, RuntimeError, "query"),
        ((Q.int(), Q, C, C), {}, RuntimeError, "query"),
        ((Q, Q[:1], C, C), {}, RuntimeError, "key"),
        ((Q, Q[:, :, :3], C, C), {}, RuntimeError, "key"),
        ((Q, Q[..., :6], C, C), {}, RuntimeError, "key"),
        ((Q, Q.to("meta"), C, C), {}, RuntimeError, "key"),
        ((Q, Q, C[:3], C[:3]), {}, RuntimeError, "cos"),
        ((Q, Q, C, C[:, :4]), {}, RuntimeError, "sin"),
        ((Q, Q, C.int(), C), {}, RuntimeError, "cos"),
        ((Q, Q, Q, Q), {}, RuntimeError, "cos"),
        ((Q, Q, Q[0], Q[0]), {}, RuntimeError, "cos"),
        ((Q, Q, C[:, :5], C[:, :5]), {}, RuntimeError, "rotary_dim"),
        ((Q, Q, C, C), {"rotary_dim": 10}, RuntimeError, "rotary_dim"),
        ((Q, Q, C, C), {"rotary_dim": 0}, RuntimeError, "rotary_dim"),
        ((Q, Q, C, C), {"rotary_dim": 6}, RuntimeError, "cos"),
        ((Q, Q, C, C.to("meta")), {}, RuntimeError, "sin"),
        ((Q, None, C, C), {}, TypeError, "key"),
    ],
)
def test_refuses(
    arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with gpunn.trace() as trace, pytest.raises(error, match=f"^{message}"):
        GF.rotary_embedding(*arguments, **keywords)
    assert not trace.launches
