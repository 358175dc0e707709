"""CUDA C++ on a CPU: threads as fibers, barriers, warps, atomics, and the 16-bit types."""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from gpunn.kernels import host
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.reference import philox as reference
from kit import CudaText, short_name
from test_interpreter import awkward_float32
from test_philox import SEEDS, VECTORS, words

pytestmark = pytest.mark.skipif(
    not INTERPRETING, reason="the kernels run on the GPU here, not on the host"
)

SOURCE = """
#include "philox.h"

// y = the sums of SIZE numbers a block, over a grid of two dimensions.
template <int SIZE, bool HAS_BARRIER>
__global__ void sum_kernel(const float* x, float* y) {
    __shared__ float tile[SIZE];
    int t = threadIdx.x, block = blockIdx.y * gridDim.x + blockIdx.x;
    tile[t] = x[block * SIZE + t];
    for (int half = SIZE / 2; half; half /= 2) {
        if (HAS_BARRIER) __syncthreads();
        if (t < half) tile[t] += tile[t + half];
    }
    if (t == 0) y[block] = tile[0];
}

template <int WARPS>
__global__ void vote_kernel(const int* x, int* y) {
    int t = threadIdx.x;
    y[4 * t] = __ballot_sync(~0u, x[t]);
    y[4 * t + 1] = __any_sync(~0u, x[t]);
    y[4 * t + 2] = __all_sync(~0u, x[t]);
    y[4 * t + 3] = t & 16 ? __ballot_sync(0xffff0000u, x[t]) : 0;  // while others wait below
    __syncthreads();
}

template <int WIDTH>
__global__ void butterfly_kernel(const int* x, int* y) {
    int sum = x[threadIdx.x];
    for (int d = WIDTH / 2; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d, WIDTH);
    y[threadIdx.x] = sum;
}

template <typename T>
__global__ void shuffle_kernel(const T* x, T* y, long long kind, long long by, long long width) {
    int t = threadIdx.x;
    if (kind == 0) y[t] = __shfl_sync(~0u, x[t], by, width);
    if (kind == 1) y[t] = __shfl_up_sync(~0u, x[t], by, width);
    if (kind == 2) y[t] = __shfl_down_sync(~0u, x[t], by, width);
    if (kind == 3) y[t] = __shfl_xor_sync(~0u, x[t], by, width);
}

// y: a counter, a sum, a maximum, a minimum, a swapped value and two compared ones.
template <typename T>
__global__ void atomic_kernel(T* y, int* before) {
    T i = T(blockIdx.x * blockDim.x + threadIdx.x);
    before[int(atomicAdd(y, T(1)))] += 1;
    atomicAdd(y + 1, i);
    atomicMax(y + 2, i);
    atomicMin(y + 3, i);
    atomicExch(y + 4, T(7));
    atomicCAS(y + 5, T(3), T(5));
    atomicCAS(y + 6, T(4), T(5));
}

template <int N>
__global__ void grid_kernel(int* y) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    y[block * blockDim.x + threadIdx.x] = block * N + threadIdx.x;
}

// y = the threads in the order in which they come.
template <int N>
__global__ void order_kernel(int* n_came, int* y) {
    y[atomicAdd(n_came, 1)] = blockIdx.x * N + threadIdx.x;
}

template <int N>
__global__ void wait_kernel(const int* kind, int* y) {
    assert(kind[threadIdx.x] < N);
    if (kind[threadIdx.x] == 1) return;
    if (kind[threadIdx.x] == 2) __syncwarp();
    else __syncthreads();
    y[threadIdx.x] = 1;
}

struct Pair {
    int first;
    double second;
};

template <typename T>
__global__ void argument_kernel(T* y, const T* absent, Pair pair, long long n, double s) {
    y[0] = T(pair.first);
    y[1] = T(pair.second);
    y[2] = T(n);
    y[3] = T(s);
    y[4] = absent == nullptr;
}

template <typename T>
__global__ void widen_kernel(const T* x, float* y, long long n) {
    for (long long i = threadIdx.x; i < n; i += blockDim.x) y[i] = widen(x[i]);
}

template <typename T>
__global__ void narrow_kernel(const float* x, T* y, long long n) {
    for (long long i = threadIdx.x; i < n; i += blockDim.x) y[i] = narrow<T>(x[i]);
}

template <int N>
__device__ float* shared() {
    __shared__ float tile[N];
    return tile;
}

template <int N>
__global__ void leave_kernel(const float* x) {
    shared<N>()[threadIdx.x] = x[threadIdx.x];
}

template <int N>
__global__ void find_kernel(float* y) {
    y[threadIdx.x] = shared<N>()[threadIdx.x];
}

template <int N>
__global__ void philox_kernel(const long long* seed, const long long* quad, long long* y) {
    uint4 words = philox(seed[threadIdx.x], quad[threadIdx.x]);
    for (int i = 0; i < N; i++) y[threadIdx.x * N + i] = word(words, i);
}
"""
Order = tuple[host.Order, int]
ORDERS: list[Order] = [("ascending", 0), ("reversed", 0), ("random", 1), ("random", 2)]
each_order = pytest.mark.parametrize("order", ORDERS, ids=lambda order: f"{order[0]}-{order[1]}")


