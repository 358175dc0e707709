"""nll_loss: losses and gradients against NumPy float64, every argument, layout, and its limits."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.kernels import launch, nll_loss, partial_sums
from gpunn.kernels.launch import Device
from gpunn.kernels.nll_loss import GradientLaunch, NllLaunch
from gpunn.reference.nll_loss import nll_loss_backward, nll_loss_forward, row_weights
from kit import as_numpy, check_gradients, each_dtype, far_apart, launched, layouts
from test_convolution_memory import Nowhere, peak_on_cpu, peak_on_cuda

OPERATORS = ("nll_loss_forward", "nll_loss_backward")
IGNORED = 2


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 16 rows, three at most in a sum; tiles of 4 rows by 4 classes, or by 2."""
    monkeypatch.setattr(nll_loss, "LAUNCH", NllLaunch(block=16))
    monkeypatch.setattr(nll_loss, "MOST_PARTS", 3)
    monkeypatch.setattr(nll_loss, "TILES", (GradientLaunch(block_rows=4, block_cols=4),))
    few, many = (GradientLaunch(block_rows=n, block_cols=2, tiles=2) for n in (2, 4))
    monkeypatch.setattr(nll_loss, "FEW_PIXELS", few)
    monkeypatch.setattr(nll_loss, "PIXELS", many)


def value_and_gradient(
    function: Any, x: torch.Tensor, dloss: torch.Tensor | None, *given: Any, **arguments: Any
) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    loss = function(leaf, *given, **arguments)
    dloss = torch.full_like(loss, 0.75) if dloss is None else dloss
    return [loss, *torch.autograd.grad(loss, leaf, dloss)]


def rows_of(array: Any) -> Any:
    """(N, C, *) as (rows, C)."""
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])


def assert_right(
    x: torch.Tensor, target: torch.Tensor, dloss: torch.Tensor | None = None,
    weight: torch.Tensor | None = None, reduction: str = "mean",
) -> list[torch.Tensor]:  # fmt: skip
    """Value and gradient are right, and our kernels computed them."""
    arguments: Any = {"weight": weight, "ignore_index": IGNORED, "reduction": reduction}
    with gpunn.trace() as trace:
        got = value_and_gradient(GF.nll_loss, x, dloss, target, **arguments)
    launched(trace, *OPERATORS)
    # torch has no gradient for other layouts on a CPU
    baseline = value_and_gradient(F.nll_loss, x.contiguous(), dloss, target, **arguments)
    y = target.cpu().numpy().reshape(-1)
    w = np.ones(x.shape[1]) if weight is None else as_numpy(weight)
    divisor = row_weights(y, w, IGNORED).sum() if reduction == "mean" else 1.0
    upstream = as_numpy(torch.full_like(got[0], 0.75) if dloss is None else dloss) / divisor
    upstream = np.broadcast_to(upstream.reshape(-1), y.shape)
    losses = nll_loss_forward(rows_of(as_numpy(x)), y, w, IGNORED)
    dx = nll_loss_backward(upstream, rows_of(as_numpy(x)), y, w, IGNORED)
    by_row = (*target.shape, x.shape[1])
    exact = losses.reshape(target.shape) if reduction == "none" else losses.sum() / divisor
    assert_accurate(got[0], np.asarray(exact), baseline[0], f"loss, {reduction}")
    assert_accurate(got[1], np.moveaxis(dx.reshape(by_row), -1, 1), baseline[1], f"dx, {reduction}")
    return got


