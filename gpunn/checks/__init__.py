"""What ``gpunn check`` checks: for every op, its cases against the NumPy reference.

To add an op: a file of its name here, whose ``CHECKS`` need ``compare`` and the reference and
hardly more, and an entry below.
"""

from gpunn.checks import (
    activation,
    attention,
    augment,
    batch_norm,
    convolution,
    cross_entropy,
    dropout,
    embedding,
    glu,
    group_norm,
    layer_norm,
    linear,
    linear_cross_entropy,
    nll_loss,
    pointwise_loss,
    pooling,
    rotary_embedding,
    softmax,
)
from gpunn.checks.comparison import Check

CHECKS: dict[str, list[Check]] = {
    "activation": activation.CHECKS,
    "attention": attention.CHECKS,
    "augment": augment.CHECKS,
    "batch_norm": batch_norm.CHECKS,
    "convolution": convolution.CHECKS,
    "cross_entropy": cross_entropy.CHECKS,
    "dropout": dropout.CHECKS,
    "embedding": embedding.CHECKS,
    "glu": glu.CHECKS,
    "group_norm": group_norm.CHECKS,
    "layer_norm": layer_norm.CHECKS,
    "linear": linear.CHECKS,
    "linear_cross_entropy": linear_cross_entropy.CHECKS,
    "nll_loss": nll_loss.CHECKS,
    "pointwise_loss": pointwise_loss.CHECKS,
    "pooling": pooling.CHECKS,
    "rotary_embedding": rotary_embedding.CHECKS,
    "softmax": softmax.CHECKS,
}
