"""``assert_accurate``: a result against the truth, and against PyTorch's own result."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gpunn.checks.comparison import as_numpy
from gpunn.reference.closeness import judge


def assert_accurate(
    got: torch.Tensor, exact: NDArray[np.float64], baseline: torch.Tensor, what: str = "result"
) -> None:
    """Fail unless ``got`` is right, by the rule of ``gpunn.reference.closeness``.

    Args:
        got: what gpunn computed.
        exact: the truth, in float64.
        baseline: what PyTorch computed, in the dtype of ``got``.
        what: how the message calls it.
    """
    assert got.dtype == baseline.dtype, f"{what}: dtype {got.dtype}, PyTorch's is {baseline.dtype}"
    shape = tuple(got.shape)
    assert shape == exact.shape, f"{what}: shape {shape}, the exact one has {exact.shape}"
    assert got.shape == baseline.shape, f"{what}: shape {shape}, PyTorch's {tuple(baseline.shape)}"
    values, torchs = as_numpy(got), as_numpy(baseline)
    verdict = judge(values, exact, torchs, torch.finfo(got.dtype).eps)
    assert verdict.vacuous is None, f"{what}: this comparison shows nothing: {verdict.vacuous}"
    if not verdict.ok:
        raise AssertionError(
            f"{what}: error {verdict.error:.3e}, allowed {verdict.allowed:.3e} ({got.dtype})\n"
            + describe_worst(values, exact, torchs, verdict.allowed)
        )


def describe_worst(
    values: NDArray[np.float64],
    exact: NDArray[np.float64],
    torchs: NDArray[np.float64],
    allowed: float,
) -> str:
    """The worst element, and how many are wrong."""
    with np.errstate(invalid="ignore"):
        errors = np.where(values == exact, 0.0, np.abs(values - exact))
    errors = np.where(np.isnan(values) & np.isnan(exact), 0.0, errors)
    errors = np.where(np.isnan(errors), np.inf, errors)
    worst = np.unravel_index(int(np.argmax(errors)), errors.shape)
    return (
        f"worst at {tuple(int(i) for i in worst)}: got {values[worst]:.9g}, "
        f"exact {exact[worst]:.9g}, PyTorch {torchs[worst]:.9g}; "
        f"{int((errors > allowed).sum())} of {errors.size} elements are wrong"
    )
