"""The checks of pooling: every function in the geometries that its kernels tell apart."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, compare, drawn, on_cpu
from gpunn.reference import pooling

# The function, the shape of the input, the other arguments.
Case = tuple[str, tuple[int, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "max, windows side by side": ("max_pool2d", (2, 3, 8, 6), {"kernel_size": 2}),
    "max, windows overlap": (
        "max_pool2d",
        (2, 8, 9, 11),
        {"kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "max, dilated, ceil": (
        "max_pool2d",
        (2, 3, 8, 10),
        {
            "kernel_size": (2, 3),
            "stride": (1, 2),
            "padding": (1, 0),
            "dilation": (3, 2),
            "ceil_mode": True,
        },
    ),
    "max, gaps between windows": ("max_pool2d", (3, 7, 9), {"kernel_size": 1, "stride": (3, 2)}),
    "max, 1d": ("max_pool1d", (2, 3, 17), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "max, more than 256 taps": ("max_pool2d", (2, 2, 19, 18), {"kernel_size": 17, "stride": 1}),
    "max, adaptive": ("adaptive_max_pool2d", (2, 3, 9, 11), {"output_size": (4, 5)}),
    "max, adaptive, to more": ("adaptive_max_pool2d", (2, 3, 4, 5), {"output_size": (7, None)}),
    "max, adaptive, 1d": ("adaptive_max_pool1d", (3, 10), {"output_size": 4}),
    "avg, windows side by side": ("avg_pool2d", (2, 3, 8, 6), {"kernel_size": 2}),
    "avg, windows overlap, ceil": (
        "avg_pool2d",
        (2, 8, 9, 10),
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    ),
    "avg, padding not counted": (
        "avg_pool2d",
        (2, 3, 7, 9),
        {"kernel_size": (3, 2), "stride": 2, "padding": 1, "count_include_pad": False},
    ),
    "avg, divisor": ("avg_pool2d", (3, 8, 7), {"kernel_size": 3, "divisor_override": 2}),
    "avg, 1d": ("avg_pool1d", (2, 3, 17), {"kernel_size": 4, "stride": 3, "padding": 2}),
    "avg, adaptive": ("adaptive_avg_pool2d", (2, 3, 9, 11), {"output_size": (4, 5)}),
    "avg, adaptive, to more": ("adaptive_avg_pool2d", (2, 3, 4, 5), {"output_size": (7, None)}),
    "avg, adaptive, to one": ("adaptive_avg_pool2d", (2, 8, 7, 7), {"output_size": 1}),
    "avg, adaptive, 1d": ("adaptive_avg_pool1d", (3, 10), {"output_size": 4}),
}
Axis = tuple[pooling.Windows, list[int]]
"""Of one dimension the windows, and what an average counts of each."""


def _axes(name: str, arguments: dict[str, Any], sizes: Sequence[int]) -> list[Axis]:
    def each(argument: str, default: Any = None) -> list[Any]:
        value = arguments.get(argument, default)
        return list(value) if isinstance(value, (tuple, list)) else [value] * len(sizes)

    if name.startswith("adaptive"):
        wanted = zip(sizes, each("output_size"), strict=True)
        found = [pooling.adaptive_windows(size, size if n is None else n) for size, n in wanted]
        return [(windows, [len(window) for window in windows]) for windows in found]
    kernel, axes = each("kernel_size"), []
    stride, padding = each("stride", kernel), each("padding", 0)
    for axis in zip(sizes, kernel, stride, padding, each("dilation", 1), strict=True):
        windows = pooling.windows(*axis, arguments.get("ceil_mode", False))
        counts = [len(window) for window in windows]
        if arguments.get("count_include_pad", True):
            counts = pooling.lengths(*axis[:4], arguments.get("ceil_mode", False))
        axes.append((windows, counts))
    return axes


def exact(
    name: str, arguments: dict[str, Any], x: Array, dy: Array
) -> tuple[Array, Array, pooling.Indices | None]:
    """The value of a function, its gradient and, of a maximum, the indices, in torch's shapes."""
    n = int(name[-2])
    row: Axis = ([[0]], [1])  # that a 1d op has
    axes = [*[row] * (2 - n), *_axes(name, arguments, x.shape[-n:])]
    (rows, heights), (columns, widths) = axes
    images = x.reshape(-1 if x.ndim == n + 2 else 1, x.shape[-n - 1], *[1] * (2 - n), *x.shape[-n:])
    upstream = dy.reshape(*images.shape[:2], len(rows), len(columns))
    if "max" in name:
        y, indices = pooling.max_pool_forward(images, rows, columns)
        dx = pooling.max_pool_backward(upstream, indices, images.shape)
        return y.reshape(dy.shape), dx.reshape(x.shape), indices.reshape(dy.shape)
    divisors = arguments.get("divisor_override") or np.outer(heights, widths)
    y = pooling.avg_pool_forward(images, rows, columns, divisors)
    dx = pooling.avg_pool_backward(upstream, rows, columns, images.shape, divisors)
    return y.reshape(dy.shape), dx.reshape(x.shape), None


def check_pooling(
    case: str, channels_last: bool, dtype: torch.dtype, device: str
) -> list[Comparison]:
    """One function, on contiguous images or channels_last ones."""
    name, shape, arguments = CASES[case]
    x = drawn(shape, dtype, device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x

    def truth(dy: Array, x: Array) -> dict[str, Array]:
        y, dx, _ = exact(name, arguments, x, dy)
        return {"y": y, "dx": dx}

    ours, theirs = (
        functools.partial(getattr(functions, name), **arguments) for functions in (GF, F)
    )
    return compare(ours, on_cpu(theirs), truth, [x])


def check_unpooling(n: int, dtype: torch.dtype, device: str) -> list[Comparison]:
    """In ``n`` dimensions, of windows side by side: nothing goes to one place twice."""
    size, window = ((8, 6), (2, 2)) if n == 2 else ((1, 48), (1, 2))
    x, indices = F.max_pool2d(drawn((2, 3, *size), dtype, device), window, return_indices=True)

    def ours(x: torch.Tensor) -> torch.Tensor:
        if n == 2:
            return GF.max_unpool2d(x, indices, 2)
        return GF.max_unpool1d(x.squeeze(2), indices.squeeze(2), 2).unsqueeze(2)

    def theirs(x: torch.Tensor) -> torch.Tensor:  # torch's own may be forbidden, or not be exact
        y = x.new_zeros(2, 3, 48).scatter(2, indices.flatten(2), x.flatten(2))
        return y.view(2, 3, *size)

    def truth(dy: Array, x: Array) -> dict[str, Array]:
        places = indices.cpu().numpy()
        y = pooling.max_unpool_forward(x, places, size)
        return {"y": y, "dx": pooling.max_unpool_backward(dy, places)}

    return compare(ours, on_cpu(theirs), truth, [x])


CHECKS = [
    *(
        Check("pooling", f"{CASES[case][0]}: {case}", functools.partial(check_pooling, case, False))
        for case in CASES
    ),
    *(
        Check(
            "pooling",
            f"{CASES[case][0]}: {case}, channels_last",
            functools.partial(check_pooling, case, True),
            (f"{case[:3]}_pool_forward_kernel", f"{case[:3]}_pool_backward{variant}_kernel"),
        )
        for case, variant in (
            ("max, windows overlap", "_patch"),
            ("avg, windows overlap, ceil", ""),
        )
    ),
    Check("pooling", "max_unpool1d", functools.partial(check_unpooling, 1)),
    Check("pooling", "max_unpool2d", functools.partial(check_unpooling, 2)),
]
