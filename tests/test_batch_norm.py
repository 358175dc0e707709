"""batch_norm against its float64 reference, in every mode, layout and dtype, and against torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.checks.comparison import any_algorithm
from gpunn.functional.activation import TORCH
from gpunn.kernels import batch_norm as kernels
from gpunn.kernels.batch_norm import StagedLaunch, unpacked_bits
from gpunn.kernels.launch import launchers
from gpunn.reference import activation as activations
from gpunn.reference import batch_norm as reference
from kit import as_numpy, check_gradients, each_dtype, launched, layouts

EPS, MOMENTUM = 1e-3, 0.3
SHAPE = (4, 10, 3, 5)
PARTS = ("y", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var")
Results = dict[str, Any]


def with_channels_last(x: torch.Tensor) -> torch.Tensor:
    """The same values, each position's channels together."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class Problem:
    """Operands of a normalisation, and what is made of them: by a function, or by the reference."""

    def __init__(
        self, mode: str, affine: bool, tracked: bool, activation: str, residual: bool
    ) -> None:
        self.training, self.activation = mode == "train", activation
        # of relu, all stays away from the kink, where a rounding decides
        apart = activation == "relu"
        channels, drawn = SHAPE[1:2], torch.randn(SHAPE)
        self.x = drawn / 4 + 3 * drawn.sign() if apart else 2 * drawn + 1
        self.weight = torch.rand(channels) + 0.5 if affine else None
        self.bias = torch.randn(channels) / (10 if apart else 1) if affine else None
        added = torch.randn(SHAPE)
        self.residual = added + 8 * apart * added.sign() if residual else None
        has_running = tracked or not self.training
        mean = torch.randn(channels) / (4 if apart else 1)
        self.running = (mean, torch.rand(channels) + 0.5) if has_running else None
        self.dy = torch.randn(SHAPE)
        self.frozen = mode == "frozen"

    def to(self, dtype: torch.dtype, device: str, channels_last: bool) -> None:
        """Rounds and lays out all of it; what channels have, to float32 where they are last."""
        of_channels = torch.float32 if channels_last else dtype
        for name in ("x", "weight", "bias", "residual", "dy"):
            tensor = getattr(self, name)
            if tensor is not None:
                images = tensor.dim() > 1
                tensor = tensor.to(device, dtype if images else of_channels)
                last = images and channels_last
                setattr(self, name, with_channels_last(tensor) if last else tensor)
        if self.running is not None:
            mean, var = self.running
            self.running = mean.to(device, of_channels), var.to(device, of_channels)

    def results(self, by_gpunn: bool) -> Results:
        """The value, the gradients and the running statistics after it."""
        leaves = {
            name: None if tensor is None else tensor.clone().requires_grad_(wanted)
            for name, tensor, wanted in (
                ("x", self.x, True), ("weight", self.weight, not self.frozen),
                ("bias", self.bias, not self.frozen), ("residual", self.residual, True),
            )
        }  # fmt: skip
        running = [None, None] if self.running is None else [part.clone() for part in self.running]
        arguments: Any = (
            leaves["x"], *running, leaves["weight"], leaves["bias"], self.training, MOMENTUM, EPS,
        )  # fmt: skip
        residual = leaves["residual"]
        if by_gpunn:
            y = GF.batch_norm(*arguments, activation=self.activation, residual=residual)
        else:
            z = F.batch_norm(*arguments)
            y = TORCH[self.activation](z if residual is None else z + residual)
        wanted = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
        gradients = torch.autograd.grad(y, list(wanted.values()), self.dy)
        found = {"y": y} | {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}
        return found | dict(zip(("running_mean", "running_var"), running, strict=True))

    def exact(self) -> Results:
        """The same, of the rounded operands, by the reference."""
        x, dy, weight, bias, residual = (
            None if t is None else as_numpy(t)
            for t in (self.x, self.dy, self.weight, self.bias, self.residual)
        )
        assert x is not None
        assert dy is not None
        running = [] if self.running is None else [as_numpy(part) for part in self.running]
        statistics = reference.batch_statistics(x, EPS)
        if not self.training:
            statistics = reference.running_statistics(running[0], running[1], EPS)
        elif running:
            variance = reference.unbiased_variance(x)
            running[0] = reference.updated(running[0], statistics.mean, MOMENTUM)
            running[1] = reference.updated(running[1], variance, MOMENTUM)
        z = reference.batch_norm_forward(x, weight, bias, statistics)
        z = z if residual is None else z + residual
        dz = activations.activation_backward(dy, z, self.activation)
        dx, dweight, dbias = reference.batch_norm_backward(dz, x, weight, statistics)
        y = activations.activation_forward(z, self.activation)
        parts = y, dx, dweight, dbias, dz, *(running or (None, None))
        return dict(zip(PARTS, parts, strict=True))


