"""The launches of attention that are compiled."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch

from gpunn.kernels.attention_decode import launch_for as decode_launch_for
from gpunn.kernels.attention_tiles import HOPPER
from gpunn.kernels.launch import launchers
from gpunn.profiling.static_report import meta
from scenario import Scenario

LENGTH, SHORT, HEADS = 4096, 512, 8  # the first long enough for descriptors, on Hopper
HALF = torch.bfloat16
KERNELS = "forward", "key_gradients", "query_gradient"
PARTIAL: list[tuple[torch.dtype, str, int, tuple[str, ...]]] = [
    (HALF, "ieee", 24, ("added", "kept")),
    (HALF, "ieee", 72, ("light", "kept")),
    (HALF, "ieee", 200, ("light", "kept")),
    (torch.float32, "tf32", 40, ("kept",)),
    (torch.float32, "tf32", 72, ("kept",)),
    (torch.float32, "ieee", 40, ("kept",)),
    (torch.float32, "ieee", 72, ("light", "kept")),
]
"""Heads that fill no tile, and what is asked of them."""


def _arguments(kind: str, dtype: torch.dtype, head: int, length: int = LENGTH) -> list[Any]:
    """Query, key, value and all that a call is told: "plain", "causal", or most that it can be.

    "light" is all but a mask and a dropout; "added" and "kept" are all, with a mask of either sort.
    """
    query = meta(2, HEADS, length, head, dtype=dtype)
    mask = slopes = seed = None
    softcap, dropout_p, before, after = 0.0, 0.0, -1, 0 if kind == "causal" else -1
    if kind in ("light", "added", "kept"):
        slopes, softcap = meta(1, HEADS, dtype=torch.float32), 5.0
        before = after = 128
    if kind in ("added", "kept"):
        mask = meta(2, 1, length, length, dtype=dtype if kind == "added" else torch.uint8)
        seed, dropout_p = meta(1, dtype=torch.int64), 0.1
    rules = 0.1, softcap, dropout_p, before, after, False
    return [query, query, query, mask, slopes, None, seed, None, None, length, length, *rules]


def _attention(
    kernel: str,
    kind: str,
    dtype: torch.dtype,
    head: int,
    precision: str = "ieee",
    length: int = LENGTH,
) -> None:
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        arguments = _arguments(kind, dtype, head, length)
        if kernel == "forward":
            launchers["attention_forward"](True, *arguments)
            return
        y = meta(2, HEADS, length, head, dtype=dtype)
        rest = y if dtype == HALF else meta(0, dtype=dtype)
        statistics = (meta(2, HEADS, length, dtype=torch.float32) for _ in range(2))
        wanted = ("query_gradient", "key_gradients", "", "mask_gradient")
        needs = [name == kernel for name in wanted]
        launchers["attention_backward"](y, y, rest, *statistics, needs, *arguments)
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous


def _packed() -> None:
    """Sequences one behind the other, forward and backward."""
    query = meta(1, HEADS, LENGTH, 64)
    starts = meta(9, dtype=torch.int32)
    rules = 0.1, 0.0, 0.0, -1, 0, False
    arguments = query, query, query, None, None, None, None, starts, starts, 512, 512, *rules
    launchers["attention_forward"](True, *arguments)
    statistics = (meta(1, HEADS, LENGTH, dtype=torch.float32) for _ in range(2))
    launchers["attention_backward"](
        query, query, query, *statistics, [True, True, True, False], *arguments
    )


def _weights(dtype: torch.dtype, head: int) -> None:
    arguments = _arguments("added", dtype, head)
    statistics = (meta(2, HEADS, LENGTH, dtype=torch.float32) for _ in range(2))
    launchers["attention_weights"](meta(3, dtype=torch.int64), *statistics, *arguments)


def _decode(dtype: torch.dtype, head: int, paged: bool) -> None:
    query = meta(64, 32, head, dtype=dtype)
    cache = meta(64 * 512 if paged else 64, 8, 16 if paged else 8192, head, dtype=dtype)
    table = meta(64, 512, dtype=torch.int32) if paged else None
    slopes = meta(1, 32, dtype=torch.float32)
    launchers["attention_decode"](
        query, cache, cache, meta(64, dtype=torch.int32), table, slopes, 0.1, 5.0, 1000
    )


def _table_scenarios() -> dict[str, Scenario]:
    """Every entry of the table, with all options that it is meant for, on the chip it is for.

    But for float32 with heads over 128 and a mask or a dropout, which spill.
    """
    found = {}
    for arithmetic, head, kernel in HOPPER:
        dtype = HALF if arithmetic == "16 bits" else torch.float32
        precision = "tf32" if arithmetic == "tf32" else "ieee"
        spills = dtype == torch.float32 and head > 128
        kinds = ("light", "kept") if arithmetic == "16 bits" or head == 128 else ("light",)
        kinds = ("added",) if kernel == "mask_gradient" else kinds
        for kind in kinds:
            if kind == "light" or not spills:
                found[f"attention-{kernel}-{kind}-{arithmetic}-{head}"] = Scenario(
                    partial(_attention, kernel, kind, dtype, head, precision, SHORT),
                    capabilities=(90,),
                )
    return found


def _partial_scenarios() -> dict[str, Scenario]:
    """Heads that fill no tile, which have masks of columns; without options, 16 bytes a load.

    On the other chips those of 16 bits, with the options that take the most registers.
    """
    found = {}
    for dtype, precision, head, kinds in PARTIAL:
        for kind, kernel in itertools.product(kinds, KERNELS):
            everywhere = dtype == HALF and kind == "kept"
            found[f"attention-{kernel}-{kind}-{precision}-{dtype.itemsize}-{head}"] = Scenario(
                partial(_attention, kernel, kind, dtype, head, precision, SHORT),
                capabilities=(80, 90, 100) if everywhere else (90,),
            )
    for head, kernel in itertools.product((72, 200), KERNELS):
        found[f"attention-{kernel}-causal-{head}"] = Scenario(
            partial(_attention, kernel, "causal", HALF, head, length=SHORT),
            tensor_cores=True,
            wide_only=True,
            narrow_allowed=32,  # of statistics, one a row
            without_products=("attention_delta_kernel",),
        )
    return found


def attention_scenarios() -> dict[str, Scenario]:
    """The causal kernels of 64 and 128 on every chip, with tensor cores in use.

    On Hopper they read by descriptors, and there the plain ones are compiled as well.
    """
    found = _table_scenarios() | _partial_scenarios()
    for head in (64, 128):
        for kernel in KERNELS:
            for kind in ("plain", "causal"):
                found[f"attention-{kernel}-{kind}-{head}"] = Scenario(
                    partial(_attention, kernel, kind, HALF, head),
                    tensor_cores=True,
                    without_products=("attention_delta_kernel",),
                    capabilities=(90,) if kind == "plain" else (80, 90, 100),
                )
        found[f"attention-forward-added-{head}"] = Scenario(
            partial(_attention, "forward", "added", HALF, head), capabilities=(80, 100)
        )
    found["attention-packed"] = Scenario(_packed, capabilities=(90,))
    found["attention-weights"] = Scenario(partial(_weights, HALF, 64), capabilities=(90,))
    for dtype, head in ((HALF, 128), (HALF, 256), (torch.float32, 64), (torch.float32, 256)):
        launch = decode_launch_for(head, dtype)
        for paged in (False, True):
            name = f"attention-decode-{launch.block_keys}-{dtype.itemsize}-{head}-{paged}"
            found[name] = Scenario(partial(_decode, dtype, head, paged), capabilities=(90,))
    return found
