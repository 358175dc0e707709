"""group_norm and instance_norm: values and gradients against NumPy float64, read once and twice."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from drawing import drawing
from gpunn.functional.activation import TORCH
from gpunn.kernels import group_norm as launcher
from gpunn.kernels import groups
from gpunn.kernels.activation import device_functions
from gpunn.kernels.batch_norm import ChannelsLaunch, constants
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import Call, Device, captured, run
from gpunn.profiling.static_report import chip
from gpunn.reference import activation as activations
from gpunn.reference import group_norm as reference
from kit import as_numpy, each_dtype, launched, layouts

EPS = 1e-5
OPERATORS = ("group_norm_forward", "group_norm_backward")
ONCE, TWICE = "group_norm_kernel", "group_normalise_kernel"
# On a device of two multiprocessors, by tiles of 8 positions and channels and 4 parts of a group:
# planes of the shapes below have several chunks, these several tiles, and groups several rounds of
# parts, of which the last is not full.
SMALL, FEW_PARTS = ChannelsLaunch(4, 8, 8), launcher.PartsLaunch(1, 4)
# With the channels last, a tile has more of them.
EACH_TILE = [(tile, False) for tile in launcher.TILES]
EACH_TILE += [(t, True) for t in launcher.TILES if t.block_channels >= launcher.FEWEST_CHANNELS]
each_reading = pytest.mark.parametrize("reading", [ONCE, TWICE])
each_layout = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


def read(reading: str, patch: pytest.MonkeyPatch) -> None:
    """Makes groups be read once, as they are where they are small, or twice."""
    if reading == TWICE:
        patch.setattr(launcher, "TILES", ())
    patch.setattr(launcher, "device_of", lambda _: Device(90, n_multiprocessors=2))
    for name in ("CHANNELS_FIRST", "CHANNELS_LAST"):
        patch.setattr(launcher, name, SMALL)
    patch.setattr(launcher, "FEW_POSITIONS", ChannelsLaunch(4, 4, 8))
    patch.setattr(launcher, "PARTS", FEW_PARTS)


def with_channels_last(x: torch.Tensor) -> torch.Tensor:
    """The same values, each position's channels together."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def results(
    ours: bool, leaves: list[Any], num_groups: int, dy: torch.Tensor, activation: str
) -> list[torch.Tensor]:
    """Value and gradients of what there is among x, weight and bias."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    x, weight, bias = leaves
    if ours:
        y = GF.group_norm(x, num_groups, weight, bias, EPS, activation=activation)
    else:
        if bias is not None and weight is None:  # which torch cannot differentiate on a CPU
            weight = torch.ones_like(bias)
        y = TORCH[activation](F.group_norm(x, num_groups, weight, bias, EPS))
    return [y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy)]


def assert_right(
    x: torch.Tensor,
    num_groups: int,
    activation: str = "identity",
    dy: torch.Tensor | None = None,
    parameters: str = "both",
    dtype: torch.dtype | None = None,
) -> gpunn.Trace:
    """Value and gradients, no worse than twice torch's own error."""
    dy = torch.randn(x.shape, device=x.device).to(x.dtype) if dy is None else dy
    weight, bias = torch.randn(2, x.shape[1], device=x.device).to(dtype or x.dtype)
    leaves = [
        x, weight if parameters in ("both", "weight") else None,
        bias if parameters in ("both", "bias") else None,
    ]  # fmt: skip
    before = [x.clone(), dy.clone()]
    with gpunn.trace() as trace:
        got = results(True, leaves, num_groups, dy, activation)
    launched(trace, *OPERATORS)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])
    # On a CPU: torch's on a GPU takes no parameters of another dtype.
    on_cpu = [None if t is None else t.cpu() for t in leaves]
    baseline = results(False, on_cpu, num_groups, dy.cpu(), activation)
    flat, w, b = (None if t is None else as_numpy(t) for t in leaves)
    assert flat is not None
    z = reference.group_norm_forward(flat, num_groups, w, b, EPS)
    dz = activations.activation_backward(as_numpy(dy), z, activation)
    dx, *others = reference.group_norm_backward(dz, flat, num_groups, w, EPS)
    truths = [activations.activation_forward(z, activation), dx]
    truths += [truth for truth, leaf in zip(others, leaves[1:], strict=True) if leaf is not None]
    names = ("y", "dx", "a parameter's", "a parameter's")
    for mine, truth, torchs, name in zip(got, truths, baseline, names, strict=False):
        assert_accurate(mine, truth, torchs, name)
    return trace