@each_dtype
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "sigmoid"])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_value_gradients_and_buffers(
    mode: str, activation: str, channels_last: bool, dtype: torch.dtype, device: str
) -> None:
    """With and without parameters, running statistics and a residual."""
    for affine, tracked, residual in itertools.product((True, False), repeat=3):
        problem = Problem(mode, affine, tracked, activation, residual)
        problem.to(dtype, device, channels_last)
        with gpunn.trace() as trace:
            got = problem.results(by_gpunn=True)
        launched(trace, "batch_norm_forward", "batch_norm_backward")
        with any_algorithm():
            baseline = problem.results(by_gpunn=False)
        exact = problem.exact()
        compared = [part for part in got if got[part] is not None]
        assert {"y", "dx"} <= set(compared)
        for part in compared:
            assert_accurate(got[part], exact[part], baseline[part], part)
        assert got["y"].stride() == problem.x.stride()


SHAPES = [
    (7, 3),
    (2, 1),
    (1, 2, 2),
    (5, 3, 1),
    (3, 5, 7),
    (2, 9, 4, 8),
    (1, 70, 3, 3),
    (2, 3, 2, 3, 4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_shapes_are_torchs(shape: tuple[int, ...], channels_last: bool, device: str) -> None:
    """Two to five dimensions, one channel, one image, more channels than a tile has."""
    x = torch.randn(shape, device=device)
    x = with_channels_last(x) if channels_last else x
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    agree_with_torch(x, residual, dy)


def agree_with_torch(x: torch.Tensor, residual: torch.Tensor, dy: torch.Tensor) -> None:
    """In training, with all that is fused."""
    weight, bias = torch.randn(2, x.shape[1], device=x.device)
    results = []
    for by_gpunn in (True, False):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        arguments: Any = (leaves[0], None, None, leaves[1], leaves[2], True)
        if by_gpunn:
            with gpunn.trace() as trace:
                y = GF.batch_norm(*arguments, activation="relu", residual=leaves[3])
            launched(trace, "batch_norm_forward")
        else:
            y = F.relu(F.batch_norm(*arguments) + leaves[3])
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_any_layout_of_input_residual_and_gradient(device: str) -> None:
    x, residual, dy = (torch.randn(2, 6, 4, 3, device=device) for _ in range(3))
    for (_, a), (_, b) in itertools.product(layouts(x), layouts(residual)):
        if not a.is_contiguous() and not b.is_contiguous() and a.stride() != b.stride():
            continue
        agree_with_torch(a, b, dy)
    for _, given in layouts(dy):
        agree_with_torch(x, residual, given)
        agree_with_torch(with_channels_last(x), residual, given)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(3, 11, 5, 3), (2, 40, 3, 3), (600, 4), (2, 3, 30, 30)], ids=str)
def test_the_bits_are_where_relu_passes(
    shape: tuple[int, ...], channels_last: bool, device: str
) -> None:
    """An eighth of a byte an element is all that is kept of it."""
    x, residual = torch.randn(2, *shape, device=device)
    x = with_channels_last(x) if channels_last else x
    y, _, _, bits = launchers["batch_norm_forward"](
        x, residual, None, None, None, None, True, 0.1, EPS, "relu", [], True
    )
    assert torch.equal(unpacked_bits(bits, x), y > 0)
    lines = shape[1] if not channels_last and x.dim() > 2 else x.numel() // shape[1]
    assert bits.numel() <= x.numel() / 8 + lines


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("residual", [False, True])
def test_what_is_kept(activation: str | None, residual: bool, device: str) -> None:
    """Neither y nor what is normalised; of relu and a residual the bits."""
    x, added = torch.randn(2, 4, 6, 5, 8, device=device)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        arguments: Any = (x.requires_grad_(), None, None, None, None, True)
        GF.batch_norm(*arguments, activation=activation, residual=added if residual else None)
    images = [tensor for tensor in kept if tensor.shape == x.shape]
    assert len(images) == 1 + (residual and activation == "gelu")
    assert any(t.dtype == torch.uint8 for t in kept) == (residual and activation == "relu")


@pytest.mark.parametrize(
    ("training", "activation", "residual", "channels_last"),
    [
        (True, None, False, False),
        (True, "relu", True, True),
        (True, "tanh", True, False),
        (True, "gelu", False, True),
        (False, "relu", True, False),
        (False, "gelu", True, True),
        (False, None, True, False),
    ],
)
def test_gradients_once_and_twice(
    training: bool, activation: str | None, residual: bool, channels_last: bool
) -> None:
    shape, running = (2, 2, 2), (torch.randn(2).double(), torch.rand(2).double() + 0.5)
    given: Any = (None, None) if training else running

    def function(x: torch.Tensor, weight: Any, bias: Any, *added: torch.Tensor) -> torch.Tensor:
        images = with_channels_last(x) if channels_last else x
        arguments: Any = (*given, weight, bias, training, 0.1, EPS)
        fused: Any = {"activation": activation, "residual": added[0] if added else None}
        return GF.batch_norm(images, *arguments, **fused)

    inputs = [torch.randn(shape), torch.rand(2) + 0.5, torch.randn(2)]
    check_gradients(function, *inputs, *([torch.randn(shape)] if residual else []))


