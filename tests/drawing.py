"""How Hypothesis draws the problems of the tests that compare hundreds of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings


def drawing(chunk: int, n: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``n`` examples, the same in every run and others in every chunk; nothing is kept."""

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        thorough = settings(
            max_examples=n,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        decorated: Callable[..., Any] = seed(20240229 + chunk)(thorough(test))
        return decorated

    return decorate


def expected_at_most(share: float, n: int) -> float:
    """How many of ``n`` draws have what a share of all has, with two standard deviations."""
    return share * n + 2 * math.sqrt(share * (1 - share) * n)
