"""Losses of elements with torch's names and arguments, on one pair of kernels.

Input and target are read once forward and once backward, and nothing else is kept. Sums are
float32, and the same from run to run.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.dispatch import autocast_is_on, differentiable_gradients, distinct, is_tensor
from gpunn.kernels.launch import decline, record_fallback, takes
from gpunn.kernels.pointwise_loss import pointwise_loss_backward, pointwise_loss_forward

# Torch's own op for each loss: called as (input, target, *parameters, reduction=…).
TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": lambda x, y, beta, **options: F.smooth_l1_loss(x, y, beta=beta, **options),
    "huber": lambda x, y, delta, **options: F.huber_loss(x, y, delta=delta, **options),
    "bce_with_logits": lambda x, y, *weighted, **options: F.binary_cross_entropy_with_logits(
        x, y, **options
    ),
    "kl_div": F.kl_div,
    "kl_div_log": lambda x, y, **options: F.kl_div(x, y, log_target=True, **options),
}


def _by_torch(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    loss: str,
    parameters: Sequence[float],
    divisor: int | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same in torch's operations, in the type that the kernels compute in."""
    wide = torch.promote_types(dtype, torch.float32)
    options: dict[str, Any] = {"reduction": "none"}
    if pos_weight is not None:
        options["pos_weight"] = pos_weight.to(wide)
    found = TORCH[loss](x.to(wide), y.to(wide), *parameters, **options)
    found = found if weight is None else found * weight.to(wide)
    return (found if divisor is None else found.sum() / divisor).to(dtype)


class _PointwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor,
        weight: torch.Tensor | None,
        pos_weight: torch.Tensor | None,
        *options: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, y, weight, pos_weight)
        ctx.options = options
        return pointwise_loss_forward(x, y, weight, pos_weight, *options)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[Any, ...]:
        x, y, weight, pos_weight = ctx.saved_tensors
        needs, (loss, parameters, divisor, _dtype) = ctx.needs_input_grad[:2], ctx.options
        dx: torch.Tensor | None
        dy: torch.Tensor | None
        if torch.is_grad_enabled():
            dx, dy = differentiable_gradients(
                lambda x, y: _by_torch(x, y, weight, pos_weight, *ctx.options), (x, y), needs, dloss
            )
        else:
            dx, dy = pointwise_loss_backward(
                dloss, x, y, weight, pos_weight, loss, parameters, divisor, needs
            )
        return dx if needs[0] else None, dy if needs[1] else None, *(None,) * 6


