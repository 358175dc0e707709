"""Sums over a whole tensor, the same from run to run: a number a program, then the sum of those.

The kernel that computes what is summed leaves the numbers; where one program is all, its number is
the result, and nothing more is launched. No atomics: numbers are added in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpunn.kernels.launch import Launch, run

MOST_PARTS = 4096
"""Programs of a sum. More than fit on a GPU at once, so that all of it is busy; so few that one
more program adds their numbers in four steps. The same on every GPU, so that sums' order is."""


@dataclass(frozen=True)
class PartsLaunch(Launch):
    """1024 numbers for 4 warps: 32 bytes a thread in float32. Not measured."""

    block: int = 1024


LAUNCH = PartsLaunch()


@triton.jit
def sum_parts_kernel(
    part_ptr, weight_part_ptr, sum_ptr, weight_sum_ptr, n_parts, BLOCK: tl.constexpr
):  # fmt: skip
    """Σ parts, or, if there are weights, Σ parts / Σ weights, and Σ weights. One program."""
    wide: tl.constexpr = part_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), dtype=wide)
    weights = tl.zeros((BLOCK,), dtype=wide)
    for start in tl.range(0, n_parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + part, mask=part < n_parts, other=0.0)
        if weight_part_ptr is not None:
            weights += tl.load(weight_part_ptr + part, mask=part < n_parts, other=0.0)
    result = tl.sum(total, 0)
    if weight_part_ptr is not None:
        weight = tl.sum(weights, 0)
        tl.store(weight_sum_ptr, weight)
        result = result / weight
    tl.store(sum_ptr, result.to(sum_ptr.dtype.element_ty))


def add_up(parts: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """``result``, which becomes the sum over the first dimension of ``parts``."""
    if parts.dtype == result.dtype:
        return torch.sum(parts, 0, out=result)
    return result.copy_(parts.sum(0))


def parts_for(result: torch.Tensor, n_parts: int) -> torch.Tensor:
    """Where programs leave their numbers: one writes the result itself."""
    wide = torch.promote_types(result.dtype, torch.float32)
    return result if n_parts == 1 else result.new_empty((n_parts,), dtype=wide)


def sum_parts(
    operator: str,
    parts: torch.Tensor,
    result: torch.Tensor,
    weight_parts: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
) -> None:
    """Reduce what ``parts_for`` gave to the result, unless it is the result."""
    if parts is not result:
        run(
            operator, sum_parts_kernel, (1,), parts, weight_parts, result, weight_sum,
            parts.numel(), launch=LAUNCH,
        )  # fmt: skip
