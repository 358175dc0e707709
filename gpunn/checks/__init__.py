"""What ``gpunn check`` checks: for every op, its cases against the NumPy reference.

To add an op: a file of its name here, whose ``CHECKS`` need ``compare`` and the reference and
hardly more, and an entry below.
"""

from gpunn.checks import (
    activation,
    attention,
    batch_norm,
    convolution,
    cross_entropy,
    dropout,
    glu,
    layer_norm,
    linear,
    pooling,
    softmax,
)
from gpunn.checks.comparison import Check

CHECKS: dict[str, list[Check]] = {
    "activation": activation.CHECKS,
    "attention": attention.CHECKS,
    "batch_norm": batch_norm.CHECKS,
    "convolution": convolution.CHECKS,
    "cross_entropy": cross_entropy.CHECKS,
    "dropout": dropout.CHECKS,
    "glu": glu.CHECKS,
    "layer_norm": layer_norm.CHECKS,
    "linear": linear.CHECKS,
    "pooling": pooling.CHECKS,
    "softmax": softmax.CHECKS,
}
