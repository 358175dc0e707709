"""One pair of kernels for every loss of elements: Σ w l(x, y) / divisor, and its gradients.

Source of the losses: ``kernels/loss.py``. Forward, x and y are read once and nothing of their size
is written, unless the losses themselves are wanted; backward, they are read once more, and the
gradients written. All is passed through in the order of x's memory. What repeats (a target or a
weight that was broadcast, the gradient of a sum) is read from as few numbers as it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gpunn.kernels.launch import Launch, cdiv, operator, run
from gpunn.kernels.loss import LOSSES, first_of
from gpunn.kernels.numeric import widen
from gpunn.kernels.partial_sums import MOST_PARTS, parts_for, sum_parts

NAME, NAME_BACKWARD = "pointwise_loss_forward", "pointwise_loss_backward"


@dataclass(frozen=True)
class PointwiseLossLaunch(Launch):
    """1024 elements for 4 warps: 16 bytes a thread in 16-bit types, 32 in float32. Not measured."""

    block: int = 1024


LAUNCH = PointwiseLossLaunch()
FAR = 2**31
"""Elements of which 32 bits do not tell the number."""


@triton.jit
def load_repeated(ptr, start, mask, inner, size, HOW: tl.constexpr, BLOCK: tl.constexpr):
    """Number i // inner % size of elements i from ``start`` on.

    HOW says what that comes to: "one" number; "every" element its own; or they repeat, "near"
    where inner times size is of 32 bits, in which a GPU divides many times sooner, or "far".
    """
    within = tl.arange(0, BLOCK)
    if HOW == "one":
        found = tl.load(ptr)
    elif HOW == "every":
        found = tl.load(ptr + start + within, mask=mask, other=0.0)
    else:
        first = start if HOW == "far" else (start % (inner * size)).to(tl.int32)
        found = tl.load(ptr + (first + within) // inner % size, mask=mask, other=0.0)
    return widen(found)


@triton.jit
def pointwise_loss_forward_kernel(
    x_ptr, y_ptr, weight_ptr, pos_weight_ptr, loss_ptr, n_elements, y_inner, y_size, weight_inner,
    weight_size, pos_inner, pos_size, divisor,
    LOSS: tl.constexpr, P0: tl.constexpr, Y_HOW: tl.constexpr, WEIGHT_HOW: tl.constexpr,
    POS_HOW: tl.constexpr, REDUCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w l(x, y) of elements; to REDUCE, a program's sum of them by the divisor.

    Of n programs each owns every n-th BLOCK elements.
    """
    program = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = tl.float64 if loss_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK,), dtype=wide)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in tl.range(program * BLOCK, n_elements, step):
        index = start + tl.arange(0, BLOCK)
        mask = index < n_elements
        x = widen(tl.load(x_ptr + index, mask=mask, other=0.0))
        y = load_repeated(y_ptr, start, mask, y_inner, y_size, Y_HOW, BLOCK)
        pos_weight = 1.0
        if pos_weight_ptr is not None:
            pos_weight = load_repeated(pos_weight_ptr, start, mask, pos_inner, pos_size, POS_HOW,
                                       BLOCK)  # fmt: skip
        loss = LOSS(x, y, pos_weight, P0)
        if weight_ptr is not None:
            loss *= load_repeated(weight_ptr, start, mask, weight_inner, weight_size, WEIGHT_HOW,
                                  BLOCK)  # fmt: skip
        if REDUCE:
            total += tl.where(mask, loss, 0.0)
        else:
            tl.store(loss_ptr + index, loss.to(loss_ptr.dtype.element_ty), mask=mask)
    if REDUCE:
        mean = tl.sum(total, 0) / divisor
        tl.store(loss_ptr + program, mean.to(loss_ptr.dtype.element_ty))