def _apply(
    loss: str,
    x: torch.Tensor,
    y: torch.Tensor,
    divisor: int | None,
    dtype: torch.dtype,
    parameters: Sequence[float] = (),
    weight: torch.Tensor | None = None,
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The losses of x and y, of one shape, on the kernels; by a divisor, their sum over it."""
    given = x, y, weight, pos_weight, loss, list(parameters), divisor, dtype
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        found: torch.Tensor = _PointwiseLoss.apply(*distinct(given[:4]), *given[4:])
        return found
    return pointwise_loss_forward(*given)


def _divisor(reduction: str, x: torch.Tensor) -> int | None:
    """What the sum of the losses is divided by; None where there is none."""
    return {"none": None, "sum": 1, "mean": x.numel()}[reduction]


def _taken(
    name: str,
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str,
    weights: Sequence[torch.Tensor | None] = (),
    old: Sequence[bool | None] = (),
    is_right: Callable[[], bool] = lambda: True,
) -> bool:
    """Whether the kernels compute this; the trace says why not.

    ``is_right``: whether torch takes what else was given; if not, it is to say why.
    """
    if not (is_tensor(name, input) and is_tensor(name, target, "target")):
        return False
    if not takes(name, input, target, *weights):
        return False
    others = [target, *(weight for weight in weights if weight is not None)]
    right = reduction in ("none", "mean", "sum") and all(t.device == input.device for t in others)
    if not (right and is_right()):
        record_fallback(name, "arguments that PyTorch may refuse")
        return False
    reason = None
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in others[1:]):
        reason = "a gradient for a weight"
    elif others[1:] and name in ("mse_loss", "l1_loss") and autocast_is_on(input):
        reason = "weights under autocast"  # torch composes these, each part in its own type
    elif any(argument is not None for argument in old):
        reason = "size_average or reduce"
    if reason is not None:
        decline(name, reason)
    return reason is None


def _warn(text: str, stacklevel: int) -> None:
    if not torch.compiler.is_compiling():  # where a warning would break the graph
        warnings.warn(text, stacklevel=stacklevel)


def _broadcast(input: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in one shape, with torch's warning if that is not their own."""
    if input.shape == target.shape:
        return input, target
    _warn(
        f"Using a target size ({target.size()}) that is different to the input size "
        f"({input.size()}). This will likely lead to incorrect results due to broadcasting. "
        "Please ensure they have the same size.",
        stacklevel=4,
    )
    x, y = torch.broadcast_tensors(input, target)
    return x, y


def _result_type(*tensors: torch.Tensor) -> torch.dtype:
    """What torch promotes floating-point tensors to; under autocast, at least to float32.

    Tensors of no dimensions count where there are no others. torch.result_type breaks the graph.
    """
    counted = [tensor.dtype for tensor in tensors if tensor.dim()]
    counted = counted or [tensor.dtype for tensor in tensors]
    if autocast_is_on(tensors[0]):  # on whose float32 list these are
        counted.append(torch.float32)
    return functools.reduce(torch.promote_types, counted)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _weighs_each(input: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether a weight, if given, is a number for each element."""
    return weight is None or weight.shape == input.shape


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a shape can be expanded to another."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(own in (1, size) for own, size in pairs)


def _differences(
    loss: str,
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """mse or l1; of weights, torch divides the sum by theirs for a mean."""
    dtype = _result_type(x, y, *([] if weight is None else [weight]))
    if weight is None or reduction != "mean":
        return _apply(loss, x, y, _divisor(reduction, x), dtype, weight=weight)
    wide = torch.promote_types(dtype, torch.float32)
    total = _apply(loss, x, y, 1, wide, weight=weight)
    return (total / weight.sum(dtype=wide)).to(dtype)


def mse_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight (input - target)² of elements, or their sum or mean: the textbook formula.

    Args:
        input, target: of one shape, or broadcast to one, with torch's warning.
        size_average, reduce: torch's old names of ``reduction``; torch computes with them.
        reduction: "none", of the broadcast shape; or, of no dimensions, "sum" or "mean", which
            divides by the sum of the weights.
        weight: of input's shape. Torch computes a gradient for it, and its results under autocast.

    Raises:
        RuntimeError: shapes that do not broadcast.
        TypeError: input or target is no tensor.
        ValueError: an unknown reduction, or a weight of another shape.
    """
    if not _taken(
        "mse_loss", input, target, reduction, [weight], [size_average, reduce],
        lambda: _weighs_each(input, weight),
    ):  # fmt: skip
        return F.mse_loss(  # type: ignore[call-arg]  # torch's stub lacks weight
            input, target, size_average, reduce, reduction, weight
        )
    return _differences("mse", *_broadcast(input, target), weight, reduction)


def l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight |input - target| of elements, or their sum or mean; else as ``mse_loss``."""
    if not _taken(
        "l1_loss", input, target, reduction, [weight], [size_average, reduce],
        lambda: _weighs_each(input, weight),
    ):  # fmt: skip
        return F.l1_loss(  # type: ignore[call-arg]  # torch's stub lacks weight
            input, target, size_average, reduce, reduction, weight
        )
    return _differences("l1", *_broadcast(input, target), weight, reduction)


def smooth_l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> torch.Tensor:
    """d² / (2 beta) where d = |input - target| < beta, else d - beta / 2; or their sum or mean.

    beta = 0 is ``l1_loss``. Otherwise as ``mse_loss``. R. Girshick, "Fast R-CNN", 2015.

    Raises:
        RuntimeError: beta is negative.
    """
    if not _taken(
        "smooth_l1_loss", input, target, reduction, (), [size_average, reduce],
        lambda: _is_number(beta) and beta >= 0,
    ):  # fmt: skip
        return F.smooth_l1_loss(input, target, size_average, reduce, reduction, beta)
    x, y = _broadcast(input, target)
    loss, parameters = ("smooth_l1", [float(beta)]) if beta else ("l1", [])
    return _apply(loss, x, y, _divisor(reduction, x), _result_type(x, y), parameters)


def huber_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight times d² / 2 where d = |input - target| < delta, else delta (d - delta / 2).

    Or their sum or mean, which divides by their number. weight is of input's shape; torch computes
    a gradient for it. P. Huber, "Robust Estimation of a Location Parameter", 1964.

    Raises:
        RuntimeError: delta is not positive, or, in backward, the dtypes differ.
        What torch raises, otherwise as ``mse_loss``.
    """

    def is_right() -> bool:
        is_mixed = _result_type(input) != _result_type(target)
        return _is_number(delta) and delta > 0 and not is_mixed and _weighs_each(input, weight)

    if not _taken("huber_loss", input, target, reduction, [weight], (), is_right):
        return F.huber_loss(  # type: ignore[call-arg]  # torch's stub lacks weight
            input, target, reduction, delta, weight
        )
    x, y = _broadcast(input, target)
    dtype = _result_type(x, y, *([] if weight is None else [weight]))
    return _apply("huber", x, y, _divisor(reduction, x), dtype, [float(delta)], weight)


def binary_cross_entropy_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight ((1 - y) log(1 + e^x) + pos_weight y log(1 + e^-x)), reduced; x input, y target.

    For y = 0 and y = 1 neither small losses nor their gradients are lost to cancellation; at
    infinite x some are a limit where torch gives NaN.

    Args:
        input, target: of one shape. The result is of the target's dtype, as torch's.
        weight, pos_weight: broadcast to that shape; what repeats is read as it is.
        size_average, reduce: torch's old names of ``reduction``; torch computes with them.
        reduction: "none", of the shape of both; or, of no dimensions, "sum" or "mean", which
            divides by the number of elements.

    Raises:
        ValueError: the shapes differ, or an unknown reduction.
        RuntimeError: a weight does not broadcast, or requires a gradient, which torch has not.
        TypeError: input or target is no tensor.

    Source: C. Bishop, "Pattern Recognition and Machine Learning", 2006, section 4.3.2.
    """
    weights = [weight, pos_weight]

    def is_right() -> bool:
        fit = all(w is None or _broadcasts(w.shape, input.shape) for w in weights)
        return fit and input.shape == target.shape

    name = "binary_cross_entropy_with_logits"
    if not _taken(name, input, target, reduction, weights, [size_average, reduce], is_right):
        return F.binary_cross_entropy_with_logits(
            input, target, weight, size_average, reduce, reduction, pos_weight
        )
    return _apply(
        "bce_with_logits", input, target, _divisor(reduction, input), _result_type(target),
        [] if pos_weight is None else [1.0], weight, pos_weight,
    )  # fmt: skip


def kl_div(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> torch.Tensor:
    """target (log target - input) of elements, 0 where target is 0, reduced; input logarithms.

    Args:
        input, target: of one shape, or broadcast to one.
        size_average, reduce: torch's old names of ``reduction``; torch computes with them.
        reduction: "none", of the broadcast shape; or, of no dimensions, "sum", "batchmean" (by
            input's first size) or "mean" (by the number of elements, with torch's warning that this
            is no divergence's mean).
        log_target: whether target is given by its logarithm.

    Raises:
        RuntimeError: shapes that do not broadcast.
        TypeError: input or target is no tensor.
        ValueError: an unknown reduction.

    Source: S. Kullback and R. Leibler, "On Information and Sufficiency", 1951.
    """
    old = size_average, reduce
    plain = "sum" if reduction == "batchmean" else reduction
    if not _taken("kl_div", input, target, plain, (), old):
        return F.kl_div(input, target, size_average, reduce, reduction, log_target=log_target)
    if reduction == "mean":
        _warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size; "
            "'batchmean' divides only by the batch size, and is the KL divergence's mean.",
            stacklevel=3,
        )
    x, y = input, target
    if x.shape != y.shape:
        y, x = torch.broadcast_tensors(target, input)  # torch's order, of which its error speaks
    n_rows = input.shape[0] if input.dim() else 1
    divisor = n_rows if reduction == "batchmean" else _divisor(reduction, x)
    loss = "kl_div_log" if log_target else "kl_div"
    return _apply(loss, x, y, divisor, _result_type(input, target))
