"""Random bits: Philox 4x32-10, and the dropout that is drawn from them.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the constants are
those of their Random123 library. The mapping from elements to counters is that of
``kernels/philox.py``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
MASK = np.uint64(0xFFFFFFFF)
N_ROUNDS = 10


def philox(counter: Any, key: Any) -> tuple[Words, Words, Words, Words]:
    """The four random words of a counter of four words (numbers or arrays) and a key of two."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    shift = np.uint64(32)
    for _ in range(N_ROUNDS):
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ k0,
            product1 & MASK,
            (product0 >> shift) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    w0, w1, w2, w3 = (word.astype(np.uint32) for word in (c0, c1, c2, c3))
    return w0, w1, w2, w3


def element_bits(seed: int, n_elements: int, first: int = 0) -> Words:
    """The 32 bits of elements ``first``, ``first + 1``, … of a tensor in row-major order.

    Element i has word i mod 4 of the counter (i div 4, 0), both in two words, low one first.
    """
    element = np.arange(first, first + n_elements, dtype=np.uint64)
    quad = element // np.uint64(4)
    zero = np.zeros_like(quad)
    counter = (quad & MASK, quad >> np.uint64(32), zero, zero)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    bits: Words = np.choose((element % np.uint64(4)).astype(np.intp), words)
    return bits


def dropout_factors(seed: int, shape: tuple[int, ...], p: float) -> NDArray[np.float64]:
    """0 with probability p, else 1 / (1 - p), for 0 < p <= 1.

    An element is kept when its bits, as an unsigned number, reach p 2³², rounded but at least 1.
    """
    bits = element_bits(seed, math.prod(shape)).reshape(shape).astype(np.uint64)
    kept = bits >= np.uint64(max(round(p * 2**32), 1))
    return np.where(kept, 0.0 if p == 1 else 1 / (1 - p), 0.0)
