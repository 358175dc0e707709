"""The bits that dropout draws: the same ones everywhere, at the rate asked for, and independent."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import gpunn.functional as GF
from gpunn.kernels.cuda import CudaLaunch, divisor
from gpunn.kernels.dropout import CUDA_LAUNCH, dropout_factors, dropout_forward
from gpunn.kernels.launch import run
from gpunn.kernels.philox import dropout_arguments
from gpunn.reference import dropout as reference
from gpunn.reference.philox import element_bits
from kit import CudaText, as_numpy, each_dtype
from test_dropout import Booleans, P, seed_of

SEEDS = [0, 1, 2**31, 2**32, 2**63 - 1, 0x243F6A8885A308D3]
BLOCK = CUDA_LAUNCH.n_threads


def ones(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, device=device, dtype=dtype)


@each_dtype
def test_bits_are_tritons_and_numpys_at_every_boundary(dtype: torch.dtype, device: str) -> None:
    """The end of a vector of 16 bytes, of a block, and of the last byte of a mask."""
    vector = 16 // dtype.itemsize
    around = [1, vector, 2 * vector, BLOCK * vector, 2 * BLOCK * vector + vector]
    for n in sorted({size + step for size in around for step in (-1, 0, 1, 3) if size + step}):
        x, seed = ones(n, device=device, dtype=dtype), seed_of(n, device)
        got = GF.dropout(x, P)
        seed_of(n, device)
        mask = GF.dropout_mask((n,), P, device=device)
        tritons = dropout_factors(torch.tensor([seed], device=device), x, P)
        kept = reference.kept_elements(seed, (n,), P)
        assert torch.equal(got, tritons), n
        assert np.array_equal(as_numpy(got) != 0, kept), n
        assert np.array_equal(mask.cpu().numpy(), reference.packed(kept)), n
        assert torch.equal(GF.dropout(x, P, mask=mask), got), n


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 1 - 2**-32, 1.0], ids="p={}".format)
def test_any_seed_and_probability(seed: int, p: float, device: str) -> None:
    x = ones(10, 13, device=device)
    key = torch.tensor([seed], device=device)
    factors = reference.dropout_forward(
        np.ones((10, 13)), reference.kept_elements(seed, (10, 13), p), p
    )
    got = dropout_forward(x, key, x.stride(), p, "dropout", None)
    assert np.array_equal(got.cpu().numpy(), factors.astype(np.float32))
    assert torch.equal(got, dropout_factors(key, x, p))


# Draws as the kernels do, from an element so far on that its index needs 64 bits.
PROBE = """
#include "dropout.cu"
template <typename T, int N, int MODE>
__global__ void probe_kernel(const long long* seed, T* y, Divisor n_channels, Divisor n_inner,
                             long long first) {
    Rule<T> rule(-1, 1, 0, 0);
    Sizes sizes{n_channels, n_inner};
    Index at = threadIdx.x * N;
    Outcome<T> outcomes[N];
    unsigned bits[N];
    if (MODE == 0) {
        draw(bits, *seed, first + at);
        for (int k = 0; k < N; k++) outcomes[k] = rule(bits[k]);
    }
    if (MODE == 1) choose_outer(outcomes, *seed, first + at, sizes, rule);
    if (MODE == 2) choose_inner(outcomes, *seed, first + at, sizes, rule);
    for (int k = 0; k < N; k++) y[at + k] = outcomes[k].factor;
}
"""


@pytest.mark.parametrize("first", [0, 2**31 - 64, 2**32 - 64, 2**34 - 64, 2**35], ids=str)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("mode", "sizes"),
    [(0, (1, 1)), (1, (5, 9)), (1, (3, 2**33)), (2, (8, 11)), (2, (24, 2**31))],
    ids=["elements", "channels", "large channels", "channels last", "large channels last"],
)
def test_an_index_may_need_64_bits(
    mode: int, sizes: tuple[int, int], first: int, width: int, device: str
) -> None:
    n_channels, n_inner = sizes
    y = torch.empty(32 * width, device=device)
    kernel = CudaText(PROBE, "probe_kernel")  # is unloaded with its last name, maybe while it runs
    run(
        "test", kernel, (1,), torch.tensor([77], device=device), y,
        divisor(n_channels), divisor(n_inner), first,
        launch=CudaLaunch(num_warps=1), T=y.dtype, N=width, MODE=mode,
    )  # fmt: skip
    elements = range(first, first + 32 * width)
    rows = [i // (n_channels * n_inner) for i in elements]
    drawn = {
        0: list(elements),
        1: [i // n_inner for i in elements],
        2: [row * n_channels + i % n_channels for row, i in zip(rows, elements, strict=True)],
    }[mode]
    assert y.tolist() == [float(element_bits(77, 1, i)[0] >= 2**31) for i in drawn]


RULE = """
#include "dropout.cu"
template <int N>
__global__ void rule_kernel(const long long* bits, double* y, long long threshold) {
    for (int k = 0; k < N; k++) y[k] = Rule<double>(threshold, 1, 0, 0)(bits[k]).factor;
}
"""


@pytest.mark.parametrize("p", [1e-12, 2**-32, 0.25, 0.5, 0.75, 1 - 2**-32, 1.0], ids="p={}".format)
def test_the_threshold_itself_is_dropped(p: float, device: str) -> None:
    """Bits are kept from p 2**32 on, as unsigned numbers."""
    least = max(round(p * 2**32), 1)
    bits = [0, least - 1, min(least, 2**32 - 1), 2**31 - 1, 2**31, 2**32 - 1]
    y = torch.empty(len(bits), dtype=torch.float64, device=device)
    kernel = CudaText(RULE, "rule_kernel")
    run(
        "test", kernel, (1,), torch.tensor(bits, device=device), y,
        dropout_arguments(p)[0], launch=CudaLaunch(num_warps=1), N=len(bits),
    )  # fmt: skip
    assert y.tolist() == [float(value >= least) for value in bits]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="8 GB of input take a CPU minutes")
@pytest.mark.parametrize("function", [GF.dropout, GF.dropout1d], ids=["elements", "channels"])
def test_more_than_two_to_the_32_elements(function: Callable[..., torch.Tensor]) -> None:
    x = torch.ones(2, 2**15, 2**16 + 8, device="cuda", dtype=torch.bfloat16)
    seed = seed_of(1, "cuda")
    y = function(x, P)
    first = 2**16 - 64 if function is GF.dropout1d else x.numel() - 64
    bits = element_bits(seed, 64, first)
    last = y[1, -64:, -1] if function is GF.dropout1d else y.view(-1)[-64:]
    assert np.array_equal(as_numpy(last) != 0, bits >= P * 2**32)


# --- how they are distributed ---


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_is_p(p: float, device: str) -> None:
    n = 10_000_000
    y = GF.dropout(ones(n, device=device, dtype=torch.bfloat16), p)
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_a_rate_of_one_drops_all_and_a_rate_of_zero_nothing(device: str) -> None:
    x = ones(1003, device=device)
    assert GF.dropout(x, 0.0) is x
    assert not GF.dropout(x, 1.0).any()
    assert not GF.dropout_mask((1003,), 1.0, device=device).any()
    assert torch.equal(GF.dropout(x, 0.0, mask=GF.dropout_mask(x.shape, 0.0, device=device)), x)


def agreement(a: Booleans, b: Booleans) -> float:
    """How far the share of agreeing elements is from a half, in standard deviations."""
    return abs(float((a == b).mean()) - 0.5) * 2 * math.sqrt(a.size)


def test_consecutive_calls_are_not_shifted_copies(device: str) -> None:
    """Nor are the parts of one call, by any shift up to 1024, or any two rows."""
    x = ones(64, 128, device=device)
    rows, others = (as_numpy(GF.dropout(x, 0.5)) != 0 for _ in range(2))
    first, second = rows.reshape(-1), others.reshape(-1)
    for shift in range(1025):
        assert agreement(first[shift:], second[: first.size - shift]) < 6, shift
        assert agreement(second[shift:], first[: first.size - shift]) < 6, shift
        assert shift == 0 or agreement(first[shift:], first[:-shift]) < 6, shift
    assert max(agreement(rows[i], rows[j]) for i in range(64) for j in range(i)) < 6


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 62])
def test_seeds_that_are_alike_draw_what_is_not(bit: int, device: str) -> None:
    x = ones(8192, device=device)
    keys = [torch.tensor([seed], device=device) for seed in (5, 5 ^ 1 << bit)]
    kept = [as_numpy(dropout_forward(x, key, (1,), 0.5, "dropout", None)) != 0 for key in keys]
    assert agreement(*kept) < 5


def test_manual_seed_reproduces_and_each_call_advances(device: str) -> None:
    x = ones(999, device=device)
    torch.manual_seed(4)
    first, second = GF.dropout(x), GF.dropout(x)
    torch.manual_seed(4)
    again = [GF.dropout(x), GF.dropout(x)]
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
