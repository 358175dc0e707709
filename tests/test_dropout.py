"""Dropout: the bits that it draws, the values and gradients that follow, every size and layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.kernels import host
from gpunn.kernels.cuda import CudaKernel
from gpunn.kernels.dropout import CHANNELS, ELEMENTS
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import Device, captured
from gpunn.kernels.philox import draw_seed
from gpunn.reference import dropout as reference
from kit import as_numpy, each_dtype, launched, layouts

Booleans = NDArray[np.bool_]
Function = Callable[[torch.Tensor], torch.Tensor]
Dropout = Callable[..., torch.Tensor]
Shape = tuple[int, ...]
P = 0.25


def seed_of(number: int, device: str) -> int:
    """The seed that the next dropout draws: that of torch.manual_seed(number)."""
    torch.manual_seed(number)
    seed = int(draw_seed(torch.device(device)).item())
    torch.manual_seed(number)
    return seed


def lies(x: torch.Tensor) -> list[int]:
    """The strides that say where an element is: a size of 1 may have any."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def fixed(kept: Booleans, kind: str) -> Function:
    """PyTorch's dropout, in float32, if it kept these elements."""
    alpha = 1.7580993408473766

    def function(x: torch.Tensor) -> torch.Tensor:
        keeps = torch.from_numpy(kept.copy()).to(x.device).float()
        if kind == "dropout":
            return (x.float() * keeps / (1 - P)).to(x.dtype)
        a = 1 / math.sqrt((alpha**2 * P + 1) * (1 - P))
        return (x.float() * (keeps * a) + (keeps - 1) * alpha * a + alpha * a * P).to(x.dtype)

    return function


