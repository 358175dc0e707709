"""The windows that pooling slides over an image: arguments as torch reads them, and sizes.

A 1d op is a 2d one on images of one row, so everything here is about two dimensions, of which the
caller gives the last ``n``. A window is the list [kh, kw, sh, sw, ph, pw, dh, dw] of kernel size,
stride, padding and dilation, or [] where the windows adapt to the output size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

Sizes = int | Sequence[int]
MOST = 2**31 - 1
"""What an integer of the kernels, and of torch's, holds."""


def _is_integer(item: object) -> bool:
    """Whether torch takes it for one: also NumPy's, and an integer tensor of one element."""
    if isinstance(item, torch.Tensor):
        return item.numel() == 1 and not (item.is_floating_point() or item.dtype == torch.bool)
    return hasattr(item, "__index__") and not isinstance(item, bool)


def _is_plain(item: object) -> bool:
    return isinstance(item, (int, torch.SymInt))


def integers(operator: str, name: str, value: Any, allowed: Sequence[int]) -> list[int]:
    """One integer, or a tuple or list of as many as ``allowed`` says, as a list.

    Raises:
        TypeError: something in it is no integer.
        RuntimeError: there are too few of them, or too many.
    """
    if type(value) is int:  # as it mostly is, and so the sooner
        return [value]
    items = value if isinstance(value, (tuple, list)) else (value,)
    if not all(map(_is_integer, items)):
        raise TypeError(f"{name}: {operator} expects integers, got {value!r}")
    if items is value and len(items) not in allowed:
        counts = " or ".join(str(count) for count in allowed)
        raise RuntimeError(f"{name}: {operator} expects one integer or {counts}, got {value}")
    return [item if _is_plain(item) else item.__index__() for item in items]


def pair(operator: str, name: str, value: Any, n: int, row: int, least: int) -> list[int]:
    """Both dimensions' integers, ``row`` being that of the row that a 1d op adds."""
    values = integers(operator, name, value, range(1, n + 1))
    if min(values) < least:
        raise RuntimeError(f"{name}: {operator} expects at least {least}, got {value}")
    if max(values) > MOST:
        raise RuntimeError(f"{name}: {operator} expects at most {MOST}, got {value}")
    if n == 1:
        return [row, values[0]]
    return values * 2 if len(values) == 1 else values


