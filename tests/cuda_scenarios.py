"""The launches of CUDA C++ kernels that are compiled: every template, in what it is used with."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch

from gpunn.kernels.launch import launchers
from gpunn.kernels.pooling import format_of
from gpunn.profiling.static_report import meta
from scenario import Scenario

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WINDOW = [3, 3, 2, 2, 1, 1, 1, 1]
LARGE_WINDOW = [17, 17, 17, 17, 0, 0, 1, 1]
"""Of more taps than a byte can number."""


def dropout_scenarios() -> dict[str, Scenario]:
    """Of a seed, and of the element or so left at the end, the accesses are narrow."""
    seed, forward, found = meta(1, dtype=torch.int64), launchers["dropout_forward"], {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        image = meta(8, 64, 32, 32, dtype=dtype)
        last = torch.empty_like(image, memory_format=torch.channels_last)
        mask = meta(image.numel() // 8, dtype=torch.uint8)
        for way, source, channel, x in (
            ("elements", seed, None, image),
            ("masked", mask, None, image),
            ("channels", seed, 1, image),
            ("channels-last", seed, 1, last),
        ):
            beside = meta(image.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride())
            wide = partial(forward, x, source, x.stride(), 0.1, "dropout", channel)
            # 8 elements a thread, and the path of a single one beside them
            most = 310 if way == "elements" and dtype.itemsize == 2 else None
            found[f"dropout-{way}-{name}"] = Scenario(
                wide, wide_only=True, narrow_allowed=4, most_instructions=most
            )
            narrow = partial(forward, beside, source, x.stride(), 0.1, "alpha", channel)
            found[f"dropout-{way}-{name}-unaligned"] = Scenario(narrow, capabilities=(90,))
    found["dropout-mask"] = Scenario(partial(launchers["dropout_mask"], seed, 2**24, 0.1))
    return found


def _image(size: list[int], dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta", memory_format=format_of(channels_last))


def _pooled(kind: str, shape: list[int], window: list[int], dtype: torch.dtype, last: bool) -> Any:
    """A call of one launcher; ``shape`` is the input's."""
    size = [(n + 2 * window[4] - window[0]) // window[2] + 1 if window else 5 for n in shape[2:]]
    x, y = _image(shape, dtype, last), _image([*shape[:2], *size], dtype, last)
    taps = window[0] * window[1] if window else 1
    positions = torch.empty_like(y, dtype=torch.uint8 if taps <= 256 else torch.int32)
    return {
        "max": partial(launchers["max_pool_forward"], x, size, window, False, False),
        "max-kept": partial(launchers["max_pool_forward"], x, size, window, True, False),
        "max-indices": partial(launchers["max_pool_forward"], x, size, window, True, True),
        "max-backward": partial(launchers["max_pool_backward"], y, positions, shape, window),
        "avg": partial(launchers["avg_pool_forward"], x, size, window, True, 0),
        "avg-backward": partial(launchers["avg_pool_backward"], y, shape, window, True, 0, last),
    }[kind]


# Whether it is channels_last, the input's shape, and whether that is taken by 16 bytes: by channels
# or by tiles; else there are too few channels, or a row of windows is too long for a tile.
LAYOUTS = {
    "channels-last": (True, [8, 64, 30, 30], True),
    "three-channels": (True, [8, 3, 30, 30], False),
    "tile": (False, [8, 64, 30, 30], True),
    "long-rows": (False, [8, 64, 30, 30000], False),
}
KINDS = ("max", "max-kept", "max-indices", "max-backward", "avg", "avg-backward")
WINDOWS = {"": WINDOW, "-adaptive": [], "-large": LARGE_WINDOW}


def pooling_scenarios() -> dict[str, Scenario]:
    """Taps and indices, and in tiles what is left at the end, are narrower than 16 bytes.

    The loop over a tile, whose indices are stored one by one, is there twice: for one plane alone.
    """
    found = {}
    for kind, (layout, (last, shape, wide)) in itertools.product(KINDS, LAYOUTS.items()):
        for suffix, window in WINDOWS.items():
            if suffix == "-large" and (not kind.startswith("max-") or not wide):
                continue
            # A type's size is what counts: two of them; and all chips where 16 bytes are moved.
            for dtype in DTYPES[::2] if not suffix else DTYPES[:1]:
                name = str(dtype).removeprefix("torch.")
                found[f"pool-{kind}{suffix}-{layout}-{name}"] = Scenario(
                    _pooled(kind, shape, window, dtype, last),
                    wide_only=wide,
                    narrow_allowed={"max-backward": 8, "max-indices": 6}.get(kind, 4),
                    capabilities=(80, 90, 100) if wide and dtype == DTYPES[0] else (90,),
                )
    return found


def unpooling_scenarios() -> dict[str, Scenario]:
    """What is fetched from the places of the maxima is fetched one by one."""
    found = {}
    for dtype, n_images in itertools.product(DTYPES, (8, 1)):
        wide = n_images == 8  # else the elements are no multiple of 16 bytes
        x, y = meta(n_images, 1, 15, 15, dtype=dtype), meta(n_images, 1, 31, 31, dtype=dtype)
        indices = torch.empty_like(x, dtype=torch.int64)
        name = str(dtype).removeprefix("torch.") + ("" if wide else "-odd")
        forward = partial(launchers["max_unpool_forward"], x, indices, [31, 31])
        backward = partial(launchers["max_unpool_backward"], y, indices)
        found[f"unpool-forward-{name}"] = Scenario(forward, wide_only=wide, narrow_allowed=8)
        found[f"unpool-backward-{name}"] = Scenario(backward, wide_only=wide, narrow_allowed=8)
    return found


def cuda_scenarios() -> dict[str, Scenario]:
    """All of them."""
    return {**dropout_scenarios(), **pooling_scenarios(), **unpooling_scenarios()}
