"""Whether a user replaced a method of torch's in a layer, as it is called and as it is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gpunn.nn
from gpunn.nn.overrides import overrides
from kit import launched

NAMES = "_conv_forward", "_no_such_method"


class Special(gpunn.nn.Conv2d):
    """Of a user's, with a method of its own."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        return input


def patched() -> gpunn.nn.Conv2d:
    layer: Any = gpunn.nn.Conv2d(2, 2, 1)
    layer._conv_forward = lambda x, *_: x
    made: gpunn.nn.Conv2d = layer
    return made


LAYERS: dict[str, tuple[Any, bool]] = {
    "gpunn's": (lambda: gpunn.nn.Conv2d(2, 2, 1), False),
    "a subclass without methods": (
        lambda: type("Plain", (gpunn.nn.Conv2d,), {})(2, 2, 1), False
    ),
    "a subclass with the method": (lambda: Special(2, 2, 1), True),
    "a subclass of that": (lambda: type("Derived", (Special,), {})(2, 2, 1), True),
    "a layer with the method": (patched, True),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_overrides(is_compiled: bool, name: str) -> None:
    torch._dynamo.reset()
    layer, expected = LAYERS[name][0](), LAYERS[name][1]

    def asked(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if overrides(layer, torch.nn.Conv2d, *NAMES) else x

    function = torch.compile(asked, backend="eager", fullgraph=True) if is_compiled else asked
    assert float(function(torch.zeros(()))) == expected


def test_a_compiled_convolution_launches_its_kernel(device: str) -> None:
    torch._dynamo.reset()
    layer = gpunn.nn.Conv2d(2, 2, 1, activation="relu").to(device)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(1, 2, 3, 3, device=device)
    compiled(x)
    with gpunn.trace() as trace:
        compiled(x)
    launched(trace, "conv_forward")
