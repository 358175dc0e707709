"""The cross-entropy of a linear layer's output, of which there is but a chunk in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.cross_entropy import (
    cross_entropy,
    in_dtype_of,
    may_be_refused,
    reduced,
    rows_by_torch,
)
from gpunn.functional.dispatch import (
    autocast_is_on,
    autocast_to_lower,
    differentiable_gradients,
    is_tensor,
)
from gpunn.functional.linear import linear
from gpunn.kernels.launch import record_fallback, takes
from gpunn.kernels.linear_cross_entropy import (
    chunk_size_of,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)

OP = "linear_cross_entropy"


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        linear_weight: torch.Tensor,
        linear_bias: torch.Tensor | None,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        *options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = x, linear_weight, linear_bias, target, weight
        loss, *kept = linear_cross_entropy_forward(*given, *options)
        ctx.mark_non_differentiable(kept[0])
        ctx.save_for_backward(*given, *kept)
        *ctx.options, _keep = options
        return loss, kept[0]

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, *of_weights: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # read once: checkpointing refuses a second time
        x, linear_weight, linear_bias, target, weight, *_ = saved
        needs = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            ignore_index, smoothing, _ = ctx.options
            gradients: Any = differentiable_gradients(
                lambda *given: rows_by_torch(
                    F.linear(*given), target, weight, ignore_index, smoothing
                ),
                [x, linear_weight, linear_bias], needs, dloss,
            )  # fmt: skip
        else:
            rest: Any = *saved, *ctx.options, needs
            found = linear_cross_entropy_backward(dloss, *rest)
            gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
        return *gradients, None, None, *[None] * (len(ctx.options) + 1)


def _check(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int | None,
) -> tuple[int, ...]:
    """The shape of the logits; refuses what has none, naming the argument and what is allowed."""
    given, shape = tuple(input.shape), tuple(linear_weight.shape)
    if len(given) not in (1, 2):
        raise RuntimeError(f"input: expected shape (H,) or (N, H), got {given}")
    if len(shape) < 2:
        raise RuntimeError(f"linear_weight: expected shape (C, H) or (C, *, H), got {shape}")
    if given[-1] != shape[-1]:
        raise RuntimeError(
            f"input: expected {shape[-1]} features, those of a linear_weight of shape {shape}, "
            f"got shape {given}"
        )
    if linear_bias is not None and tuple(linear_bias.shape) != shape[:-1]:
        raise RuntimeError(
            f"linear_bias: expected shape {shape[:-1]}, got {tuple(linear_bias.shape)}"
        )
    if len(shape) > 2 and len(given) == 1:
        raise RuntimeError(f"input: expected shape (N, H) for a linear_weight of shape {shape}")
    logits = (*given[:-1], *shape[:-1])
    if ignore_index is not None and tuple(target.shape) == logits:
        raise RuntimeError("ignore_index: cannot be given when target contains probabilities")
    return logits


def _composed(
    layer: Callable[..., torch.Tensor],
    loss: Callable[..., torch.Tensor],
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    linear_bias: torch.Tensor | None,
    ignore_index: int | None,
    **arguments: Any,
) -> torch.Tensor:
    """The loss of logits that stand in memory."""
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = layer(input, linear_weight.flatten(0, -2), bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    ignored = -100 if ignore_index is None else ignore_index
    return loss(logits, target, ignore_index=ignored, **arguments)


def _by_torch(*tensors: Any, options: Any, **arguments: Any) -> torch.Tensor:
    """torch's own function, or, where this release has none, what it computes."""
    if hasattr(F, OP):
        found: torch.Tensor = F.linear_cross_entropy(*tensors, options=options, **arguments)
        return found
    return _composed(F.linear, F.cross_entropy, *tensors, **arguments)