@triton.jit
def pointwise_loss_backward_kernel(
    x_ptr, dloss_ptr, y_ptr, weight_ptr, pos_weight_ptr, dx_ptr, dy_ptr, n_elements, dloss_inner,
    dloss_size, y_inner, y_size, weight_inner, weight_size, pos_inner, pos_size, divisor,
    GRADIENT: tl.constexpr, P0: tl.constexpr, DLOSS_HOW: tl.constexpr, Y_HOW: tl.constexpr,
    WEIGHT_HOW: tl.constexpr, POS_HOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dloss / divisor w ∂l/∂x, dy likewise, or one of them. A program owns BLOCK elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    mask = index < n_elements
    x = widen(tl.load(x_ptr + index, mask=mask, other=0.0))
    y = load_repeated(y_ptr, start, mask, y_inner, y_size, Y_HOW, BLOCK)
    scale = load_repeated(dloss_ptr, start, mask, dloss_inner, dloss_size, DLOSS_HOW, BLOCK)
    scale = scale / divisor
    if weight_ptr is not None:
        scale *= load_repeated(weight_ptr, start, mask, weight_inner, weight_size, WEIGHT_HOW,
                               BLOCK)  # fmt: skip
    pos_weight = 1.0
    if pos_weight_ptr is not None:
        pos_weight = load_repeated(pos_weight_ptr, start, mask, pos_inner, pos_size, POS_HOW,
                                   BLOCK)  # fmt: skip
    dx, dy = GRADIENT(x, y, pos_weight, P0)
    if dx_ptr is not None:
        tl.store(dx_ptr + index, (scale * dx).to(dx_ptr.dtype.element_ty), mask=mask)
    if dy_ptr is not None:
        tl.store(dy_ptr + index, (scale * dy).to(dy_ptr.dtype.element_ty), mask=mask)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it without gaps or repetitions."""
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.clone()


class _Repeated(NamedTuple):
    """Numbers that repeat over x: element i of its memory has ``numbers[i // inner % size]``."""

    numbers: torch.Tensor | None
    inner: int = 1
    size: int = 1
    how: str = "one"


def _repeated(given: torch.Tensor | None, x: torch.Tensor) -> _Repeated:
    """``given``, broadcast to the shape of x, which is dense, as its numbers and their pattern.

    They are copied where they are not in the order of x's memory, and where a dimension in which
    they repeat lies between others there.
    """
    if given is None:
        return _Repeated(given)
    if given.shape == x.shape and given.stride() == x.stride():
        return _Repeated(given, how="every")
    whole, strides = given.expand(x.shape).squeeze(), x.squeeze().stride()
    if not any(whole.stride()):
        return _Repeated(whole)
    whole = whole.permute(sorted(range(whole.dim()), key=lambda dim: -strides[dim]))
    own = [dim for dim, stride in enumerate(whole.stride()) if stride]
    first, last = own[0], own[-1] + 1
    inner, size = whole.shape[last:].numel(), whole.shape[first:last].numel()
    index = [slice(None) if first <= dim < last else 0 for dim in range(whole.dim())]
    numbers = whole[tuple(index)].contiguous()
    if size == x.numel():
        return _Repeated(numbers, how="every")
    far = inner * size > FAR - LAUNCH.block
    return _Repeated(numbers, inner, size, "far" if far else "near")


def _run(
    name: str,
    kernel: Any,
    n_programs: int,
    x: torch.Tensor,
    given: dict[str, torch.Tensor | None],
    outputs: Sequence[torch.Tensor | None],
    divisor: int | None,
    **constants: Any,
) -> None:
    """Launch a kernel on x, which is dense, and on what is given for its elements."""
    repeated = {key: _repeated(tensor, x) for key, tensor in given.items()}
    run(
        name, kernel, (n_programs,), x, *(r.numbers for r in repeated.values()), *outputs,
        x.numel(), *(n for r in repeated.values() for n in (r.inner, r.size)), divisor or 1,
        launch=LAUNCH, **{f"{key}_HOW": r.how for key, r in repeated.items()}, **constants,
    )  # fmt: skip


def _forward_fake(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    loss: str,
    parameters: list[float],
    divisor: int | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype) if divisor is None else x.new_empty((), dtype=dtype)


@operator(
    "pointwise_loss_forward(Tensor x, Tensor y, Tensor? weight, Tensor? pos_weight, str loss, "
    "float[] parameters, SymInt? divisor, ScalarType dtype) -> Tensor",
    fake=_forward_fake,
)
def pointwise_loss_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    loss: str,
    parameters: list[float],
    divisor: int | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """w l(x, y) in x's memory format where x is dense; or their sum by ``divisor``, a scalar.

    x and y of one shape, to which the weights broadcast; any strides.
    """
    found = _forward_fake(x, y, weight, pos_weight, loss, parameters, divisor, dtype)
    if x.numel() == 0:
        return found.fill_(0.0 if divisor else torch.nan)
    x = _dense(x)
    n_blocks = cdiv(x.numel(), LAUNCH.block)
    n_programs = n_blocks if divisor is None else min(n_blocks, MOST_PARTS)
    result = found if divisor is None else parts_for(found, n_programs)
    _run(
        NAME, pointwise_loss_forward_kernel, n_programs, x,
        {"Y": y, "WEIGHT": weight, "POS": pos_weight}, [result], divisor,
        LOSS=LOSSES[loss].forward, P0=first_of(parameters), REDUCE=divisor is not None,
    )  # fmt: skip
    if divisor is not None:
        sum_parts(NAME, result, found)
    return found


def _backward_fake(
    dloss: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    loss: str,
    parameters: list[float],
    divisor: int | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dy = (
        torch.empty_like(x, dtype=like.dtype) if needed else x.new_empty((0,), dtype=like.dtype)
        for like, needed in zip((x, y), needs, strict=True)
    )
    return dx, dy


@operator(
    "pointwise_loss_backward(Tensor dloss, Tensor x, Tensor y, Tensor? weight, "
    "Tensor? pos_weight, str loss, float[] parameters, SymInt? divisor, bool[] needs) "
    "-> (Tensor, Tensor)",
    fake=_backward_fake,
)
def pointwise_loss_backward(
    dloss: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    loss: str,
    parameters: list[float],
    divisor: int | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dy, in x's memory format where x is dense; each is empty where it is not needed."""
    gradients = _backward_fake(dloss, x, y, weight, pos_weight, loss, parameters, divisor, needs)
    if x.numel():
        x = _dense(x)
        _run(
            NAME_BACKWARD, pointwise_loss_backward_kernel, cdiv(x.numel(), LAUNCH.block), x,
            {"DLOSS": dloss, "Y": y, "WEIGHT": weight, "POS": pos_weight},
            [gradient if gradient.numel() else None for gradient in gradients], divisor,
            GRADIENT=LOSSES[loss].gradient, P0=first_of(parameters),
        )  # fmt: skip
    return gradients
