"""Launching ``matmul.py``: the epilogue's arguments, the choice of tiles, split products.

``product(a, b, epilogue)`` is what the launchers of linear (and of 1 x 1 convolutions) call.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from gpunn.kernels.activation import ACTIVATIONS, device_functions
from gpunn.kernels.launch import (
    Device,
    Launch,
    cdiv,
    chosen_backend,
    device_of,
    record_fallback,
    run,
)
from gpunn.kernels.matmul import epilogue_kernel, matmul_kernel
from gpunn.kernels.philox import dropout_arguments


@dataclass(frozen=True)
class MatmulLaunch(Launch):
    """Tile sizes of a product; ``split_inner`` parts of the inner dimension go to own programs."""

    num_stages: int = 3
    block_rows: int = 128
    block_cols: int = 128
    block_inner: int = 64
    group_rows: int = 8
    split_inner: int = 1


@dataclass(frozen=True)
class EpilogueLaunch(Launch):
    """Tile sizes of a pass over an (n_rows, n_cols) matrix: 16 bytes a thread in 16-bit types."""

    block_rows: int = 8
    block_cols: int = 128


EPILOGUE_LAUNCH = EpilogueLaunch()  # 8 elements a thread, in rows of 256 bytes; not measured


@dataclass
class Epilogue:
    """What follows a product, y = dropout(f(product + bias)) + residual, and where it goes."""

    y: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    saved: torch.Tensor | None = None
    activation: str = "identity"
    parameters: list[float] = field(default_factory=list)
    dropout_p: float = 0.0

    @property
    def is_bare(self) -> bool:
        """Whether y is the product itself."""
        extras = (self.bias, self.residual, self.seed, self.saved)
        return self.activation == "identity" and all(extra is None for extra in extras)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The pointer arguments of the kernels."""
        bias = None if self.bias is None else self.bias.contiguous()
        return bias, self.residual, self.seed, self.y, self.saved

    def scalars(self) -> tuple[int | float, ...]:
        """The residual's strides, and the dropout's threshold and scale."""
        strides = (0, 0) if self.residual is None else self.residual.stride()
        return *strides, *dropout_arguments(self.dropout_p or 1.0)

    def constants(self) -> dict[str, Any]:
        """The constexpr arguments of the kernels."""
        return {
            "SAVES_OUTPUT": ACTIVATIONS[self.activation].from_output(self.parameters),
            "QUADS": self.y.shape[-1] % 4 == 0,
            **device_functions(self.activation, self.parameters),
        }


