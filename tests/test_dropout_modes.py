"""Dropout in autograd, compiled, in modules, and wherever torch has rules of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
import gpunn.nn
from gpunn.kernels.dropout import dropout_factors
from gpunn.reference import dropout as reference
from kit import as_numpy, check_gradients, each_dtype, launched, layouts
from test_dropout import P, seed_of

Dropout = Callable[..., torch.Tensor]
# Each function with an input that it takes without a warning.
FUNCTIONS: dict[str, tuple[Dropout, Dropout, tuple[int, ...]]] = {
    "dropout": (GF.dropout, F.dropout, (6, 7)),
    "dropout1d": (GF.dropout1d, F.dropout1d, (4, 6, 7)),
    "dropout2d": (GF.dropout2d, F.dropout2d, (4, 6, 3, 5)),
    "dropout3d": (GF.dropout3d, F.dropout3d, (4, 6, 3, 5)),
    "alpha_dropout": (GF.alpha_dropout, F.alpha_dropout, (6, 7)),
    "feature_alpha_dropout": (GF.feature_alpha_dropout, F.feature_alpha_dropout, (6, 7, 5)),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def seeded(function: Dropout, *arguments: Any, **options: Any) -> Callable[..., torch.Tensor]:
    """The function with the same random bits at every call."""

    def call(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(12)
        return function(x, *arguments, **options)

    return call


# --- autograd ---


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_gradient_is_the_factor(p: float, device: str) -> None:
    """Exactly, of kept negative values too, and for dy in any layout."""
    x = torch.randn(2, 8, 3, 4, device=device, requires_grad=True)
    factors = dropout_factors(torch.tensor([seed_of(1, device)], device=device), x.detach(), p)
    base = torch.randn(x.shape, device=device)
    for layout, dy in layouts(base):
        seed_of(1, device)
        y = GF.dropout(x, p)
        (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (second,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(y, x * factors), layout
        assert torch.equal(first, dy * factors), layout
        assert torch.equal(second, first), layout
    seed_of(1, device)
    (dx,) = torch.autograd.grad(GF.dropout(x, p).sum(), x)
    assert torch.equal(dx, factors)


@each_function
def test_gradients_once_and_twice(name: str) -> None:
    function, _, shape = FUNCTIONS[name]
    small = [min(size, 2 + i % 2) for i, size in enumerate(shape)]
    check_gradients(seeded(function, P, True), torch.randn(small))


def test_gradients_by_a_mask_and_in_channels_last() -> None:
    x = torch.randn(2, 2, 3, 2)
    check_gradients(seeded(lambda x: GF.dropout(x, P, mask=GF.dropout_mask(x.shape, P))), x)
    check_gradients(seeded(lambda x: GF.dropout(x.mT.movedim(1, -1), P)), x)


@each_function
def test_the_graph_keeps_a_seed_and_no_mask(name: str, device: str) -> None:
    function, _, shape = FUNCTIONS[name]
    x = torch.randn(shape, device=device, requires_grad=True)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x, P, True)
    assert [(tensor.dtype, tensor.numel()) for tensor in saved] == [(torch.int64, 1)]
    with gpunn.trace() as trace:
        y.sum().backward()
    assert len(launched(trace, "dropout_forward")) == 1


def test_the_graph_keeps_a_given_mask_and_no_copy(device: str) -> None:
    x = torch.randn(5, 7, device=device, requires_grad=True)
    saved: list[torch.Tensor] = []
    mask = GF.dropout_mask(x.shape, device=device)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: mask):
        GF.dropout(x, mask=mask)
    assert [tensor.data_ptr() for tensor in saved] == [mask.data_ptr()]
    y = GF.dropout(x, mask=mask)
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_function
def test_checkpointing_draws_the_same_mask_again(name: str, device: str) -> None:
    function, _, shape = FUNCTIONS[name]
    x = torch.randn(shape, device=device, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return function(x, 0.5, True) ** 2

    seed_of(2, device)
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    torch.rand(3, device=device)
    (got,) = torch.autograd.grad(y.sum(), x)
    seed_of(2, device)
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(got, expected)


# --- as torch's ---


@each_function
def test_the_input_itself_where_there_is_nothing_to_do(name: str, device: str) -> None:
    function, theirs, shape = FUNCTIONS[name]
    x = torch.randn(shape, device=device)
    for p, training, inplace in ((0.5, False, False), (0, True, False), (0.0, True, True)):
        assert theirs(x, p, training, inplace).data_ptr() == x.data_ptr()
        assert function(x, p, training, inplace) is x


@each_function
@pytest.mark.parametrize("p", [-0.1, 1.1, 2])
def test_p_must_be_a_probability(name: str, p: float, device: str) -> None:
    function, theirs, shape = FUNCTIONS[name]
    x = torch.randn(shape, device=device)
    for training in (True, False):
        with pytest.raises(ValueError, match="between 0 and 1"):
            theirs(x, p, training)
        with pytest.raises(ValueError, match=f"p: .*between 0 and 1, but got {p}"):
            function(x, p, training)
    with pytest.raises(ValueError, match=f"p: .*between 0 and 1, but got {p}"):
        GF.dropout_mask(shape, p)


def said(function: Dropout, x: torch.Tensor, p: float) -> list[str]:
    """The warnings and the error of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function(x, p, True)
        except RuntimeError as error:
            return [*(str(w.message) for w in caught), str(error)]
    return [str(w.message) for w in caught]


