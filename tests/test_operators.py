"""Every registered op keeps torch's contract: schema, fake implementation, tracing."""

from __future__ import annotations

import pytest
import torch

import gpunn.functional  # noqa: F401  (registers the ops)
from gpunn.functional.augment_arguments import settings_of
from gpunn.kernels.launch import launchers


def pooling_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """Of overlapping, dilated windows, of adaptive ones, and of places in a plane."""
    images, window = torch.randn(2, 3, 6, 5, device=device), [3, 2, 2, 1, 1, 0, 1, 2]
    pooled = torch.randn(2, 3, 3, 3, device=device)
    places = torch.arange(9, device=device).view(3, 3).expand(2, 3, 3, 3)
    return {
        "max_pool_forward": (images, [3, 3], window, True, True),
        "max_pool_backward": (pooled, torch.zeros_like(pooled).byte(), [2, 3, 6, 5], window),
        "avg_pool_forward": (images, [3, 4], [], False, 0),
        "avg_pool_backward": (pooled, [2, 3, 6, 5], [], False, 0, True),
        "max_unpool_forward": (pooled, places, [6, 5]),
        "max_unpool_backward": (images, places),
    }


def convolution_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """Strided, dilated, padded unevenly, in groups, with all that is fused."""
    x, dz = torch.randn(2, 4, 6, 5, device=device), torch.randn(2, 6, 3, 3, device=device)
    weight, bias = torch.randn(6, 2, 2, 3, device=device), torch.randn(6, device=device)
    geometry = [2, 1], [1, 0, 0, 2], [1, 2], 2
    fused: tuple[object, ...] = "gelu", [], True
    return {
        "conv_forward": (x, weight, bias, dz, *geometry, *fused),
        "conv_transpose_forward": (dz, weight, bias[:4], x, [6, 5], *geometry, *fused),
        "conv_weight_gradient": (dz, x, [6, 2, 2, 3], *geometry),
    }


def batch_norm_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """By the batch, with all that is fused; the running statistics change."""
    x, residual, dy = (torch.randn(2, 9, 3, 4, device=device) for _ in range(3))
    weight, bias, mean, var = (torch.rand(9, device=device) + 0.5 for _ in range(4))
    bits = torch.randint(255, (9, 3), device=device).byte()
    given = dy, x, None, bits, weight, bias, mean, var
    return {
        "batch_norm_forward": (
            x, residual, weight, bias, mean, var, True, 0.1, 1e-5, "relu", [], True
        ),
        "batch_norm_backward": (*given, None, 24, True, "relu", [], [True, True, True, False]),
        "batch_norm_statistics": (x,),
        "batch_norm_sums": (*given, "relu", []),
    }  # fmt: skip


def attention_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """With all that changes scores, in 16 bits; and packed sequences, whose results are filled."""
    query, key = torch.randn(2, 4, 9, 8, device=device), torch.randn(2, 2, 7, 8, device=device)
    query, key = query.half(), key.half()
    mask, slopes = torch.randn(2, 1, 1, 7, device=device), torch.rand(1, 4, device=device)
    seed, starts = torch.randint(2**62, (1,), device=device), torch.tensor([0, 4, 7], device=device)
    rules = 0.3, 2.0, 0.1, 5, 3, True
    whole = query, key, key, mask.half(), slopes, None, seed, None, None, 9, 7, *rules
    y, maxima = torch.randn_like(query), torch.zeros(2, 4, 9, device=device)
    packed = key[:1], key[:1], key[:1], None, None, None, None, starts, starts, 4, 4
    needs, heads = [True, False, True, True], torch.tensor([3, 1], device=device)
    cache, lengths = torch.randn(2, 2, 20, 8, device=device).half(), torch.tensor([20, 3])
    return {
        "attention_forward": (True, *packed, 0.3, 0.0, 0.0, -1, 0, False),
        "attention_backward": (y, y, y, maxima, maxima.exp(), needs, *whole),
        "attention_weights": (heads, maxima, maxima.exp(), *whole),
        "attention_decode": (
            query[:, :, 0],
            cache,
            cache,
            lengths.to(device),
            None,
            slopes,
            0.3,
            0.0,
            4,
        ),
    }


def row_norm_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """With all that is fused."""
    x, residual, dy = (torch.randn(5, 12, device=device) for _ in range(3))
    weight, bias = (torch.randn(12, device=device) for _ in range(2))
    statistic, seed = torch.rand(5, device=device), torch.randint(2**62, (1,), device=device)
    needs = [True, True, True, False]
    return {
        "row_norm_forward": (
            x, residual, weight, bias, seed, 0.3, 1e-5, True, True, torch.float32
        ),
        "row_norm_backward": (
            dy, x, weight, bias, statistic, statistic, residual, seed, 0.3, True, needs
        ),
    }  # fmt: skip


def group_norm_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """Of groups that are read once, and twice."""
    x, dy = torch.randn(2, 9, 3, 4, device=device), torch.randn(2, 70, 2, 2, device=device)
    weight, statistic = torch.randn(9, device=device), torch.rand(2, 1, device=device)
    return {
        "group_norm_forward": (x, 3, weight, weight, 1e-5, "silu", [], torch.float32),
        "group_norm_backward": (
            dy, dy.sin(), None, None, statistic, statistic, "relu", [], [True, True, False]
        ),
    }  # fmt: skip


