"""What is benchmarked: for every op, the sizes, ours, PyTorch's, and the least that must be done.

A ``Case`` counts the fewest bytes that must move (each input read once, each output written once)
and the floating-point operations of the products in it, two a multiply-add; elementwise arithmetic
is not counted. From both follows the time below which no version can run. ``Case.small()`` is the
same comparison at a size that an interpreter can run, so that tests hold that ours and theirs
compute the same thing: a benchmark of two different computations would be a lie.

To add an op: a function or a class that makes its cases, and one entry of ``CASES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.functional.activation import TORCH, resolve_activation
from gpunn.kernels.launch import Call, Device, backend, captured, launchers
from gpunn.kernels.linear import saves
from gpunn.profiling.static_report import meta

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
    """(device, dtype, seed) to random inputs; the last is dy, if gradients are wanted."""
    ours: Function
    theirs: Function
    """PyTorch's way in eager mode; torch.compile is given the same function."""
    bytes: int
    flops: int
    launch: Callable[[], object]
    """Calls the launchers on meta tensors, for the static report."""
    small: Callable[[], Case]
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    mode: Mode = "forward"
    """What is timed: forward without gradients, backward alone, or a step of both."""
    wanted: tuple[int, ...] = ()
    """The inputs whose gradients are wanted."""
    library: Callable[..., torch.Tensor] | None = None
    """A bare product as torch.mm (cuBLAS), from all inputs, where the case is one."""
    launch_bound: bool = False
    """Whether it is so short that it is also timed in a CUDA graph, without launch overhead."""
    dropped: Function | None = None
    """With random dropout: what a dropped element is, from the inputs."""

    @property
    def precision(self) -> str:
        """The arithmetic that limits the products: a dtype's name, or "tf32"."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Torch's setting for float32 products as the case wants it, for the block."""
        previous = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(previous)

    def prepared(self, function: Function, inputs: Tensors) -> Callable[[], Tensors]:
        """The call to be timed; a backward alone has its forward done here, and its graph kept."""
        if self.mode == "forward":
            return lambda: (function(*inputs),)
        *given, dy = inputs
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
        with self.settings(), backend("kernels"), captured(device) as calls:
            self.launch()
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
    return {"bfloat16": 2e-2, "float16": 2e-3, "tf32": 5e-3, "float32": 1e-4}[case.precision]


