"""Launching a Triton kernel again without the search for its compiled variant.

``kernel[grid](…)`` asks of every argument what Triton specialises on, writes all of that and the
options as text, and looks for the variant under it; then two hooks, usually empty, are called from
C, and of each tensor the driver is asked where it lies. All that is most of the host's time for a
launch. Here a variant is remembered by the same properties of the arguments, compared as they are,
and gets the addresses of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# What a variant depends on and how it is launched was read from this version's source.
KNOWN = triton.__version__.startswith("3.6.")
_variants: dict[tuple[Any, ...], tuple[Any, tuple[None, ...]]] = {}


@lru_cache(maxsize=4096)
def kind_of(number: int) -> tuple[bool, ...]:
    """All that Triton's compiler sees of an integer: is it 1, divisible by 16, and how wide."""
    return number == 1, number % 16 == 0, -(2**31) <= number < 2**31, number < 2**63


def examined(arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any]] | None:
    """What Triton specialises on, and the arguments with addresses for tensors.

    None where an argument is of a type that it does otherwise with.
    """
    kinds: list[Any] = []
    values: list[Any] = []
    for value in arguments:
        kind = type(value)
        if value is None or kind is float:
            kinds.append(kind)
        elif kind is int:
            kinds.append(kind_of(value))
        elif isinstance(value, torch.Tensor):
            kinds.append(value.dtype)
            value = value.data_ptr()
            kinds.append(value % 16 == 0)
        elif kind is TensorDescriptor:
            kinds.append((value.base.dtype, *value.block_shape))
        else:
            return None
        values.append(value)
    return kinds, values


def has_hooks(kernel: JITFunction[Any]) -> bool:
    """Whether somebody, a profiler for one, wants to be told of launches."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    told = getattr(before, "calls", before) or getattr(after, "calls", after)
    return bool(told or kernel.pre_run_hooks)


def launch_compiled(
    kernel: Any,
    grid: tuple[int, ...],
    device: int,
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    launch: Any,
) -> None:
    """``kernel[grid](*arguments, **constants, **launch.arguments())`` on ``device``, the current.

    ``constants`` and those of ``launch`` are the kernel's constexprs and Triton's options, and
    ``arguments`` the rest, by position.
    """
    found = None
    if KNOWN and isinstance(kernel, JITFunction) and not has_hooks(kernel):
        found = examined(arguments)
    if found is None:
        kernel[grid](*arguments, **constants, **launch.arguments())
        return
    kinds, values = found
    key = (
        kernel.fn, launch, device, knobs.runtime.debug, knobs.compilation.instrumentation_mode,
        *constants, *constants.values(), *map(type, constants.values()), *kinds,
    )  # fmt: skip
    variant = _variants.get(key)
    if variant is None:
        compiled = kernel[grid](*arguments, **constants, **launch.arguments())
        # None where a hook of Triton's kept it from being compiled
        if compiled is not None and len(arguments) + len(kernel.constexprs) == len(kernel.params):
            _variants[key] = compiled, (None,) * len(kernel.constexprs)
        return
    compiled, placeholders = variant
    width, height, depth = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(
        width, height, depth, stream, compiled.function, compiled.packed_metadata,
        None, None, None, *values, *placeholders,
    )  # fmt: skip
