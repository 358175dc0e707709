"""Cross-entropy of the rows of x Wᵀ + b, and the gradients of x, W and b.

Source: C. Bishop, "Pattern Recognition and Machine Learning", 2006, section 4.3.4.
"""

from __future__ import annotations

from gpunn.reference.cross_entropy import (
    Array,
    cross_entropy_backward,
    cross_entropy_forward,
)


def linear_cross_entropy_forward(
    x: Array, linear_weight: Array, bias: Array, share: Array, weight: Array
) -> Array:
    """The loss of each row of x (N, H), with W (C, H); ``share`` and ``weight`` as there."""
    return cross_entropy_forward(x @ linear_weight.T + bias, share, weight)


def linear_cross_entropy_backward(
    dloss: Array, x: Array, linear_weight: Array, bias: Array, share: Array, weight: Array
) -> tuple[Array, Array, Array]:
    """dx, dW and db, through the gradient of the logits."""
    dlogits = cross_entropy_backward(dloss, x @ linear_weight.T + bias, share, weight)
    return dlogits @ linear_weight, dlogits.T @ x, dlogits.sum(0)
