"""Cross-entropy of logits, without their softmax in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.dispatch import autocast_is_on, differentiable_gradients, is_tensor
from gpunn.kernels.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_scale_gradient,
    cross_entropy_with_gradient,
)
from gpunn.kernels.launch import decline, record_fallback, takes


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        ignore_index: int,
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, row_weight, lse = cross_entropy_forward(x, target, weight, ignore_index, smoothing)
        ctx.mark_non_differentiable(row_weight)
        ctx.save_for_backward(x, target, weight, row_weight, lse)
        ctx.options = ignore_index, smoothing
        return loss, row_weight

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, *of_weights: Any) -> tuple[Any, ...]:
        x, target, weight, row_weight, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            (dx,) = differentiable_gradients(
                lambda x: rows_by_torch(x, target, weight, *ctx.options), [x], [True], dloss
            )
        else:
            dx = cross_entropy_backward(dloss, x, target, weight, row_weight, lse, *ctx.options)
        return dx, None, None, None, None


class _ReducedCrossEntropy(torch.autograd.Function):
    """The sum or the mean, whose gradient is computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        ignore_index: int,
        smoothing: float,
        reduction: str,
    ) -> torch.Tensor:
        loss, row_weight, lse, dx = cross_entropy_with_gradient(
            x, target, weight, ignore_index, smoothing, reduction == "mean"
        )
        ctx.save_for_backward(x, target, weight, row_weight, lse, dx)
        ctx.options, ctx.reduction = (ignore_index, smoothing), reduction
        ctx.is_spent = False
        return reduced(loss, row_weight, target, reduction)

    @staticmethod
    def backward(ctx: Any, dvalue: torch.Tensor) -> tuple[Any, ...]:
        x, target, weight, row_weight, lse, dx = ctx.saved_tensors
        if torch.is_grad_enabled():
            (dx,) = differentiable_gradients(
                lambda x: reduced(
                    rows_by_torch(x, target, weight, *ctx.options), row_weight, target,
                    ctx.reduction,
                ), [x], [True], dvalue,
            )  # fmt: skip
        elif not ctx.is_spent:
            # What is handed out may be written to, here and by whoever takes it. It has a version
            # of its own, so that the saved tensors of a later backward still count as unchanged.
            ctx.is_spent, dx = True, dx.data
            cross_entropy_scale_gradient(dx, dvalue)
        else:
            n_rows = row_weight.numel()
            total = row_weight.sum() if not target.is_floating_point() else n_rows
            dloss = (dvalue / total if ctx.reduction == "mean" else dvalue).expand(lse.shape)
            dx = cross_entropy_backward(dloss, x, target, weight, row_weight, lse, *ctx.options)
        return dx, None, None, None, None, None


def reduced(
    loss: torch.Tensor, row_weight: torch.Tensor, target: torch.Tensor, reduction: str
) -> torch.Tensor:
    """The rows' losses, summed for "sum"; for "mean" over their weights, of probabilities rows."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (loss.numel() if target.is_floating_point() else row_weight.sum())


def rows_by_torch(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> torch.Tensor:
    """The losses of the rows, in the type that the kernels compute in."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    given = None if weight is None else weight.to(wide.dtype)
    soft = target.to(wide.dtype) if target.is_floating_point() else target
    loss: torch.Tensor = F.cross_entropy(
        wide, soft, given, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
    )
    return loss


def may_be_refused(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: str
) -> bool:
    """Whether torch may refuse these arguments: then it is to say why."""
    if input.dim() < 1 or not input.is_floating_point():
        return True
    classes = input.shape[0 if input.dim() == 1 else 1]
    rows = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if target.is_floating_point():
        fits = target.shape == input.shape
    else:
        fits = tuple(target.shape) == rows and target.dtype == torch.int64
    fits &= weight is None or (tuple(weight.shape) == (classes,) and weight.is_floating_point())
    fits &= target.device == input.device and (weight is None or weight.device == input.device)
    return not fits or reduction not in ("none", "mean", "sum")


