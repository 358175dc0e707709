"""What the style demo optimises, and what sees it: losses and networks, on the kernels too."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
from closeness import assert_accurate
from gpunn import nn
from kit import as_numpy, launched

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _as_on_a_cpu(demo_folder: Path) -> Iterator[None]:
    """PyTorch computes."""
    with gpunn.backend("torch"):
        yield


@pytest.fixture
def optimisation() -> ModuleType:
    return importlib.import_module("image_optimisation")


@pytest.fixture
def networks() -> ModuleType:
    return importlib.import_module("feature_networks")


@pytest.fixture
def part(tmp_path: Path) -> Any:
    """Of a journal that is empty."""
    return importlib.import_module("checkpoint").Journal(tmp_path, {}).part("a part")


def test_a_dream_climbs_in_every_octave(
    optimisation: ModuleType, networks: ModuleType, monkeypatch: Patch, part: Any
) -> None:
    """Its size and its range stay, no neighbourhood changes its colour, and every size is seen."""
    monkeypatch.setattr(networks, "RANDOM_WIDTHS", (8, 8, 8, 8))
    photograph = torch.rand(3, 40, 56) / 2 + 0.25
    network = networks.calibrate(networks.random_network(0), [photograph[None]])
    sizes, strengths = [], list[float]()
    network.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-2:]))
    image = optimisation.dream(network, 2, photograph, 3, strengths.append, part)
    grown = optimisation.strength(network, 2, image) / optimisation.strength(network, 2, photograph)
    assert grown > 1.1
    assert image.shape == photograph.shape
    assert 0 <= image.min() < image.max() <= 1
    assert list(map(tuple, sizes[:12:3])) == [(15, 21), (20, 28), (29, 41), (40, 56)]
    assert len(strengths) == 12
    assert strengths[11] > strengths[10] > strengths[9]
    assert (image - photograph).mean((1, 2)).abs().max() < 0.01 < (image - photograph).abs().mean()


def test_a_gram_matrix_by_hand(optimisation: ModuleType) -> None:
    """Two channels over the positions of a 1×3 map: means of products, in either memory format."""
    maps = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 3.0]]).view(1, 2, 1, 3)
    expected = torch.tensor([[5 / 3, 1.0], [1.0, 6.0]])
    torch.testing.assert_close(optimisation.gram(maps), expected)
    last = maps.clone(memory_format=torch.channels_last)
    torch.testing.assert_close(optimisation.gram(last), expected)


def test_penalties_by_hand(optimisation: ModuleType) -> None:
    image = torch.tensor([[-1.0, 0.5], [3.0, 1.0]]).view(1, 1, 2, 2)
    assert optimisation.outside(image).item() == (1 + 4) / 4
    assert optimisation.roughness(image).item() == (16 + 0.25) / 2 + (2.25 + 4) / 2
    assert optimisation.outside(image.clamp(0, 1)).item() == 0


def one_layer(networks: ModuleType, factor: float) -> Any:
    """A network whose only layer gives the ReLU of ``factor`` times the colours."""
    layer = nn.Conv2d(3, 3, 1, bias=False, activation="relu")
    with torch.no_grad():
        layer.weight.copy_(factor * torch.eye(3).view(3, 3, 1, 1))
    return networks.FeatureNetwork([layer], [0], 0, mean=(0.5,) * 3, deviation=(0.25,) * 3)


def test_losses_by_hand(optimisation: ModuleType, networks: ModuleType) -> None:
    """One pixel x, whose maps are the ReLU of 2 (x - 1/2) / (1/4).

    Those of the photograph are (4, 2, 0), of the painting (4, 4, 4), of the image (4, 0, 2). So the
    content loss is (0 + 4 + 4) / (16 + 4 + 0). The painting's Gram matrix is 16 everywhere; in
    units of that, the image's lacks 1 in five places, 1/2 in two, 3/4 in one and nothing in one.
    """
    network = one_layer(networks, 2.0)
    photograph = torch.tensor([1.0, 0.75, 0.0]).view(3, 1, 1)
    painting = torch.ones(3, 1, 1)
    image = torch.tensor([1.0, 0.25, 0.75]).view(1, 3, 1, 1)
    style = (2 * 0.5**2 + 0.75**2 + 5) / 9
    goal = optimisation.Goal.of([network], photograph, painting)
    losses = goal.losses(image)
    torch.testing.assert_close(torch.stack(losses), torch.tensor([0.4, style]))
    twice = optimisation.Goal.of([network, one_layer(networks, 1.0)], photograph, painting)
    torch.testing.assert_close(torch.stack(twice.losses(image)), torch.tensor([0.4, 2 * style]))
    goal = optimisation.Goal.of([network], *torch.rand(2, 3, 4, 5))
    image = 2 * torch.rand(1, 3, 4, 5) - 0.5
    content, style = goal.losses(image)
    penalties = 1000 * optimisation.outside(image) + 2 * optimisation.roughness(image)
    assert min(content, style, penalties) > 0.1
    torch.testing.assert_close(goal.loss(image, 3.0), content + 3 * style + penalties)


def test_the_style_is_a_mean_over_layers(optimisation: ModuleType, networks: ModuleType) -> None:
    """The same map twice is as one; the photograph has no content loss, the painting no style."""
    network = one_layer(networks, 1.0)
    both = networks.FeatureNetwork([*network.layers, nn.Identity()], [0, 1], 0)
    alone = networks.FeatureNetwork([*network.layers], [0], 0)
    photograph, painting, image = torch.rand(3, 3, 4, 5)
    goals = [optimisation.Goal.of([n], photograph, painting) for n in (both, alone)]
    styles = [goal.losses(image[None])[1] for goal in goals]
    torch.testing.assert_close(*styles)
    assert styles[0] > 0.01
    assert goals[0].losses(photograph[None])[0] == 0 < goals[0].losses(photograph[None])[1]
    assert goals[0].losses(painting[None])[1] == 0 < goals[0].losses(painting[None])[0]


def test_a_network_is_calibrated(networks: ModuleType, monkeypatch: Patch) -> None:
    """Every channel has mean 0 and deviation 1 over images of two sizes, and its ReLU stays."""
    monkeypatch.setattr(networks, "RANDOM_WIDTHS", (4, 5, 4, 3))
    network = networks.random_network(1)
    images = [torch.rand(1, 3, 16, 24) ** 2, torch.rand(1, 3, 24, 16)]
    networks.calibrate(network, images)
    for number, layer in enumerate(network.layers):
        if not isinstance(layer, nn.Conv2d):
            continue
        inputs = [(image - network.mean) / network.deviation for image in images]
        if number:
            inputs = [network(image, [number - 1])[0] for image in images]
        values = torch.cat(
            [F.conv2d(x, layer.weight, layer.bias, 1, layer.padding).flatten(2) for x in inputs],
            2,
        )[0]
        deviation, mean = torch.std_mean(values, dim=1)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
        torch.testing.assert_close(deviation, torch.ones_like(mean), atol=1e-4, rtol=0)
        assert network(images[0], [number])[0].min() == 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_what_was_trained_is_what_sees(networks: ModuleType) -> None:
    """The normalisations are folded into the convolutions; two of them, and a pooling, a stage."""
    model = networks.classifier(5, widths=(4, 6, 8, 8))
    images = torch.rand(6, 3, 48, 48)
    for _ in range(3):
        model(images)  # moves the running statistics
    network = networks.features_of(model)
    model.eval()
    expected = model[:4]((images - network.mean) / network.deviation)
    first, pooled = network(images, [1, 2])
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pooled, F.avg_pool2d(first, 2))
    widths = [maps.shape[1] for maps in network(images, network.style)]
    sides = [maps.shape[2] for maps in network(images, (network.content, *network.dream))]
    assert model(images).shape == (6, 5)
    assert widths == [4, 6, 8, 8]
    assert sides == [24, 24, 12, 6]
    kinds = [type(layer) for layer in network.layers]
    assert kinds == 3 * [nn.Conv2d, nn.Conv2d, nn.AvgPool2d] + 2 * [nn.Conv2d]


def test_the_regions_are_learnt(networks: ModuleType, monkeypatch: Patch, part: Any) -> None:
    """Every region of every image is a class of its own, and the patches are the network's."""
    seen = list[Any]()
    real = networks.draw_patches

    def spy(regions: list[Any], n: int, generator: torch.Generator) -> Any:
        seen.extend(regions)
        return real(regions, n, generator)

    monkeypatch.setattr(networks, "draw_patches", spy)
    monkeypatch.setattr(networks, "WIDTHS", (2, 2, 2, 2))
    images = list(torch.rand(2, 3, 150, 200))
    networks.trained_network(images, 1, 0, torch.device("cpu"), part)
    assert [region.quarter for region in seen] == list(range(2 * 12))
    assert {tuple(region.pixels.shape) for region in seen} == {(3, 50, 50)}
    torch.testing.assert_close(seen[17].pixels * 0.25 + 0.45, images[1][:, 50:100, 50:100])