@each_function
@pytest.mark.parametrize("n_dimensions", range(7))
def test_dimensions_as_torch(name: str, n_dimensions: int, device: str) -> None:
    """The same warning, the same error, the same channels dropped."""
    ours, theirs, _ = FUNCTIONS[name]
    x = torch.ones((5, 4, 3, 2, 2, 3)[:n_dimensions], device=device)
    assert said(ours, x, 0.5) == said(theirs, x, 0.5)
    assert said(ours, x, 1.0) == said(theirs, x, 1.0)


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize(
    ("name", "shape", "channel"),
    [
        ("dropout2d", (5, 4), 1),
        ("dropout2d", (5, 4, 3), 1),
        ("dropout2d", (5, 4, 3, 2, 2), 1),
        ("dropout3d", (9,), 0),
        ("dropout3d", (9, 3), 0),
        ("dropout3d", (9, 3, 2), 0),
        ("dropout3d", (9, 2, 2, 2, 2, 3), 0),
        ("feature_alpha_dropout", (5, 4), 1),
    ],
    ids=str,
)
def test_channels_of_unusual_dimensions_are_torchs(
    name: str, shape: tuple[int, ...], channel: int, device: str
) -> None:
    ours, theirs, _ = FUNCTIONS[name]
    x = torch.ones(shape, device=device)
    kept = reference.kept_channels(seed_of(3, device), shape, 0.5, channel)
    y = ours(x, 0.5, True)
    assert np.array_equal(as_numpy(y) == as_numpy(y).max(), kept)
    for result in (y, theirs(x, 0.5, True)):  # a channel is of one value, and they differ
        channels = result.flatten(channel + 1) if len(shape) > channel + 1 else result[..., None]
        assert (channels == channels[..., :1]).all()
        assert len(channels[..., 0].unique()) == 2


