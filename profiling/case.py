"""What is benchmarked: the sizes, ours, PyTorch's, and the least that must be done.

A ``Case`` counts the fewest bytes that must move (each input read once, each output written once)
and the floating-point operations of the products in it, two a multiply-add; elementwise arithmetic
is not counted. From both follows the time below which no version can run. ``Case.small()`` is the
same comparison at a size that an interpreter can run, so that tests hold that ours and theirs
compute the same thing: a benchmark of two different computations would be a lie.

To add an op: a file like ``linear_cases.py`` with a function that makes its cases, and one entry of
``CASES`` in ``cases.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from gpunn.kernels.launch import Call, Device, backend, captured

ACROSS_THE_KINK = 5e-2
"""Tolerance of gradients through a relu before which PyTorch rounds to 16 bits and we do not.

Elements near 0 come to lie on its other side: 2 to 3 % of the norm, as measured on an H200.
"""
Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor]
Mode = Literal["forward", "backward", "step"]


@dataclass(frozen=True)
class Case:
    """One comparison of gpunn with PyTorch, on the same inputs."""

    op: str
    name: str
    shapes: str
    make: Callable[[torch.device, torch.dtype, int], Tensors]
    """(device, dtype, seed) to random inputs, or, on the meta device, to their shapes.

    The last is dy, if gradients are wanted; the last ones, of several results.
    """
    ours: Function
    theirs: Function
    """PyTorch's way in eager mode; torch.compile is given the same function."""
    bytes: int
    flops: int
    small: Callable[[], Case]
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    mode: Mode = "forward"
    """What is timed: forward without gradients, backward alone, or a step of both."""
    wanted: tuple[int, ...] = ()
    """The inputs whose gradients are wanted."""
    n_results: int = 1
    """Where a function does not give one tensor, the length of its tuple."""
    reads_all: bool = True
    """Whether a forward pass reads its inputs whole, and not what indices among them name."""
    library: Callable[..., torch.Tensor] | None = None
    """A bare product as torch.mm (cuBLAS), from all inputs, where the case is one."""
    rivals: Mapping[str, Function] = field(default_factory=dict)
    """Further ways of PyTorch's, by their name in the table; each of the same inputs."""
    launch_bound: bool = False
    """Whether it is so short that it is also timed in a CUDA graph, without launch overhead."""
    dropped: Function | None = None
    """With random dropout: what a dropped element is, from the inputs."""
    tolerance: float | None = None
    """What results may differ by, where it is not what follows from the precision."""

    @property
    def precision(self) -> str:
        """The arithmetic that limits the products: a dtype's name, or "tf32"."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Torch's settings for float32 products as the case wants them, for the block."""
        convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        previous = torch.get_float32_matmul_precision(), convolution.fp32_precision
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        convolution.fp32_precision = "tf32" if self.tf32 else "ieee"
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(previous[0])
            convolution.fp32_precision = previous[1]

    def prepared(self, function: Function, inputs: Tensors) -> Callable[[], Tensors]:
        """The call to be timed; a backward alone has its forward done here, and its graph kept."""
        if self.mode == "forward":
            return lambda: (function(*inputs),) if self.n_results == 1 else tuple(function(*inputs))
        given, dy = inputs[: -self.n_results], inputs[-self.n_results :]
        leaves = [
            t.detach().requires_grad_(i in self.wanted) if t.is_floating_point() else t
            for i, t in enumerate(given)
        ]
        wanted = [leaves[i] for i in self.wanted]
        if self.mode == "step":
            return lambda: torch.autograd.grad(function(*leaves), wanted, dy)
        y = function(*leaves)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    def launches(self, device: Device) -> list[Call]:
        """The launches that our kernels make for this case on ``device``; nothing is run."""
        inputs = self.make(torch.device("meta"), self.dtype, 0)
        with self.settings(), backend("kernels"), captured(device) as calls:
            call = self.prepared(self.ours, inputs)
            calls.clear()  # a backward alone has had its forward done
            call()
        return calls


def difference(case: Case, inputs: Tensors, got: Tensors, expected: Tensors) -> float:
    """The largest ‖got - expected‖ / ‖expected‖ among the results; NaN if either holds a NaN.

    With random dropout, among the elements that neither has dropped.
    """
    errors = []
    for ours, theirs in zip(got, expected, strict=True):
        a, b = ours.float(), theirs.float()
        if case.dropped is not None:
            dropped = case.dropped(*inputs)
            kept = (ours != dropped) & (theirs != dropped)
            a, b = a[kept], b[kept]
        errors.append(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
    return float(torch.stack(errors).max())  # max propagates NaN


def tolerated_difference(case: Case) -> float:
    """Twice the rounding of operands or results, and more for what torch rounds on the way."""
    if case.tolerance is not None:
        return case.tolerance
    return {"bfloat16": 2e-2, "float16": 2e-3, "tf32": 5e-3, "float32": 1e-4}[case.precision]


def normal(*shapes: Sequence[int], scales: Sequence[float] = ()) -> Callable[..., Tensors]:
    """A ``Case.make`` that draws tensors of these shapes from normal distributions."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        is_meta = device.type == "meta"
        generator = None if is_meta else torch.Generator(device).manual_seed(seed)
        factors = (*scales, *[1.0] * (len(shapes) - len(scales)))
        return tuple(
            torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(factor)
            for shape, factor in zip(shapes, factors, strict=True)
        )

    return make


def reduced(size: int) -> int:
    """A small size of the same alignment: what is divisible by 16 stays so."""
    return size if size <= 32 else 32 + size % 16