def execute(
    name: str,
    grid: tuple[int, ...],
    n_threads: int,
    *arguments: Any,
    order: Order = ("ascending", 0),
    **constants: Any,
) -> None:
    """Run a kernel of the source above on any number of threads."""
    kernel = CudaText(SOURCE, name)
    function = host.entry(kernel.source, kernel.instantiation(constants))
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    with host.thread_order(*order):
        host.launch(function, grid, n_threads, values)


# --- a block, and the order of its threads ---


def sums(x: torch.Tensor, order: Order, has_barrier: bool) -> list[float]:
    y = torch.zeros(6)
    execute("sum_kernel", (2, 3), 64, x, y, order=order, SIZE=64, HAS_BARRIER=has_barrier)
    return [float(value) for value in y]


def whole_numbers(*shape: int) -> torch.Tensor:
    """Numbers whose sums are exact in any order."""
    return torch.randint(-99, 99, shape).float()


@each_order
def test_a_block_adds_up_through_shared_memory(order: Order) -> None:
    x = whole_numbers(6, 64)
    assert sums(x, order, has_barrier=True) == x.sum(1).tolist()


def test_a_missing_barrier_shows_in_another_order() -> None:
    x = whole_numbers(6, 64)
    assert any(sums(x, order, False) != sums(x, ("reversed", 0), False) for order in ORDERS)
    assert sums(x, ("random", 1), False) != sums(x, ("random", 2), False)


def test_orders_are_what_they_are_called() -> None:
    def came(order: Order) -> list[int]:
        count, y = torch.zeros(1, dtype=torch.int32), torch.zeros(120, dtype=torch.int32)
        execute("order_kernel", (3,), 40, count, y, order=order, N=40)
        return [int(thread) for thread in y]

    assert came(("ascending", 0)) == list(range(120))
    assert came(("reversed", 0)) == list(range(119, -1, -1))
    first, second = came(("random", 1)), came(("random", 2))
    assert sorted(first) == sorted(second) == list(range(120))
    assert first == came(("random", 1))
    assert first != second
    assert [thread % 40 for thread in first[:40]] != [thread % 40 for thread in first[40:80]]


def test_an_order_holds_for_its_block_alone() -> None:
    with pytest.raises(ValueError, match="order: expected one of ascending, reversed, random"):
        execute("grid_kernel", (1,), 1, None, order=("sorted", 0), N=1)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError), host.thread_order("reversed"):
        raise ZeroDivisionError
    assert host._order == ("ascending", 0)


@pytest.mark.parametrize("grid", [(1,), (5,), (3, 4), (2, 3, 2)])
@each_order
def test_every_thread_of_every_block_runs_once(grid: tuple[int, ...], order: Order) -> None:
    n_threads = 40
    y = torch.full((int(np.prod(grid)) * n_threads + 1,), -1, dtype=torch.int32)
    execute("grid_kernel", grid, n_threads, y, order=order, N=n_threads)
    assert y.tolist() == [*range(y.numel() - 1), -1]


