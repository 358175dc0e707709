"""Cross-entropy of logits, without their softmax in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.dispatch import autocast_is_on, differentiable_gradients, is_tensor
from gpunn.kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward
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
                lambda x: _rows_by_torch(x, target, weight, *ctx.options), [x], [True], dloss
            )
        else:
            dx = cross_entropy_backward(dloss, x, target, weight, row_weight, lse, *ctx.options)
        return dx, None, None, None, None


def _rows_by_torch(
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


def _is_wrong(
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


def _losses(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the weight of each row."""
    x, target = x.contiguous(), target.contiguous()
    weight = None if weight is None else weight.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        found: Any = _CrossEntropy.apply(x, target, weight, ignore_index, smoothing)
    else:
        found = cross_entropy_forward(x, target, weight, ignore_index, smoothing)
    return found[0], found[1]


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
    wrong = _is_wrong(input, target, weight, reduction) or not 0 <= label_smoothing <= 1
    if wrong:
        record_fallback("cross_entropy", "arguments that PyTorch may refuse")
        return False
    reason = _unsupported(input, target, weight, is_old)
    if reason is not None:
        decline("cross_entropy", reason)
    return reason is None


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

    The logits are read once forward and once backward, and nothing of their size is kept but
    they: no softmax. Sums are float32. No host synchronisation.

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
    loss, row_weight = _losses(*rows, weight, ignore_index, label_smoothing)
    if reduction == "none":
        loss = loss[0] if single else loss
    elif reduction == "sum" or (target.is_floating_point() and reduction == "mean"):
        loss = loss.sum() / (loss.numel() if reduction == "mean" else 1)
    else:
        loss = loss.sum() / row_weight.sum()
    return loss if autocast_is_on(input) and input.is_cuda else loss.to(input.dtype)