def _in_chunks(
    target: torch.Tensor,
    weight: torch.Tensor | None,
    chunk_size: int,
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
) -> bool:
    """Whether the logits are more than one chunk, and what a kernel computes chunks of.

    What ``linear`` and ``cross_entropy`` may refuse is left to them.
    """
    if linear_weight.dim() > 2 or linear_weight.shape[0] <= chunk_size or input.numel() == 0:
        return False
    if target.is_floating_point() or (weight is not None and weight.requires_grad):
        return False
    parameters = [linear_weight] if linear_bias is None else [linear_weight, linear_bias]
    return all(p.dtype == input.dtype and p.device == input.device for p in parameters)


def _value(
    x: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    *options: Any,
) -> torch.Tensor:
    """The loss, chunk by chunk."""
    single = x.dim() == 1
    x, target = (x[None], target[None]) if single else (x, target)
    parameters = x, linear_weight, linear_bias
    given = *parameters, target.contiguous(), None if weight is None else weight.contiguous()
    found: Any
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in parameters):
        found = _LinearCrossEntropy.apply(*given, *options)
    else:
        rest: Any = *options[:-1], False
        found = linear_cross_entropy_forward(*given, *rest)
    loss = reduced(found[0], found[1], target, reduction)
    return in_dtype_of(loss[0] if single and reduction == "none" else loss, x, target)


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    chunk_size: int | None = None,
    keep_logits: bool = False,
) -> torch.Tensor:
    """``cross_entropy`` of the logits z = x Wᵀ + b, which never stand in memory at once.

    They are computed a chunk of classes at a time, in one buffer, and again in the backward pass:
    four products, where logits that are kept take three, and memory for all of them. Sums over a
    chunk and over chunks are float32. Logits that fit one chunk are kept, and so are those of
    probabilities and of a loss of more dimensions: those are ``linear``, then ``cross_entropy``. A
    gradient of a gradient has them in memory, too.

    Args:
        input: x, (H,) or (N, H), with any strides.
        linear_weight: W, (C, H), or (C, *, H) for a loss of more dimensions.
        target: class numbers, int64, of the logits' shape without C; or probabilities of its shape.
        linear_bias: b, (C,) or (C, *), or None.
        weight: of the classes, (C,).
        reduction: "none", "sum", or "mean", as of ``cross_entropy``.
        ignore_index: rows of this class have no loss; None is -100.
        label_smoothing: ε, from 0 to 1, as of ``cross_entropy``.
        options: how torch's function chunks; only it takes notice.
        chunk_size: classes of a chunk; None for as many as make 2²⁷ logits, 4096 at least.
        keep_logits: whether they are kept for the backward pass; of each chunk the rows are aligned
            for any product, which those of an odd number of classes are not.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other.
        ValueError: a chunk_size below 1.
        What torch raises, for the loss's own arguments.

    Source: torch.nn.functional.linear_cross_entropy; E. Wijmans et al., "Cut Your Losses in
    Large-Vocabulary Language Models", 2025.
    """
    given = input, linear_weight, target
    arguments: Any = dict(
        linear_bias=linear_bias, weight=weight, reduction=reduction, ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    names = "input", "linear_weight", "target"
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 class, got {chunk_size}")
    if not all(is_tensor(OP, tensor, name) for tensor, name in zip(given, names, strict=True)):
        return _by_torch(*given, options=options, **arguments)
    shape = _check(input, linear_weight, linear_bias, target, ignore_index)
    if not takes(OP, input, linear_weight, linear_bias):
        return _by_torch(*given, options=options, **arguments)
    like_logits = input.new_empty(()).expand(shape)
    if may_be_refused(like_logits, target, weight, reduction) or not 0 <= label_smoothing <= 1:
        record_fallback(OP, "arguments that PyTorch may refuse")
        return _by_torch(*given, options=options, **arguments)
    layer: Any = input, linear_weight, linear_bias
    if autocast_is_on(input):
        layer = autocast_to_lower(*layer)
    size = chunk_size_of(math.prod(input.shape[:-1])) if chunk_size is None else chunk_size
    if not _in_chunks(target, weight, size, *layer):
        return _composed(linear, cross_entropy, *given, **arguments)
    ignored = -100 if ignore_index is None else ignore_index
    rest = ignored, label_smoothing, size, keep_logits
    return _value(*layer, target, weight, reduction, *rest)