def row_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """Of softmax, and of the loss that is made of it."""
    x, wide = torch.randn(6, 4, device=device), torch.randn(4, 6, device=device)
    weight = torch.rand(4, device=device)
    return {
        "cross_entropy_forward": (x, torch.arange(6, device=device) % 4, None, -100, 0.1),
        "cross_entropy_backward": (
            x[:, 0],
            x,
            x.softmax(1),
            weight[:1].expand(6).contiguous(),
            x[:, 0].exp(),
            x[:, 0],
            -100,
            0.1,
        ),
        "cross_entropy_scale_gradient": (x.clone(), weight[0]),
        "cross_entropy_with_gradient": (
            x,
            torch.arange(6, device=device) % 4,
            weight,
            2,
            0.1,
            True,
        ),
        **linear_cross_entropy_arguments(device),
        "softmax_forward": (wide.half(), (wide > 0).byte(), 0, 0.5, True, torch.float32),
        "softmax_backward": (wide, wide, 1, 0.5, False, torch.float16),
    }


def embedding_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """With all that is fused; queries and keys of grouped heads, turned in part."""
    weight, positional, dy = (torch.randn(n, 6, device=device) for n in (7, 5, 8))
    indices, seed = torch.arange(8, device=device) % 5, torch.randint(2**62, (1,), device=device)
    query, key = torch.randn(2, 3, 4, 10, device=device), torch.randn(2, 3, 2, 10, device=device)
    cos, sin = torch.rand(1, 3, 8, device=device), torch.rand(1, 3, 8, device=device)
    return {
        "embedding_forward": (
            indices.int(), weight, indices, positional, seed, 4, 2.0, 0.3, torch.float16
        ),
        "embedding_backward": (dy, indices, seed, 4, 7, 2, 2.0, 0.3, torch.float16),
        "rotary_embedding": (query.transpose(1, 2).half(), key.transpose(1, 2), cos, sin, 4, True,
                             False),
    }  # fmt: skip


def linear_cross_entropy_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """Six classes in chunks of four, in 16 bits, without a gradient of W."""
    x, linear_weight = (torch.randn(n, 5, device=device).half() for n in (3, 6))
    bias, weight, rows = (torch.rand(n, device=device) for n in (6, 6, 3))
    layer = x, linear_weight, bias.half()
    loss = torch.tensor([5, 2, 0], device=device), weight
    options: tuple[object, ...] = 2, 0.1, 4
    return {
        "linear_cross_entropy_forward": (*layer, *loss, *options, True),
        "linear_cross_entropy_backward": (
            rows, *layer, *loss, rows, rows + 4, x.new_empty(0), *options, [True, False, True]
        ),
    }  # fmt: skip


def loss_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """Of elements, with all that is weighted, and of classes."""
    x, y, weight = (torch.rand(2, 3, 5, device=device) for _ in range(3))
    target = torch.randint(3, (2, 5), device=device)
    pointwise = x, y.half(), weight[:, :1], weight[0, 0], "bce_with_logits", [1.0]
    total, mean = torch.tensor([0.7, 3.0], device=device)
    return {
        "nll_loss_forward": (x, target, weight[0, :, 0], 1, "mean", torch.float32),
        "nll_loss_backward": (mean, x, target, None, total, 1, "mean"),
        "pointwise_loss_forward": (*pointwise, None, torch.float16),
        "pointwise_loss_backward": (mean, *pointwise, 30, [False, True]),
    }


def augment_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """Of all distortions at once, of which the gradient needs the pictures."""
    settings = settings_of(
        rotation=30, crop_area=(0.5, 1), elastic_amplitude=2, brightness=0.5, horizontal_flip=0.5
    )
    images, seed = torch.rand(2, 3, 6, 5, device=device), torch.tensor([7], device=device)
    dy = torch.randn(2, 3, 4, 7, device=device)
    return {
        "augment_forward": (images, seed, [4, 7], *settings, torch.float16),
        "augment_backward": (dy, images, seed, [6, 5], *settings, torch.float32, True),
    }


def opcheck_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """Arguments for every registered op, of which none requires a gradient."""
    x, weight = torch.randn(6, 4, device=device), torch.randn(8, 4, device=device)
    bias, residual = torch.randn(8, device=device), torch.randn(6, 8, device=device)
    seed = torch.randint(2**62, (1,), device=device)
    wide = torch.randn(4, 6, device=device)
    images = convolution_arguments(device) | pooling_arguments(device)
    images |= batch_norm_arguments(device) | attention_arguments(device)
    images |= row_norm_arguments(device) | row_arguments(device) | embedding_arguments(device)
    images |= group_norm_arguments(device) | loss_arguments(device) | augment_arguments(device)
    return images | {
        "activation_forward": (x, "gelu", []),
        "activation_backward": (x, x, "gelu", []),
        "glu_forward": (wide, 1, "silu", []),
        "glu_backward": (wide[:, :3], wide, 1, "silu", []),
        "dropout_factors": (seed, x, 0.5),
        "dropout_forward": (x.T, seed, (1, 4), 0.5, "alpha", 0),
        "dropout_in_place": (
            x.clone(),
            torch.full((3,), 90).byte().to(device),
            0.5,
            "dropout",
            None,
        ),
        "dropout_mask": (seed, 13, 0.5),
        "linear_forward": (x, weight, bias, residual, seed, "gelu", [], 0.5, True),
        "linear_epilogue_backward": (
            residual,
            residual,
            seed,
            "gelu",
            [],
            0.5,
            torch.float32,
            True,
            True,
        ),
        "linear_input_gradient": (residual, weight),
        "linear_weight_gradient": (residual, x),
    }


@pytest.mark.parametrize("name", sorted(launchers))
def test_every_registered_op_passes_opcheck(name: str, device: str) -> None:
    arguments = opcheck_arguments(device)
    assert name in arguments, f"{name}: add its arguments to opcheck_arguments"
    torch.library.opcheck(getattr(torch.ops.gpunn, name).default, arguments[name])
