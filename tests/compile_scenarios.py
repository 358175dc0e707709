"""Every kernel in every configuration that it can choose, as launches to be compiled.

A scenario calls a launcher on meta tensors while its launches are captured. ``reports_of`` runs in
a process of its own without TRITON_INTERPRET (see test_compiles.py).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import torch

from attention_scenarios import attention_scenarios
from augment_scenarios import augment_scenarios
from batch_norm_scenarios import batch_norm_scenarios
from convolution_scenarios import convolution_scenarios
from cross_entropy_scenarios import cross_entropy_scenarios
from cuda_scenarios import cuda_scenarios
from embedding_scenarios import embedding_scenarios
from gpunn.functional.glu import GATES
from gpunn.kernels import convolve, glu, launch, product
from gpunn.kernels.activation import ACTIVATIONS
from gpunn.kernels.launch import launchers
from gpunn.kernels.linear import BACKWARD_LAUNCHES
from gpunn.kernels.product import Epilogue, MatmulLaunch
from gpunn.profiling.static_report import Report, chip, meta, report
from group_norm_scenarios import group_norm_scenarios
from linear_cross_entropy_scenarios import linear_cross_entropy_scenarios
from nll_loss_scenarios import nll_loss_scenarios
from pointwise_loss_scenarios import pointwise_loss_scenarios
from rotary_embedding_scenarios import rotary_embedding_scenarios
from row_norm_scenarios import row_norm_scenarios
from scenario import Scenario
from softmax_scenarios import softmax_scenarios

SIZE = 4096
HALF = torch.bfloat16


def _epilogue(kind: str, dtype: torch.dtype, activation: str) -> Epilogue:
    """An epilogue: "bare", "saved" (bias, activation, residual) or "all" (and dropout)."""
    y = meta(SIZE, SIZE, dtype=dtype)
    if kind == "bare":
        return Epilogue(y)
    epilogue = Epilogue(
        y,
        bias=meta(SIZE, dtype=dtype),
        residual=torch.empty_like(y),
        saved=torch.empty_like(y),
        activation=activation,
        parameters=list(ACTIVATIONS[activation].defaults),
    )
    if kind == "all":
        epilogue.seed, epilogue.dropout_p = meta(1, dtype=torch.int64), 0.1
    return epilogue


def _operands(layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands with the inner dimension contiguous, the rows contiguous, or unaligned."""
    width = SIZE + 1 if layout == "odd" else SIZE
    a, b = meta(SIZE, width, dtype=dtype), meta(SIZE, width, dtype=dtype)
    return (a.T, b.T) if layout == "rows" else (a[:, :SIZE], b[:, :SIZE])


def _multiply(
    tile: MatmulLaunch, layout: str, kind: str, dtype: torch.dtype, precision: str, activation: str
) -> None:
    a, b = _operands(layout, dtype)
    epilogue = _epilogue(kind if kind != "split" else "bare", dtype, activation)
    if kind == "split":
        tile = replace(tile, split_inner=4)
        epilogue = Epilogue(meta(4, SIZE, SIZE, dtype=torch.float32))
    tf32 = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        product.multiply("product", a, b, epilogue, tile)
    finally:
        torch.backends.cuda.matmul.fp32_precision = tf32


# The activations whose epilogues take the most registers, the ones to try every tile with.
HEAVY = {"saved": ("gelu_tanh",), "all": ("softplus", "mish")}
# Tiles, the operands' layouts, dtype and precision; descriptors are for sm_90 and newer.
FAMILIES = {
    "descriptor": (product.DESCRIPTOR_TILES_16_BIT, ("inner", "rows"), HALF, "ieee"),
    "pointer": (product.POINTER_TILES_16_BIT, ("odd", "rows"), HALF, "ieee"),
    "tf32": (product.TILES_TF32, ("inner", "rows", "odd"), torch.float32, "tf32"),
    "ieee": (product.TILES_IEEE, ("inner", "rows", "odd"), torch.float32, "ieee"),
}


def _chips(family: str, tile: MatmulLaunch, layout: str, kind: str) -> tuple[int, ...]:
    """The chips on which a product of this kind may be launched with this tile."""
    _, _, dtype, precision = FAMILIES[family]
    found = []
    for capability in (80, 90, 100):
        by_descriptor = capability >= 90 and layout != "odd"
        if dtype == HALF and by_descriptor != (family == "descriptor"):
            continue
        problem = product.Product(
            SIZE, SIZE, SIZE, dtype, precision, by_descriptor, kind == "all", chip(capability)
        )
        if tile in product.tiles_for(problem):
            found.append(capability)
    return tuple(found)


def _product_scenarios() -> dict[str, Scenario]:
    found = {}
    for family, (tiles, layouts, dtype, precision) in FAMILIES.items():
        for tile, layout in itertools.product(tiles, layouts):
            # an epilogue comes with linear's forward, whose operands are contiguous or odd
            for kind in ("bare",) if layout == "rows" else ("saved", "all", "split"):
                for activation in HEAVY.get(kind, ("identity",)):
                    chips = _chips(family, tile, layout, kind)
                    if activation in ("gelu_tanh", "softplus"):  # "all" of mish is the heaviest
                        chips = tuple(chip for chip in chips if chip == 90)
                    shape = f"{tile.block_rows}x{tile.block_cols}x{tile.block_inner}"
                    found[f"product-{family}-{shape}-{layout}-{kind}-{activation}"] = Scenario(
                        partial(_multiply, tile, layout, kind, dtype, precision, activation),
                        tensor_cores=precision == "tf32" or dtype == HALF,
                        capabilities=chips,
                    )
    return found


