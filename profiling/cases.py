"""All that is benchmarked, in the order in which it is measured when time may run out."""

from __future__ import annotations

from gpunn.profiling.attention_cases import attention_cases
from gpunn.profiling.augment_cases import augment_cases
from gpunn.profiling.batch_norm_cases import batch_norm_cases
from gpunn.profiling.case import Case
from gpunn.profiling.convolution_cases import convolution_cases
from gpunn.profiling.cross_entropy_cases import cross_entropy_cases
from gpunn.profiling.dropout_cases import dropout_cases
from gpunn.profiling.elementwise_cases import activation_cases, glu_cases
from gpunn.profiling.embedding_cases import embedding_cases
from gpunn.profiling.gan_cases import gan_cases
from gpunn.profiling.group_norm_cases import group_norm_cases
from gpunn.profiling.layer_norm_cases import layer_norm_cases
from gpunn.profiling.linear_cases import linear_cases
from gpunn.profiling.linear_cross_entropy_cases import linear_cross_entropy_cases
from gpunn.profiling.model_cases import model_cases
from gpunn.profiling.nll_loss_cases import nll_loss_cases
from gpunn.profiling.pointwise_loss_cases import pointwise_loss_cases
from gpunn.profiling.pooling_cases import pooling_cases
from gpunn.profiling.rotary_embedding_cases import rotary_embedding_cases
from gpunn.profiling.softmax_cases import softmax_cases
from gpunn.profiling.transformer_cases import transformer_cases
from gpunn.profiling.translation_cases import translation_cases

CASES: dict[str, list[Case]] = {
    "linear": linear_cases(),
    "activation": activation_cases(),
    "glu": glu_cases(),
    "convolution": convolution_cases(),
    "batch_norm": batch_norm_cases(),
    "layer_norm": layer_norm_cases(),
    "group_norm": group_norm_cases(),
    "attention": attention_cases(),
    "cross_entropy": cross_entropy_cases(),
    "embedding": embedding_cases(),
    "rotary_embedding": rotary_embedding_cases(),
    "linear_cross_entropy": linear_cross_entropy_cases(),
    "nll_loss": nll_loss_cases(),
    "pointwise_loss": pointwise_loss_cases(),
    "pooling": pooling_cases(),
    "dropout": dropout_cases(),
    "augment": augment_cases(),
    "softmax": softmax_cases(),
    "models": [*model_cases(), *transformer_cases(), *translation_cases(), *gan_cases()],
}

CHECKED_AS: dict[str, tuple[str, ...]] = {
    "models": (
        "linear", "convolution", "batch_norm", "pooling", "activation", "attention", "layer_norm",
        "embedding", "cross_entropy", "linear_cross_entropy",
    ),
}  # fmt: skip
"""The ops whose checks must be green before a case is timed, where it is not its own."""
