"""The demo of activations: its figure, its pictures, its measurements, and the kernels below it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gpunn


@pytest.fixture
def demo(demo_folder: Path) -> ModuleType:
    """The demo, which imports what it shares as scripts do, from its own folder."""
    return importlib.import_module("activations")


def test_the_quick_demo_shows_what_batch_normalisation_repairs(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    with gpunn.backend("torch"):
        assert demo.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"training .* misread \d+\.\d%", shown), "the bar is not of what it shows"
    assert re.search(r"gradient of layer 1 over that of layer 10: \d\.\de-0[5-9]", shown)
    last = shown.splitlines()[-1]
    said = re.fullmatch(
        r"Sigmoid, Xavier: ([\d.]+)% of held-out digits, ([\d.]+)% with batch normalisation "
        r"\(expected: at most 20%, at least 90%\)",
        last,
    )
    assert said, last
    assert float(said[1]) <= 100 * demo.AT_MOST
    assert float(said[2]) >= 100 * demo.AT_LEAST
    for name in ("activations.png", "gradients.png", "accuracies.png"):
        pixels = imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.02, f"{name} is blank"


def test_a_network_has_the_layers_and_the_weights_of_its_setting(demo: ModuleType) -> None:
    for name, deviation in (("zeros", 0.0), ("N(0, 1)", 1.0), ("Xavier", 0.125), ("He", 0.177)):
        for normalised in (False, True):
            model = demo.build(demo.Setting("tanh", name, normalised))
            dense = demo.dense_layers(model)
            assert len(dense) == demo.LAYERS
            assert len(model) == demo.LAYERS + (demo.LAYERS - 1) * normalised
            assert float(dense[3].weight.detach().std()) == pytest.approx(deviation, rel=0.05)
            assert not dense[3].bias.any()


def test_every_derivative_is_compared(demo: ModuleType, device: str) -> None:
    x = torch.tensor([-2.0, -0.5, 0.5, 3.0], device=device)
    for name, exact in (
        ("sigmoid", [0.10499, 0.23500, 0.23500, 0.04518]),
        ("tanh", [0.07065, 0.78645, 0.78645, 0.00987]),
        ("relu", [0.0, 0.0, 1.0, 1.0]),
        ("leaky_relu", [0.1, 0.1, 1.0, 1.0]),
    ):
        for computed in (demo.derivative(name, x)[1], demo.formula(name, x)):
            torch.testing.assert_close(
                computed.cpu(), torch.tensor(exact), rtol=0, atol=1e-5, msg=name
            )


@pytest.mark.parametrize("normalised", [False, True])
def test_the_kernels_train_as_torch_does(
    demo: ModuleType, normalised: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of the first step, of a narrow network, layer by layer."""
    monkeypatch.setattr(demo, "WIDTH", 8)
    monkeypatch.setattr(demo, "LAYERS", 4)
    digits, setting = demo.load(device), demo.Setting("leaky ReLU", "He", normalised)
    gradients = []
    for choice in ("torch", "kernels"):
        trace = gpunn.Trace()
        with gpunn.backend(choice):
            gradients.append(torch.tensor(demo.learn(setting, digits, 0, 1, trace)[0]))
    expected, got = gradients
    assert expected.min() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    operators = [record.operator for record in trace.launches]
    assert operators.count("linear_forward") == 4
    assert ("batch_norm_forward" in operators) == normalised
    assert not trace.fallbacks


def test_bad_options_are_refused(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
    assert "--steps: expected 1 or more, got 0" in capsys.readouterr().err