def _odd_columns() -> None:
    """Results that are stored one by one, of operands that are read so as well."""
    y = meta(2 * SIZE, SIZE - 1)
    epilogue = Epilogue(
        y, bias=meta(SIZE - 1), residual=y, saved=torch.empty_like(y), activation="silu"
    )
    product.product("product", meta(2 * SIZE, 333), meta(SIZE - 1, 333), epilogue)


def _finish(n_parts: int, activation: str) -> None:
    partials = meta(n_parts, SIZE, SIZE, dtype=torch.float32)
    product.finish("finish", partials, _epilogue("all", HALF, activation))


def _linear_scenarios() -> dict[str, Scenario]:
    found = {
        f"epilogue-{parts}-{activation}": Scenario(partial(_finish, parts, activation))
        for parts in (1, 2, convolve.MOST_PARTS)
        for activation in HEAVY["all"]
    }
    found["product-odd-columns"] = Scenario(_odd_columns, tensor_cores=True)
    y, seed = meta(SIZE, SIZE), meta(1, dtype=torch.int64)
    backward = launchers["linear_epilogue_backward"]
    for activation in ("relu", *HEAVY["all"]):
        for name, dropout in (("", None), ("-dropout", seed)):
            found[f"epilogue-backward-{activation}{name}"] = Scenario(
                partial(
                    backward, y, y, dropout, activation, [], 0.1 if name else 0.0, HALF, True, True
                )
            )
    for tile in BACKWARD_LAUNCHES:
        narrow = meta(SIZE, tile.block_cols)
        found[f"epilogue-backward-{tile.block_cols}-columns"] = Scenario(
            partial(backward, narrow, narrow, None, "gelu", [], 0.0, HALF, True, True),
            wide_only=True,
            narrow_allowed=1,  # of the sums
        )
    found["epilogue-backward-bias-alone"] = Scenario(
        partial(backward, y, None, None, "identity", [], 0.0, HALF, False, True)
    )
    return found


def _elementwise_scenarios() -> dict[str, Scenario]:
    x, found = meta(SIZE, SIZE), {}
    for name, entry in ACTIVATIONS.items():
        parameters = list(entry.defaults)
        # The formulas differ, the memory accesses do not: all on one chip, a few on the others.
        chips = (80, 90, 100) if name in ("relu", *HEAVY["all"]) else (90,)
        forward = partial(launchers["activation_forward"], x, name, parameters)
        found[f"activation-forward-{name}"] = Scenario(forward, False, True, chips)
        backward = partial(launchers["activation_backward"], x, x, name, parameters)
        found[f"activation-backward-{name}"] = Scenario(backward, False, True, chips)
    for gate in (*GATES.values(), "gelu_tanh"):
        for tile in glu.LAUNCHES if gate == "silu" else glu.LAUNCHES[-1:]:
            x, y = meta(SIZE, 2 * tile.block_cols), meta(SIZE, tile.block_cols)
            name = f"{gate}-{tile.block_rows}x{tile.block_cols}"
            forward = partial(launchers["glu_forward"], x, 1, gate, [])
            found[f"glu-forward-{name}"] = Scenario(forward, wide_only=True)
            backward = partial(launchers["glu_backward"], y, x, 1, gate, [])
            found[f"glu-backward-{name}"] = Scenario(backward, wide_only=True)
    seed = meta(1, dtype=torch.int64)
    found["dropout-factors"] = Scenario(partial(launchers["dropout_factors"], seed, x, 0.1))
    return found


SCENARIOS = {
    **_product_scenarios(),
    **_linear_scenarios(),
    **_elementwise_scenarios(),
    **convolution_scenarios(),
    **attention_scenarios(),
    **batch_norm_scenarios(),
    **row_norm_scenarios(),
    **group_norm_scenarios(),
    **softmax_scenarios(),
    **cross_entropy_scenarios(),
    **embedding_scenarios(),
    **rotary_embedding_scenarios(),
    **linear_cross_entropy_scenarios(),
    **nll_loss_scenarios(),
    **pointwise_loss_scenarios(),
    **cuda_scenarios(),
    **augment_scenarios(),
}


def reports_of(name: str, capability: int, from_ptx: bool = True) -> list[Report]:
    """Capture a scenario's launches for a chip, compile them, and read their code.

    Accesses and products are counted in PTX, whose instructions are the assembler's but for loops
    that it unrolls: a disassembler would take a fifth of the gate's time. How many instructions
    there are is read from the machine code.
    """
    scenario = SCENARIOS[name]
    with launch.captured(chip(capability)) as calls, launch.backend("kernels"):
        scenario.launch()
    from_ptx = from_ptx and scenario.most_instructions is None
    return [report(call, capability, from_ptx) for call in calls]
