"""The checks of convolution: every function, in the geometries that its kernels tell apart."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import gpunn.functional as GF
from gpunn.checks.comparison import Array, Check, Comparison, compare, drawn
from gpunn.functional.activation import TORCH
from gpunn.reference import activation as activations
from gpunn.reference.convolution import (
    Geometry,
    conv_forward,
    conv_input_gradient,
    conv_weight_gradient,
)


@dataclass(frozen=True)
class Case:
    """A convolution of x (N, C, H, W) by (K, C / groups, R, S), or, transposed, (C, …)."""

    function: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    output_padding: tuple[int, int] = (0, 0)
    activation: str = "identity"
    bias: bool = True
    residual: bool = False
    channels_last: bool = False

    @property
    def transposed(self) -> bool:
        """Whether it is the gradient of a convolution."""
        return "transpose" in self.function

    @property
    def n_outputs(self) -> int:
        """Channels of the result."""
        return self.weight[1] * self.groups if self.transposed else self.weight[0]

    @property
    def geometry(self) -> Geometry:
        """As the reference takes it."""
        top, left = self.padding
        return Geometry(self.stride, (top, top, left, left), self.dilation, self.groups)

    def output_size(self) -> list[int]:
        """(OH, OW)."""
        if not self.transposed:
            return self.geometry.output_size(self.x[2:], self.weight[2:])
        return [
            (self.x[2 + d] - 1) * self.stride[d] - 2 * self.padding[d]
            + self.dilation[d] * (self.weight[2 + d] - 1) + self.output_padding[d] + 1
            for d in (0, 1)
        ]  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """What follows input, weight and bias; of a 1d function, without the row."""
        given: dict[str, Any] = {
            "stride": self.stride, "padding": self.padding, "dilation": self.dilation
        }  # fmt: skip
        if self.transposed:
            given["output_padding"] = self.output_padding
        if self.function.endswith("1d"):
            given = {name: value[1] for name, value in given.items()}
        return {**given, "groups": self.groups}


CASES: dict[str, Case] = {
    "conv2d, 3 × 3": Case("conv2d", (2, 16, 6, 5), (8, 16, 3, 3), padding=(1, 1)),
    "conv2d, all that is fused": Case(
        "conv2d", (2, 16, 6, 5), (8, 16, 3, 3), activation="gelu", residual=True, channels_last=True
    ),
    "conv2d, strided, dilated": Case(
        "conv2d", (1, 18, 9, 8), (5, 18, 3, 2), (2, 3), (2, 1), (2, 3), activation="relu"
    ),
    "conv2d, multiples of eight": Case(
        "conv2d", (2, 24, 5, 4), (40, 24, 3, 2), activation="relu", channels_last=True
    ),
    "conv2d, three channels": Case("conv2d", (2, 3, 8, 8), (6, 3, 5, 5), (2, 2), (2, 2)),
    "conv2d, 1 × 1": Case(
        "conv2d", (2, 16, 4, 4), (8, 16, 1, 1), activation="relu", channels_last=True
    ),
    "conv2d, groups": Case("conv2d", (1, 32, 5, 5), (34, 16, 3, 3), padding=(1, 1), groups=2),
    "conv2d, depthwise": Case(
        "conv2d", (2, 12, 6, 6), (24, 1, 3, 3), (2, 2), (1, 1), groups=12, activation="silu"
    ),
    "conv1d": Case("conv1d", (2, 16, 1, 9), (6, 16, 1, 4), (1, 2), (0, 3), activation="tanh"),
    "conv_transpose2d": Case(
        "conv_transpose2d", (2, 16, 4, 3), (16, 5, 4, 4), (2, 2), (1, 1),
        activation="relu", channels_last=True,
    ),
    "conv_transpose2d, all of its arguments": Case(
        "conv_transpose2d", (1, 6, 3, 4), (6, 4, 3, 2), (3, 2), (1, 0), (1, 3), 2, (2, 1),
        residual=True,
    ),
    "conv_transpose1d": Case("conv_transpose1d", (2, 4, 1, 5), (4, 3, 1, 3), (1, 2), (0, 1)),
}  # fmt: skip


def exact(case: Case, dy: Array, x: Array, weight: Array, *rest: Array) -> dict[str, Array]:
    """Value and gradients by the reference; ``rest`` is bias and residual where there are any."""
    geometry, given = case.geometry, list(rest)
    bias = given.pop(0) if case.bias else None
    if case.transposed:
        z = conv_input_gradient(x, weight, case.output_size(), geometry)
    else:
        z = conv_forward(x, weight, geometry)
    z = z if bias is None else z + bias[:, None, None]
    y = activations.activation_forward(z, case.activation)
    dz = activations.activation_backward(dy, z, case.activation)
    if case.transposed:
        dx = conv_forward(dz, weight, geometry)
        dweight = conv_weight_gradient(x, dz, weight.shape, geometry)
    else:
        dx = conv_input_gradient(dz, weight, x.shape[2:], geometry)
        dweight = conv_weight_gradient(dz, x, weight.shape, geometry)
    found = {"y": y + given[0] if given else y, "dx": dx, "dweight": dweight}
    found |= {"dbias": dz.sum((0, 2, 3))} if case.bias else {}
    return found | ({"dresidual": dy} if given else {})


def inputs_of(case: Case, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """x, weight, and bias and residual where the case has them."""
    fan_in = torch.Size(case.weight[1:]).numel()
    shapes = [case.x, case.weight]
    shapes += [(case.n_outputs,)] if case.bias else []
    shapes += [(case.x[0], case.n_outputs, *case.output_size())] if case.residual else []
    found = [drawn(shape, dtype, device) for shape in shapes]
    found[1] = found[1] / fan_in**0.5
    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
    return [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in found]


def calls(case: Case) -> tuple[Any, Any]:
    """gpunn's function of the inputs, and torch's."""

    def row(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.squeeze(2) if case.function.endswith("1d") else tensor

    def parts(rest: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return rest[0] if case.bias else None, rest[-1] if case.residual else None

    def ours(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        bias, residual = parts(rest)
        function, fused = getattr(GF, case.function), {"activation": case.activation}
        y: torch.Tensor = function(
            row(x), row(weight), bias, **case.arguments(), residual=residual, **fused
        )
        return y.view(x.shape[0], case.n_outputs, *case.output_size()) if y.dim() == 3 else y

    def theirs(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        bias, residual = parts(rest)
        y = getattr(F, case.function)(row(x), row(weight), bias, **case.arguments())
        y = TORCH[case.activation](y).view(x.shape[0], case.n_outputs, *case.output_size())
        return y if residual is None else y + residual

    return ours, theirs


def check_convolution(name: str, dtype: torch.dtype, device: str) -> list[Comparison]:
    """One case, with the gradients of all that it is given."""
    case = CASES[name]
    return compare(*calls(case), functools.partial(exact, case), inputs_of(case, dtype, device))


CHECKS = [Check("convolution", n, functools.partial(check_convolution, n)) for n in CASES]