@each_dtype
@each_layout
@each_reading
def test_value_and_gradients(
    reading: str, last: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(reading, monkeypatch)
    x = torch.randn(2, 6, 5, 7, device=device).to(dtype) * 2 + 1
    trace = assert_right(with_channels_last(x) if last else x, 2, "silu")
    assert {reading} <= {record.kernel for record in trace.launches}


@pytest.mark.parametrize(("tile", "last"), EACH_TILE, ids=str)
def test_each_tile(last: bool, tile: ChannelsLaunch, device: str) -> None:
    """Groups that all but fill a tile, and two groups in one, the last of which has one."""
    n_positions, widest = tile.block_positions, tile.block_channels
    for per_group, num_groups in ((widest, 1), (widest // 2, 3)) if widest > 1 else ((1, 2),):
        x = torch.randn(1, per_group * num_groups, n_positions, device=device)
        trace = assert_right(with_channels_last(x) if last else x, num_groups)
        if num_groups < 3:  # else a smaller one may do
            assert trace.launches[0].launch == tile


@pytest.mark.parametrize(
    ("shape", "num_groups", "last", "backward", "planes"),
    [
        ((1, 64, 256), 1, False, False, 64),  # the largest tile
        ((1, 64, 256), 1, False, True, 0),  # of gradients it would spill
        ((1, 64, 225), 1, False, False, 0),  # and of planes at odd addresses
        ((1, 60, 240), 1, True, False, 0),
        ((1, 64, 240), 1, True, False, 64),
        ((1, 120, 9), 12, True, False, 40),  # 6 groups of 10 would fit, 4 begin at multiples of 8
        ((1, 66, 9), 6, True, False, 55),  # which 5 groups of 11 never do
        ((1, 8, 1000), 4, False, False, 4),
        ((1, 8, 1000), 4, True, False, 0),  # 4 channels of each position are too short a run
    ],
)
def test_what_a_program_holds(
    shape: tuple[int, ...], num_groups: int, last: bool, backward: bool, planes: int
) -> None:
    """As many groups as memory is read well in, and registers hold; none where they are long."""
    x = torch.empty(shape, device="meta")
    plan = launcher.plan_for(with_channels_last(x) if last else x, num_groups, backward)
    assert plan.planes_a_program == planes
    assert (plan.n_chunks > 0) == (planes == 0)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes and options of a call."""
    return {
        "images": draw(st.integers(1, 2)),
        "num_groups": draw(st.integers(1, 5)),
        "per_group": draw(st.integers(1, 6)),
        "places": draw(st.lists(st.integers(1, 4), max_size=3)),
        "last": draw(st.booleans()),
        "reading": draw(st.sampled_from([ONCE, TWICE])),
        "activation": draw(st.sampled_from(["identity", "gelu", "tanh"])),
        "parameters": draw(st.sampled_from(["both", "weight", "bias", "neither"])),
        "seed": draw(st.integers(0, 999)),
    }


@pytest.mark.skipif(not INTERPRETING, reason="in float64, which kernels on a GPU do not take")
@drawing(0, 25)
@given(problem=problems())
def test_drawn_problems(problem: dict[str, Any], device: str) -> None:
    """Two to five dimensions, one of anything, groups on both sides of a tile's and an image's end.

    In float64: of groups of two values, say, rounding leaves hardly anything of a gradient.
    """
    torch.manual_seed(problem["seed"])
    num_groups, wanted = problem["num_groups"], problem["parameters"]
    shape = problem["images"], num_groups * problem["per_group"], *problem["places"]
    assume(math.prod(shape) > num_groups)  # which is refused
    x, dy = torch.randn(2, *shape, device=device, dtype=torch.float64)
    x = with_channels_last(x) if problem["last"] else x
    weight, bias = torch.randn(2, shape[1], device=device, dtype=torch.float64)
    leaves = [x, weight if wanted in ("both", "weight") else None]
    leaves += [bias if wanted in ("both", "bias") else None]
    with pytest.MonkeyPatch.context() as patch:
        read(problem["reading"], patch)
        got = results(True, leaves, num_groups, dy, problem["activation"])
    expected = results(False, leaves, num_groups, dy, problem["activation"])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@each_dtype
@each_reading
def test_groups_far_from_zero(
    reading: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their variance is not a difference of squares, nor their mean a sum of large numbers."""
    read(reading, monkeypatch)
    size = {torch.float32: 1e4, torch.float16: 100.0, torch.bfloat16: 30.0}[dtype]
    assert_right((torch.randn(2, 6, 12, 12, device=device) + size).to(dtype), 2)


@each_reading
def test_channels_that_drift_apart(
    reading: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts whose own means differ by more than they vary; the first is far from all others."""
    read(reading, monkeypatch)
    x = torch.randn(2, 6, 5, 9, device=device) + 50 * torch.arange(6, device=device)[:, None, None]
    x[:, 0] -= 1e3
    assert_right(x, 2)


@each_reading
def test_groups_without_variance(
    reading: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one value, many times or once: nothing is divided by zero, and there is the bias."""
    read(reading, monkeypatch)
    weight, bias = torch.randn(2, 4, device=device)
    for x in (torch.full((2, 4, 37), 1000.3, device=device), torch.randn(3, 4, 1, device=device)):
        num_groups = 2 if x.shape[2] > 1 else 4
        dy = torch.randn_like(x)
        y, dx, *others = results(True, [x, weight, bias], num_groups, dy, "identity")
        torch.testing.assert_close(y, bias[:, None].expand_as(x), rtol=0.05, atol=0.05)
        _, expected, *theirs = results(False, [x, weight, bias], num_groups, dy, "identity")
        assert dx.isfinite().all()
        if num_groups == 4:
            torch.testing.assert_close(dx, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(others[1], theirs[1], rtol=1e-4, atol=1e-4)


@each_reading
@each_layout
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_group(
    value: float, last: bool, reading: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(reading, monkeypatch)
    x, dy = torch.randn(2, 2, 6, 3, 3, device=device)
    x = with_channels_last(x) if last else x
    x[1, 3, 2, 0] = value
    weight = torch.randn(6, device=device)
    weight[0] = math.nan  # in every image, of the first group alone
    y, dx, dweight = results(True, [x, weight, None], 3, dy, "silu")
    expected = results(False, [x, weight, None], 3, dy, "silu")
    for ours, theirs in zip((y, dx, dweight), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert y[:, 4:].isfinite().all()
    assert dx[:, 4:].isfinite().all()


@each_reading
def test_layouts_of_input_and_gradient(
    reading: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(reading, monkeypatch)
    x, dy = torch.randn(2, 2, 6, 3, 3, device=device)
    of_input = [laid_out for _, laid_out in layouts(x) if laid_out.flatten(1).unique().numel() > 1]
    of_gradient = [laid_out for _, laid_out in layouts(dy)]
    for a, b in zip(of_input, reversed(of_gradient), strict=False):
        assert_right(a, 3, "silu", b)
    for laid_out in of_gradient[-3:]:  # two expanded ones, and with the channels last
        assert_right(x, 3, "silu", laid_out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_reading
def test_parameters_in_float32(
    reading: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(reading, monkeypatch)
    x = torch.randn(2, 6, 5, 7, device=device).to(dtype)
    for given_ones in ("both", "weight", "bias"):
        assert_right(x, 3, parameters=given_ones, dtype=torch.float32)


def test_long_groups_are_shared_out() -> None:
    """Of few long groups, chunks of planes are; of short ones, the groups: two programs or more."""
    shapes = [(2, 2048, 256, 256), (1, 32, 512, 512), (1, 1, 2048, 2048), (8, 1280, 8, 8)]
    for shape, last in itertools.product(shapes, (False, True)):
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        with captured(chip(90)) as calls, gpunn.backend("kernels"):
            GF.group_norm(x, min(32, shape[1]))
        reading: Call = calls[0]
        assert reading.grid[0] >= min(2 * 132, shape[0] * 32), (shape, last)
        elements = math.prod(shape) / reading.grid[0]
        assert elements <= max(2**20, math.prod(shape) / 264), (shape, last)


@pytest.mark.parametrize(
    ("last", "near", "far"), [(True, (8, 1, 2), (2**30, 1, 2)), (False, (0, 4, 1), (0, 2**30, 1))]
)
def test_offsets_past_two_to_the_31(
    last: bool, near: tuple[int, ...], far: tuple[int, ...], device: str
) -> None:
    """Three images, or planes, 2^30 elements apart: an index times its stride in 32 bits."""
    torch.use_deterministic_algorithms(False)  # or the gap would be filled, and take real memory
    n_channels = 2 if last else 1
    n_all = 3 * n_channels
    values = torch.randn(3, n_channels, 4, device=device).half()
    statistic, sums = torch.rand(n_all, device=device), torch.randn(2, n_all, device=device)
    kept, found = torch.empty(3, n_all, device=device), []
    options: Any = {"launch": ChannelsLaunch(4, 4, 4), "CHANNELS_LAST": last}
    function, gradient = device_functions("silu", []), constants("silu", [])
    for strides in (near, far):
        x, out = torch.empty(2, 2**31 + 64, dtype=torch.float16, device=device)
        at = (strides[0] if last else strides[1], *strides[1:])
        x.as_strided(values.shape, at).copy_(values)
        result, n_planes = out.as_strided(values.shape, at), n_channels if last else n_all
        sizes = n_channels, 1, 4, n_planes
        once, twice = (*sizes, n_planes, 4, n_all, *strides), (*sizes, 1, 4, n_all, *strides)
        grid, given = (3 if last else 1,), (x, None, None, statistic, statistic)
        run("far", groups.group_norm_kernel, grid, x, None, None, out, *kept, *once, EPS,
            EIGHTS=False, **function, **options)  # fmt: skip
        found += [result.clone(), kept.clone()]
        run("far", groups.group_norm_gradient_kernel, grid, x, *given, out, kept, *once,
            EIGHTS=False, **gradient, **options)  # fmt: skip
        found += [result.clone(), kept[:2].clone()]
        run("far", groups.plane_statistics_kernel, grid, x, kept, *twice[2:], **options)
        found += [kept[:2].clone()]
        run("far", groups.group_normalise_kernel, grid, *given, out, *twice, **function, **options)
        found += [result.clone()]
        run("far", groups.plane_sums_kernel, grid, x, *given, kept, *twice, **gradient, **options)
        found += [kept[:2].clone()]
        run("far", groups.group_input_gradient_kernel, grid, x, *given, sums, out, *twice,
            **gradient, **options)  # fmt: skip
        found += [result.clone()]
    half = len(found) // 2
    for ours, theirs in zip(found[:half], found[half:], strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)
