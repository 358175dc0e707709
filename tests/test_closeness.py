"""The tolerance rule rejects what is wrong, accepts what is right, and refuses to show nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from closeness import assert_accurate
from kit import as_numpy, each_dtype

Case = tuple[NDArray[np.float64], torch.Tensor]


def softmax_case(dtype: torch.dtype) -> Case:
    """Softmax over 1000 classes: small values, which fixed tolerances let zeros pass for."""
    x = torch.randn(4, 1000).to(dtype)
    exact = np.exp(as_numpy(x))
    return exact / exact.sum(axis=1, keepdims=True), torch.softmax(x, dim=1)


@each_dtype
def test_accepts_torchs_own(dtype: torch.dtype) -> None:
    exact, baseline = softmax_case(dtype)
    assert_accurate(baseline.clone(), exact, baseline)


@each_dtype
def test_accepts_the_nearest_values(dtype: torch.dtype) -> None:
    exact, baseline = softmax_case(dtype)
    assert_accurate(torch.from_numpy(exact).to(dtype), exact, baseline)


@each_dtype
def test_rejects_zeros(dtype: torch.dtype) -> None:
    exact, baseline = softmax_case(dtype)
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        assert_accurate(torch.zeros_like(baseline), exact, baseline)


@each_dtype
def test_rejects_one_output_ten_percent_off(dtype: torch.dtype) -> None:
    exact, baseline = softmax_case(dtype)
    wrong = baseline.clone()
    wrong.view(-1)[baseline.argmax()] *= 1.1
    with pytest.raises(AssertionError, match="1 of 4000 elements are wrong"):
        assert_accurate(wrong, exact, baseline)


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rejects_a_nan_or_infinity_where_the_truth_is_finite(
    dtype: torch.dtype, value: float
) -> None:
    exact, baseline = softmax_case(dtype)
    wrong = baseline.clone()
    wrong[2, 3] = value
    with pytest.raises(AssertionError, match=r"worst at \(2, 3\)"):
        assert_accurate(wrong, exact, baseline)


def test_wants_infinities_and_nans_where_the_truth_has_them() -> None:
    exact = np.array([1.0, np.inf, np.nan, -2.0])
    right = torch.tensor([1.0, torch.inf, torch.nan, -2.0])
    assert_accurate(right, exact, right)
    for place, wrong_value in ((1, 3e38), (1, -torch.inf), (2, 0.0)):
        wrong = right.clone()
        wrong[place] = wrong_value
        with pytest.raises(AssertionError, match=rf"worst at \({place},\)"):
            assert_accurate(wrong, exact, right)


def test_refuses_a_truth_that_is_all_but_zero() -> None:
    exact = np.full(5, 3e-7)  # the gradient of a softmax for an upstream gradient of ones
    zeros = torch.zeros(5)
    with pytest.raises(AssertionError, match="shows nothing: the largest exact value"):
        assert_accurate(zeros, exact, zeros)


def test_refuses_a_tolerance_that_would_pass_zeros() -> None:
    exact = np.asarray(np.linspace(0.1, 1, 5), dtype=np.float64)
    bad_baseline = torch.from_numpy(exact).float() * 0.8
    with pytest.raises(AssertionError, match="shows nothing: PyTorch's own result is off by 2"):
        assert_accurate(torch.from_numpy(exact).float(), exact, bad_baseline)


def test_refuses_a_baseline_that_is_not_finite() -> None:
    exact, right = np.ones(3), torch.ones(3)
    with pytest.raises(AssertionError, match="shows nothing: PyTorch's own result is off by inf"):
        assert_accurate(right, exact, torch.tensor([1.0, torch.nan, 1.0]))


def test_refuses_to_compare_nothing() -> None:
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_accurate(torch.empty(0), np.empty(0), torch.empty(0))


def test_wants_shape_and_dtype_right() -> None:
    exact, right = np.ones((2, 3)), torch.ones(2, 3)
    with pytest.raises(AssertionError, match=r"dtype torch.float64, PyTorch's is torch.float32"):
        assert_accurate(right.double(), exact, right)
    with pytest.raises(AssertionError, match=r"shape \(3, 2\), the exact one has \(2, 3\)"):
        assert_accurate(right.T, exact, right)
    with pytest.raises(AssertionError, match=r"shape \(2, 3\), PyTorch's \(6,\)"):
        assert_accurate(right, exact, right.flatten())
