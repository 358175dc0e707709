"""Batch normalisation of a batch that is spread over the processes of ``torch.distributed``.

Each process sums over its own part; what is exchanged are numbers a channel: mean, squared
deviations and count forward, two sums backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm

from gpunn.functional.activation import TORCH, ActivationName, resolve_activation
from gpunn.functional.batch_norm import MOST_POSITIONS, Options, check_channels, keeps_bits
from gpunn.functional.convolution_arguments import check_residual
from gpunn.functional.dispatch import distinct
from gpunn.kernels.batch_norm import (
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_statistics,
    batch_norm_sums,
)
from gpunn.kernels.launch import decline, takes

Optional = torch.Tensor | None


def _gathered(x: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, squared deviations and count over all processes; of an empty part, nothing counts."""
    n_channels, wide = x.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32
    mine = torch.zeros(2 * n_channels + 1, dtype=wide, device=x.device)
    if x.numel():
        mine[:-1] = batch_norm_statistics(x).flatten()
        mine[-1] = x.numel() // n_channels
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group)
    means, squares, counts = torch.stack(parts).split([n_channels, n_channels, 1], dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    return mean, (squares + counts * (means - mean) ** 2).sum(0), count


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: Optional,
        weight: Optional,
        bias: Optional,
        running_mean: Optional,
        running_var: Optional,
        options: Options,
        group: Any,
    ) -> torch.Tensor:
        mean, squares, count = _gathered(x, group)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), options.momentum)
            running_var.lerp_((squares / (count - 1)).to(running_var.dtype), options.momentum)
        forward: Any = batch_norm_forward
        y = torch.empty_like(x)
        kept: Sequence[Optional] = (None, None)
        keep = keeps_bits(options.name, residual)
        bits = None
        if x.numel():
            given = x, residual, weight, bias, mean, squares / count
            y, *kept, bits = forward(*given, *options._replace(training=False), keep)
        again = None if keep or options.name == "identity" else residual
        ctx.save_for_backward(x, again, weight, bias, *kept, bits if keep else None, count)
        ctx.options, ctx.group = options, group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Optional, ...]:
        x, residual, weight, bias, mean, invstd, bits, count = ctx.saved_tensors
        needs, fused = ctx.needs_input_grad[:4], (ctx.options.name, ctx.options.parameters)
        sums = torch.zeros(2, x.shape[1], dtype=count.dtype, device=x.device)
        operands = dy, x, residual, bits, weight, bias, mean, invstd
        if x.numel():
            sums = batch_norm_sums(*operands, *fused)
        of_all = sums.clone()
        if needs[0]:
            dist.all_reduce(of_all, group=ctx.group)
        dx = dresidual = None
        if x.numel() and any(needs[:2]):
            wanted = [*needs[:2], False, False]
            dx, dresidual, *_ = batch_norm_backward(
                *operands, of_all / count, 1, True, *fused, wanted
            )
        dweight, dbias = (
            total.to(parameter.dtype) if parameter is not None and needed else None
            for total, parameter, needed in zip(
                reversed(sums), (weight, bias), needs[2:], strict=True
            )
        )
        if not x.numel():
            dx, dresidual = torch.zeros_like(x), torch.zeros_like(x)
        gradients = dx if needs[0] else None, dresidual if needs[1] else None, dweight, dbias
        return (*gradients, None, None, None, None)


def sync_batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
    *,
    activation: ActivationName = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``batch_norm`` in training, with the mean and variance of the batches of all processes.

    Each process of the group calls it, with as many images as it has, be it none. The gradients of
    weight and bias are those of its own images, as DistributedDataParallel expects.

    Args:
        process_group: of torch.distributed; None for all processes.
        input, running_mean, running_var, weight, bias, momentum, eps: as ``batch_norm``'s.
        activation, residual: as ``batch_norm``'s; the residual is of input's dtype.

    Raises:
        RuntimeError: as ``batch_norm``; also where it is differentiated twice.
        ValueError: an unknown activation; a CPU's tensor, where no kernel takes it.

    Sources: S. Ioffe and C. Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167;
    T. Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
    1979 (the variance of parts).
    """
    options = Options(True, momentum, eps, *resolve_activation(activation))
    group = dist.group.WORLD if process_group is None else process_group
    running = {"running_mean": running_mean, "running_var": running_var}
    check_channels(input, **running, weight=weight, bias=bias)
    if residual is not None:
        check_residual(residual, input.shape, input.device)
        if residual.dtype != input.dtype:
            raise RuntimeError(f"residual: expected {input.dtype}, got {residual.dtype}")
    tensors = input, residual, weight, bias, running_mean, running_var
    if takes("sync_batch_norm", *tensors):
        if input.numel() <= MOST_POSITIONS * input.shape[1]:
            y: torch.Tensor = _SyncBatchNorm.apply(*distinct(tensors), options, group)
            return y
        decline("sync_batch_norm", f"no kernel for a batch of shape {tuple(input.shape)}")
    if input.is_cpu:
        raise ValueError("input: sync_batch_norm expects a GPU's tensor where no kernel takes it")
    z = SyncBatchNorm.apply(
        input, weight, bias, running_mean, running_var, eps, momentum, group,
        dist.get_world_size(group),
    )  # fmt: skip
    return TORCH[options.name](z if residual is None else z + residual, *options.parameters)