def drawn(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, classes, some of which are ignored, and weights."""
    x = torch.log_softmax(torch.randn(shape, device=device), 1).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    target.view(-1)[:: max(3, target.numel() // 4)] = IGNORED
    return x, target, (torch.rand(shape[1], device=device) + 0.5).to(dtype)


@each_dtype
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(37, 5), (100, 3), (2, 5, 7), (2, 7, 3, 5), (2, 3, 2, 2, 3)])
def test_reductions_and_dimensions(
    shape: tuple[int, ...], reduction: str, dtype: torch.dtype, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A program with one block of rows, or with several; classes in one tile, or in two."""
    small_blocks(monkeypatch)
    x, target, weight = drawn(shape, device, dtype)
    dloss = torch.randn(target.shape, device=device).to(dtype) if reduction == "none" else None
    assert_right(x, target, dloss, weight, reduction)
    if dtype == torch.float32:
        assert_right(x, target, dloss, None, reduction)


@pytest.mark.parametrize("n_classes", [4, 32, 33, 300, 2049])
@pytest.mark.parametrize("inner", [1, 6, 65])
def test_every_kind_of_tile(n_classes: int, inner: int, device: str) -> None:
    """The narrowest that holds the classes, and more than one of the widest."""
    shape = (5, n_classes, inner) if inner > 1 else (5, n_classes)
    x, target, _ = drawn(shape, device)
    target.view(-1)[-1] = n_classes - 1
    with gpunn.trace() as trace:
        assert_right(x, target, reduction="sum")
    (backward,) = launched(trace, OPERATORS[1])
    widths = {1: (32, 128, 512, 2048), 6: (16,), 65: (4,)}[inner]
    expected = next((width for width in widths if n_classes <= width), widths[-1])
    assert asdict(backward.launch)["block_cols"] == expected


def test_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in several parts is finished by one more program; one in one part is not."""
    small_blocks(monkeypatch)
    monkeypatch.setattr(partial_sums, "LAUNCH", partial_sums.PartsLaunch(block=16))
    for n_rows, kernels in ((16, ["nll_loss_forward_kernel"]),
                            (17, ["nll_loss_forward_kernel", "sum_parts_kernel"])):  # fmt: skip
        x, target, _ = drawn((n_rows, 4), device)
        with gpunn.trace() as trace:
            GF.nll_loss(x, target)
        assert [r.kernel for r in launched(trace, OPERATORS[0])] == kernels


def test_layouts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that is given; the gradient is channels_last where x is."""
    small_blocks(monkeypatch)
    x, target, weight = drawn((3, 5, 2, 4), device)
    dloss = torch.randn(3, 2, 4, device=device)
    dloss.view(-1)[0] = 0.75
    for name, laid_out in layouts(x):
        _, dx = assert_right(laid_out, target, dloss, weight, "none")
        as_channels = dx.is_contiguous(memory_format=torch.channels_last)
        assert as_channels == (name == "channels_last")
    for _, laid_out in layouts(dloss):
        assert_right(x, target, laid_out, weight, "none")
    assert_right(x, target.transpose(1, 2).contiguous().transpose(1, 2), dloss, weight, "none")
    assert_right(x, target, weight=weight.repeat_interleave(2)[::2])
    x, target, _ = drawn((7, 5), device)
    _, dx = assert_right(x.T.contiguous().T, target)
    assert dx.is_contiguous()
    x, target, _ = drawn((3, 5, 1, 1), device)
    assert_right(x, target)


def test_one_row_without_a_batch(device: str) -> None:
    x, target = torch.randn(5, device=device), torch.tensor(3, device=device)
    for reduction in ("none", "sum", "mean"):
        ours = value_and_gradient(GF.nll_loss, x, None, target, reduction=reduction)
        theirs = value_and_gradient(F.nll_loss, x, None, target, reduction=reduction)
        torch.testing.assert_close(ours, theirs)


def test_no_rows_and_rows_that_are_all_ignored(device: str) -> None:
    for n_rows, ignored in ((0, -100), (3, -100), (3, IGNORED)):
        x, target = torch.randn(n_rows, 5, device=device), torch.full((n_rows,), ignored)
        for reduction in ("none", "sum", "mean"):
            given: Any = {"reduction": reduction, "ignore_index": ignored}
            ours = value_and_gradient(GF.nll_loss, x, None, target.to(device), **given)
            theirs = value_and_gradient(F.nll_loss, x, None, target.to(device), **given)
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_infinities_and_nans(device: str) -> None:
    """Of the row's class they are its loss's; of other classes, and of ignored rows, nothing's."""
    x = torch.zeros(7, 3, device=device)
    x[:, 1] = torch.tensor([math.nan, math.inf, -math.inf, 1.0, math.nan, -3e38, 3e38])
    target = torch.tensor([1, 1, 1, 1, 0, 1, -100], device=device)
    for weight in (None, torch.tensor([1.0, 2.0, 0.0], device=device)):
        given: Any = {"weight": weight, "reduction": "none"}
        ours = value_and_gradient(GF.nll_loss, x, None, target, **given)
        theirs = value_and_gradient(F.nll_loss, x, None, target, **given)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_number_that_is_no_class_gives_nan(device: str) -> None:
    """And reads nothing, where there is no memory: torch stops the GPU, a kernel cannot raise."""
    x, target = torch.randn(4, 5, device=device), torch.tensor([0, 5, -1, 2**45], device=device)
    loss = GF.nll_loss(x, target, torch.ones(5, device=device), reduction="none")
    assert loss.isnan().tolist() == [False, True, True, True]
    assert GF.nll_loss(x, target).isnan()


def test_offsets_past_2_to_the_31(device: str) -> None:
    """The last class, and the last row, lie beyond what 32 bits can say."""
    near = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], device=device)
    target = torch.tensor([1, 1], device=device)
    for strides in ((1, 2**31), (2**31, 1)):
        far = far_apart(near, strides)
        assert GF.nll_loss(far, target, reduction="none").tolist() == [2.0, 4.0]


def test_an_image_past_2_to_the_31(device: str) -> None:
    """Its first classes: of 3 pixels times their number, 32 bits keep 2."""
    target, dx = torch.tensor([1, -100, 3], device=device), torch.empty(4, 3, device=device)
    n_cols = (2**32 + 2) // 3
    launch.run(
        "far", nll_loss.nll_loss_backward_kernel, (1,), torch.tensor(2.0, device=device), target,
        None, None, dx, 3, n_cols, 3, -100, launch=GradientLaunch(block_rows=4, block_cols=4),
        EACH=False, LAST_DIM=False,
    )  # fmt: skip
    assert dx.nonzero().tolist() == [[1, 0], [3, 2]]
    assert dx.sum() == -4


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_differentiable_gradients_are_the_kernels(reduction: str, device: str) -> None:
    x, target, weight = drawn((4, 5), device)
    x.requires_grad_()
    loss = GF.nll_loss(x, target, weight, ignore_index=IGNORED, reduction=reduction)
    dloss = torch.randn_like(loss)
    (by_kernels,) = torch.autograd.grad(loss, x, dloss, retain_graph=True)
    (differentiable,) = torch.autograd.grad(loss, x, dloss, create_graph=True)
    torch.testing.assert_close(differentiable, by_kernels)


