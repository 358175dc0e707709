"""Augmentation against its float64 reference: values and gradients of every distortion.

``test_augment_drawn.py`` has combinations of them; ``test_augment_modes.py`` what is around them:
autograd, torch.compile, refusals, the layer.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from closeness import assert_accurate
from gpunn.checks.augment import ALL, CASES, COLOURS, GEOMETRY
from gpunn.functional.augment_arguments import range_of, settings_of
from gpunn.functional.augment_composition import composed
from gpunn.kernels import augment as kernels
from gpunn.kernels.host import ORDERS, thread_order
from gpunn.reference import augment as reference
from gpunn.reference.augment import Distortion
from kit import as_numpy, each_dtype, launched, layouts

SEED = 12
LAUNCHED = ("augment_forward", "augment_backward")


def distortion_of(asked: dict[str, Any]) -> Distortion:
    """What the reference takes for what the function is asked for."""
    plain = {field.name for field in fields(Distortion) if field.type in ("float", "str", "bool")}
    found: dict[str, Any] = {k: v if k in plain else range_of(k, v) for k, v in asked.items()}
    return Distortion(**found)


def value_and_gradient(
    function: Any, images: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    images = images.detach().requires_grad_()
    y = function(images)
    return y, torch.autograd.grad(y, images, dy)[0]


def by_torch(images: torch.Tensor, asked: dict[str, Any], **more: Any) -> torch.Tensor:
    with gpunn.backend("torch"):
        return GF.augment(images, seed=SEED, **asked, **more)


def results(
    images: torch.Tensor, dy: torch.Tensor, asked: dict[str, Any]
) -> list[tuple[str, torch.Tensor, Any, torch.Tensor]]:
    """The value and the gradient: ours by the kernels, the exact one, and torch's."""
    size, exact = list(dy.shape[2:]), distortion_of(asked)
    more: dict[str, Any] = {"size": size, "dtype": dy.dtype}
    with gpunn.trace() as trace:
        got = value_and_gradient(lambda x: GF.augment(x, seed=SEED, **asked, **more), images, dy)
    launched(trace, *LAUNCHED)
    torchs = value_and_gradient(lambda x: by_torch(x, asked, **more), images, dy)
    y = reference.augment_forward(as_numpy(images), SEED, size, exact)
    dx = reference.augment_backward(as_numpy(dy), as_numpy(images), SEED, exact)
    return [("y", got[0], y, torchs[0]), ("dx", got[1], dx, torchs[1])]


def pictures(*shape: int) -> torch.Tensor:
    """Colours of which some are beyond black and white, and no two alike."""
    return 1.2 * torch.rand(shape) - 0.1


# --- values and gradients ---


@each_dtype
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case: str, dtype: torch.dtype, device: str) -> None:
    """Each distortion alone, and all of them; of the last, tiles share a picture both ways."""
    asked, shape = CASES[case]
    images = pictures(*shape).to(device, dtype)
    for what, got, exact, torchs in results(images, torch.randn(shape).to(device, dtype), asked):
        assert_accurate(got, exact, torchs, what)


def test_layouts(device: str) -> None:
    """Every layout of the pictures, and every one of the gradient; of three channels and of two."""
    for shape in ((2, 3, 6, 8), (2, 2, 6, 8)):
        asked = {**GEOMETRY, "brightness": 0.5}
        base, base_dy = pictures(*shape).to(device), torch.randn(shape, device=device)
        base.view(-1)[0] = base_dy.view(-1)[0] = 0.75  # what the expanded layouts repeat
        for layout, images in layouts(base):
            for what, got, exact, torchs in results(images, base_dy, asked):
                assert_accurate(got, exact, torchs, f"{what} of images {layout}")
        for layout, dy in layouts(base_dy):
            for what, got, exact, torchs in results(base, dy, asked):
                assert_accurate(got, exact, torchs, f"{what} of dy {layout}")


# --- what is known exactly ---


