"""Launchers of max-unpooling: values go back to where the maxima were, zeros elsewhere.

Where two values go to one place, the last of the plane stays, as in PyTorch on a CPU. The result
does not depend on who comes first: the last is found by an integer maximum before any is moved.
"""

from __future__ import annotations

from typing import Any

import torch

from gpunn.kernels.cuda import CudaKernel, CudaLaunch
from gpunn.kernels.launch import cdiv, operator, run
from gpunn.kernels.pooling import are_aligned, format_of, is_channels_last, vector_length

# Four elements of 32 bits, eight of 16: 16 bytes a thread. Not measured.
LAUNCH = CudaLaunch(num_warps=4)
WINNERS = CudaKernel("unpooling.cu", "max_unpool_winners_kernel")
FORWARD = CudaKernel("unpooling.cu", "max_unpool_forward_kernel")
BACKWARD = CudaKernel("unpooling.cu", "max_unpool_backward_kernel")


def _run(
    name: str, kernel: CudaKernel, tensors: list[torch.Tensor], sizes: list[int], **constants: Any
) -> None:
    """Launch on as many elements as the last of the tensors, or (winners) the first, has."""
    walked = tensors[0] if kernel is WINNERS else tensors[-1]
    length = vector_length(walked.element_size(), walked.numel(), are_aligned(*tensors))
    n_vectors = walked.numel() // length
    run(
        name, kernel, (cdiv(n_vectors, LAUNCH.n_threads),), *tensors, n_vectors, *sizes,
        launch=LAUNCH, N=length, **constants,
    )  # fmt: skip


def _sizes(x: torch.Tensor, n_outputs: int, channels_last: bool) -> list[int]:
    """Places of a plane before and after, and the channels of a place."""
    return [x.shape[2] * x.shape[3], n_outputs, x.shape[1] if channels_last else 1]


def _max_unpool_forward_fake(
    x: torch.Tensor, indices: torch.Tensor, output_size: list[int]
) -> torch.Tensor:
    memory_format = format_of(is_channels_last(x))
    shape = (*x.shape[:2], *output_size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


@operator(
    "max_unpool_forward(Tensor x, Tensor indices, SymInt[] output_size) -> Tensor",
    fake=_max_unpool_forward_fake,
)
def max_unpool_forward(
    x: torch.Tensor, indices: torch.Tensor, output_size: list[int]
) -> torch.Tensor:
    """y (N, C, OH, OW): the values of x (N, C, H, W) at their indices in the plane, else 0."""
    y = _max_unpool_forward_fake(x, indices, output_size)
    if not x.numel():
        return y.zero_()
    channels_last = is_channels_last(x)
    memory_format = format_of(channels_last)
    sizes = _sizes(x, output_size[0] * output_size[1], channels_last)
    winners = torch.full_like(y, -1, dtype=torch.int32)
    places = indices.contiguous(memory_format=memory_format)
    _run("max_unpool_forward", WINNERS, [places, winners], sizes)
    values = x.contiguous(memory_format=memory_format)
    _run("max_unpool_forward", FORWARD, [values, winners, y], sizes, T=x.dtype)
    return y


def _max_unpool_backward_fake(dy: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    memory_format = format_of(is_channels_last(indices))
    return torch.empty_like(indices, dtype=dy.dtype, memory_format=memory_format)


@operator(
    "max_unpool_backward(Tensor dy, Tensor indices) -> Tensor", fake=_max_unpool_backward_fake
)
def max_unpool_backward(dy: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """dx (N, C, H, W): dy (N, C, OH, OW) at the indices."""
    dx = _max_unpool_backward_fake(dy, indices)
    if dx.numel():
        channels_last = is_channels_last(indices)
        memory_format = format_of(channels_last)
        sizes = _sizes(indices, dy.shape[2] * dy.shape[3], channels_last)
        given = [dy.contiguous(memory_format=memory_format)]
        given.append(indices.contiguous(memory_format=memory_format))
        _run("max_unpool_backward", BACKWARD, [*given, dx], sizes, T=dy.dtype)
    return dx
