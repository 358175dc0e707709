"""Random bits: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

Element ``i`` of a tensor, counted in row-major order, gets word ``i mod 4`` of Philox with the
counter ``(i div 4, 0)`` and the seed as the key. Every kernel, and NumPy in
``gpunn/reference/philox.py``, derives the same bits from the same seed, whatever its tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A seed is one int64 on the tensor's own device, drawn from torch's generator there: no host
# synchronisation, reproducible from torch.manual_seed, and fresh when a CUDA graph is replayed.
_SEED_LIMIT = 2**63 - 1
_WORD = 2**32 - 1


def draw_seed(device: torch.device) -> torch.Tensor:
    """One int64 from the torch generator of ``device``, as a tensor of one element there."""
    return torch.randint(_SEED_LIMIT, (1,), dtype=torch.int64, device=device)


def dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """The kernel arguments ``threshold`` and ``scale`` for a dropout probability in (0, 1].

    An element is kept when its 32 random bits, as an unsigned number, reach ``dropout_p * 2**32``;
    the threshold is one less, moved into the range of int32 so that its type does not depend on p.
    """
    threshold = max(round(dropout_p * 2**32), 1) - 1 - 2**31
    return threshold, 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and the lower word of a product of two words, which int64 would not hold."""
    low = (a & 0xFFFF) * b
    middle = (a >> 16) * b + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def random_words(seed: torch.Tensor, counter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four words of each counter, an int64 of two words, as torch computes them: in int64."""
    c0, c1 = counter & _WORD, counter >> 32 & _WORD
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


@triton.jit
def quad_bits(seed, index, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Bits of a tile of elements from the indices, divided by four, of its groups of four."""
    r0, r1, r2, r3 = tl.randint4x(seed, index)
    return tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCK_ROWS, BLOCK_COLS))


@triton.jit
def dropout_factor(
    seed_ptr, row, first_col, n_cols, threshold, scale,
    ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Tile of ``0`` (dropped) and ``scale`` (kept) for rows ``row`` from column ``first_col`` on.

    ``ALIGNED`` says that ``n_cols`` is divisible by four: then four neighbours share one Philox
    call; otherwise each element makes its own.
    """
    seed = tl.load(seed_ptr)
    start = row.to(tl.int64)[:, None] * n_cols + first_col
    if ALIGNED:
        quads: tl.constexpr = BLOCK_COLS // 4
        index = start // 4 + tl.arange(0, quads)[None, :]
        bits = quad_bits(seed, index, BLOCK_ROWS, BLOCK_COLS)
    else:
        element = start + tl.arange(0, BLOCK_COLS)[None, :]
        r0, r1, r2, r3 = tl.randint4x(seed, element // 4)
        lane = element % 4
        bits = tl.where(lane < 2, tl.where(lane == 0, r0, r1), tl.where(lane == 2, r2, r3))
    signed = (bits ^ 0x80000000).to(tl.int32, bitcast=True)
    return tl.where(signed > threshold, scale, 0.0)