def test_running_statistics_after_ten_steps(device: str) -> None:
    """Also with a cumulative average, and with a mean that is large beside the deviation."""
    for momentum in (0.1, None):
        ours = gpunn.nn.BatchNorm2d(5, momentum=momentum).to(device)
        theirs = torch.nn.BatchNorm2d(5, momentum=momentum).to(device)
        for step in range(10):
            x = torch.randn(3, 5, 4, 4, device=device) + 100 * step
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
        for name, expected in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], expected)
        assert ours.num_batches_tracked == 10
        x = torch.randn(3, 5, 4, 4, device=device)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_numbers_of_channels_that_are_not_side_by_side(device: str) -> None:
    """In training the running ones are written, and nothing between them."""
    x = torch.randn(4, 3, 5, device=device)
    table = torch.rand(4, 4, device=device) + 0.5
    tables = [table.clone() for _ in range(2)]
    for training in (True, False):
        (a, b, c, d), (mean, var, weight, bias) = (table[:3].unbind(1) for table in tables)
        expected = F.batch_norm(x, mean, var, weight, bias, training)
        torch.testing.assert_close(GF.batch_norm(x, a, b, c, d, training), expected)
    torch.testing.assert_close(*tables)
    assert not torch.equal(tables[0][:3, :2], table[:3, :2])
    assert torch.equal(tables[0][:, 2:], table[:, 2:])


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.3, -7e5])
def test_without_variance_there_is_the_bias(value: float, device: str) -> None:
    """A channel of one value: what it is off its mean by rounding is no negative variance."""
    x = torch.full((3, 2, 37), value, device=device)
    bias = torch.tensor([1.0, -2.0], device=device)
    mean, squares = launchers["batch_norm_statistics"](x)
    assert (squares >= 0).all()
    assert (squares / 111 <= (1e-6 * value) ** 2).all()
    torch.testing.assert_close(mean, x[0, :, 0])
    running = torch.zeros(2, device=device), torch.full((2,), 9.0, device=device)
    y = GF.batch_norm(x, *running, None, bias, True, 1.0, 10.0)
    torch.testing.assert_close(y, bias[:, None].expand_as(x), rtol=0.05, atol=0)
    torch.testing.assert_close(running[0], x[0, :, 0])
    assert (running[1] <= (1e-6 * value) ** 2 * 1.01).all()  # as above, and no longer 9


def test_a_mean_far_from_zero_keeps_its_variance(device: str) -> None:
    """Σx² - (Σx)² / n would leave nothing of a deviation of 1 beside a mean of 10,000.

    The chunks' means, rounded to float32, are off by up to 5e-4; they differ by about 3e-2.
    """
    x = torch.randn(4, 3, 40, 40, device=device) + 1e4
    mean, squares = launchers["batch_norm_statistics"](x)
    n = x.numel() // 3
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(squares.double() / n, exact.var(1, correction=0), rtol=3e-5, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_chunks_of_no_power_of_two(
    channels_last: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three: a program adds up four, of which the last lies beyond them."""
    small = StagedLaunch(4, block_positions=16, block_channels=8)
    for name in ("STATISTICS_FIRST", "STATISTICS_LAST", "SUMS_FIRST", "SUMS_LAST"):
        monkeypatch.setattr(kernels, name, small)
    monkeypatch.setattr(kernels, "MOST_CHUNKS", 3)
    x = torch.randn(3, 5, 16, device=device) + 2
    x = with_channels_last(x) if channels_last else x
    assert kernels.plan_for(x, False).sums.n_parts == kernels.plan_for(x, True).sums.n_parts == 3
    dy, weight = torch.randn_like(x), torch.rand(5, device=device) + 0.5
    results = []
    for function, dtype in ((GF.batch_norm, x.dtype), (F.batch_norm, torch.float64)):
        call: Any = function
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = call(leaves[0], None, None, leaves[1], training=True)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_parts_of_a_batch_that_drift_apart(channels_last: bool, device: str) -> None:
    """The chunks' statistics differ and are added up as such; the running ones move once."""
    x = torch.randn(64, 2, 33, device=device) + torch.arange(64, device=device)[:, None, None]
    x[0] += 1e3
    x = with_channels_last(x) if channels_last else x
    results = []
    for function, dtype in ((GF.batch_norm, x.dtype), (F.batch_norm, torch.float64)):
        call: Any = function
        mean, var = torch.zeros(2, 2, device=device, dtype=dtype)
        with gpunn.trace() as trace:
            y = call(x.to(dtype), mean, var, training=True, momentum=0.3)
        results.append([part.double() for part in (y, mean, var)])
        if call is GF.batch_norm:
            assert trace.launches[0].grid[0] > 1, "there is but one chunk"
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    mean, squares = launchers["batch_norm_statistics"](x)
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-5, atol=0)
    variance = exact.var(1, correction=0)
    torch.testing.assert_close(squares.double() / exact.shape[1], variance, rtol=1e-5, atol=0)
