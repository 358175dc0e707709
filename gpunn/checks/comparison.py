"""What a check is made of: ours, PyTorch's and the exact result of one case, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

Array = NDArray[np.float64]
Comparison = tuple[str, torch.Tensor, Array, torch.Tensor]
"""The name of a result, ours, the exact one, and PyTorch's in the same dtype."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEED = 20240229


@dataclass(frozen=True)
class Check:
    """One case of an op."""

    op: str
    case: str
    run: Callable[[torch.dtype, str], list[Comparison]]
    """Computes the case in a dtype on a device: the value, and each gradient."""
    kernels: tuple[str, ...] = ()
    """Kernels that must have run, where that any did is not enough."""


def as_numpy(tensor: torch.Tensor) -> Array:
    """The values in float64: what a reference takes."""
    return tensor.detach().double().cpu().numpy()


def drawn(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal numbers, the same ones on every device."""
    return torch.randn(tuple(shape)).to(device, dtype)


@contextmanager
def any_algorithm() -> Iterator[None]:
    """Lets PyTorch compute what it refuses to under ``use_deterministic_algorithms``.

    On a GPU that is its gradient of a pooling, among others. Its attention is the one that is a
    plain formula: of its fused ones, some refuse what is not aligned, and give rows of which all
    is ruled out a value.
    """
    wanted = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(wanted)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products and convolutions of float32 in float32, and not in TF32, for the block."""
    settings: Any = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    previous = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, previous, strict=True):
            setting.fp32_precision = precision


def on_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of tensors, computed on the CPU: the baseline where PyTorch's on a GPU is wrong.

    Its gradient of an average over windows of channels_last images is, in PyTorch 2.11.
    """

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return function(*(t.cpu() for t in tensors)).to(tensors[0].device)

    return call


def compare(
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    exact: Callable[..., dict[str, Array]],
    inputs: Sequence[torch.Tensor],
) -> list[Comparison]:
    """The value and the gradients of an op with a random upstream gradient.

    Args:
        ours, theirs: gpunn's function and PyTorch's, of ``inputs``.
        exact: of dy and ``inputs`` in NumPy, the value and the gradient of each, by name.
        inputs: the tensors to differentiate by.
    """
    leaves = [[tensor.detach().requires_grad_() for tensor in inputs] for _ in range(2)]
    y = ours(*leaves[0])
    dy = drawn(y.shape, y.dtype, str(y.device))
    got = [y, *torch.autograd.grad(y, leaves[0], dy)]
    with any_algorithm():
        torch_y = theirs(*leaves[1])
        baseline = [torch_y, *torch.autograd.grad(torch_y, leaves[1], dy)]
    return named(got, exact(as_numpy(dy), *map(as_numpy, inputs)), baseline)


def named(
    got: Sequence[torch.Tensor], truth: dict[str, Array], baseline: Sequence[torch.Tensor]
) -> list[Comparison]:
    """Results in the order of ``truth``, with its names."""
    return list(zip(truth, got, truth.values(), baseline, strict=True))