def precision_of(dtype: torch.dtype) -> str:
    """How ``tl.dot`` treats float32: as torch's matmul settings say."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


# The tiles that a product may use, largest first; the first that gives every multiprocessor a tile
# is taken. Each compiles for sm_80, sm_90 and sm_100 without spills and with WGMMA not serialised
# (tests/test_compiles.py). They are ordered by arithmetic intensity, not by a measurement.
DESCRIPTOR_TILES_16_BIT = (
    MatmulLaunch(8, 4, block_rows=128, block_cols=256, block_inner=64),
    MatmulLaunch(8, 4, block_rows=128, block_cols=128, block_inner=64),
    MatmulLaunch(4, 4, block_rows=64, block_cols=128, block_inner=64),
    MatmulLaunch(8, 4, block_rows=64, block_cols=64, block_inner=64),
)
POINTER_TILES_16_BIT = (
    MatmulLaunch(8, 3, block_rows=128, block_cols=128, block_inner=64),
    MatmulLaunch(4, 4, block_rows=64, block_cols=128, block_inner=32),
    MatmulLaunch(8, 4, block_rows=64, block_cols=64, block_inner=32),
)
TILES_TF32 = (
    MatmulLaunch(8, 3, block_rows=128, block_cols=128, block_inner=32),
    MatmulLaunch(8, 3, block_rows=128, block_cols=64, block_inner=32),
    MatmulLaunch(4, 4, block_rows=64, block_cols=64, block_inner=16),
)
# Without tensor cores the operands stand in registers, so the tiles are small.
TILES_IEEE = (
    MatmulLaunch(8, 3, block_rows=32, block_cols=64, block_inner=16),
    MatmulLaunch(4, 3, block_rows=32, block_cols=32, block_inner=16),
)
MOST_PARTS = 16
LEAST_STEPS_A_PART = 4


@dataclass(frozen=True)
class Product:
    """What the choice of tiles depends on."""

    n_rows: int
    n_cols: int
    n_inner: int
    dtype: torch.dtype
    precision: str
    by_descriptor: bool
    has_dropout: bool
    device: Device


def tiles_for(problem: Product) -> tuple[MatmulLaunch, ...]:
    """The tile sizes among which a product is launched.

    The random bits of a dropout take registers: with them the widest tile spills, on Blackwell the
    three widest. There the widest tile of TF32 spills with some activations too. By pointer
    both wider ones do where results are stored one by one.
    """
    on_blackwell = problem.device.capability >= 100
    if problem.dtype.itemsize > 2:
        tiles = TILES_TF32 if problem.precision == "tf32" else TILES_IEEE
        return tiles[1:] if on_blackwell and tiles is TILES_TF32 else tiles
    if not problem.by_descriptor:
        return POINTER_TILES_16_BIT[2 if problem.n_cols % 16 else 0 :]
    skipped = 0 if not problem.has_dropout else 3 if on_blackwell else 1
    return DESCRIPTOR_TILES_16_BIT[skipped:]


def fits(launch: MatmulLaunch, problem: Product) -> bool:
    """Whether the operands of all stages fit in shared memory, with a little beside them."""
    operands = (launch.block_rows + launch.block_cols) * launch.block_inner
    needed = launch.num_stages * operands * problem.dtype.itemsize + 2048
    return needed <= problem.device.shared_memory


@lru_cache(maxsize=4096)
def choose_launch(problem: Product) -> MatmulLaunch:
    """The largest tiles that fill the chip; else the smallest, split along the inner dimension."""

    def n_tiles(launch: MatmulLaunch) -> int:
        down = cdiv(problem.n_rows, launch.block_rows)
        return down * cdiv(problem.n_cols, launch.block_cols)

    fitting = [t for t in tiles_for(problem) if fits(t, problem)]
    tiles = fitting or tiles_for(problem)[-1:]
    for launch in tiles:
        if n_tiles(launch) >= problem.device.n_multiprocessors:
            return launch
    smallest = tiles[-1]
    steps = cdiv(problem.n_inner, smallest.block_inner)
    idle = problem.device.n_multiprocessors // n_tiles(smallest)
    parts = max(1, min(idle, steps // LEAST_STEPS_A_PART, MOST_PARTS))
    # a power of two, since each number of parts is a kernel of its own to compile
    return replace(smallest, split_inner=1 << (parts.bit_length() - 1))


def layout_of(matrix: torch.Tensor, device: Device) -> str:
    """How ``matmul_kernel`` reads a matrix: by descriptor (see ``operand_tile``) or by pointer."""
    if device.capability < 90 or matrix.numel() == 0 or matrix.data_ptr() % 16:
        return "pointer"
    (n_rows, n_inner), (row, inner) = matrix.shape, matrix.stride()
    for name, unit, length, pitch in (("inner", inner, n_inner, row), ("rows", row, n_rows, inner)):
        if unit == 1 and pitch >= length and pitch * matrix.element_size() % 16 == 0:
            return name
    return "pointer"


def operand(matrix: torch.Tensor, layout: str, block_rows: int, block_inner: int) -> Any:
    """A matrix as ``operand_tile`` wants it: itself, or a descriptor of it or its transpose."""
    if layout == "inner":
        return TensorDescriptor.from_tensor(matrix, [block_rows, block_inner])
    if layout == "rows":
        return TensorDescriptor.from_tensor(matrix.T, [block_inner, block_rows])
    return matrix


def product(name: str, a: torch.Tensor, b: torch.Tensor, epilogue: Epilogue) -> None:
    """y = dropout(f(a bᵀ + bias)) + residual for a (n_rows, n_inner) and b (n_cols, n_inner)."""
    (n_rows, n_inner), n_cols = a.shape, b.shape[0]
    if n_rows == 0 or n_cols == 0:
        return
    precision, device = precision_of(a.dtype), device_of(a)
    reason = library_is_faster(n_inner, a.dtype, precision, epilogue)
    if reason is not None and chosen_backend() == "auto":
        record_fallback(f"{name}: the product", reason)
        if epilogue.is_bare:
            torch.mm(a, b.T, out=epilogue.y)
        else:
            finish(name, torch.mm(a, b.T)[None], epilogue)
        return
    layouts = layout_of(a, device), layout_of(b, device)
    by_descriptor, has_dropout = "pointer" not in layouts, epilogue.seed is not None
    launch = choose_launch(
        Product(n_rows, n_cols, n_inner, a.dtype, precision, by_descriptor, has_dropout, device)
    )
    if launch.split_inner == 1:
        multiply(name, a, b, epilogue, launch, layouts)
        return
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    partials = a.new_empty((launch.split_inner, n_rows, n_cols), dtype=wide)
    multiply(name, a, b, Epilogue(partials), launch, layouts)
    finish(name, partials, epilogue)


def library_is_faster(
    n_inner: int, dtype: torch.dtype, precision: str, epilogue: Epilogue, most_inner: int = 3300
) -> str | None:
    """Why PyTorch's product (cuBLAS) and a kernel for the epilogue should be faster; else None.

    Absorbing a pass over the output saves four bytes an element, and costs what our product is
    slower than cuBLAS's. With 8192 rows and 4096 columns on an H200, bias and relu took 133 us in
    one kernel and 138 by cuBLAS and the epilogue with an inner dimension of 1024, 233 and 236 with
    2048, 412 either way with 4096.
    """
    if epilogue.is_bare:
        return "a bare product: PyTorch's"
    if precision == "ieee" and dtype == torch.float32:
        return "float32 without TF32: PyTorch's, then the fused epilogue"
    if n_inner > most_inner:
        return f"inner dimension {n_inner} > {most_inner}: PyTorch's, then the fused epilogue"
    return None


def multiply(
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    epilogue: Epilogue,
    launch: MatmulLaunch,
    layouts: tuple[str, str] | None = None,
) -> None:
    """Launch ``matmul_kernel``; ``layouts`` are those of a and b, where they are known."""
    (n_rows, n_inner), n_cols, device = a.shape, b.shape[0], device_of(a)
    n_tiles = cdiv(n_rows, launch.block_rows) * cdiv(n_cols, launch.block_cols)
    n_programs = min(n_tiles * launch.split_inner, device.n_multiprocessors)
    a_layout, b_layout = layouts or (layout_of(a, device), layout_of(b, device))
    run(
        name,
        matmul_kernel,
        (n_programs,),
        operand(a, a_layout, launch.block_rows, launch.block_inner),
        operand(b, b_layout, launch.block_cols, launch.block_inner),
        *epilogue.tensors(),
        n_rows,
        n_cols,
        n_inner,
        *a.stride(),
        *b.stride(),
        *epilogue.scalars(),
        launch=launch,
        A_LAYOUT=a_layout,
        B_LAYOUT=b_layout,
        PRECISION=precision_of(a.dtype),
        **epilogue.constants(),
    )


def finish(name: str, partials: torch.Tensor, epilogue: Epilogue) -> None:
    """Launch ``epilogue_kernel`` on partial products (n_parts, n_rows, n_cols)."""
    n_parts, n_rows, n_cols = partials.shape
    launch = EPILOGUE_LAUNCH
    n_programs = cdiv(n_rows, launch.block_rows) * cdiv(n_cols, launch.block_cols)
    run(
        name,
        epilogue_kernel,
        (n_programs,),
        partials,
        *epilogue.tensors(),
        n_rows,
        n_cols,
        *epilogue.scalars(),
        launch=launch,
        N_PARTS=n_parts,
        **epilogue.constants(),
    )