def shallow(networks: ModuleType) -> Any:
    """Two convolutions and a pooling."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1, activation="relu"), nn.AvgPool2d(2),
              nn.Conv2d(4, 4, 3, padding=1, activation="relu")]  # fmt: skip
    return networks.FeatureNetwork(layers, (0, 2), 2)


def descended(
    optimisation: ModuleType, networks: ModuleType, device: str, dtype: torch.dtype, part: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses and the image of a few evaluations of L-BFGS, on a tiny image and network."""
    generator = torch.Generator().manual_seed(0)
    content, style = torch.rand(2, 3, 12, 16, generator=generator).to(device, dtype)
    network = shallow(networks).to(device, dtype)
    goal = optimisation.Goal.of([network], content, style)
    losses = list[float]()
    image = optimisation.descend(goal, content[None], 0.5, 3, losses.append, part)
    return torch.tensor(losses, dtype=dtype), image


def test_the_kernels_paint_as_torch_does(
    optimisation: ModuleType, networks: ModuleType, device: str, part: Any
) -> None:
    """Losses and pixels after a few evaluations: no further from float64 than torch's."""
    parts = [replace(part, name=name) for name in ("exact", "baseline", "got")]
    exact = descended(optimisation, networks, device, torch.float64, parts[0])
    baseline = descended(optimisation, networks, device, torch.float32, parts[1])
    with gpunn.backend("kernels"), gpunn.trace() as trace:
        got = descended(optimisation, networks, device, torch.float32, parts[2])
    assert len(got[0]) >= 3
    assert exact[0][-1] < exact[0][0], "the steps changed nothing"
    for ours, right, theirs, what in zip(got, exact, baseline, ("losses", "image"), strict=True):
        assert_accurate(ours, as_numpy(right), theirs, what)
    launched(trace, "conv_forward", "conv_transpose_forward", "avg_pool_backward")


