"""embedding: values and gradients against NumPy float64, runs of equal indices, what is fused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from drawing import drawing
from gpunn.kernels import embedding as kernels
from gpunn.kernels.philox import draw_seed
from gpunn.reference import embedding as reference
from gpunn.reference.dropout import kept_elements
from kit import as_numpy, check_gradients, each_dtype, far_apart, launched, layouts

OPERATORS = ("embedding_forward", "embedding_backward")


def composed(
    indices: torch.Tensor, weight: torch.Tensor, positional: torch.Tensor | None, **options: Any
) -> Any:
    """The same in torch's functions."""
    scale: float = options.get("scale", 1.0)
    y = F.embedding(indices, weight, options.get("padding_idx")) * scale
    if positional is None:
        return y
    positions = options.get("positions")
    positions = torch.arange(indices.shape[-1], device=y.device) if positions is None else positions
    return y + F.embedding(positions, positional)


def assert_right(
    indices: torch.Tensor,
    weight: torch.Tensor,
    positional: torch.Tensor | None = None,
    dy: torch.Tensor | None = None,
    **options: Any,
) -> gpunn.Trace:
    """Value and gradients of both tables, no worse than twice torch's own error."""
    results: list[list[torch.Tensor]] = []
    with gpunn.trace() as trace:
        for function in (GF.embedding, composed):
            tables = [
                None if t is None else t.detach().requires_grad_() for t in (weight, positional)
            ]
            if function is composed:
                y = composed(indices, *tables, **options)  # type: ignore[arg-type]
            else:
                y = GF.embedding(indices, tables[0], positional=tables[1], **options)  # type: ignore[arg-type]
            dy = torch.randn_like(y) if dy is None else dy
            wanted = [t for t in tables if t is not None]
            results.append([y, *torch.autograd.grad(y, wanted, dy)])
    assert dy is not None
    launched(trace, *OPERATORS)
    padding, scale = options.get("padding_idx"), options.get("scale", 1.0)
    padding = padding if padding is None or padding >= 0 else padding + len(weight)
    places, exact_dy = indices.cpu().numpy().astype(np.int64), as_numpy(dy)
    positions = options.get("positions", torch.arange(indices.shape[-1] if indices.dim() else 1))
    steps = np.broadcast_to(positions.cpu().numpy().astype(np.int64), places.shape)
    table = None if positional is None else as_numpy(positional)
    truths = [
        reference.embedding_forward(places, as_numpy(weight), scale, table, steps),
        reference.embedding_backward(exact_dy, places, len(weight), scale, padding),
    ]
    if positional is not None:
        truths.append(reference.embedding_backward(exact_dy, steps, len(positional), 1.0))
    for ours, truth, torchs in zip(results[0], truths, results[1], strict=True):
        assert_accurate(ours, truth, torchs)
    return trace


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of eight rows in tiles of two rows of 16 columns: a few tokens make all kinds."""
    tile = replace(kernels.SUMS[0], piece=8, block_rows=2, block_cols=16)
    monkeypatch.setattr(kernels, "SUMS", (tile,))


# On both sides of every tile's width; the last take several tiles.
@each_dtype
@pytest.mark.parametrize("width", [1, 16, 17, 64, 65, 256, 259])
def test_widths(width: int, dtype: torch.dtype, device: str) -> None:
    indices = torch.tensor([[3, 0, 3, 6], [6, 3, 1, 0]], device=device)
    assert_right(indices, torch.randn(7, width, device=device).to(dtype))


@each_dtype
@pytest.mark.parametrize("kind", ["along the sequence", "given", "given for all sequences"])
def test_scale_positions_and_padding(kind: str, dtype: torch.dtype, device: str) -> None:
    """More positions than there are in the sequences: theirs, and those alone, have a gradient."""
    weight, positional = (torch.randn(n, 20, device=device).to(dtype) for n in (9, 11))
    indices = torch.randint(9, (3, 6), device=device, dtype=torch.int32)
    options: dict[str, Any] = {"scale": 20**0.5, "padding_idx": -9}
    if kind == "given":
        options["positions"] = torch.randint(11, (3, 6), device=device)
    elif kind == "given for all sequences":
        options["positions"] = torch.arange(6, device=device, dtype=torch.int32).flip(0) + 2
    assert_right(indices, weight, positional, **options)


@each_dtype
def test_runs_within_pieces_over_cuts_and_over_many(
    dtype: torch.dtype, device: str, short_pieces: None
) -> None:
    """Counts of equal indices: one, up to a cut, over one, several pieces whole, up to the end."""
    counts = [1, 7, 3, 8, 5, 30, 2, 0, 1, 7]
    indices = torch.repeat_interleave(torch.arange(10), torch.tensor(counts))
    indices = indices[torch.randperm(64)].to(device)
    weight = torch.randn(11, 21, device=device).to(dtype)
    trace = assert_right(indices, weight)
    assert "embedding_join_kernel" in {record.kernel for record in trace.launches}


@drawing(0, 40)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 16, 25]), min_size=1, max_size=5),
    padding=st.sampled_from([None, 0, -1]),
    length=st.integers(1, 3),
    scale=st.sampled_from([1.0, -0.5]),
)
def test_drawn_runs(
    counts: list[int], padding: int | None, length: int, scale: float, device: str
) -> None:
    """As torch's sums in float64, also the same when the tokens stand in another order."""
    indices = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    indices = indices[torch.randperm(len(indices))][: len(indices) // length * length]
    dy = torch.randn(len(indices), 5, device=device)
    expected = torch.zeros(len(counts), 5, device=device).double()
    expected.index_add_(0, indices, scale * dy.double())
    if padding is not None:
        expected[padding] = 0
    tile = replace(kernels.SUMS[0], piece=8, block_rows=4, block_cols=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SUMS", (tile,))
        weight = torch.zeros(len(counts), 5, device=device).requires_grad_()
        positional = torch.zeros(length + 1, 5, device=device).requires_grad_()
        y = GF.embedding(
            indices.view(-1, length), weight, padding, scale=scale, positional=positional
        )
        got = torch.autograd.grad(y, [weight, positional], dy.view_as(y))
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert not got[1][length:].any()
    torch.testing.assert_close(got[1][:length], dy.view(-1, length, 5).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_a_frequent_index_are_float32(
    dtype: torch.dtype, device: str, short_pieces: None
) -> None:
    """In 16 bits, 150 times 1 + 1/64 stands still, or loses the fraction, on the way."""
    weight = torch.zeros(2, 3, device=device, dtype=dtype).requires_grad_()
    y = GF.embedding(torch.ones(150, device=device, dtype=torch.int64), weight)
    dy = torch.full_like(y, 1 + 1 / 64)
    (dweight,) = torch.autograd.grad(y, weight, dy)
    assert dweight[1].tolist() == [float(torch.tensor(150 * (1 + 1 / 64)).to(dtype))] * 3


def test_layouts(device: str) -> None:
    weight, positional = (torch.randn(n, 9, device=device).half() for n in (5, 4))
    indices = torch.randint(5, (4, 3), device=device).T
    dy = torch.randn(3, 4, 9, device=device).half()
    for _, laid_out in layouts(dy):
        assert_right(indices, weight, positional, laid_out)
    for _, laid_out in layouts(weight):
        assert_right(indices, laid_out, positional, dy)
    for _, laid_out in layouts(positional):
        assert_right(indices, weight, laid_out, dy)


@pytest.mark.parametrize("width", [8, 5])
def test_dropout_is_that_of_dropout(width: int, device: str, short_pieces: None) -> None:
    """Of whole groups of four bits, and of widths that are none; twice differentiable."""
    indices = torch.randint(3, (4, 5), device=device)
    tables = [torch.randn(n, width, device=device).requires_grad_() for n in (3, 6)]
    torch.manual_seed(7)
    seed = int(draw_seed(torch.device(device)))
    kept = kept_elements(seed, (4, 5, width), 0.4)
    factors = torch.from_numpy(kept).to(device) / 0.6
    torch.manual_seed(7)
    y = GF.embedding(indices, tables[0], positional=tables[1], scale=2.0, dropout_p=0.4)
    expected = composed(indices, *tables, scale=2.0) * factors
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    theirs = torch.autograd.grad(expected, tables, dy)
    for create_graph in (False, True):
        ours = torch.autograd.grad(y, tables, dy, retain_graph=True, create_graph=create_graph)
        for mine, torchs in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-5)
    assert not GF.embedding(indices, tables[0], dropout_p=1.0).any()


def test_gradcheck(short_pieces: None) -> None:
    indices = torch.tensor([[1, 1, 2], [0, 1, 1]])
    positions = torch.tensor([2, 0, 0])
    check_gradients(
        lambda weight, positional: GF.embedding(
            indices, weight, 3, scale=1.5, positional=positional, positions=positions
        ),
        torch.randn(4, 3), torch.randn(3, 3),
    )  # fmt: skip


def test_one_table_of_which_a_gradient_is_wanted(device: str) -> None:
    """The other's is not computed, and a table may be changed before the backward pass."""
    indices = torch.randint(4, (2, 3), device=device)
    weight, positional = (torch.randn(n, 5, device=device) for n in (4, 3))
    of_each = (weight, positional, "backward"), (positional, weight, "positions")
    for wanted, other, kernel in of_each:
        wanted.requires_grad_()
        y = GF.embedding(indices, weight, positional=positional)
        with torch.no_grad():
            weight.add_(1.0)
        with gpunn.trace() as trace:
            (gradient,) = torch.autograd.grad(y, wanted, torch.randn_like(y))
        assert gradient.shape == wanted.shape
        assert [r.kernel for r in trace.launches] == [f"embedding_{kernel}_kernel"]
        assert not other.requires_grad
        wanted.requires_grad_(False)


@pytest.mark.parametrize("has_indices", [True, False])
def test_padding_has_no_gradient(has_indices: bool, device: str) -> None:
    """In the operator, also where token n looked up row n."""
    dy = torch.randn(2, 4, 5, device=device)
    indices = torch.arange(4, device=device).repeat(2, 1) if has_indices else None
    got = torch.ops.gpunn.embedding_backward(dy, indices, None, 4, 6, 2, 1.0, 0.0, torch.float32)
    expected = torch.zeros(6, 5, device=device)
    expected[:4] = dy.sum(0)
    expected[2] = 0
    torch.testing.assert_close(got, expected)


def test_backward_twice_and_bit_identical(device: str, short_pieces: None) -> None:
    indices = torch.randint(3, (60,), device=device)
    weight = torch.randn(3, 6, device=device).requires_grad_()
    y, dy = GF.embedding(indices, weight), torch.randn(60, 6, device=device)
    before = dy.clone()
    first = torch.autograd.grad(y, weight, dy, retain_graph=True)
    again = torch.autograd.grad(y, weight, dy)
    assert torch.equal(first[0], again[0])
    assert torch.equal(dy, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_row(value: float, device: str, short_pieces: None) -> None:
    indices = torch.tensor([0, 1, 2, 1, 0], device=device).repeat(4)
    weight = torch.randn(3, 4, device=device)
    weight[2, 1] = value
    leaf = weight.requires_grad_()
    y = GF.embedding(indices, leaf, scale=-2.0)
    torch.testing.assert_close(y, F.embedding(indices, weight) * -2.0, equal_nan=True)
    dy = torch.randn_like(y)
    dy[6, 3] = value  # of row 1
    (dweight,) = torch.autograd.grad(y, leaf, dy)
    assert dweight.isfinite().sum() == 11
    assert not dweight[1, 3].isfinite()


@pytest.mark.parametrize("index", [-2, 4])
def test_an_index_of_no_row(
    index: int, device: str, monkeypatch: pytest.MonkeyPatch, short_pieces: None
) -> None:
    """Refused on a CPU; where the host does not look, NaN, and nothing is written for it."""
    indices = torch.tensor([2, index, 2, 3], device=device).repeat(6)
    weight = torch.randn(4, 3, device=device).requires_grad_()
    if device == "cpu":
        for given_indices, options in (
            (indices, {}),
            (indices.clamp(0, 3), {"positions": indices}),
        ):
            table = weight if options else None
            with pytest.raises(IndexError, match="index out of range"):
                GF.embedding(given_indices, weight, positional=table, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(kernels, "refuse_strangers", lambda indices, n_rows: None)
    around = torch.ones(12, 3, device=device)
    monkeypatch.setattr(kernels, "_backward_fake", lambda *arguments: around[4:8])
    y = GF.embedding(indices, weight)
    assert y[1::4].isnan().all()
    torch.testing.assert_close(y[::2], weight[2].expand(12, 3))
    dy = torch.randn_like(y)
    (dweight,) = torch.autograd.grad(y, weight, dy)
    torch.testing.assert_close(dweight[2], dy[::2].sum(0))
    torch.testing.assert_close(dweight[3], dy[3::4].sum(0))
    assert not dweight[:2].any()
    assert (around[:4] == 1).all()
    assert (around[8:] == 1).all()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3, 1, 2)])
@pytest.mark.parametrize("size", [(4, 3), (4, 0)])
def test_shapes(shape: tuple[int, ...], size: tuple[int, int], device: str) -> None:
    """One token, none, and vectors of nothing."""
    indices, weight = torch.randint(4, shape, device=device), torch.randn(size, device=device)
    y = GF.embedding(indices, weight.requires_grad_())
    assert torch.equal(y, F.embedding(indices, weight))
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    (expected,) = torch.autograd.grad(F.embedding(indices, weight).sum(), weight)
    assert torch.equal(dweight, expected)


@pytest.mark.parametrize("which", ["weight", "positional"])
def test_offsets_past_two_to_the_31(which: str, device: str) -> None:
    """Rows 2^30 elements apart: an index of 32 bits times the stride."""
    near = {name: torch.randn(3, 8, device=device).half() for name in ("weight", "positional")}
    far = far_apart(near[which], (2**30, 1))
    indices = torch.arange(3, device=device, dtype=torch.int32)
    y, apart = (
        GF.embedding(indices, t["weight"], positional=t["positional"], positions=indices)
        for t in (near, {**near, which: far})
    )
    assert torch.equal(y, apart)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_tables_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    indices = torch.randint(4, (2, 3), device=device)
    tables = [torch.randn(4, 5, device=device).to(d).requires_grad_() for d in dtypes]
    y = GF.embedding(indices, tables[0], positional=tables[1])
    assert y.dtype == composed(indices, *tables).dtype == torch.float32
    assert tuple(g.dtype for g in torch.autograd.grad(y.sum(), tables)) == dtypes


def test_autocast_and_compile(device: str) -> None:
    indices, weight = torch.randint(9, (2, 5), device=device), torch.randn(9, 4, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert GF.embedding(indices, weight).dtype == F.embedding(indices, weight).dtype
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda i, w, p: GF.embedding(i, w, 1, scale=3.0, positional=p), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    for length in (3, 5):
        tables = [torch.randn(9, 4, device=device).requires_grad_() for _ in range(2)]
        ours = compiled(indices[:, :length], *tables)
        expected = composed(indices[:, :length], *tables, scale=3.0, padding_idx=1)
        torch.testing.assert_close(ours, expected)
        dy = torch.randn_like(ours)
        for mine, torchs in zip(
            torch.autograd.grad(ours, tables, dy), torch.autograd.grad(expected, tables, dy),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(mine, torchs)
