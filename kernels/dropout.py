"""Dropout: an element is kept and scaled, or dropped, as random bits or a mask of bits say.

The bits are drawn from a seed wherever they are needed, in ``dropout.cu``, and no mask is stored.
linear's fused kernels draw the same ones; ``dropout_factors`` makes a tensor of their factors, 0 or
1 / (1 - p), for a double backward, which is computed with differentiable torch operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gpunn.kernels.cuda import CudaKernel, CudaLaunch, divisor
from gpunn.kernels.elementwise import LAUNCH
from gpunn.kernels.launch import cdiv, operator, run
from gpunn.kernels.philox import dropout_arguments, dropout_factor

ELEMENTS = CudaKernel("dropout.cu", "dropout_kernel")
CHANNELS = CudaKernel("dropout.cu", "channel_dropout_kernel")
MASKED = CudaKernel("dropout.cu", "masked_dropout_kernel")
MASK = CudaKernel("dropout.cu", "dropout_mask_kernel")
MASK_WORD = 32
"""Elements, and so bits, of which a thread makes a mask."""
CUDA_LAUNCH = CudaLaunch()

# What adds nothing: 0.0 would turn -0.0 into 0.0, and so differ from a multiplication.
NOTHING = -0.0
SELU_LIMIT = -1.7580993408473766
"""SELU's limit at minus infinity, which alpha dropout puts in an element's place."""


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


def coefficients(p: float, kind: str) -> tuple[float, float, float]:
    """What a kept element is multiplied by, and what is added to a kept one and to a dropped one.

    "dropout": 1 / (1 - p), and nothing. "alpha", for p < 1: a, and b and a α' + b, where α' is
    ``SELU_LIMIT``, a = ((1 - p) (1 + p α'²))^(-1/2) and b = -a α' p (Klambauer et al.,
    "Self-normalizing neural networks", 2017). "alpha_gradient": a, and nothing.
    """
    if kind == "dropout":
        return dropout_arguments(p)[1], NOTHING, NOTHING
    a = ((1 - p) * (1 + p * SELU_LIMIT**2)) ** -0.5
    b = -a * SELU_LIMIT * p
    return (a, b, a * SELU_LIMIT + b) if kind == "alpha" else (a, NOTHING, NOTHING)


def result_strides(x: torch.Tensor) -> tuple[int, ...]:
    """The strides that torch gives to f(x): those of x where it is dense."""
    return x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()


def _lie_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have the same order in memory."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(mine == other for size, mine, other in strides if size > 1)


def is_direct(y: torch.Tensor, source: torch.Tensor, channel: int | None) -> bool:
    """Whether a kernel can write y, a dense tensor, in the order in which it lies in memory.

    It can in any order if elements are drawn; a mask's bits are in row-major order; and channels
    must be contiguous or, as in channels_last, vary fastest.
    """
    if y.is_contiguous() or (channel is None and source.dtype == torch.int64):
        return True
    return channel is not None and y.movedim(channel, -1).is_contiguous()


def _drop(
    x: torch.Tensor, source: torch.Tensor, y: torch.Tensor, p: float, kind: str, channel: int | None
) -> None:
    """Launch the kernel that writes y, which ``is_direct``, from x, which lies alike."""
    vector, kernel, constants = 16 // y.element_size(), ELEMENTS, {}
    arguments: tuple[int | float, ...] = (dropout_arguments(p)[0], *coefficients(p, kind))
    n_inner = 1 if channel is None else y.shape[channel + 1 :].numel()
    divisors: tuple[bytes, ...] = ()
    if source.dtype == torch.uint8:
        kernel, arguments, source = MASKED, arguments[1:3], source.contiguous()
    elif channel is not None and n_inner > 1:
        n_channels, channels_last = y.shape[channel], not y.is_contiguous()
        fits = n_channels % vector == 0 if channels_last else n_inner >= vector
        vector, kernel = vector if fits else 1, CHANNELS
        constants = dict(CHANNELS_LAST=channels_last)
        divisors = divisor(n_channels), divisor(n_inner)
    if x.data_ptr() % 16 or y.data_ptr() % 16:
        vector = 1
    run(
        "dropout_forward",
        kernel,
        (cdiv(y.numel(), vector * CUDA_LAUNCH.n_threads),),
        x,
        source,
        y,
        *divisors,
        y.numel(),
        *arguments,
        launch=CUDA_LAUNCH,
        T=y.dtype,
        VECTOR=vector,
        **constants,
    )


def _dropout_forward_fake(
    x: torch.Tensor,
    source: torch.Tensor,
    strides: Sequence[int],
    p: float,
    kind: str,
    channel: int | None,
) -> torch.Tensor:
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


@operator(
    "dropout_forward(Tensor x, Tensor source, SymInt[] strides, float p, str kind, int? channel)"
    " -> Tensor",
    fake=_dropout_forward_fake,
)
def dropout_forward(
    x: torch.Tensor,
    source: torch.Tensor,
    strides: Sequence[int],
    p: float,
    kind: str,
    channel: int | None,
) -> torch.Tensor:
    """y = factor x + addend, with the ``coefficients`` of p, in (0, 1], and ``kind``.

    Args:
        x: of any shape and strides.
        source: a seed, one int64, or a packed mask, uint8, as ``dropout_mask`` makes it.
        strides: those of y, which they must make dense.
        channel: a seed draws whole channels, which this dimension numbers, channel c of the
            flattened dimensions before it, n, as element n C + c; or, where it is None, the
            elements in the order in which y lies in memory. A mask is always for the elements of
            x in row-major order.
    """
    y = _dropout_forward_fake(x, source, strides, p, kind, channel)
    if y.numel():
        written = y if is_direct(y, source, channel) else y.new_empty(y.shape)
        if not _lie_alike(x, written):
            x = torch.empty_like(written).copy_(x)
        _drop(x, source, written, p, kind, channel)
        if written is not y:
            y.copy_(written)
    return y


def writes_in_place(x: torch.Tensor, source: torch.Tensor, channel: int | None) -> bool:
    """Whether ``dropout_in_place`` takes x: it is dense, and lies as a kernel can write it."""
    return x.stride() == result_strides(x) and is_direct(x, source, channel)


def _dropout_in_place_fake(
    x: torch.Tensor, source: torch.Tensor, p: float, kind: str, channel: int | None
) -> None:
    pass


@operator(
    "dropout_in_place(Tensor(a!) x, Tensor source, float p, str kind, int? channel) -> ()",
    fake=_dropout_in_place_fake,
)
def dropout_in_place(
    x: torch.Tensor, source: torch.Tensor, p: float, kind: str, channel: int | None
) -> None:
    """x = factor x + addend, as ``dropout_forward``, for an x that ``writes_in_place``."""
    if x.numel():
        _drop(x, source, x, p, kind, channel)
        torch.autograd.graph.increment_version(x)


def _dropout_mask_fake(seed: torch.Tensor, n_elements: int, p: float) -> torch.Tensor:
    return torch.empty((n_elements + 7) // 8, dtype=torch.uint8, device=seed.device)


@operator(
    "dropout_mask(Tensor seed, SymInt n_elements, float p) -> Tensor", fake=_dropout_mask_fake
)
def dropout_mask(seed: torch.Tensor, n_elements: int, p: float) -> torch.Tensor:
    """Bit i % 8 of byte i // 8 is 1 where a dropout with this seed and p, in (0, 1], keeps i."""
    mask = _dropout_mask_fake(seed, n_elements, p)
    if n_elements:
        run(
            "dropout_mask",
            MASK,
            (cdiv(n_elements, MASK_WORD * CUDA_LAUNCH.n_threads),),
            seed,
            mask,
            n_elements,
            dropout_arguments(p)[0],
            launch=CUDA_LAUNCH,
            N=MASK_WORD,
        )
    return mask