def test_the_steps_begin_at_any_strides(
    optimisation: ModuleType, networks: ModuleType, part: Any
) -> None:
    """L-BFGS cannot view an image that is not contiguous as a vector; what is given stays as is."""
    goal = optimisation.Goal.of([one_layer(networks, 1.0)], *torch.rand(2, 3, 4, 4))
    given = torch.rand(1, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    before, told = given.clone(), list[float]()
    image = optimisation.descend(goal, given, 1.0, 6, told.append, part)
    assert told[-1] < 0.8 * told[0], told
    assert 6 <= len(told) <= 7, "the last line search may take one more"
    assert torch.equal(given, before)
    assert not image.requires_grad


def test_a_transfer_goes_from_half_the_size_to_the_whole(
    optimisation: ModuleType, networks: ModuleType, monkeypatch: Patch, part: Any
) -> None:
    """The first image is the photograph, smaller; the second, what became of it."""
    starts = list[torch.Tensor]()

    def stay(goal: Any, image: torch.Tensor, *_: object) -> torch.Tensor:
        starts.append(image)
        return image + 0.25 if len(starts) == 1 else 3 * image

    monkeypatch.setattr(optimisation, "descend", stay)
    photograph, painting = torch.rand(3, 16, 24) / 4, torch.rand(3, 16, 18)
    image = optimisation.transfer(
        [one_layer(networks, 1.0)], photograph, painting, 1.0, 1, print, part
    )
    assert [tuple(start.shape) for start in starts] == [(1, 3, 8, 12), (1, 3, 16, 24)]
    small = F.avg_pool2d(photograph, 2)
    assert (starts[0][0] - small).abs().mean() < 0.02
    assert (F.avg_pool2d(starts[1][0], 2) - small - 0.25).abs().mean() < 0.02
    torch.testing.assert_close(image, (3 * starts[1][0]).clamp(0, 1))
    assert image.max() == 1