def test_kernels_share_no_shared_memory() -> None:
    """Though the function that has it is of one name in both libraries."""
    x, y = torch.ones(8), torch.ones(8)
    execute("leave_kernel", (1,), 8, x, N=8)
    execute("find_kernel", (1,), 8, y, N=8)
    assert y.tolist() == [0] * 8


def test_threads_of_the_host_take_turns() -> None:
    x = whole_numbers(6, 64)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: sums(x, ("ascending", 0), True), range(400)))
    assert found == [x.sum(1).tolist()] * 400


def test_arguments_are_pointers_structs_integers_and_doubles() -> None:
    y = torch.zeros(5, dtype=torch.float64)
    pair = struct.pack("id", 3, 0.1)
    execute("argument_kernel", (1,), 1, y, None, pair, 2**40 + 1, 0.7, T=torch.float64)
    assert y.tolist() == [3, 0.1, 2**40 + 1, 0.7, 1]


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ([0] * 31 + [3], r"assertion failed: kind\[threadIdx.x\] < N"),
        ([0] * 16 + [2] * 16, "deadlock: threads wait at different barriers"),
        ([0] * 1025, "a block has at most 1024 threads"),
    ],
    ids=["assertion", "deadlock", "threads"],
)
@each_order
def test_what_goes_wrong_is_an_error_and_the_next_launch_works(
    kinds: list[int], reason: str, order: Order
) -> None:
    kind, y = torch.tensor(kinds, dtype=torch.int32), torch.zeros(2000, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"CUDA C\\+\\+ kernel: {reason}"):
        execute("wait_kernel", (1,), len(kinds), kind, y, order=order, N=3)
    y.zero_()
    execute("wait_kernel", (1,), 100, torch.zeros(100, dtype=torch.int32), y, order=order, N=3)
    assert y.tolist() == [1] * 100 + [0] * 1900


def test_a_barrier_does_not_wait_for_threads_that_ended() -> None:
    kind, y = torch.tensor([1, 0] * 20, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
    execute("wait_kernel", (1,), 40, kind, y, N=3)
    assert y.tolist() == [0, 1] * 20


# --- warps ---


@each_order
@pytest.mark.parametrize("n_threads", [32, 64, 70, 5])
def test_votes(n_threads: int, order: Order) -> None:
    """Also of a last warp that has fewer than 32 threads."""
    x = torch.randint(0, 2, (n_threads,), dtype=torch.int32)
    x[:32] = 1
    y = torch.zeros(n_threads, 4, dtype=torch.int32)
    execute("vote_kernel", (1,), n_threads, x, y, order=order, WARPS=3)
    for first in range(0, n_threads, 32):
        warp = x[first : first + 32].tolist()
        ballot = sum(bit << lane for lane, bit in enumerate(warp))
        for lane, got in enumerate(y[first : first + 32].tolist()):
            upper = ballot & 0xFFFF0000 if lane & 16 else 0
            expected = [ballot, int(any(warp)), int(all(warp)), upper]
            assert [got[0] % 2**32, got[1], got[2], got[3] % 2**32] == expected


def source_of(kind: int, lane: int, by: int, width: int) -> int:
    """The lane that a shuffle reads, from the definition of ``shfl`` in the PTX manual."""
    first, last = lane & -width, (lane & -width) + width - 1
    if kind == 0:
        return first + by % width
    if kind == 1:
        return lane - by if lane - by >= first else lane
    source = lane + by if kind == 2 else lane ^ by
    return source if source <= last else lane


@pytest.mark.parametrize("kind", range(4), ids=["idx", "up", "down", "xor"])
@pytest.mark.parametrize("width", [32, 16, 8, 1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float64], ids=short_name)
def test_shuffles(kind: int, width: int, dtype: torch.dtype) -> None:
    x = torch.arange(64).to(dtype) + 100
    for by in (0, 1, 5, 16, 31, *((-1, -9) if kind == 0 else ())):
        y = torch.zeros_like(x)
        order: Order = ("random", 64 * width + by)
        execute("shuffle_kernel", (1,), 64, x, y, kind, by, width, order=order, T=dtype)
        lanes = [t & ~31 | source_of(kind, t & 31, by, width) for t in range(64)]
        assert y.tolist() == x[lanes].tolist(), by


@each_order
@pytest.mark.parametrize("width", [32, 8])
def test_one_shuffle_after_the_other(width: int, order: Order) -> None:
    """A lane that goes ahead must not give its next value before the others have read this one."""
    x, y = torch.arange(64, dtype=torch.int32) ** 2, torch.zeros(64, dtype=torch.int32)
    execute("butterfly_kernel", (1,), 64, x, y, order=order, WIDTH=width)
    assert torch.equal(y, x.view(-1, width).sum(1, dtype=torch.int32).repeat_interleave(width))


@each_order
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.int64], ids=short_name)
def test_atomics(dtype: torch.dtype, order: Order) -> None:
    y = torch.tensor([0, 0, 5, 5, 1, 3, 3], dtype=dtype)
    before = torch.zeros(120, dtype=torch.int32)
    execute("atomic_kernel", (3,), 40, y, before, order=order, T=dtype)
    assert before.tolist() == [1] * 120
    assert y.tolist() == [120, 119 * 60, 119, 0, 7, 5, 3]


