"""What the tests of every operator need: dtypes, layouts, gradients, and proof of what ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import gpunn
import gpunn.functional
from gpunn.checks.comparison import DTYPES
from gpunn.checks.comparison import as_numpy as as_numpy  # the tests' too
from gpunn.kernels import host
from gpunn.kernels.cuda import CudaKernel
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import LaunchRecord

# The files of gpunn/functional that are no op: what ops share or are put together of, more
# functions of attention, one whose kernels and reference are batch_norm's, and one made of linear
# and attention. So is a file called after an op, OP_arguments.py.
NO_OPS = {
    "__init__", "attention_decode", "attention_function", "attention_varlen", "attention_weights",
    "augment_composition", "differentiable_pooling", "dispatch", "multihead_attention",
    "sync_batch_norm", "window",
}  # fmt: skip
# The stem of every op.
OPS = sorted(
    path.stem
    for path in Path(gpunn.functional.__file__).parent.glob("*.py")
    if path.stem not in NO_OPS and not path.stem.endswith("_arguments")
)
# What gpunn.nn re-exports from torch.nn.
CONTAINERS = {
    "Flatten", "Identity", "Module", "ModuleDict", "ModuleList", "Parameter",
    "ParameterDict", "ParameterList", "Sequential", "Unflatten",
}  # fmt: skip
# Parameters other than the defaults, exact in bfloat16: what happens at a kink does not depend
# on the dtype. test_activation.py's test_limits_that_no_dtype_has is about the others.
PARAMETERS: dict[str, tuple[float, ...]] = {
    "leaky_relu": (0.25,),
    "elu": (1.75,),
    "celu": (0.625,),
    "hardtanh": (-0.25, 0.75),
    "softplus": (2.0, 3.0),
    "softshrink": (0.25,),
    "hardshrink": (0.75,),
}


def short_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short_name)


class CudaText(CudaKernel):
    """A CUDA C++ kernel whose source stands in a test."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__("text.cu", name)
        self.source = host.with_includes(text)


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return _contiguous(tensor.transpose(0, -1)).transpose(0, -1)


def _sliced(tensor: torch.Tensor) -> torch.Tensor:
    shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
    gaps = tensor.new_full(shape, torch.nan)
    gaps[..., ::2] = tensor
    return gaps[..., ::2]


def _shifted(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.new_full((tensor.numel() + 1,), torch.nan)
    flat[1:] = tensor.flatten()
    return flat[1:].view(tensor.shape)


def _expanded_rows(tensor: torch.Tensor) -> torch.Tensor:
    return _contiguous(tensor[:1]).expand(tensor.shape)


def _expanded_scalar(tensor: torch.Tensor) -> torch.Tensor:
    return _contiguous(tensor.flatten()[:1])[0].expand(tensor.shape)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.channels_last)


# Name: (least and most dimensions that it is for, how it is made).
LAYOUTS: dict[str, tuple[int, int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "contiguous": (0, 99, _contiguous),
    "transposed": (2, 99, _transposed),
    "every second element": (1, 99, _sliced),
    "not 16-byte aligned": (1, 99, _shifted),
    "one row expanded": (2, 99, _expanded_rows),
    "one element expanded, as sum().backward() gives": (1, 99, _expanded_scalar),
    "channels_last": (4, 4, _channels_last),
}


def layouts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """``tensor`` in every layout that an input or a gradient may have.

    The values are the same, except that the expanded ones repeat one row or one element; so
    compute the reference from what is given here.
    """
    for name, (least, most, make) in LAYOUTS.items():
        if least <= tensor.dim() <= most:
            yield name, make(tensor.detach())


def far_apart(near: torch.Tensor, strides: tuple[int, ...], shift: int = 0) -> torch.Tensor:
    """float16 values with strides of 2^30 and more: to see an offset pass 32 bits.

    From here on a test's uninitialised memory is no longer filled with NaN: the gap would be, too,
    and take the memory that it only seems to take.
    """
    torch.use_deterministic_algorithms(False)
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=near.device)
    return storage.as_strided(near.shape, strides, shift).copy_(near)


def check_gradients(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor, twice: bool = True
) -> None:
    """gradcheck and (``twice``) gradgradcheck of ``function`` at ``inputs``, in float64.

    And, since gradgradcheck only holds the differentiable gradient to its own derivative, that it
    is the gradient which the kernels compute. The first derivative is taken along a direction that
    is drawn: references tell of every element. Only the interpreter's kernels take float64; on CUDA
    it is PyTorch's own, by design.
    """
    if not INTERPRETING:
        pytest.skip("gradcheck needs float64, which the kernels take in the interpreter alone")
    inputs = tuple(tensor.detach().double().cpu().requires_grad_() for tensor in inputs)
    with gpunn.trace() as trace:
        torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert trace.launches, "no kernel ran"
    assert not trace.fallbacks, trace
    if not twice:
        return
    torch.autograd.gradgradcheck(function, inputs)
    y = function(*inputs)
    dy = torch.randn_like(y)
    by_kernels = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    differentiable = torch.autograd.grad(y, inputs, dy, create_graph=True)
    advice = "do the kernels add up float64 in float64?"
    for ours, theirs in zip(by_kernels, differentiable, strict=True):
        torch.testing.assert_close(
            theirs, ours, rtol=1e-6, atol=1e-9, msg=lambda text: f"{text}\n{advice}"
        )


def launched(trace: gpunn.Trace, *operators: str) -> list[LaunchRecord]:
    """The launches of ``operators``; fails unless each ran and nothing was left to PyTorch."""
    assert not trace.fallbacks, f"left to PyTorch:\n{trace}"
    missing = set(operators) - {record.operator for record in trace.launches}
    assert not missing, f"no kernel ran for {', '.join(sorted(missing))}:\n{trace}"
    return [record for record in trace.launches if record.operator in operators]


def assert_trains_as_torch(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, *operators: str
) -> gpunn.Trace:
    """The loss of a training step and every gradient, by ``operators``, as PyTorch's are.

    Within a thousandth of the largest values; nothing is left to PyTorch.
    """
    found: list[list[torch.Tensor]] = []
    for choice in ("torch", "kernels"):
        torch.manual_seed(0)
        with gpunn.backend(choice), gpunn.trace() as trace:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    launched(trace, *operators)
    for exact, got in zip(*found, strict=True):
        largest = float(exact.detach().abs().max())
        assert largest > 1e-4, "the comparison would be vacuous"
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-3 * largest)
    return trace