def test_gradcheck() -> None:
    target, weight = torch.tensor([1, 0, -100]), torch.rand(3).double()
    check_gradients(lambda x: GF.nll_loss(x, target, weight), torch.randn(3, 3))
    more = torch.tensor([[1, 0]])
    check_gradients(lambda x: GF.nll_loss(x, more, reduction="none"), torch.randn(1, 2, 2))


def test_backward_twice_and_compiled(device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(GF.nll_loss, fullgraph=True, backend="aot_eager")
    for shape in ((4, 9), (5, 9)):
        x, target, weight = drawn(shape, device)
        x.requires_grad_()
        before = x.detach().clone(), target.clone()
        loss = GF.nll_loss(x, target, weight)
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (again,) = torch.autograd.grad(loss, x)
        assert torch.equal(first, again)
        assert torch.equal(x, before[0])
        assert torch.equal(target, before[1])
        (dx,) = torch.autograd.grad(compiled(x, target, weight), x)
        torch.testing.assert_close(dx, first)


@each_dtype
def test_autocast_as_torch(dtype: torch.dtype, device: str) -> None:
    """In float32; then weights may be of another type."""
    x, target, weight = drawn((4, 5), device, dtype)
    with torch.autocast(device, torch.bfloat16):
        for given in ((target,), (target, weight.float())):
            ours = value_and_gradient(GF.nll_loss, x, None, *given)
            theirs = value_and_gradient(F.nll_loss, x, None, *given)
            assert [t.dtype for t in ours] == [t.dtype for t in theirs]
            torch.testing.assert_close(ours, theirs)


def test_what_is_torchs_and_why(device: str) -> None:
    x, target, _ = drawn((3, 5), device)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        with pytest.warns(UserWarning, match="size_average and reduce"):
            GF.nll_loss(x, target, size_average=False)
        GF.nll_loss(x, target.byte())
        with gpunn.backend("torch"):
            GF.nll_loss(x, target)
    assert [r.reason for r in trace.fallbacks] == [
        "size_average or reduce", "arguments that PyTorch may refuse", "backend('torch')",
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_memory(order: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient, and next to nothing else: no copies of the log-probabilities."""
    torch.use_deterministic_algorithms(False)  # or filling what is new would take memory of its own
    x = torch.zeros(4, 32, 64, 64, device=device, dtype=torch.bfloat16)
    if order == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    target = torch.zeros(4, 64, 64, device=device, dtype=torch.int64)

    def forward() -> torch.Tensor:
        return GF.nll_loss(x, target)

    if device == "cpu":
        monkeypatch.setattr(launch, "_capture", (Device(90, 132), Nowhere()))
    peak_of = peak_on_cuda if device == "cuda" else peak_on_cpu
    assert peak_of(forward) <= 0.01 * x.nbytes
    peak = peak_of(lambda: torch.autograd.grad(forward(), x))
    assert x.nbytes <= peak <= 1.01 * x.nbytes


@pytest.mark.filterwarnings("ignore:.*NLLLoss2d. has been deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["NLLLoss", "NLLLoss2d"])
def test_the_layers(name: str, device: str) -> None:
    x, target, weight = drawn((4, 5, 2, 3), device)
    arguments: Any = dict(ignore_index=IGNORED, reduction="sum")
    with gpunn.trace() as trace:
        loss = getattr(gpunn.nn, name)(weight, **arguments)(x, target)
    launched(trace, OPERATORS[0])
    torch.testing.assert_close(loss, getattr(torch.nn, name)(weight, **arguments)(x, target))


def test_the_deprecated_name_warns() -> None:
    with pytest.warns(FutureWarning, match="use `NLLLoss` instead") as warned:
        gpunn.nn.NLLLoss2d()
    assert warned[0].filename == __file__


X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "arguments",
    [
        (X, Y[:2]), (X, Y.int()), (X, torch.randn(3, 4)), (X, Y, torch.ones(3)),
        (X, Y, torch.ones(4).half()), (X, Y, torch.ones(4, requires_grad=True)),
        (X, Y, None, None, -100, None, "average"), (torch.tensor(1.0), torch.tensor(0)),
        (X.int(), Y), ([1.0], Y), (X, [0, 1, 2]),
    ],
)  # fmt: skip
def test_refuses_what_torch_refuses(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011  (torch raises errors of many classes)
        F.nll_loss(*arguments)
    with pytest.raises(type(expected.value)), gpunn.backend("auto"):
        GF.nll_loss(*arguments)