@each_dtype
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_changes_nothing(dtype: torch.dtype, channels_last: bool, device: str) -> None:
    images = torch.randn(2, 3, 35, 41).to(device, dtype)
    images = images.to(memory_format=torch.channels_last) if channels_last else images
    dy = torch.randn_like(images)
    for mode in kernels.PADDING_MODES:
        y, dx = value_and_gradient(lambda x, m=mode: GF.augment(x, padding_mode=m), images, dy)
        assert torch.equal(y, images)
        assert y.stride() == images.stride()
        assert y.data_ptr() != images.data_ptr()
        assert torch.equal(dx, dy)
        assert dx.stride() == images.stride()


def test_flips_and_quarter_turns_only_move_pixels(device: str) -> None:
    x = torch.randn(3, 3, 33, 33, device=device)
    assert torch.equal(GF.augment(x, horizontal_flip=1.0), x.flip(3))
    assert torch.equal(GF.augment(x, vertical_flip=1), x.flip(2))
    twice = GF.augment(GF.augment(x, horizontal_flip=1.0), horizontal_flip=1.0)
    assert torch.equal(twice, x)
    for turns in (1, 2, -1):
        y = GF.augment(x, rotation=(90 * turns, 90 * turns))
        assert torch.equal(y, x.rot90(turns, (2, 3))), "anticlockwise"


def test_translation_is_to_the_right_and_down(device: str) -> None:
    x = torch.randn(2, 1, 8, 8, device=device)
    y = GF.augment(x, translation_x=(0.25, 0.25), translation_y=(0.125, 0.125), fill=-3)
    assert torch.equal(y[:, :, 1:, 2:], x[:, :, :-1, :-2])
    assert (y[:, :, 0] == -3).all()
    assert (y[:, :, :, :2] == -3).all()


