"""Random bits: the published vectors, the same bits in Triton and NumPy, and what dropout makes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import gpunn
from gpunn.kernels.dropout import dropout_factors
from gpunn.kernels.elementwise import ElementwiseLaunch
from gpunn.kernels.launch import Launch, run
from gpunn.kernels.philox import draw_seed, dropout_arguments, dropout_factor, random_words
from gpunn.reference import philox as reference
from kit import each_dtype, launched

# Counter, key and result of philox4x32-10 in tests/kat_vectors of Random123.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
each_vector = pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
SEEDS = [0, 1, 2**31, 2**32, 2**63 - 1, 0x243F6A8885A308D3]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(value: int, n_bits: int) -> int:
    """The two's complement reading of an unsigned number, for torch's signed integers."""
    return value - 2**n_bits if value >= 2 ** (n_bits - 1) else value


@triton.jit
def philox_kernel(counter_ptr, seed_ptr, words_ptr):
    """The four words of one counter."""
    c0, c1 = tl.load(counter_ptr), tl.load(counter_ptr + 1)
    c2, c3 = tl.load(counter_ptr + 2), tl.load(counter_ptr + 3)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3)
    tl.store(words_ptr, w0.to(tl.int64))
    tl.store(words_ptr + 1, w1.to(tl.int64))
    tl.store(words_ptr + 2, w2.to(tl.int64))
    tl.store(words_ptr + 3, w3.to(tl.int64))


@triton.jit
def factors_kernel(
    seed_ptr, factors_ptr, first_row, n_cols, threshold, scale,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Factors of a (ROWS, COLS) tile from row ``first_row`` of a matrix of n_cols columns."""
    row = first_row + tl.arange(0, ROWS)
    tile = dropout_factor(seed_ptr, row, 0, n_cols, threshold, scale, ALIGNED, ROWS, COLS)
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(factors_ptr + at, tile)


def factors_of(seed: int, shape: tuple[int, ...], p: float, device: str) -> torch.Tensor:
    return dropout_factors(
        torch.tensor([seed], device=device), torch.empty(shape, device=device), p
    )


@each_vector
def test_published_vectors_in_numpy(counter: str, key: str, expected: str) -> None:
    got = reference.philox(words(counter), words(key))
    assert [int(word) for word in got] == words(expected)


@each_vector
def test_published_vectors_in_triton(counter: str, key: str, expected: str, device: str) -> None:
    low, high = words(key)
    counters = torch.tensor([signed(w, 32) for w in words(counter)], dtype=torch.int32)
    seed = torch.tensor([signed(high << 32 | low, 64)])
    got = torch.empty(4, dtype=torch.int64, device=device)
    run("test", philox_kernel, (1,), counters.to(device), seed.to(device), got, launch=Launch())
    assert [word % 2**32 for word in got.tolist()] == words(expected)


@pytest.mark.parametrize("seed", [*SEEDS, -3])
def test_torch_computes_the_same_words(seed: int, device: str) -> None:
    """Of counters of two words, for any seed that an int64 is."""
    counters = [0, 1, 2**31, 2**32 - 1, 2**32, 0x243F6A8885A308D3 >> 1, 2**63 - 1]
    got = random_words(torch.tensor([seed], device=device), torch.tensor(counters, device=device))
    for i, counter in enumerate(counters):
        key = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
        expected = reference.philox((counter & 0xFFFFFFFF, counter >> 32, 0, 0), key)
        assert [int(word[i]) for word in got] == [int(word) for word in expected]


def test_element_bits_are_the_words_of_their_counters() -> None:
    """Four neighbours share a counter; the seed's two halves are the key."""
    low, high = words("a4093822 299f31d0")
    first = 2**34 - 2  # the counter passes 2**32 in the middle
    bits = reference.element_bits(high << 32 | low, 6, first)
    before = reference.philox((2**32 - 1, 0, 0, 0), (low, high))
    after = reference.philox((0, 1, 0, 0), (low, high))
    assert bits.tolist() == [int(w) for w in (*before[2:], *after)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.5, 0.1, 1.0, 1e-12], ids="p={}".format)
