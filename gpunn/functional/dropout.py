"""Dropout of elements, of whole channels or by a given mask, and alpha dropout.

What a function keeps for its backward is the seed of its random bits, one int64, or the given mask.
Sources: Srivastava et al. 2014 (dropout); Tompson et al., "Efficient object localization using
convolutional networks", 2015 (channels); Klambauer et al., "Self-normalizing neural networks", 2017
(alpha). Where an input's order in memory is not row-major, as in channels_last, the bits of
``dropout`` and ``alpha_dropout`` follow the order in memory; a mask is always row-major.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from gpunn.functional.dispatch import is_tensor
from gpunn.kernels import dropout as kernels
from gpunn.kernels.cuda import takes_cuda
from gpunn.kernels.philox import draw_seed

# The numbers of dimensions that torch's function takes without a warning.
USUAL = {"dropout1d": (2, 3), "dropout2d": (4,), "dropout3d": (4, 5)}


class _Dropout(torch.autograd.Function):
    """y = factor x + addend. Its gradient is a dropout of dy, by the same bits."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        source: torch.Tensor,
        strides: Sequence[int],
        p: float,
        kind: str,
        channel: int | None,
        in_place: bool = False,
    ) -> torch.Tensor:
        ctx.save_for_backward(source)
        gradient = "dropout" if kind == "dropout" else "alpha_gradient"
        ctx.arguments = strides, p, gradient, channel
        if not in_place:
            return kernels.dropout_forward(x, source, strides, p, kind, channel)
        ctx.mark_dirty(x)
        kernels.dropout_in_place(x, source, p, kind, channel)
        return x

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (source,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx = _Dropout.apply(dy, source, *ctx.arguments)
        else:
            dx = kernels.dropout_forward(dy, source, *ctx.arguments)
        return dx, None, None, None, None, None, None


def _packed(kept: torch.Tensor) -> torch.Tensor:
    """Booleans as bits, the first one lowest."""
    padded = F.pad(kept.flatten().to(torch.uint8), (0, -kept.numel() % 8)).view(-1, 8)
    place = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (padded << place).sum(1, dtype=torch.uint8)


def _unpacked(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bits of a mask for a tensor ``like``, in its shape and dtype."""
    place = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask[:, None] >> place & 1).flatten()
    return bits[: like.numel()].view(like.shape).to(like.dtype)


def _composed(
    name: str,
    input: torch.Tensor,
    p: float,
    training: bool,
    inplace: bool,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """What torch computes, by its function of this name; by its multiplication for a mask."""
    if mask is None or not training:
        function = getattr(F, name)
        return function(input, p, training, inplace)  # type: ignore[no-any-return]
    factors = _unpacked(mask, input) * kernels.coefficients(p, "dropout")[0]
    return input.mul_(factors) if inplace else input * factors


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p: dropout probability has to be between 0 and 1, but got {p}")


def _check_mask(mask: torch.Tensor, input: torch.Tensor) -> None:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    n_bytes = (input.numel() + 7) // 8
    if mask.dtype != torch.uint8 or mask.shape != (n_bytes,):
        raise RuntimeError(
            f"mask: expected ({n_bytes},) of torch.uint8, one bit an element of input, "
            f"got {tuple(mask.shape)} of {mask.dtype}"
        )
    if mask.device != input.device:
        raise RuntimeError(
            f"mask: expected device {input.device}, that of input, got {mask.device}"
        )


def _torch_refuses_in_place(input: torch.Tensor) -> bool:
    """Whether autograd forbids to write into ``input``, or may do so.

    Raises:
        RuntimeError: it is forbidden for a reason that torch finds too late, when it has written.
    """
    if input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "input: an inference tensor can only be written in place in inference mode"
        )
    if not (input.requires_grad and torch.is_grad_enabled()):
        return False
    if not input._is_view():
        return input.is_leaf
    how = torch._C._autograd._get_creation_meta(input)
    return input._base.is_leaf or how != torch._C._autograd.CreationMeta.DEFAULT  # type: ignore[union-attr]


def _drop(
    name: str,
    input: torch.Tensor,
    p: float,
    training: bool,
    inplace: bool,
    kind: str = "dropout",
    channel: int | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The function of this name: by a kernel where one takes the input, else torch's."""
    _check_probability(p)
    if mask is not None:
        _check_mask(mask, input)
    if not training or (p == 0 and mask is None):
        return input
    if not takes_cuda(name, input):
        return _composed(name, input, p, training, inplace, mask)
    if input.numel() == 0:
        return input
    if p == 1:  # all is dropped, and to that torch adds nothing
        kind, channel = "dropout", None
    elif channel is not None and channel >= input.dim():
        torch.feature_dropout(input, p, True)  # raises torch's error
    source = draw_seed(input.device) if mask is None else mask
    if not inplace:
        return _dropped(input, source, float(p), kind, channel)
    direct = kernels.writes_in_place(input, source, channel)
    if torch.compiler.is_compiling() or not direct:
        return input.copy_(_dropped(input, source, float(p), kind, channel))
    if _torch_refuses_in_place(input):
        return _composed(name, input, p, training, inplace, mask)
    return _dropped(input, source, float(p), kind, channel, True)


def _dropped(
    input: torch.Tensor,
    source: torch.Tensor,
    p: float,
    kind: str,
    channel: int | None,
    in_place: bool = False,
) -> torch.Tensor:
    """The kernels' result, a new tensor or the input itself, and its place in autograd's graph."""
    strides = kernels.result_strides(input)
    if input.requires_grad and torch.is_grad_enabled():
        return _Dropout.apply(input, source, strides, p, kind, channel, in_place)  # type: ignore[no-any-return]
    if not in_place:
        return kernels.dropout_forward(input, source, strides, p, kind, channel)
    kernels.dropout_in_place(input, source, p, kind, channel)
    return input


def dropout(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = 0 with probability p, else x / (1 - p), for each element by itself.

    Args:
        input: x, of any shape and strides; y has the same shape, and torch's strides.
        p: the probability; at 0 the input itself is returned.
        training: where False, the input itself is returned.
        inplace: whether y is written over x.
        mask: which elements to keep, as ``dropout_mask`` gives it: then y = x bit / (1 - p), at
            p = 0 too (and 0 at p = 1).

    Raises:
        RuntimeError: the mask does not fit the input; or torch's, for an input that must not be
            written over.
        ValueError: p is not in [0, 1].
    """
    if not is_tensor("dropout", input):
        return _composed("dropout", input, p, training, inplace, mask)
    return _drop("dropout", input, p, training, inplace, mask=mask)


def _drop_channels(
    name: str, input: torch.Tensor, p: float, training: bool, inplace: bool, kind: str = "dropout"
) -> torch.Tensor:
    if not is_tensor(name, input):
        return _composed(name, input, p, training, inplace, None)
    n_dimensions = input.dim()
    if n_dimensions not in USUAL.get(name, (n_dimensions,)):
        _check_probability(p)
        getattr(F, name)(input, p, training=False)  # warns, or raises an error, in torch's words
    channel = 1
    if name == "dropout1d" or (name == "dropout3d" and n_dimensions != 5):
        channel = n_dimensions - 2 if name == "dropout1d" else 0  # without a batch, dimension 0
    return _drop(name, input, p, training, inplace, kind, channel)


def dropout1d(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """``dropout`` of whole channels: of x[n, c, :] for x (N, C, L), of x[c, :] for x (C, L).

    Raises:
        RuntimeError: x has another number of dimensions.
        ValueError: p is not in [0, 1].
    """
    return _drop_channels("dropout1d", input, p, training, inplace)


def dropout2d(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """``dropout`` of whole channels: of x[n, c] for x (N, C, H, W).

    For another number of dimensions, two at least, torch's warning is given; the first two are
    N and C.

    Raises:
        RuntimeError: x has less than two dimensions.
        ValueError: p is not in [0, 1].
    """
    return _drop_channels("dropout2d", input, p, training, inplace)


def dropout3d(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """``dropout`` of whole channels: of x[n, c] for x (N, C, D, H, W), of x[c] for x (C, D, H, W).

    For another number of dimensions torch's warning is given, and the first one is C.

    Raises:
        RuntimeError: x has no dimension.
        ValueError: p is not in [0, 1].
    """
    return _drop_channels("dropout3d", input, p, training, inplace)


def alpha_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> torch.Tensor:
    """y = a x + b, or, with probability p, a α' + b, for each element by itself.

    α' = -1.7580993408473766, a = ((1 - p)(1 + p α'²))^(-1/2) and b = -a α' p keep the mean at 0 and
    the variance at 1. At p = 1, y = 0, as torch's. Klambauer et al. 2017.

    Raises:
        ValueError: p is not in [0, 1].
    """
    if not is_tensor("alpha_dropout", input):
        return _composed("alpha_dropout", input, p, training, inplace, None)
    return _drop("alpha_dropout", input, p, training, inplace, "alpha")


def feature_alpha_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> torch.Tensor:
    """``alpha_dropout`` of whole channels: of x[n, c] for x (N, C, *).

    Raises:
        RuntimeError: x has less than two dimensions.
        ValueError: p is not in [0, 1].
    """
    return _drop_channels("feature_alpha_dropout", input, p, training, inplace, "alpha")


def dropout_mask(
    shape: Sequence[int], p: float = 0.5, *, device: torch.device | str | None = None
) -> torch.Tensor:
    """A mask for ``dropout``: one bit an element, 0 with probability p, else 1.

    Element i, in row-major order, is bit i % 8 of byte i // 8, the lowest one being bit 0, as
    ``numpy.unpackbits(mask, bitorder="little")`` reads it; the bits behind the last element are 0.

    Args:
        shape: that of the tensor to drop elements of.
        p: the probability.
        device: where the mask is made; by default, where torch makes tensors.

    Returns:
        ceil(numel / 8) bytes, a uint8 tensor of one dimension.

    Raises:
        ValueError: p is not in [0, 1].
    """
    _check_probability(p)
    n_elements = math.prod(shape)
    like = torch.empty(0, dtype=torch.float32, device=device)
    if p == 0:
        return _packed(torch.ones(n_elements, dtype=torch.bool, device=like.device))
    if not takes_cuda("dropout_mask", like):
        return _packed(torch.rand(n_elements, device=like.device) >= p)
    return kernels.dropout_mask(draw_seed(like.device), n_elements, float(p))