def normal(*shapes: Sequence[int], scales: Sequence[float] = ()) -> Callable[..., Tensors]:
    """A ``Case.make`` that draws tensors of these shapes from normal distributions."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        factors = (*scales, *[1.0] * (len(shapes) - len(scales)))
        return tuple(
            torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(factor)
            for shape, factor in zip(shapes, factors, strict=True)
        )

    return make


def reduced(size: int) -> int:
    """A small size of the same alignment: what is divisible by 16 stays so."""
    return size if size <= 32 else 32 + size % 16


DROPOUT_P = 0.1


@dataclass(frozen=True)
class Linear:
    """The cases of linear: y = dropout(f(x Wᵀ + b)) + residual, x (rows, inner), W (cols, inner).

    The inputs are x, W, then b, residual and dy where there are any.
    """

    rows: int
    inner: int
    cols: int
    activation: str | None = None
    bias: bool = True
    dropout: bool = False
    """Dropout, and a residual."""
    mode: Mode = "forward"
    wanted: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    launch_bound: bool = False

    def parts(self, rest: Tensors) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """b and the residual, from the inputs that follow x and W."""
        return rest[0] if self.bias else None, rest[int(self.bias)] if self.dropout else None

    def ours(self, x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        bias, residual = self.parts(rest)
        p = DROPOUT_P if self.dropout else 0.0
        return GF.linear(
            x, weight, bias, activation=self.activation, residual=residual, dropout_p=p
        )

    def theirs(self, x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        bias, residual = self.parts(rest)
        y = F.linear(x, weight, bias)
        if self.activation is not None:
            y = TORCH[self.activation](y)
        return y if residual is None else F.dropout(y, DROPOUT_P) + residual

    def library(self, x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if self.mode == "forward":
            return torch.mm(x, weight.T)
        dy = rest[-1]
        return torch.mm(dy, weight) if self.wanted == (0,) else torch.mm(dy.T, x)

    @property
    def saves(self) -> str:
        """What the forward pass keeps; see ``gpunn.kernels.linear.saves``."""
        return saves(self.activation or "identity", [], DROPOUT_P * self.dropout, self.dropout)

    def work(self) -> tuple[int, int]:
        """Fewest bytes, and flops."""
        x, weight = self.rows * self.inner, self.inner * self.cols
        y, flops = self.rows * self.cols, 2 * self.rows * self.inner * self.cols
        sizes = (x, weight, self.cols)
        forward = x + weight + self.cols * self.bias + y * self.dropout + y
        operands = weight * (0 in self.wanted) + x * (1 in self.wanted)
        saved = y * (self.saves != "nothing")
        backward = y + saved + operands + sum(sizes[i] for i in self.wanted)
        n_products = len(set(self.wanted) & {0, 1})
        elements, n = {
            "forward": (forward, 1),
            "backward": (backward, n_products),
            "step": (forward + y * (self.saves == "saved") + backward, 1 + n_products),
        }[self.mode]
        return elements * self.dtype.itemsize, n * flops

    def launch(self) -> None:
        """Call the launchers as ``gpunn.functional.linear`` does."""
        tensor = partial(meta, dtype=self.dtype)
        x, weight = tensor(self.rows, self.inner), tensor(self.cols, self.inner)
        bias, y = tensor(self.cols) if self.bias else None, tensor(self.rows, self.cols)
        residual, seed = (y, meta(1, dtype=torch.int64)) if self.dropout else (None, None)
        name, parameters = resolve_activation(self.activation)
        p, keep = DROPOUT_P * self.dropout, self.mode == "step"
        if self.mode != "backward":
            launchers["linear_forward"](x, weight, bias, residual, seed, name, parameters, p, keep)
        saved = None if self.saves == "nothing" else y
        changes, needs_dbias = saved is not None or seed is not None, 2 in self.wanted
        if self.wanted and (changes or needs_dbias):
            launchers["linear_epilogue_backward"](
                y, saved, seed, name, parameters, p, self.dtype, changes, needs_dbias
            )
        if 0 in self.wanted:
            launchers["linear_input_gradient"](y, weight)
        if 1 in self.wanted:
            launchers["linear_weight_gradient"](y, x)

    @property
    def name(self) -> str:
        gradients = ", ".join(("dx", "dW", "db")[i] for i in self.wanted)
        parts = ["bias"] * self.bias + [self.activation or ""] * bool(self.activation)
        parts += ["dropout", "residual"] * self.dropout
        suffix = {"forward": "", "backward": f": {gradients}", "step": ": forward and backward"}
        return (" + ".join(parts) or "bare") + suffix[self.mode]

    def case(self) -> Case:
        x, weight = (self.rows, self.inner), (self.cols, self.inner)
        y, bare = (self.rows, self.cols), not self.bias and self.activation is None
        shapes = [x, weight] + [(self.cols,)] * self.bias + [y] * self.dropout
        rows, inner, cols = reduced(self.rows), reduced(self.inner), reduced(self.cols)
        n_bytes, flops = self.work()
        return Case(
            op="linear",
            name=self.name,
            shapes=f"M={self.rows} K={self.inner} N={self.cols}",
            make=normal(*shapes, *[y] * bool(self.wanted), scales=(1.0, self.inner**-0.5)),
            ours=self.ours,
            theirs=self.theirs,
            bytes=n_bytes,
            flops=flops,
            launch=self.launch,
            small=replace(self, rows=rows, inner=inner, cols=cols).case,
            dtype=self.dtype,
            tf32=self.tf32,
            mode=self.mode,
            wanted=self.wanted,
            library=self.library if bare and len(self.wanted) < 2 else None,
            launch_bound=self.launch_bound,
            dropped=(lambda *inputs: inputs[-1]) if self.dropout else None,
        )


def linear_cases() -> list[Case]:
    """The sizes of a transformer's layers first, then what is unusual."""
    tokens, cols, everything = 8192, 4096, (0, 1, 2)
    specs = [
        Linear(tokens, inner, cols, activation, bias)
        for inner in (1024, 4096, 512, 8192)
        for bias, activation in ((True, "gelu"), (True, "relu"), (True, None), (False, None))
    ]
    specs += [Linear(tokens, inner, cols, "gelu", dropout=True) for inner in (1024, 4096)]
    specs += [
        Linear(tokens, inner, cols, "gelu", mode="backward", wanted=everything)
        for inner in (1024, 4096)
    ]
    specs += [
        Linear(tokens, 1024, cols, "relu", mode="backward", wanted=everything),
        Linear(tokens, 1024, cols, "gelu", mode="step", wanted=everything),
        Linear(tokens, 4096, cols, bias=False, mode="backward", wanted=(0,)),
        Linear(tokens, 4096, cols, bias=False, mode="backward", wanted=(1,)),
        Linear(16, 4096, cols, bias=False, launch_bound=True),
        Linear(16, 4096, cols, "gelu", launch_bound=True),
        Linear(1000, 1001, 1003, "gelu", launch_bound=True),
        Linear(tokens, 1024, cols, "gelu", dtype=torch.float32),
        Linear(tokens, 1024, cols, "gelu", dtype=torch.float32, tf32=True),
    ]
    return [spec.case() for spec in specs]


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return a * F.silu(b)


def elementwise(name: str, shape: tuple[int, int], mode: Mode = "forward") -> Case:
    """An activation of x, or swiglu, whose y is half as wide as x; gradients from dy and x."""
    gated = name == "swiglu"
    rows, cols = shape
    y_shape = (rows, cols // 2) if gated else shape
    backward = mode == "backward"
    x_size, y_size = rows * cols, rows * y_shape[1]

    def launch() -> None:
        x, dy = meta(*shape), meta(*y_shape)
        if gated:
            launchers[f"glu_{mode}"](*[dy] * backward, x, 1, "silu", [])
        else:
            launchers[f"activation_{mode}"](*[dy] * backward, x, name, [])

    return Case(
        op="glu" if gated else "activation",
        name=f"{name}: dx" if backward else name,
        shapes=f"{rows} × {cols}",
        make=normal(shape, *[y_shape] * backward),
        ours=getattr(GF, name),
        theirs=_swiglu if gated else TORCH[name],
        bytes=2 * (y_size + x_size * (1 + backward)),
        flops=0,
        launch=launch,
        small=partial(elementwise, name, (reduced(rows), reduced(cols)), mode),
        mode=mode,
        wanted=(0,) if backward else (),
    )


# In the order in which they are measured when time may run out.
CASES: dict[str, list[Case]] = {
    "linear": linear_cases(),
    "activation": [
        elementwise(name, (8192, 8192), mode)
        for name in ("gelu", "silu")
        for mode in ("forward", "backward")
    ],
    # the two halves of a Llama-3 8B feed-forward layer
    "glu": [elementwise("swiglu", (8192, 2 * 14336), mode) for mode in ("forward", "backward")],
}
