"""The factors of a dropout, 0 or 1 / (1 - p), as a tensor of their own.

The fused kernels derive them on the fly and store nothing; this is for those who need them: a
double backward, which is computed with differentiable torch operations, and tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpunn.kernels.elementwise import LAUNCH
from gpunn.kernels.launch import cdiv, operator, run
from gpunn.kernels.philox import dropout_arguments, dropout_factor


@triton.jit
def dropout_factors_kernel(
    seed_ptr, factors_ptr, n_elements, threshold, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """factors[i] = scale or 0, as the random bits of element i say. A program owns BLOCK."""
    row = tl.zeros((1,), dtype=tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    factors = dropout_factor(seed_ptr, row, first, n_elements, threshold, scale, True, 1, BLOCK)
    index = first + tl.arange(0, BLOCK)[None, :]
    values = factors.to(factors_ptr.dtype.element_ty)
    tl.store(factors_ptr + index, values, mask=index < n_elements)


def _dropout_factors_fake(seed: torch.Tensor, like: torch.Tensor, dropout_p: float) -> torch.Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@operator(
    "dropout_factors(Tensor seed, Tensor like, float dropout_p) -> Tensor",
    fake=_dropout_factors_fake,
)
def dropout_factors(seed: torch.Tensor, like: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """0 for each element that a dropout with this seed drops, 1 / (1 - p) for the others."""
    factors = _dropout_factors_fake(seed, like, dropout_p)
    if factors.numel():
        run(
            "dropout_factors",
            dropout_factors_kernel,
            (cdiv(factors.numel(), LAUNCH.block),),
            seed,
            factors,
            factors.numel(),
            *dropout_arguments(dropout_p),
            launch=LAUNCH,
        )
    return factors
