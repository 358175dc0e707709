"""Layers with the names, arguments and state_dict of torch.nn's, on gpunn's kernels.

The containers are torch's own, re-exported; everything else is defined here.
"""

from torch.nn import (
    Flatten,
    Identity,
    Module,
    ModuleDict,
    ModuleList,
    Parameter,
    ParameterDict,
    ParameterList,
    Sequential,
    Unflatten,
)

from gpunn.nn.activation import (
    CELU,
    ELU,
    GELU,
    SELU,
    Hardshrink,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    LogSigmoid,
    Mish,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softplus,
    Softshrink,
    Softsign,
    Tanh,
    Tanhshrink,
)
from gpunn.nn.attention import ScaledDotProductAttention
from gpunn.nn.augment import Augment
from gpunn.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from gpunn.nn.convolution import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d
from gpunn.nn.cross_entropy import CrossEntropyLoss
from gpunn.nn.dropout import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    FeatureAlphaDropout,
)
from gpunn.nn.embedding import Embedding, PositionalEncoding
from gpunn.nn.glu import GEGLU, GLU, ReGLU, SwiGLU
from gpunn.nn.group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from gpunn.nn.layer_norm import LayerNorm, RMSNorm
from gpunn.nn.linear import Linear
from gpunn.nn.linear_cross_entropy import LinearCrossEntropyLoss
from gpunn.nn.multihead_attention import MultiheadAttention
from gpunn.nn.nll_loss import NLLLoss, NLLLoss2d
from gpunn.nn.pointwise_loss import (
    BCEWithLogitsLoss,
    HuberLoss,
    KLDivLoss,
    L1Loss,
    MSELoss,
    SmoothL1Loss,
)
from gpunn.nn.pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    MaxPool1d,
    MaxPool2d,
    MaxUnpool1d,
    MaxUnpool2d,
)
from gpunn.nn.rotary_embedding import RotaryEmbedding
from gpunn.nn.softmax import LogSoftmax, Softmax, Softmax2d, Softmin
from gpunn.nn.tracing import keep_layers_whole
from gpunn.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from gpunn.nn.transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer

keep_layers_whole()

__all__ = [
    "CELU",
    "ELU",
    "GEGLU",
    "GELU",
    "GLU",
    "SELU",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AlphaDropout",
    "Augment",
    "AvgPool1d",
    "AvgPool2d",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "CrossEntropyLoss",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "Embedding",
    "FeatureAlphaDropout",
    "Flatten",
    "GroupNorm",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "HuberLoss",
    "Identity",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "KLDivLoss",
    "L1Loss",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSigmoid",
    "LogSoftmax",
    "MSELoss",
    "MaxPool1d",
    "MaxPool2d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "Mish",
    "Module",
    "ModuleDict",
    "ModuleList",
    "MultiheadAttention",
    "NLLLoss",
    "NLLLoss2d",
    "Parameter",
    "ParameterDict",
    "ParameterList",
    "PositionalEncoding",
    "RMSNorm",
    "ReGLU",
    "ReLU",
    "ReLU6",
    "RotaryEmbedding",
    "ScaledDotProductAttention",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SmoothL1Loss",
    "Softmax",
    "Softmax2d",
    "Softmin",
    "Softplus",
    "Softshrink",
    "Softsign",
    "SwiGLU",
    "SyncBatchNorm",
    "Tanh",
    "Tanhshrink",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "Unflatten",
]
