"""Networks of the literature, built of ``gpunn.nn``'s layers.

Each is an ordinary ``torch.nn.Module`` that returns logits: their softmax is the caller's, inside
the cross-entropy. Where torchvision has the network, or transformers has GPT-2, parameters have its
names, so that its checkpoints load; activations, residuals and dropout are fused into the layers
before them.
"""

from gpunn.models.alexnet import AlexNet, AlexNetOneTower, alexnet, alexnet_one_tower
from gpunn.models.generation import KeyValueCache
from gpunn.models.gpt import GPT, GPTMLP, GPTAttention, GPTBlock, gpt2
from gpunn.models.lenet import LeNet5, lenet5
from gpunn.models.resnet import (
    BasicBlock,
    Bottleneck,
    CifarBlock,
    CifarResNet,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnet_cifar,
)
from gpunn.models.transformer import (
    AttentionMaps,
    TranslationTransformer,
    noam_rate,
    transformer_base,
    transformer_big,
    transformer_small,
)
from gpunn.models.vgg import (
    VGG,
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)

__all__ = [
    "GPT",
    "GPTMLP",
    "VGG",
    "AlexNet",
    "AlexNetOneTower",
    "AttentionMaps",
    "BasicBlock",
    "Bottleneck",
    "CifarBlock",
    "CifarResNet",
    "GPTAttention",
    "GPTBlock",
    "KeyValueCache",
    "LeNet5",
    "ResNet",
    "TranslationTransformer",
    "alexnet",
    "alexnet_one_tower",
    "gpt2",
    "lenet5",
    "noam_rate",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet_cifar",
    "transformer_base",
    "transformer_big",
    "transformer_small",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]
