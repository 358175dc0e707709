"""The negative log-likelihood of classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.cross_entropy import may_be_refused
from gpunn.functional.dispatch import autocast_is_on, differentiable_gradients, is_tensor
from gpunn.kernels.launch import decline, record_fallback, takes
from gpunn.kernels.nll_loss import nll_loss_backward, nll_loss_forward


class _NllLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        ignore_index: int,
        reduction: str,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, weight_sum = nll_loss_forward(x, target, weight, ignore_index, reduction, dtype)
        ctx.mark_non_differentiable(weight_sum)
        ctx.save_for_backward(x, target, weight, weight_sum)
        ctx.options = ignore_index, reduction
        return loss, weight_sum

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, *of_weights: Any) -> tuple[Any, ...]:
        x, target, weight, weight_sum = ctx.saved_tensors
        ignore_index, reduction = ctx.options

        def composition(x: torch.Tensor) -> torch.Tensor:
            wide = torch.promote_types(x.dtype, torch.float32)
            given = None if weight is None else weight.to(wide)
            loss: torch.Tensor = F.nll_loss(
                x.to(wide), target, given, ignore_index=ignore_index, reduction=reduction
            )
            return loss.to(dloss.dtype)

        if torch.is_grad_enabled():
            (dx,) = differentiable_gradients(composition, [x], [True], dloss)
        else:
            dx = nll_loss_backward(dloss, x, target, weight, weight_sum, *ctx.options)
        return dx, *(None,) * 5


def _taken(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    is_old: bool,
) -> bool:
    """Whether the kernels compute this; the trace says why not."""
    if not takes("nll_loss", input, weight):
        return False
    refused = target.is_floating_point() or may_be_refused(input, target, weight, reduction)
    if not refused and weight is not None:  # which torch has no gradient for
        mixed = weight.dtype != input.dtype and not autocast_is_on(input)
        refused = mixed or (torch.is_grad_enabled() and weight.requires_grad)
    if refused:
        record_fallback("nll_loss", "arguments that PyTorch may refuse")
        return False
    reason = "size_average or reduce" if is_old else None
    if input.shape[0 if input.dim() == 1 else 1] == 0:
        reason = f"no kernel for log-probabilities of shape {tuple(input.shape)}"
    if reason is not None:
        decline("nll_loss", reason)
    return reason is None


def nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """-w_y x_y for each row of log-probabilities x and its class y, reduced over the rows.

    Of the log-probabilities one a row is read, and nothing is kept but they. Sums are float32, and
    the same from run to run. No host synchronisation.

    Args:
        input: log-probabilities, (C,), (N, C) or (N, C, *); of any strides.
        target: class numbers, int64, of input's shape without C. A number that is no class and not
            ``ignore_index`` gives NaN, where torch stops the GPU; uint8 is torch's.
        weight: w, (C,), of input's dtype. It has no gradient, here as in torch.
        size_average, reduce: torch's old names of ``reduction``; torch computes with them.
        ignore_index: rows of this class have no loss.
        reduction: "none", "sum", or "mean", over the rows' weights w_y.

    Raises:
        What torch raises, for what is none of these.

    Source: torch.nn.functional.nll_loss; C. Bishop, "Pattern Recognition and Machine Learning",
    2006, section 4.3.4.
    """
    tensors = is_tensor("nll_loss", input) and is_tensor("nll_loss", target, "target")
    is_old = size_average is not None or reduce is not None
    if not tensors or not _taken(input, target, weight, reduction, is_old):
        return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    single = input.dim() == 1
    x, y = (input[None], target[None]) if single else (input, target)
    dtype = input.dtype
    if autocast_is_on(input):  # on whose float32 list it is
        dtype = torch.promote_types(dtype, torch.float32)
    if torch.is_grad_enabled() and input.requires_grad:
        found: Any = _NllLoss.apply(x, y, weight, ignore_index, reduction, dtype)
    else:
        found = nll_loss_forward(x, y, weight, ignore_index, reduction, dtype)
    loss: torch.Tensor = found[0]
    return loss[0] if single and reduction == "none" else loss