def test_factors_are_numpys_bit_for_bit(seed: int, p: float, device: str) -> None:
    expected = reference.dropout_factors(seed, (130,), p).astype(np.float32)
    assert np.array_equal(factors_of(seed, (130,), p, device).cpu().numpy(), expected)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1,), id="one element"),
        pytest.param((7, 13), id="rows not divisible by four"),
        pytest.param((3, 16), id="rows divisible by four"),
        pytest.param((ElementwiseLaunch().block + 3,), id="a second program has three elements"),
    ],
)
@each_dtype
def test_factors_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    like = torch.empty(shape, device=device, dtype=dtype)
    with gpunn.trace() as trace:
        got = dropout_factors(torch.tensor([99], device=device), like, 0.25)
    launched(trace, "dropout_factors")
    expected = torch.from_numpy(reference.dropout_factors(99, shape, 0.25)).float().to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got.cpu(), expected)


def test_factors_of_nothing(device: str) -> None:
    assert factors_of(1, (0, 3), 0.5, device).shape == (0, 3)


@pytest.mark.parametrize(
    ("n_cols", "aligned"), [(12, True), (12, False), (13, False)], ids=["quads", "single", "odd"]
)
@pytest.mark.parametrize("first_row", [0, 2**31 // 12 + 5], ids=["start", "past 2**31 elements"])
def test_a_tile_has_the_bits_of_its_place(
    n_cols: int, aligned: bool, first_row: int, device: str
) -> None:
    """In quads or one by one, and where the element index needs 64 bits."""
    rows, cols, seed = 4, 16, 7
    tile = torch.empty(rows, cols, device=device)
    run(
        "test", factors_kernel, (1,), torch.tensor([seed], device=device), tile, first_row, n_cols,
        *dropout_arguments(0.5), launch=Launch(), ALIGNED=aligned, ROWS=rows, COLS=cols,
    )  # fmt: skip
    for row in range(rows):
        first = (first_row + row) * n_cols
        bits = reference.element_bits(seed, cols, first)
        assert tile[row].tolist() == np.where(bits >= 2**31, 2.0, 0.0).tolist()


def test_a_seed_comes_from_torchs_generator_of_the_device(device: str) -> None:
    where = torch.device(device)
    torch.manual_seed(5)
    first, second = draw_seed(where), draw_seed(where)
    torch.manual_seed(5)
    assert torch.equal(draw_seed(where), first)
    assert not torch.equal(first, second)
    assert first.device.type == device
    assert first.dtype == torch.int64
    before = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    draw_seed(where)
    after = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert not torch.equal(before, after)


def test_consecutive_draws_are_not_shifted_copies(device: str) -> None:
    where, n_elements = torch.device(device), 4096
    like = torch.empty(n_elements, device=device)
    first, second = (dropout_factors(draw_seed(where), like, 0.5).bool().cpu() for _ in range(2))
    agreements = [
        (first[shift:] == second[: n_elements - shift]).double().mean().item()
        for shift in range(1025)
    ]
    # Independent masks agree in half of at least 3071 places; 6 deviations of that are 0.054.
    assert max(abs(agreement - 0.5) for agreement in agreements) < 0.06


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_is_p(p: float, device: str) -> None:
    n_elements = 50_000
    dropped = (factors_of(3, (n_elements,), p, device) == 0).double().mean().item()
    assert abs(dropped - p) < 4 * math.sqrt(p * (1 - p) / n_elements)


@pytest.mark.parametrize("p", [1e-12, 0.25, 0.5, 1 - 2**-32, 1.0])
def test_threshold_keeps_what_the_formula_keeps(p: float) -> None:
    """An element is kept when its unsigned bits reach p 2**32; in signed numbers, so on a GPU."""
    threshold, scale = dropout_arguments(p)
    least_kept = max(round(p * 2**32), 1)
    assert -(2**31) <= threshold < 2**31
    for bits in (0, least_kept - 1, min(least_kept, 2**32 - 1), 2**32 - 1):
        assert (bits - 2**31 > threshold) == (bits >= least_kept)
    assert scale == (0 if p == 1 else 1 / (1 - p))