def assert_both_accurate(
    function: Function,
    x: torch.Tensor,
    dy: torch.Tensor,
    kept: Booleans,
    what: str = "",
    kind: str = "dropout",
) -> None:
    """Value and gradient at x are right for these kept elements, and our kernels computed them."""
    x = x.detach().requires_grad_()
    with gpunn.trace() as trace:
        y = function(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert len(launched(trace, "dropout_forward")) == 2
    theirs = fixed(kept, kind)(x)
    (their_dx,) = torch.autograd.grad(theirs, x, dy)
    forward, backward = reference.dropout_forward, reference.dropout_backward
    if kind == "alpha":
        forward, backward = reference.alpha_dropout_forward, reference.alpha_dropout_backward
    assert_accurate(y, forward(as_numpy(x), kept, P), theirs, f"y {what}")
    assert_accurate(dx, backward(as_numpy(dy), kept, P), their_dx, f"dx {what}")
    assert lies(y) == lies(torch.nn.functional.dropout(x)) == lies(dx), what


@each_dtype
@pytest.mark.parametrize("kind", ["dropout", "alpha"])
def test_values_and_gradients_of_elements(kind: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(13, 170).to(device, dtype)
    dy, seed = torch.randn_like(x), seed_of(6, device)
    kept = reference.kept_elements(seed, (13, 170), P)

    def function(x: torch.Tensor) -> torch.Tensor:
        return GF.dropout(x, P) if kind == "dropout" else GF.alpha_dropout(x, P, True)

    assert_both_accurate(function, x, dy, kept, kind=kind)


@each_dtype
def test_values_and_gradients_by_a_mask(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(13, 171).to(device, dtype)
    mask = GF.dropout_mask(x.shape, 0.5, device=device)
    bits = np.unpackbits(mask.cpu().numpy(), bitorder="little")
    assert not bits[13 * 171 :].any()
    kept = bits[: 13 * 171].reshape(13, 171).astype(bool)
    assert_both_accurate(lambda x: GF.dropout(x, P, mask=mask), x, torch.randn_like(x), kept)


def in_every_way(x: torch.Tensor, device: str) -> Iterator[tuple[str, Function, Booleans]]:
    """Dropout of elements, of channels and by a mask, ready to be called, and what each keeps."""
    shape, strides = tuple(x.shape), torch.empty_like(x).stride()
    order = sorted(range(x.dim()), key=lambda i: -strides[i])
    mask = GF.dropout_mask(shape, P, device=device)
    bits = np.unpackbits(mask.cpu().numpy(), bitorder="little", count=x.numel())
    yield "by a mask", lambda x: GF.dropout(x, P, mask=mask), bits.reshape(shape).astype(bool)
    kept = reference.kept_elements(seed_of(7, device), shape, P, order)
    yield "of elements", lambda x: GF.dropout(x, P), kept
    kept = reference.kept_channels(seed_of(8, device), shape, P, 1)
    yield "of channels", lambda x: GF.dropout2d(x, P), kept


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 8, 3, 6)], ids=str)
def test_layouts_of_input_and_gradient(shape: tuple[int, ...], device: str) -> None:
    """The bits of elements follow the result's order in memory, whatever that of dy."""
    base, base_dy = torch.randn(shape, device=device), torch.randn(shape, device=device)
    base.view(-1)[0] = base_dy.view(-1)[0] = 1.25  # what the expanded layouts repeat
    given = [(f"x {layout}", x, base_dy) for layout, x in layouts(base)]
    given += [(f"dy {layout}", base, dy) for layout, dy in layouts(base_dy)]
    for layout, x, dy in given:
        for way, function, kept in in_every_way(x, device):
            assert_both_accurate(function, x, dy, kept, f"{way}, {layout}")


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("function", "shape", "format", "kernel", "is_wide"),
    [
        (GF.dropout, (2, 16, 3, 5), "contiguous", ELEMENTS, True),
        (GF.dropout, (2, 3, 3, 5), "channels_last", ELEMENTS, True),
        (GF.dropout2d, (2, 5, 1, 1), "contiguous", ELEMENTS, True),
        (GF.dropout2d, (2, 3, 3, 5), "contiguous", CHANNELS, True),
        (GF.dropout2d, (2, 3, 1, 3), "contiguous", CHANNELS, False),
        (GF.dropout2d, (2, 16, 3, 5), "channels_last", CHANNELS, True),
        (GF.dropout2d, (2, 18, 3, 5), "channels_last", CHANNELS, False),
    ],
)
def test_nothing_is_converted_and_accesses_are_wide(
    function: Dropout, shape: Shape, format: str, kernel: CudaKernel, is_wide: bool,
    dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    """The kernel reads the input where it is and writes the result, 16 bytes a thread."""
    x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=FORMATS[format])
    beside = torch.randn(x.numel() + 1, device=device, dtype=dtype)[1:].as_strided(
        shape, x.stride()
    )
    for given in (x, beside):
        with captured(Device(90, 4)) as calls:
            y = function(given, P)
        (call,) = calls
        assert call.kernel is kernel
        assert call.arguments[0].data_ptr() == given.data_ptr()
        assert call.arguments[2] is y
        assert y.stride() == x.stride()
        assert call.keywords["VECTOR"] == (16 // dtype.itemsize if is_wide and given is x else 1)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 2047, 2048, 2049])
def test_nothing_beside_is_written(n: int, device: str) -> None:
    x = torch.full((n + 32,), 3.0, device=device, dtype=torch.bfloat16)
    for mask in (None, GF.dropout_mask((n,), 1.0, device=device)):
        GF.dropout(x[16 : 16 + n], 1.0, inplace=True, mask=mask)
        assert not x[16 : 16 + n].any()
        assert (x[:16] == 3).all()
        assert (x[16 + n :] == 3).all()
        x.fill_(3.0)


# Sizes (channels, inner) by what a vector of 16 bytes holds, and how many elements a thread takes.
SIZES = [
    pytest.param(5, 1, id="no inner dimension: elements"),
    pytest.param(5, 3, id="channels shorter than a vector"),
    pytest.param(6, 8, id="a vector is a channel in 16-bit types"),
    pytest.param(7, 49, id="a vector meets two channels"),
    pytest.param(3, 64, id="no vector meets two channels"),
    pytest.param(40, 130, id="several blocks"),
    pytest.param(8, 6, id="channels last: a row of channels is a vector"),
    pytest.param(32, 65, id="channels last: it is four"),
    pytest.param(12, 5, id="channels last: it is not whole in 16-bit types"),
    pytest.param(3, 700, id="channels last: one by one, several blocks"),
]


@each_dtype
@pytest.mark.parametrize(("n_channels", "n_inner"), SIZES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_channels(
    n_channels: int, n_inner: int, channels_last: bool, dtype: torch.dtype, device: str
) -> None:
    """The bits of a channel are those of its number, however it lies in memory."""
    shape = (3, n_channels, n_inner, 1)
    x, dy = torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    kept = reference.kept_channels(seed_of(8, device), shape, P, 1)
    assert_both_accurate(lambda x: GF.dropout2d(x, P), x, dy, kept)
    seed_of(8, device)
    alpha = lambda x: GF.feature_alpha_dropout(x, P, True)  # noqa: E731
    assert_both_accurate(alpha, x, dy, kept, kind="alpha")


@pytest.mark.parametrize(
    ("function", "shape", "channel"),
    [
        (GF.dropout1d, (6, 5), 0),
        (GF.dropout1d, (4, 6, 5), 1),
        (GF.dropout2d, (4, 6, 3, 5), 1),
        (GF.dropout3d, (8, 3, 2, 5), 0),
        (GF.dropout3d, (4, 6, 3, 2, 5), 1),
    ],
    ids=["1d, no batch", "1d", "2d", "3d, no batch", "3d"],
)
def test_whole_channels_are_dropped(
    function: Dropout, shape: Shape, channel: int, device: str
) -> None:
    x = torch.randn(shape, device=device)
    seed = seed_of(9, device)
    y = function(x, 0.5)
    kept = reference.kept_channels(seed, shape, 0.5, channel)
    assert 0 < kept.mean() < 1
    assert np.array_equal(as_numpy(y), as_numpy(x) * 2 * kept)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("function", [GF.alpha_dropout, GF.feature_alpha_dropout])
def test_alpha_dropout_keeps_mean_and_variance(function: Dropout, p: float, device: str) -> None:
    n = 200_000
    y = function(torch.randn(n // 4, 4, device=device), p, True).double()
    assert abs(y.mean().item()) < 5 / math.sqrt(n)
    # The variance of a variance is (kurtosis - 1) / n; at p = 0.8 the kurtosis is below 20.
    assert abs(y.var().item() - 1) < 5 * math.sqrt(20 / n)


@pytest.mark.parametrize("kind", ["dropout", "alpha_dropout"])
def test_double_precision(kind: str) -> None:
    if not INTERPRETING:
        pytest.skip("on a GPU double precision is PyTorch's")
    x, dy = torch.randn(2, 3, 75, dtype=torch.float64)
    kept = reference.kept_elements(seed_of(13, "cpu"), (3, 75), P)
    y = getattr(GF, kind)(x.requires_grad_(), P, True)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = getattr(reference, f"{kind}_forward")(as_numpy(x), kept, P)
    exact_dx = getattr(reference, f"{kind}_backward")(as_numpy(dy), kept, P)
    np.testing.assert_allclose(as_numpy(y), exact, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(as_numpy(dx), exact_dx, rtol=1e-14, atol=1e-15)


def test_infinities_nans_and_signs_are_those_of_a_product(device: str) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -1.5, 1e-45])
    x = special.repeat(9).to(device)
    kept = reference.kept_elements(seed_of(10, device), (72,), P)
    y = GF.dropout(x, P).cpu()
    factors = torch.from_numpy(np.where(kept, np.float32(1 / (1 - P)), np.float32(0)))
    expected = x.cpu() * factors
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    known = ~y.isnan()
    assert torch.equal(y.signbit()[known], expected.signbit()[known])
    assert torch.equal(GF.dropout(x, 1.0).isnan(), (x * 0).isnan())


@pytest.mark.parametrize("order", host.ORDERS)
def test_no_order_of_the_threads_changes_anything(order: host.Order, device: str) -> None:
    if not INTERPRETING:
        pytest.skip("a GPU's threads run in an order of their own")
    x = torch.randn(3, 8, 301).half()
    mask = GF.dropout_mask(x.shape)

    def results() -> list[torch.Tensor]:
        torch.manual_seed(11)
        y = [GF.dropout(x), GF.dropout1d(x), GF.dropout(x, mask=mask), GF.dropout_mask((3001,))]
        return [*y, GF.dropout1d(x.mT.contiguous().mT), GF.dropout(x.clone(), inplace=True)]

    expected = results()
    with host.thread_order(order, 5):
        assert all(map(torch.equal, results(), expected))


@pytest.mark.parametrize("shape", [(0,), (3, 0, 4)], ids=str)
def test_no_elements(shape: tuple[int, ...], device: str) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    mask = GF.dropout_mask(shape, device=device)
    assert mask.shape == (0,)
    assert GF.dropout(x) is x
    assert GF.dropout(x, mask=mask) is x
    assert GF.alpha_dropout(x, 0.5, True) is x
