"""When a result counts as right: no further from the truth than twice what PyTorch's own is.

    allowed = 2 max|baseline - exact| + 2 eps max|exact|

with ``exact`` in float64, ``baseline`` PyTorch's result in the same dtype as ``got``, and ``eps``
that dtype's. The rule is flash-attention's (tests/test_flash_attn.py), with two units in the last
place added. A comparison that would pass an answer of zeros shows nothing, and is not passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALLEST = 1e-6


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison."""

    error: float
    """The largest error; infinite where an infinity or a NaN is missing or misplaced."""
    allowed: float
    vacuous: str | None
    """Why the comparison would show nothing; None when it shows something."""

    @property
    def ok(self) -> bool:
        """Whether the result is right, and the comparison able to say so."""
        return self.vacuous is None and self.error <= self.allowed


def largest_error(values: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    """max |values - exact|; infinite unless both have the same infinities and NaNs."""
    finite = np.isfinite(exact)
    if not np.array_equal(values[~finite], exact[~finite], equal_nan=True):
        return np.inf
    if not np.isfinite(values[finite]).all():
        return np.inf
    return float(np.max(np.abs(values[finite] - exact[finite]), initial=0.0))


def judge(got: Any, exact: Any, baseline: Any, eps: float) -> Verdict:
    """Compare ``got`` with ``exact``, arrays of one shape, by the rule above."""
    got, exact, baseline = (np.asarray(a, dtype=np.float64) for a in (got, exact, baseline))
    if not got.shape == exact.shape == baseline.shape:
        shapes = f"got {got.shape}, exact {exact.shape}, baseline {baseline.shape}"
        raise ValueError(f"shapes differ: {shapes}")
    error = largest_error(got, exact)
    size = float(np.max(np.abs(exact[np.isfinite(exact)]), initial=0.0))
    baseline_error = largest_error(baseline, exact)
    allowed = 2 * baseline_error + 2 * eps * size
    vacuous = None
    if exact.size == 0:
        vacuous = "there is nothing to compare"
    elif not size > SMALLEST:
        vacuous = f"the largest exact value is {size:.1e}, not above {SMALLEST:.0e}"
    elif not allowed < size / 4:
        vacuous = (
            f"PyTorch's own result is off by {baseline_error:.1e}, "
            f"where the largest exact value is {size:.1e}"
        )
    return Verdict(error, allowed, vacuous)
