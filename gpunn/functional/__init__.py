"""Functions in the shape of torch.nn.functional's, on gpunn's kernels."""

from gpunn.functional.activation import (
    celu,
    elu,
    gelu,
    hardshrink,
    hardsigmoid,
    hardswish,
    hardtanh,
    leaky_relu,
    logsigmoid,
    mish,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    softplus,
    softshrink,
    softsign,
    tanh,
    tanhshrink,
)
from gpunn.functional.attention import scaled_dot_product_attention
from gpunn.functional.attention_decode import attention_decode
from gpunn.functional.attention_varlen import attention_varlen
from gpunn.functional.attention_weights import attention_weights
from gpunn.functional.augment import augment
from gpunn.functional.batch_norm import batch_norm
from gpunn.functional.convolution import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d
from gpunn.functional.cross_entropy import cross_entropy
from gpunn.functional.dropout import (
    alpha_dropout,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    dropout_mask,
    feature_alpha_dropout,
)
from gpunn.functional.embedding import embedding, sinusoidal_encoding
from gpunn.functional.glu import geglu, glu, reglu, swiglu
from gpunn.functional.group_norm import group_norm, instance_norm
from gpunn.functional.layer_norm import layer_norm, rms_norm
from gpunn.functional.linear import linear
from gpunn.functional.linear_cross_entropy import linear_cross_entropy
from gpunn.functional.multihead_attention import (
    merge_heads,
    multi_head_attention_forward,
    split_heads,
)
from gpunn.functional.nll_loss import nll_loss
from gpunn.functional.pointwise_loss import (
    binary_cross_entropy_with_logits,
    huber_loss,
    kl_div,
    l1_loss,
    mse_loss,
    smooth_l1_loss,
)
from gpunn.functional.pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    avg_pool1d,
    avg_pool2d,
    max_pool1d,
    max_pool2d,
    max_unpool1d,
    max_unpool2d,
)
from gpunn.functional.rotary_embedding import rotary_embedding, rotary_tables
from gpunn.functional.softmax import log_softmax, softmax, softmin
from gpunn.functional.sync_batch_norm import sync_batch_norm

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "alpha_dropout",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "augment",
    "avg_pool1d",
    "avg_pool2d",
    "batch_norm",
    "binary_cross_entropy_with_logits",
    "celu",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "cross_entropy",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_mask",
    "elu",
    "embedding",
    "feature_alpha_dropout",
    "geglu",
    "gelu",
    "glu",
    "group_norm",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "huber_loss",
    "instance_norm",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "logsigmoid",
    "max_pool1d",
    "max_pool2d",
    "max_unpool1d",
    "max_unpool2d",
    "merge_heads",
    "mish",
    "mse_loss",
    "multi_head_attention_forward",
    "nll_loss",
    "reglu",
    "relu",
    "relu6",
    "rms_norm",
    "rotary_embedding",
    "rotary_tables",
    "scaled_dot_product_attention",
    "selu",
    "sigmoid",
    "silu",
    "sinusoidal_encoding",
    "smooth_l1_loss",
    "softmax",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "split_heads",
    "swiglu",
    "sync_batch_norm",
    "tanh",
    "tanhshrink",
]
