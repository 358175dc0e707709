"""The launches of group normalisation that are compiled."""

from __future__ import annotations

from functools import partial

import torch

from gpunn.kernels.group_norm import FEWEST_CHANNELS, LONGEST_NARROW, TILES
from gpunn.kernels.launch import launchers
from gpunn.profiling.static_report import meta
from scenario import Scenario

HALF, FLOAT = torch.bfloat16, torch.float32


def _group_norm(
    shape: tuple[int, ...],
    num_groups: int,
    dtype: torch.dtype,
    last: bool,
    *,
    backward: bool = True,
) -> None:
    """Forward and backward, with the activation whose gradient takes the most registers."""
    x, parameter = meta(*shape, dtype=dtype), meta(shape[1], dtype=FLOAT)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    y, mean, invstd, _ = launchers["group_norm_forward"](
        x, num_groups, parameter, parameter, 1e-5, "mish", [], dtype
    )
    if backward:
        launchers["group_norm_backward"](
            y, x, parameter, parameter, mean, invstd, "mish", [], [True] * 3
        )


def group_norm_scenarios() -> dict[str, Scenario]:
    """Tiles that are filled are read by 128 bits; the largest, and odd ones, must not spill."""
    found = {}
    for tile in TILES:
        n_positions, widest = tile.block_positions, tile.block_channels
        large = widest * n_positions > LONGEST_NARROW
        for last in (False, True) if widest >= FEWEST_CHANNELS else (False,):
            launch = partial(
                _group_norm, (64, 4 * widest, n_positions), 4, HALF if last else FLOAT, last,
                backward=not large,
            )  # fmt: skip
            name = f"group-norm-{n_positions}x{widest}-{'last' if last else 'first'}"
            # what groups and channels have one of is narrower than 16 bytes
            chips = (80, 90, 100) if last and n_positions == 256 and not large else (90,)
            found[name] = Scenario(launch, False, True, chips, narrow_allowed=40)
    odd = partial(_group_norm, (64, 128, 225), 4, HALF, False)
    found["group-norm-odd-planes"] = Scenario(odd, capabilities=(90,))
    odd = partial(_group_norm, (64, 620, 256), 20, HALF, True)
    found["group-norm-odd-channels"] = Scenario(odd, capabilities=(90,))
    eights = partial(_group_norm, (8, 1280, 64), 32, HALF, True)
    found["group-norm-channels-by-eights"] = Scenario(eights, False, True, (90,), 40)
    for last in (False, True):
        launch = partial(_group_norm, (8, 512, 4096), 32, HALF, last)
        name = f"group-norm-read-twice-{'last' if last else 'first'}"
        found[name] = Scenario(launch, False, True, (90,), narrow_allowed=50)
    few = partial(_group_norm, (8, 2048, 64), 1, HALF, False)
    found["group-norm-read-twice-few-positions"] = Scenario(few, False, True, (90,), 50)
    return found
