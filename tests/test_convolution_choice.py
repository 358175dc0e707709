"""Which convolutions ``auto`` computes by kernels, and of which it leaves the sums to torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from kit import launched
from test_convolution_modes import NAMES


def test_auto_fuses_what_there_is_to_fuse(device: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    x, weight, bias = (
        torch.randn(s, device=device) for s in ((1, 16, 5, 4), (16, 16, 3, 3), (16,))
    )
    residual = torch.randn_like(x)
    options: list[dict[str, Any]] = [{"activation": "relu"}, {"residual": residual}]
    for fused in options:
        with gpunn.trace() as trace, gpunn.backend("auto"):
            GF.conv2d(x, weight, bias, padding=1, **fused)
        (record,) = launched(trace, "conv_forward")
        assert record.kernel == "convolution_kernel"
    for name in NAMES:
        part: Any = (slice(None),) * 3 + ((...,) if name.endswith("2d") else (0,))
        with gpunn.trace() as trace, gpunn.backend("auto"):
            images, taps = x[part], weight[part]
            taps = taps.transpose(0, 1) if "transpose" in name else taps
            y = getattr(GF, name)(images, taps, bias)
        assert torch.equal(y, getattr(F, name)(images, taps, bias))
        assert not trace.launches
        assert [f.operator for f in trace.fallbacks] == [name]


# The convolution, x, weight, its arguments, and why in auto the sums are PyTorch's.
LEFT: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], str]] = {
    "long": ("conv2d", (1, 97, 4, 3), (16, 97, 3, 3), (1, 1), "inner dimension 873 > 864"),
    "long, transposed": (
        "conv_transpose2d", (1, 97, 4, 3), (97, 16, 3, 3), (1, 1), "inner dimension 873 > 864"
    ),
    "few channels": ("conv2d", (2, 3, 5, 6), (16, 3, 3, 3), (2, 1), "3 channels"),
    "phases": ("conv_transpose2d", (1, 32, 4, 3), (32, 16, 4, 4), (2, 1), "4 phases of outputs"),
}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("case", LEFT)
def test_auto_leaves_sums_to_torch_where_it_was_faster(
    case: str, activation: Any, layout: torch.memory_format, device: str
) -> None:
    """The kernels' epilogue follows, and its backward precedes the gradients, which are bare."""
    name, input_size, weight_size, arguments, reason = LEFT[case]
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    x, weight, bias = (torch.randn(s, device=device) for s in (input_size, weight_size, (16,)))
    x, weight = (t.to(memory_format=layout) for t in (x, weight / math.sqrt(weight[0].numel())))
    residual, dy = torch.randn(2, *getattr(F, name)(x, weight, bias, *arguments).shape).to(device)
    tensors = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    with gpunn.trace() as trace, gpunn.backend("auto"):
        fused = {"activation": activation, "residual": tensors[3]}
        y = getattr(GF, name)(*tensors[:3], *arguments, **fused)
        got = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    operator = name.replace("2d", "_forward")
    assert [(record.operator, record.kernel) for record in trace.launches] == [
        (operator, "epilogue_kernel"),
        ("linear_epilogue_backward", "epilogue_backward_kernel"),
    ]
    assert [(f.operator, f.reason) for f in trace.fallbacks] == [
        (f"{operator}: the sums", f"{reason}: PyTorch's, then the fused epilogue"),
        ("the convolution's gradients", "bare products: PyTorch's"),
    ]
    z = getattr(F, name)(*tensors[:3], *arguments)
    theirs = (F.gelu(z) if activation else z) + tensors[3]
    assert y.stride() == z.stride()
    expected = torch.autograd.grad(theirs, tensors, dy)
    for mine, torchs in zip([y, *got], [theirs, *expected], strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


def test_auto_keeps_the_gradients_of_groups_of_few_channels(device: str) -> None:
    x, weight = torch.randn(1, 32, 5, 5, device=device), torch.randn(32, 1, 3, 3, device=device)
    with gpunn.trace() as trace, gpunn.backend("auto"):
        y = GF.conv2d(x.requires_grad_(), weight.requires_grad_(), groups=32, activation="relu")
        torch.autograd.grad(y.sum(), (x, weight))
    kernels = {(record.operator, record.kernel) for record in trace.launches}
    assert kernels >= {
        ("conv_forward", "epilogue_kernel"),
        ("conv_transpose_forward", "grouped_convolution_kernel"),
        ("conv_weight_gradient", "grouped_weight_kernel"),
    }
    (left,) = trace.fallbacks
    assert left.operator == "conv_forward: the sums"
    assert left.reason.startswith("1 channels: ")