def check_flag(operator: str, name: str, value: object) -> None:
    """Refuse what is no bool.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {operator} expects a bool, got {type(value).__name__}")


def window_of(
    operator: str, n: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any = 1
) -> list[int]:
    """``read_window`` of these arguments, read but once where they can be remembered."""
    if not torch.compiler.is_compiling():  # which would look past the memory, and warn of it
        with suppress(TypeError):  # of a list, which cannot be remembered, or of what is no integer
            return _read_before(operator, n, kernel_size, stride, padding, dilation)
    return read_window(operator, n, kernel_size, stride, padding, dilation)


def read_window(
    operator: str, n: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> list[int]:
    """The window of the arguments; a stride of None or [] is the kernel size.

    Raises:
        TypeError: an argument is neither an integer nor a sequence of integers.
        RuntimeError: an argument has a wrong length or range, or the padding is more than half
            of the kernel size (not dilated, as in torch).
    """
    kernel = pair(operator, "kernel_size", kernel_size, n, 1, 1)
    omitted = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    steps = list(kernel) if omitted else pair(operator, "stride", stride, n, 1, 1)
    pads = pair(operator, "padding", padding, n, 0, 0)
    if any(2 * pad > size for pad, size in zip(pads, kernel, strict=True)):
        raise RuntimeError(
            f"padding: {operator} allows at most half of kernel_size {kernel_size}, got {padding}"
        )
    return kernel + steps + pads + pair(operator, "dilation", dilation, n, 1, 1)


_read_before = functools.lru_cache(maxsize=1024, typed=True)(read_window)


def pooled_size(
    operator: str, input_size: Sequence[int], window: Sequence[int], ceil_mode: bool
) -> list[int]:
    """How many windows fit into an image (…, H, W), below each other and beside each other.

    floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1; with ``ceil_mode`` rounded
    up, less the last window if it would start right of the input. Source: the documentation of
    ``torch.nn.MaxPool2d``.

    Raises:
        TypeError: ``ceil_mode`` is no bool.
        RuntimeError: no window fits.
    """
    check_flag(operator, "ceil_mode", ceil_mode)
    output_size = []
    for axis, size in enumerate(input_size[-2:]):
        kernel, stride, padding, dilation = window[axis::2]
        extra = stride - 1 if ceil_mode else 0
        count = (size + 2 * padding - dilation * (kernel - 1) - 1 + extra) // stride + 1
        if ceil_mode and (count - 1) * stride >= size + padding:
            count -= 1
        if count < 1:
            raise RuntimeError(
                f"input: too small for {operator}, whose output would have size {count}: size "
                f"{size}, kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation}"
            )
        output_size.append(count)
    return output_size


def adaptive_size(operator: str, n: int, output_size: Any, input_size: Sequence[int]) -> list[int]:
    """The output size of adaptive pooling; in a pair, None is the size of the input.

    Raises:
        TypeError: an element is no integer (nor, in a pair, None).
        RuntimeError: its length is wrong, or an element negative.
    """
    given = output_size
    if n == 2 and isinstance(given, (tuple, list)) and len(given) == 2:
        pairs = zip(given, input_size[-2:], strict=True)
        given = [size if item is None else item for item, size in pairs]
    sizes = integers(operator, "output_size", given, (n,))
    if min(sizes) < 0:
        raise RuntimeError(f"output_size: {operator} expects no negative size, got {output_size}")
    if n == 1:
        return [1, *sizes]
    return sizes * 2 if len(sizes) == 1 else sizes


def unpooled_size(
    operator: str,
    n: int,
    input_size: Sequence[int],
    arguments: dict[str, Any],
    output_size: Sequence[int] | None,
) -> list[int]:
    """The output size of unpooling: as given, or (size - 1) stride + kernel - 2 padding.

    ``arguments``: kernel_size, stride and padding, by name.

    Raises:
        TypeError: an argument is neither an integer nor a sequence of integers.
        RuntimeError: kernel_size, stride or padding has a wrong length.
        ValueError: ``output_size`` has a wrong length or differs from the default by a stride or
            more, or the default is negative.
    """
    lists = [integers(operator, name, value, (n,)) for name, value in arguments.items()]
    kernel, stride, padding = [values * n if len(values) < n else values for values in lists]
    default = [
        (size - 1) * step + k - 2 * pad
        for size, step, k, pad in zip(input_size[-n:], stride, kernel, padding, strict=True)
    ]
    if output_size is None:
        sizes = default
    elif not isinstance(output_size, (tuple, list)):
        raise TypeError(f"output_size: {operator} expects a sequence, got {output_size!r}")
    elif len(output_size) not in (n, n + 2):
        raise ValueError(f"output_size: {operator} expects {n} or {n + 2} sizes, got {output_size}")
    else:
        sizes = integers(operator, "output_size", output_size[-n:], (n,))
        for size, middle, step in zip(sizes, default, stride, strict=True):
            if not middle - step < size < middle + step:
                raise ValueError(
                    f"output_size: {operator} expects sizes between {middle - step} and "
                    f"{middle + step} (neither included) in place of {size}, got {output_size}"
                )
    if min(sizes) < 0:
        raise ValueError(f"output_size: {operator} expects no negative size, got {sizes}")
    return sizes if n == 2 else [1, *sizes]


def as_images(operator: str, n: int, input: torch.Tensor, first_filled: int) -> torch.Tensor:
    """The input as (N, C, H, W), one row high if the op is 1d, one image if it has no batch.

    Dimensions before ``first_filled`` may be empty.

    Raises:
        RuntimeError: the input has too few dimensions or too many, or an empty one.
    """
    shape, dims = tuple(input.shape), input.dim()
    if dims not in (n + 1, n + 2):
        raise RuntimeError(
            f"input: {operator} expects {n + 1} or {n + 2} dimensions, got {dims}: {shape}"
        )
    if 0 in shape[first_filled:]:
        raise RuntimeError(f"input: {operator} expects no dimension of size 0, got {shape}")
    rows = input if n == 2 else input.unsqueeze(-2)
    return rows if dims == n + 2 else rows.unsqueeze(0)


def as_given(result: torch.Tensor, n: int, dims: int) -> torch.Tensor:
    """A result (N, C, OH, OW) with the dimensions that the input had."""
    images = result if n == 2 else result.squeeze(-2)
    return images if dims == n + 2 else images.squeeze(0)
