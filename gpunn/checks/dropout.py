"""The checks of dropout: of elements and channels, by a mask, and alpha dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

import gpunn.functional as GF
from gpunn.checks.comparison import SEED, Array, Check, Comparison, compare, drawn
from gpunn.kernels.philox import draw_seed
from gpunn.reference import dropout

P = 0.25
Kept = Callable[[int, tuple[int, ...]], dropout.Booleans]


def by_elements(seed: int, shape: tuple[int, ...]) -> dropout.Booleans:
    """What a dropout with this seed keeps, drawn element by element."""
    return dropout.kept_elements(seed, shape, P)


def by_channels(seed: int, shape: tuple[int, ...]) -> dropout.Booleans:
    """What a dropout of whole channels keeps."""
    return dropout.kept_channels(seed, shape, P, 1)


def by_a_mask(x: torch.Tensor) -> torch.Tensor:
    """Dropout by a mask that is drawn before."""
    return GF.dropout(x, P, mask=GF.dropout_mask(x.shape, P, device=x.device))


def check_dropout(
    function: Callable[[torch.Tensor], torch.Tensor],
    keeps: Kept,
    shape: tuple[int, ...],
    channels_last: bool,
    alpha: bool,
    dtype: torch.dtype,
    device: str,
) -> list[Comparison]:
    """One function with the bits of a known seed; PyTorch's formula in float32, for those bits."""
    x = drawn(shape, dtype, device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    torch.manual_seed(SEED)
    kept = keeps(int(draw_seed(torch.device(device)).item()), tuple(x.shape))
    limit = dropout.LIMIT if alpha else 0.0
    scale = ((1 - P) * (1 + P * limit**2)) ** -0.5 if alpha else 1 / (1 - P)

    def ours(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(SEED)  # so that it draws that seed
        return function(x)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        keep = torch.from_numpy(np.ascontiguousarray(kept)).to(x.device)
        y = x.float() * (keep * scale) + (~keep * limit - P * limit) * scale
        return y.to(x.dtype)

    def exact(dy: Array, x: Array) -> dict[str, Array]:
        if alpha:
            forward, backward = dropout.alpha_dropout_forward, dropout.alpha_dropout_backward
        else:
            forward, backward = dropout.dropout_forward, dropout.dropout_backward
        return {"y": forward(x, kept, P), "dx": backward(dy, kept, P)}

    return compare(ours, theirs, exact, [x])


def _check(
    case: str,
    function: Callable[[torch.Tensor], torch.Tensor],
    kernel: str,
    keeps: Kept = by_elements,
    shape: tuple[int, ...] = (3, 8, 5, 9),
    channels_last: bool = False,
    alpha: bool = False,
) -> Check:
    run = functools.partial(check_dropout, function, keeps, shape, channels_last, alpha)
    return Check("dropout", case, run, (kernel,))


CHANNELS = "channel_dropout_kernel"
CHECKS = [
    _check("dropout", lambda x: GF.dropout(x, P), "dropout_kernel"),
    _check("dropout, in place", lambda x: GF.dropout(x * 1, P, inplace=True), "dropout_kernel"),
    _check("dropout, by dropout_mask", by_a_mask, "masked_dropout_kernel"),
    _check("dropout1d", lambda x: GF.dropout1d(x, P), CHANNELS, by_channels, (3, 8, 45)),
    _check("dropout2d", lambda x: GF.dropout2d(x, P), CHANNELS, by_channels),
    _check(
        "dropout2d, channels_last",
        lambda x: GF.dropout2d(x, P),
        CHANNELS,
        by_channels,
        channels_last=True,
    ),
    _check("dropout3d", lambda x: GF.dropout3d(x, P), CHANNELS, by_channels, (3, 8, 3, 3, 5)),
    _check("alpha_dropout", lambda x: GF.alpha_dropout(x, P, True), "dropout_kernel", alpha=True),
    _check(
        "feature_alpha_dropout",
        lambda x: GF.feature_alpha_dropout(x, P, True),
        CHANNELS,
        by_channels,
        alpha=True,
    ),
]