def test_shears_are_to_the_right_and_down(device: str) -> None:
    """By 45 degrees, two pixels from the middle."""
    x = torch.randn(2, 1, 9, 9, device=device)
    below, right = GF.augment(x, shear_x=(45, 45))[:, :, 6], GF.augment(x, shear_y=(45, 45))[..., 6]
    torch.testing.assert_close(below, F.pad(x[:, :, 6], (2, -2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(right, F.pad(x[..., 6], (2, -2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [5, (17, 40), (80, 30)])
def test_another_size_is_torchs_interpolation(size: Any, device: str) -> None:
    x = torch.randn(2, 3, 9, 13, device=device)
    y = GF.augment(x, size=size, padding_mode="border")
    size = (size, size) if isinstance(size, int) else size
    expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", kernels.PADDING_MODES)
def test_outside_is_as_in_grid_sample(mode: str, device: str) -> None:
    """Far outside, too: a fifth of the size, so that it is reflected several times."""
    x = torch.randn(1, 2, 6, 10, device=device)
    y = GF.augment(x, scale=(0.2, 0.2), translation_x=(0.3, 0.3), padding_mode=mode)
    x, y = x.cpu(), y.cpu()  # on a GPU, torch has no deterministic gradient of it
    turned = torch.tensor([[[5.0, 0, -3.0], [0, 5.0, 0]]])
    grid = F.affine_grid(turned, [1, 2, 6, 10], align_corners=False)
    expected = F.grid_sample(x, grid, padding_mode=mode, align_corners=False)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_crop_has_its_area_and_ratio(device: str) -> None:
    """Of pictures that are the coordinates of their pixels, in 1 to 1."""
    height, width = 40, 64
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(64.0), indexing="ij")
    picture = torch.stack([x, y]).to(device).expand(50, 2, height, width)
    asked: dict[str, Any] = {"crop_area": (0.2, 0.3), "crop_ratio": (0.5, 2.0)}
    found = GF.augment(picture, seed=3, size=(8, 8), padding_mode="border", **asked).double().cpu()
    wide = (found[:, 0, 4, 6] - found[:, 0, 4, 1]) * 8 / 5
    high = (found[:, 1, 6, 4] - found[:, 1, 1, 4]) * 8 / 5
    share, ratio = wide * high / (height * width), wide / high
    for got, (least, greatest) in ((share, (0.2, 0.3)), (ratio, (0.5, 2.0))):
        assert least - 1e-4 < got.min() < least * 1.1
        assert greatest * 0.9 < got.max() < greatest + 1e-4
    assert abs(ratio.log().mean()) < 0.15
    left = found[:, 0, 4, 0] + 0.5 - wide / 16
    assert left.min() > -1e-3
    assert (left + wide).max() < width + 1e-3
    assert left.std() > 5


def test_the_elastic_field_moves_no_pixel_further_than_asked(device: str) -> None:
    x = torch.arange(64.0, device=device).expand(2, 1, 64, 64)
    y = GF.augment(x, elastic_amplitude=5, elastic_spacing=8, padding_mode="border")
    moved = (y - x)[:, :, :, 6:-6].abs()
    assert 2 < moved.max() < 5
    assert 0.5 < moved.mean() < 2
    roughness = (y - x)[:, :, :, 6:-6].diff(n=2).abs().max()
    assert roughness < 4 * 5 / 8**2, "a spline's second derivative is at most that"


# --- bytes ---


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_bytes(layout: str, dtype: torch.dtype, device: str) -> None:
    images = torch.randint(0, 256, (3, 3, 21, 48), dtype=torch.uint8, device=device)
    exact = reference.augment_forward(
        as_numpy(images), SEED, (21, 48), distortion_of(ALL), bound=255
    )
    given, asked = images, ALL
    if layout == "NHWC":
        given, asked = images.permute(0, 2, 3, 1).contiguous(), {**ALL, "layout": "NHWC"}
    elif layout == "channels_last":
        given = images.to(memory_format=torch.channels_last)
    with gpunn.trace() as trace:
        y = GF.augment(given, seed=SEED, dtype=dtype, **asked)
    launched(trace, "augment_forward")
    last = layout != "NCHW"
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    torchs = by_torch(given, asked, dtype=dtype)
    if dtype == torch.uint8:
        assert np.abs(as_numpy(y) - exact).max() < 0.501
        assert y.min() == 0
        assert y.max() == 255
        assert np.abs(as_numpy(y) - as_numpy(torchs)).max() <= 1
    else:
        assert_accurate(y, exact / 255, torchs)


def test_bytes_that_nothing_changes(device: str) -> None:
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16)
    assert torch.equal(GF.augment(images), images)
    exact = images.cpu() / 255  # a GPU multiplies by the rounded inverse
    assert torch.equal(GF.augment(images, dtype=torch.float32).cpu(), exact)
    halves = GF.augment(images, translation_x=(1 / 32, 1 / 32), padding_mode="border")
    assert halves[0, 0, 0, :4].tolist() == [0, 0, 2, 2], "the nearest, ties to even"
    bright = GF.augment(images, brightness=(2, 2), clamp=False)
    assert torch.equal(bright, (2 * images.int()).clamp(max=255).byte())


# --- what is drawn ---


def test_a_picture_depends_on_the_seed_and_its_number_alone(device: str) -> None:
    x = pictures(7, 3, 12, 10).to(device)
    x[:] = x[:1].clone()
    y = GF.augment(x, seed=SEED, **ALL)
    assert torch.equal(GF.augment(x[:4], seed=SEED, **ALL), y[:4])
    assert torch.equal(GF.augment(x.mT.contiguous().mT, seed=SEED, **ALL), y)
    seed = torch.tensor([SEED], device=device)
    assert torch.equal(GF.augment(x, seed=seed, **ALL), y)
    assert not torch.equal(GF.augment(x, seed=SEED + 2**40, **ALL), y)
    differ = [(y[i] - y[j]).abs().max() for i in range(7) for j in range(i)]
    assert min(differ) > 0.1


def test_the_seed_is_drawn_from_torchs_generator(device: str) -> None:
    x = pictures(2, 1, 8, 8).to(device)

    def drawn() -> torch.Tensor:
        return GF.augment(x, rotation=90)

    torch.manual_seed(4)
    first, second = drawn(), drawn()
    torch.manual_seed(4)
    assert torch.equal(drawn(), first)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    with gpunn.backend("torch"):
        torch.testing.assert_close(drawn(), first, rtol=1e-4, atol=1e-5)


def test_parameters_are_drawn_evenly() -> None:
    """Each over its whole range, and none with another."""
    asked = {"rotation": (10, 20), "scale": (1, 3), "brightness": (0, 1), "horizontal_flip": 0.25}
    n = 400
    found = [reference.drawn(SEED, i, distortion_of(asked)) for i in range(n)]
    table = np.array([[chosen[name] for name in (*asked, "crop_x")] for chosen in found])
    means, least, greatest = table.mean(0), table.min(0), table.max(0)
    assert np.allclose(means, [15, 2, 0.5, 0.25, 0.5], rtol=0.12)
    assert np.allclose(least, [10, 1, 0, 0, 0], atol=0.1)
    assert np.allclose(greatest, [20, 3, 1, 1, 1], atol=0.1)
    together = np.corrcoef(table.T) - np.eye(5)
    assert np.abs(together).max() < 0.15


@pytest.mark.parametrize("case", CASES)
def test_the_torch_path_draws_the_same(case: str, device: str) -> None:
    asked, shape = CASES[case]
    images = pictures(*shape).to(device)
    y = GF.augment(images, seed=2**40 + 1, **asked)
    seed = torch.tensor([2**40 + 1], device=device)
    expected = composed(images, seed, list(shape[2:]), settings_of(**asked), torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


# --- sizes, specials, sums ---


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 1, 1, 1), (1, 3, 1, 40), (1, 1, 34, 1)])
def test_small_sizes(shape: tuple[int, ...], device: str) -> None:
    images, dy = pictures(*shape).to(device), torch.randn(shape, device=device)
    asked = {**ALL, "saturation": 0 if shape[1] == 1 else 0.5, "padding_mode": "reflection"}
    y, dx = value_and_gradient(lambda x: GF.augment(x, seed=SEED, **asked), images, dy)
    expected = value_and_gradient(lambda x: by_torch(x, asked), images, dy)
    for got, theirs in zip((y, dx), expected, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-4)


def test_a_picture_beyond_the_reach_of_32_bits(device: str) -> None:
    if device == "cuda":
        pytest.skip("memory that is not touched costs nothing on a CPU alone")
    memory = torch.from_numpy(np.zeros(3 * 2**30, dtype=np.uint8))
    images = memory.as_strided((2, 1, 3, 4), (2**31 + 5, 12, 4, 1))
    images[1] = torch.randint(1, 256, (1, 3, 4))
    assert torch.equal(GF.augment(images, horizontal_flip=1.0), images.flip(3))
    rows = memory.as_strided((1, 1, 2, 4), (0, 0, 2**31 + 5, 1))
    assert rows[0, 0, 1].all()
    assert torch.equal(GF.augment(rows, vertical_flip=1.0), rows.flip(2))


def test_infinities_and_nans(device: str) -> None:
    """A pixel spoils those that it has a part in, however small, as in grid_sample."""
    x = torch.rand(1, 3, 12, 12, device=device)
    x[0, 0, 3, 4], x[0, 1, 8, 2], x[0, 2, 0, 0] = torch.nan, torch.inf, torch.nan
    for asked in ({"rotation": 30, "scale": (0.7, 0.7)}, {"rotation": 30, **COLOURS}):
        y, expected = GF.augment(x, seed=SEED, **asked), by_torch(x, asked)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert y.isnan().any()
        assert y.isfinite().any()


def test_infinite_gradients_go_where_torchs_go(device: str) -> None:
    x, dy = torch.rand(2, 1, 9, 9, device=device), torch.randn(2, 1, 9, 9, device=device)
    dy[0, 0, 2, 2], dy[0, 0, 6, 6], dy[1, 0, 4, 4] = torch.inf, -torch.inf, torch.nan
    dy[1, 0, 1, 1], dy[1, 0, 1, 2] = torch.inf, -torch.inf
    asked: dict[str, Any] = {"rotation": (20, 20)}
    _, dx = value_and_gradient(lambda x: GF.augment(x, seed=SEED, **asked), x, dy)
    _, expected = value_and_gradient(lambda x: by_torch(x, asked), x, dy)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert dx.isnan().sum() > 4
    assert (dx == torch.inf).any()
    assert (dx == -torch.inf).any()


@pytest.mark.parametrize("power", [-90, -40, 60, 100])
def test_gradients_of_any_size_are_added_up_alike(power: int, device: str) -> None:
    """Integers are counted in what the largest gradient asks for: a power of two changes none."""
    x, dy = torch.rand(2, 3, 8, 9, device=device), torch.randn(2, 3, 8, 9, device=device)
    dy[:, :, :4] = 0
    function = lambda x: GF.augment(x, seed=SEED, **GEOMETRY)  # noqa: E731
    _, dx = value_and_gradient(function, x, dy)
    _, scaled = value_and_gradient(function, x, dy * 2.0**power)
    assert torch.equal(scaled, dx * 2.0**power)
    assert not value_and_gradient(function, x, dy * 0)[1].any()


def test_the_largest_sum_that_there_can_be(device: str) -> None:
    """One pixel gets the gradients of all, times what the colours multiply them by."""
    x, dy = torch.rand(1, 1, 1, 1, device=device), torch.ones(1, 1, 40, 70, device=device)
    asked: dict[str, Any] = {"brightness": (512, 512), "contrast": (8, 8), "clamp": False}
    _, dx = value_and_gradient(
        lambda x: GF.augment(x, size=(40, 70), padding_mode="border", **asked), x, dy
    )
    assert dx.item() == 40 * 70 * 512 * 8


@pytest.mark.parametrize(
    ("at_once", "shape", "times"),
    [
        pytest.param(1, (3, 3, 5, 9), 3, id="a picture is more than there is room for"),
        pytest.param(300, (3, 3, 5, 9), 2, id="two pictures, then one"),
        pytest.param(12, (5, 1, 2, 2), 2, id="eight elements from the twelfth on"),
    ],
)
def test_gradients_of_pictures_at_a_time(
    at_once: int, shape: tuple[int, ...], times: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of eight marks are not divided as the pictures are."""
    x, dy = torch.rand(shape, device=device), torch.randn(shape, device=device)
    dy[1, 0, 0, 1] = dy[-1, -1, -1, -1] = torch.nan
    function = lambda x: GF.augment(x, seed=SEED, rotation=10, contrast=0.5)  # noqa: E731
    _, whole = value_and_gradient(function, x, dy)
    monkeypatch.setattr(kernels, "SUMS_AT_ONCE", at_once)
    with gpunn.trace() as trace:
        _, dx = value_and_gradient(function, x, dy)
    assert whole[-1].isnan().any()
    assert torch.equal(dx.nan_to_num(7), whole.nan_to_num(7))
    scatters = [r for r in trace.launches if r.kernel == "augment_scatter_kernel"]
    assert len(scatters) == times


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_changes_nothing(order: Any, device: str) -> None:
    """Bit for bit: of the value, and of gradients that many add to."""
    x, dy = torch.rand(2, 3, 20, 37, device=device), torch.randn(2, 3, 20, 37, device=device)
    asked = {**ALL, "padding_mode": "border", "scale": (0.3, 0.5)}
    function = lambda x: GF.augment(x, seed=SEED, **asked)  # noqa: E731
    expected = value_and_gradient(function, x, dy)
    with thread_order(order):
        got = value_and_gradient(function, x, dy)
    assert all(map(torch.equal, got, expected))