# --- the 16-bit types and the random bits ---


def awkward_for_float16() -> torch.Tensor:
    """All halves between two float16 and their neighbours, where float32 has them; overflow."""
    halves = torch.arange(2**16 - 1, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = ((halves[1:] + halves[:-1]) / 2)[halves[1:].isfinite() & halves[:-1].isfinite()]
    edges = torch.tensor([65503.0, 65504, 65519.996, 65520, 65536, 1e30, torch.inf, 2.0**-25])
    near = [middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(middles * 2), edges]
    return torch.cat([*near, -edges])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short_name)
def test_widening_is_torchs(dtype: torch.dtype) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    y = torch.zeros(2**16)
    execute("widen_kernel", (1,), 1024, x, y, x.numel(), T=dtype)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit()[~x.isnan()], x.signbit()[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short_name)
@pytest.mark.parametrize("make", [awkward_float32, awkward_for_float16])
def test_narrowing_is_torchs(make: Callable[[], torch.Tensor], dtype: torch.dtype) -> None:
    x = make()
    y = torch.zeros(x.shape, dtype=dtype)
    execute("narrow_kernel", (1,), 1024, x, y, x.numel(), T=dtype)
    number = ~x.isnan()
    assert torch.equal(y.view(torch.int16)[number], x.to(dtype).view(torch.int16)[number])
    assert y[~number].isnan().all()


def philox_words(seeds: list[int], quads: list[int]) -> list[list[int]]:
    seed, quad = torch.tensor(seeds), torch.tensor(quads)
    y = torch.zeros(len(seeds), 4, dtype=torch.int64)
    execute("philox_kernel", (1,), len(seeds), seed, quad, y, N=4)
    return [[int(value) for value in row] for row in y]


def test_philox_gives_the_published_words() -> None:
    """Of the vectors whose counter is a number of a quad: its two upper words are zero."""
    fitting = [v for v in VECTORS if words(v[0])[2:] == [0, 0]]
    assert fitting
    for counter, key, expected in fitting:
        low, high = words(key)
        quad = words(counter)[0] + (words(counter)[1] << 32)
        assert philox_words([high << 32 | low], [quad]) == [words(expected)]


def test_philox_is_numpys() -> None:
    quads = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**61 + 12345]
    pairs = [(seed, quad) for seed in (*SEEDS, -1) for quad in quads]
    got = philox_words([seed for seed, _ in pairs], [quad for _, quad in pairs])
    for (seed, quad), four in zip(pairs, got, strict=True):
        assert four == reference.element_bits(seed % 2**64, 4, 4 * quad).tolist()