@pytest.mark.parametrize("options", [{}, {"mask": True}], ids=["drawn", "by a mask"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_kernels_do_not_take_is_torchs(
    options: dict[str, bool], inplace: bool, device: str
) -> None:
    x = torch.randn(7, 9, device=device)
    mask = GF.dropout_mask(x.shape, device=device) if options else None
    expected = GF.dropout(x, P, mask=mask)
    with gpunn.backend("torch"), gpunn.trace() as trace:
        y = GF.dropout(x.clone(), P, True, inplace, mask=mask)
    assert [record.reason for record in trace.fallbacks] == ["backend('torch')"]
    assert not trace.launches
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - P))
    if options:
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("n", [8000, 8001, 8007])
def test_a_mask_by_torch(n: int, device: str) -> None:
    with gpunn.backend("torch"), gpunn.trace() as trace:
        masks = [GF.dropout_mask((n,), p, device=device) for p in (P, 1.0, 0.0)]
    assert [record.reason for record in trace.fallbacks] == ["backend('torch')"] * 2  # 0 is known
    bits = [np.unpackbits(mask.cpu().numpy(), bitorder="little") for mask in masks]
    assert {mask.shape for mask in masks} == {((n + 7) // 8,)}
    assert abs(bits[0][:n].mean() - (1 - P)) < 0.03
    assert not bits[1].any()
    assert bits[2][:n].all()
    assert not any(some[n:].any() for some in bits)


def test_other_devices_and_dtypes_are_torchs(device: str) -> None:
    integers = torch.arange(9, device=device)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        assert GF.dropout(torch.ones(3, 4, device="meta")).is_meta
        assert GF.dropout_mask((3, 4), device="meta").shape == (2,)
        assert GF.dropout(integers, 0.0) is integers
        mask = GF.dropout_mask((9,), 0.0, device=device)
        assert GF.dropout(integers, 0.0, mask=mask).tolist() == integers.tolist()
    assert [record.reason for record in trace.fallbacks] == [
        "meta tensor",
        "meta tensor",
        f"no kernel for torch.int64 on {device}",
    ]


def test_a_mask_that_does_not_fit_is_refused(device: str) -> None:
    x = torch.randn(3, 7, device=device)
    mask = GF.dropout_mask(x.shape, device=device)
    for wrong in (mask[:-1], mask.to(torch.int32), mask.view(1, 3)):
        with pytest.raises(RuntimeError, match=r"mask: expected \(3,\) of torch.uint8"):
            GF.dropout(x, mask=wrong)
    with pytest.raises(TypeError, match="mask: expected a tensor, got list"):
        GF.dropout(x, mask=[1])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"mask: expected device .*, got meta"):
        GF.dropout(x, mask=mask.to("meta"))
    with pytest.raises(TypeError, match="input: dropout expects a tensor, got list"):
        GF.dropout([1.0])  # type: ignore[arg-type]
    strided = torch.stack([mask, mask], 1)[:, 0]
    assert torch.equal(GF.dropout(x, mask=strided), GF.dropout(x, mask=mask))


@each_function
@each_dtype
def test_autocast_as_torch(name: str, dtype: torch.dtype, device: str) -> None:
    ours, theirs, shape = FUNCTIONS[name]
    x = torch.randn(shape, device=device, dtype=dtype)
    with torch.autocast(device, torch.bfloat16):
        assert ours(x, P, True).dtype == theirs(x, P, True).dtype == dtype


# --- modules and compilers ---


@pytest.mark.parametrize("name", ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d"])
@pytest.mark.parametrize("inplace", [False, True])
def test_modules_drop_in_training_alone(name: str, inplace: bool, device: str) -> None:
    layer = getattr(gpunn.nn, name)(0.5, inplace)
    shape = FUNCTIONS[name.lower()][2]
    x = torch.randn(shape, device=device)
    expected = seeded(getattr(GF, name.lower()), 0.5)(x)
    given = x.clone()
    assert torch.equal(seeded(layer)(given), expected)
    assert torch.equal(given, expected if inplace else x)
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="between 0 and 1"):
        getattr(gpunn.nn, name)(1.5)


@pytest.mark.parametrize("name", ["AlphaDropout", "FeatureAlphaDropout"])
def test_alpha_modules(name: str, device: str) -> None:
    """Which write in place as little as torch's do."""
    function = {"AlphaDropout": GF.alpha_dropout, "FeatureAlphaDropout": GF.feature_alpha_dropout}
    layer, x = getattr(gpunn.nn, name)(0.5, True), torch.randn(4, 6, 5, device=device)
    before = x.clone()
    assert torch.equal(seeded(layer)(x), seeded(function[name], 0.5, True)(x))
    assert torch.equal(x, before)
    getattr(torch.nn, name)(0.5, True)(x)
    assert torch.equal(x, before)
    assert layer.eval()(x) is x


def test_a_module_takes_a_mask(device: str) -> None:
    x = torch.randn(4, 6, device=device)
    mask = GF.dropout_mask(x.shape, device=device)
    assert torch.equal(gpunn.nn.Dropout()(x, mask=mask), GF.dropout(x, mask=mask))


@each_function
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_a_graph_break(name: str, inplace: bool, device: str) -> None:
    torch._dynamo.reset()
    function, _, shape = FUNCTIONS[name]

    def net(x: torch.Tensor) -> torch.Tensor:
        return function(x * 2, 0.5, True, inplace) + 1

    x, dy = torch.randn(shape, device=device), torch.randn(shape, device=device)
    results = []
    for call in (torch.compile(net, fullgraph=True, backend="aot_eager"), net):
        leaf = x.clone().requires_grad_()
        with gpunn.trace() as trace:
            y = seeded(call)(leaf)
            results.append((y, *torch.autograd.grad(y, leaf, dy)))
        assert len(launched(trace, "dropout_forward")) == 2
    assert all(map(torch.equal, *results))


def test_masks_and_varying_sizes_compile(device: str) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def net(x: torch.Tensor) -> torch.Tensor:
        return GF.dropout(x.mT, mask=GF.dropout_mask(x.shape, 0.5, device=x.device))

    for rows in (5, 9):
        x = torch.randn(rows, 6, device=device)
        seed_of(4, device)
        mask = GF.dropout_mask(x.shape, 0.5, device=device)
        assert torch.equal(seeded_net(net, x, device), GF.dropout(x.mT, mask=mask))


def seeded_net(net: Dropout, x: torch.Tensor, device: str) -> torch.Tensor:
    seed_of(4, device)
    return net(x)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.func's own
def test_symbolic_tracing_and_function_transforms(device: str) -> None:
    net = gpunn.nn.Sequential(gpunn.nn.Dropout(), gpunn.nn.Dropout1d(), gpunn.nn.AlphaDropout())
    x = torch.randn(3, 4, device=device)
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(seeded(traced)(x).shape, x.shape)
    with gpunn.backend("auto"):
        per_row = torch.func.vmap(
            torch.func.grad(lambda x: GF.dropout(x).sum()), randomness="different"
        )
        assert set(per_row(torch.ones(4, 50, device=device)).unique().tolist()) == {0.0, 2.0}
