"""Augmentation in autograd, compiled, under autocast, as a layer, left to torch, and refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import gpunn
import gpunn.functional as GF
import gpunn.nn
from gpunn.checks.augment import ALL, GEOMETRY
from gpunn.functional.augment_arguments import DTYPES, settings_of
from gpunn.kernels.interpreter import INTERPRETING
from kit import check_gradients, each_dtype, launched
from test_augment import SEED, by_torch, pictures, value_and_gradient

# Of three channels, what differs in the gradient.
ASKED: dict[str, dict[str, Any]] = {
    "geometry": {**GEOMETRY, "padding_mode": "reflection", "size": (3, 5)},
    "fill": {"rotation": 40, "fill": 0.5},
    "colours": {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "rotation": 20},
    "colours, not clamped": {"contrast": 0.5, "saturation": 0.9, "clamp": False},
}


# --- autograd ---


@pytest.mark.parametrize("name", ASKED)
def test_gradients_once_and_twice(name: str) -> None:
    """In float64; of these pictures, no colour is within a step of where it is clamped."""
    channels = 1 if name in ("geometry", "fill") else 3
    images = torch.rand(2 if channels == 1 else 1, channels, 3, 2) * 1.5 - 0.2
    check_gradients(lambda x: GF.augment(x, seed=SEED, **ASKED[name]), images)


def test_a_gradient_penalty_of_another_dtype(device: str) -> None:
    """The gradient of the squared gradient, through what is before and after, from float16 on."""

    def penalty(choice: Any) -> torch.Tensor:
        x = images.clone().requires_grad_()
        with gpunn.backend(choice):
            y = GF.augment(x.half(), seed=SEED, dtype=torch.float32, **ALL)
            (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            return torch.autograd.grad(dx.pow(2).sum(), x)[0]

    images = pictures(2, 3, 8, 9).to(device)
    got, expected = penalty("kernels"), penalty("torch")
    assert expected.abs().max() > 1
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ASKED)
def test_what_is_kept_for_the_backward(name: str, device: str) -> None:
    """The seed; and the pictures, not copied, where a colour may have been clamped."""
    images = pictures(2, 3, 6, 5).to(device).requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = GF.augment(images, seed=SEED, **ASKED[name])
    clamps = name == "colours"
    assert [t.numel() for t in kept] == ([images.numel(), 1] if clamps else [1])
    assert not clamps or kept[0].data_ptr() == images.data_ptr()
    with gpunn.trace() as trace:
        y.sum().backward()
    launched(trace, "augment_backward")


def test_backward_twice_and_nothing_is_overwritten(device: str) -> None:
    x, dy = pictures(2, 3, 6, 5).to(device).requires_grad_(), torch.randn(2, 3, 6, 5, device=device)
    before, seed = (x.detach().clone(), dy.clone()), torch.tensor([SEED], device=device)
    y = GF.augment(x, seed=seed, **ALL)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(first, second)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])
    assert seed.item() == SEED
    y = GF.augment(x, seed=seed, **ALL)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpointing_draws_the_same_again(device: str) -> None:
    x = pictures(2, 3, 6, 5).to(device).requires_grad_()

    def block(x: torch.Tensor) -> torch.Tensor:
        return GF.augment(x, **ALL) ** 2

    torch.manual_seed(2)
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    torch.rand(3, device=device)
    (got,) = torch.autograd.grad(y.sum(), x)
    torch.manual_seed(2)
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(got, expected)


# --- compiled, under autocast, left to torch ---


def test_compiles_without_a_graph_break(device: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return GF.augment(x, seed=SEED, **ALL) * 2

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for last in (False, True):
        x, dy = pictures(2, 3, 9, 8).to(device), torch.randn(2, 3, 9, 8, device=device)
        x = x.to(memory_format=torch.channels_last) if last else x
        with gpunn.trace() as trace:
            got = value_and_gradient(compiled, x, dy)
        launched(trace, "augment_forward", "augment_backward")
        assert all(map(torch.equal, got, value_and_gradient(function, x, dy)))
        assert got[0].is_contiguous(memory_format=torch.channels_last) == last


def test_compiles_once_for_all_sizes_and_draws(device: str) -> None:
    """Bytes with dynamic shapes; the seed is drawn in the graph."""
    layer = gpunn.nn.Augment(layout="NHWC", dtype=torch.float32, **ALL)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 8, 6, 3), (4, 11, 9, 3)):
            x = torch.randint(256, size, dtype=torch.uint8, device=device)
            torch.manual_seed(1)
            got = compiled(x)
            torch.manual_seed(1)
            assert torch.equal(got, layer(x))


def test_the_torch_path_compiles(device: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return GF.augment(x, seed=SEED, **ALL)

    torch._dynamo.reset()
    x, dy = pictures(2, 3, 9, 8).to(device), torch.randn(2, 3, 9, 8, device=device)
    with gpunn.backend("torch"):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        for got, expected in zip(
            value_and_gradient(compiled, x, dy), value_and_gradient(function, x, dy), strict=True
        ):
            torch.testing.assert_close(got, expected)


@each_dtype
@pytest.mark.parametrize("choice", ["kernels", "torch"])
def test_autocast_changes_nothing(choice: Any, dtype: torch.dtype, device: str) -> None:
    x = pictures(2, 3, 9, 8).to(device, dtype)
    with gpunn.backend(choice):
        expected = GF.augment(x, seed=SEED, **ALL)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(GF.augment(x, seed=SEED, **ALL), expected)
    assert expected.dtype == dtype


def test_torch_gives_the_same_and_the_trace_says_so(device: str) -> None:
    x = pictures(2, 3, 9, 8).to(device)
    with gpunn.backend("torch"), gpunn.trace() as trace:
        theirs = GF.augment(x, seed=SEED, **ALL)
    assert [record.reason for record in trace.fallbacks] == ["backend('torch')"]
    assert not trace.launches
    torch.testing.assert_close(GF.augment(x, seed=SEED, **ALL), theirs, rtol=1e-4, atol=1e-4)


def test_what_torch_computes_instead(device: str) -> None:
    x = torch.rand(2, 3, 9, 8)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        assert GF.augment(x.to("meta"), rotation=10, size=4).shape == (2, 3, 4, 4)
        torch.func.grad(lambda x: GF.augment(x, seed=SEED, **ALL).sum())(x.to(device))
        if not INTERPRETING:
            GF.augment(x.to(device).byte(), dtype=torch.float64)
    reasons = [record.reason for record in trace.fallbacks]
    expected = ["meta tensor", "inside a torch.func transform"]
    expected += [] if INTERPRETING else ["no kernel for torch.float64 on cuda"]
    assert reasons == expected


# --- as a layer ---


def test_the_layer_acts_in_training_alone(device: str) -> None:
    x = pictures(4, 3, 8, 6).to(device)
    layer = gpunn.nn.Augment(rotation=30, brightness=0.5)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    assert torch.equal(y, GF.augment(x, rotation=30, brightness=0.5))
    assert not torch.equal(layer(x), y)
    assert layer.eval()(x) is x
    assert not layer.state_dict()
    assert repr(layer) == "Augment(rotation=30, brightness=0.5)"
    torch.manual_seed(3)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer.train())))
    assert torch.equal(copied(x), y)


def test_the_layer_converts_in_eval_mode_too(device: str) -> None:
    x = torch.randint(256, (2, 8, 6, 3), dtype=torch.uint8, device=device)
    layer = gpunn.nn.Augment(size=(4, 3), layout="NHWC", dtype=torch.float32, rotation=30).eval()
    y = layer(x)
    assert (y.shape, y.dtype) == ((2, 3, 4, 3), torch.float32)
    images = x.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(y, GF.augment(images, size=(4, 3)))
    assert not layer.train()(x).equal(y)
    assert "rotation=30, size=(4, 3), layout='NHWC', dtype=torch.float32" in repr(layer)


# --- refusals ---

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"horizontal_flip": 2}, ValueError, "horizontal_flip: .*probability from 0 to 1, got 2"),
    ({"vertical_flip": -0.1}, ValueError, "vertical_flip: .*got -0.1"),
    ({"vertical_flip": "no"}, TypeError, "vertical_flip: .*got 'no'"),
    ({"horizontal_flip": float("nan")}, ValueError, "horizontal_flip: .*got nan"),
    ({"rotation": (20, 10)}, ValueError, r"rotation: .*least value first, got \(20, 10\)"),
    ({"rotation": -5}, ValueError, "rotation: .*at least 0, or two, got -5"),
    ({"rotation": (1, 2, 3)}, TypeError, r"rotation: .*a number or two.*got \(1, 2, 3\)"),
    ({"rotation": (0, float("inf"))}, ValueError, "rotation: .*finite"),
    ({"shear_x": 90}, ValueError, "shear_x: .*between -90 and 90, got 90"),
    ({"shear_y": (-95, 0)}, ValueError, "shear_y: .*between -90 and 90"),
    ({"scale": (-1, 2)}, ValueError, r"scale: .*factors above 0, got \(-1, 2\)"),
    ({"scale": (0, 2)}, ValueError, "scale: .*factors above 0"),
    ({"scale": 2}, ValueError, "scale: .*two numbers, the least first, got 2"),
    ({"translation_x": "far"}, TypeError, "translation_x: .*got 'far'"),
    ({"crop_area": (0.5, 1.5)}, ValueError, r"crop_area: .*up to 1, got \(0.5, 1.5\)"),
    ({"crop_area": (0, 1)}, ValueError, "crop_area: .*above 0"),
    ({"crop_area": 0.5}, ValueError, "crop_area: .*two numbers"),
    ({"crop_ratio": (0, 1)}, ValueError, "crop_ratio: .*ratios above 0"),
    ({"brightness": (-1, 1)}, ValueError, "brightness: .*factors of at least 0"),
    ({"contrast": -0.5}, ValueError, "contrast: .*at least 0"),
    ({"saturation": True}, TypeError, "saturation: .*got True"),
    ({"elastic_amplitude": -1}, ValueError, "elastic_amplitude: .*at least 0, got -1"),
    ({"elastic_spacing": 3}, ValueError, "elastic_spacing: .*at least 4 pixels, got 3"),
    ({"grey": 1.5}, ValueError, "grey: .*from 0 to 1, got 1.5"),
    ({"fill": float("inf")}, ValueError, "fill: .*finite"),
    ({"fill": 1, "padding_mode": "border"}, ValueError, "fill: 'border' leaves nothing to fill"),
    ({"padding_mode": "wrap"}, ValueError, "padding_mode: .*zeros, border, reflection, got 'wrap'"),
    ({"clamp": 1}, TypeError, "clamp: .*bool, got int"),
    ({"size": 0}, ValueError, "size: .*at least 1, got 0"),
    ({"size": (3, 0)}, ValueError, r"size: .*at least 1, got \(3, 0\)"),
    ({"size": (1, 2, 3)}, TypeError, "size: .*an integer or two"),
    ({"size": 2.0}, TypeError, "size: .*got 2.0"),
    ({"size": "bad"}, TypeError, "size: .*got 'bad'"),
    ({"layout": "CHW"}, ValueError, "layout: .*NCHW, NHWC, got 'CHW'"),
    ({"dtype": torch.int64}, ValueError, "dtype: .*floating point.*got torch.int64"),
    ({"dtype": "float32"}, ValueError, "dtype: .*floating point.*got float32"),
]
CALL_REFUSED: list[tuple[torch.Tensor, dict[str, Any], type[Exception], str]] = [
    (torch.rand(2, 1, 4, 4), {"saturation": 1}, ValueError, "saturation: .*got 1 channels"),
    (torch.rand(3, 4, 4), {}, ValueError, r"images: .*four dimensions.*got \(3, 4, 4\)"),
    (torch.rand(2, 3, 0, 4), {}, ValueError, "images: .*none but the first 0"),
    (torch.rand(2, 0, 3, 4), {}, ValueError, "images: .*none but the first 0"),
    (torch.ones(2, 3, 4, 4).int(), {}, TypeError, "images: .*bytes or floating.*torch.int32"),
    (torch.rand(2, 3, 4, 4), {"dtype": torch.uint8}, ValueError, "dtype: .*got torch.uint8"),
    (torch.rand(2, 3, 4, 4), {"seed": 1.5}, TypeError, "seed: .*got 1.5"),
    (torch.rand(2, 3, 4, 4), {"seed": 2**63}, ValueError, "seed: .*64 bits, got 92233720368547758"),
    (torch.rand(2, 3, 4, 4), {"seed": torch.ones(1)}, ValueError, "seed: .*one int64"),
    (torch.rand(2, 3, 4, 4), {"seed": torch.ones(2).long()}, ValueError, "seed: .*got 2 of"),
]


@pytest.mark.parametrize(("asked", "error", "message"), REFUSED, ids=str)
def test_bad_distortions_are_refused(
    asked: dict[str, Any], error: type[Exception], message: str
) -> None:
    """By the function, and by the layer when it is made."""
    images = torch.rand(2, 3, 4, 4)
    state = torch.get_rng_state()
    with gpunn.trace() as trace, pytest.raises(error, match=message):
        GF.augment(images, **asked)
    with pytest.raises(error, match=message):
        gpunn.nn.Augment(**asked)
    assert not trace.launches
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("i", range(len(CALL_REFUSED)))
def test_bad_calls_are_refused(i: int) -> None:
    images, asked, error, message = CALL_REFUSED[i]
    for choice in ("kernels", "torch"):
        refused, state = pytest.raises(error, match=message), torch.get_rng_state()
        with gpunn.backend(choice), gpunn.trace() as trace, refused:
            GF.augment(images, **asked)
        assert not trace.launches
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_the_layer_takes_what_some_pictures_allow(dtype: torch.dtype | None, device: str) -> None:
    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8, device=device)
    for size, expected in ((None, (4, 4)), (3, (3, 3)), ([2, 5], (2, 5))):
        with gpunn.backend("auto"):  # on a GPU, float64 is torch's
            y = gpunn.nn.Augment(size=size, dtype=dtype)(x)
        assert (y.shape, y.dtype) == ((2, 3, *expected), dtype or torch.uint8)


def test_an_unknown_distortion_is_refused() -> None:
    for name in ("rotations", "crop_x", "seed"):
        with pytest.raises(TypeError, match=f"augment has no argument '{name}'"):
            gpunn.nn.Augment(**{name: 1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images: augment expects a tensor, got list"):
        GF.augment([1, 2])  # type: ignore[arg-type]


def test_a_number_stands_for_a_range() -> None:
    assert settings_of(rotation=15, translation_x=0.25) == settings_of(
        rotation=(-15, 15), translation_x=(-0.25, 0.25)
    )
    assert settings_of(contrast=0.25, brightness=3) == settings_of(
        contrast=(0.75, 1.25), brightness=(0, 4)
    )
    assert by_torch(torch.ones(1, 1, 2, 2), {"fill": 2}).tolist() == [[[[1, 1], [1, 1]]]]