def _unsupported(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, is_old: bool
) -> str | None:
    """Why torch computes these arguments; None where a kernel can."""
    if input.numel() == 0:
        return f"no kernel for logits of shape {tuple(input.shape)}"
    others = (t for t in (target, weight) if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in others):
        return "a gradient for target or weight"
    return "size_average or reduce" if is_old else None


def _value(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    smoothing: float,
    reduction: str,
) -> torch.Tensor:
    """The rows' losses, reduced."""
    x, target = x.contiguous(), target.contiguous()
    weight = None if weight is None else weight.contiguous()
    given = x, target, weight, ignore_index, smoothing
    found: Any
    if not (torch.is_grad_enabled() and x.requires_grad):
        found = cross_entropy_forward(*given)
    elif reduction != "none" and _takes_one_pass(x):
        found = _ReducedCrossEntropy.apply(*given, reduction)
        return found  # type: ignore[no-any-return]
    else:
        found = _CrossEntropy.apply(*given)
    return reduced(found[0], found[1], target, reduction)


def _takes_one_pass(x: torch.Tensor) -> bool:
    """Whether the forward pass may compute the gradient before the upstream one is known.

    Not in float16: divided by the number of rows, what a loss scale would have lifted is flushed
    to zero before it gets there. Nor in torch.compile, whose backward is made of operations that
    write into nothing that was saved.
    """
    return x.dtype != torch.float16 and not torch.compiler.is_compiling()


def _taken(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    is_old: bool,
    label_smoothing: float,
) -> bool:
    """Whether the kernels compute this; the trace says why not."""
    floats = [target] if target.is_floating_point() else []
    if not takes("cross_entropy", input, *floats):
        return False
    wrong = may_be_refused(input, target, weight, reduction) or not 0 <= label_smoothing <= 1
    if wrong:
        record_fallback("cross_entropy", "arguments that PyTorch may refuse")
        return False
    reason = _unsupported(input, target, weight, is_old)
    if reason is not None:
        decline("cross_entropy", reason)
    return reason is None


def in_dtype_of(loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss in the dtype that torch's has: the logits', but under autocast a wide one.

    Where the target is probabilities of a wider dtype: theirs.
    """
    dtype = logits.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
    return loss if autocast_is_on(logits) else loss.to(dtype)


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Σ_c w_c t_c (log Σ_k exp(x_k) - x_c) for each row of logits x, reduced over the rows.

    Nothing of the logits' size is kept but they and their gradient: no softmax. Where the losses
    are summed or averaged, the logits are read once, and loss and gradient computed in one pass;
    of losses one by one ("none"), of float16 and in torch.compile, once forward and once backward.
    Sums are float32. No host synchronisation.

    Args:
        input: logits, (C,), (N, C) or (N, C, *).
        target: class numbers, int64, of input's shape without C; or probabilities of its shape. A
            number that is no class and not ``ignore_index`` gives NaN, where torch stops the GPU.
        weight: w, (C,).
        size_average, reduce: torch's old names of ``reduction``; torch computes with them.
        ignore_index: rows of this class have no loss.
        reduction: "none", "sum", or "mean", over the rows' weights w_y (of probabilities, over
            the rows).
        label_smoothing: ε; t becomes (1 - ε) t + ε / C.

    Raises:
        What torch raises, for what is none of these.

    Source: torch.nn.functional.cross_entropy; C. Szegedy et al., "Rethinking the Inception
    Architecture", 2016, section 7 (smoothing).
    """
    tensors = is_tensor("cross_entropy", input) and is_tensor("cross_entropy", target, "target")
    is_old = size_average is not None or reduce is not None
    if not tensors or not _taken(input, target, weight, reduction, is_old, label_smoothing):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    single = input.dim() == 1
    rows = (input[None], target[None]) if single else (input, target)
    loss = _value(*rows, weight, ignore_index, label_smoothing, reduction)
    loss = loss[0] if single and reduction == "none" else loss
    return in_dtype_of(loss, input, target)
