"""The neuron demo: its truth tables, its gradients, its pictures, and that kernels compute it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gpunn


@pytest.fixture
def neuron(demo_folder: Path) -> ModuleType:
    """The demo, which imports what it shares as scripts do, from its own folder."""
    return importlib.import_module("neuron")


def test_the_quick_demo_learns_every_truth_table(
    neuron: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    with gpunn.backend("torch"):
        assert neuron.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "AND  by hand: 0.000  0.000  0.000  1.000" in shown
    assert "OR   by hand: 0.000  1.000  1.000  1.000" in shown
    assert "NOT  by hand: 1.000  0.000" in shown
    assert shown.splitlines()[-1] == "Truth tables learned: 4 (expected: 4)"
    for name in ("gates.png", "xor.png"):
        pixels = imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.02, f"{name} is blank"


def test_a_network_that_has_not_learned_is_not_counted(
    neuron: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """XOR takes more than a step, and no neuron without a hidden layer learns it."""
    with gpunn.backend("torch"):
        neuron.main(["--quick", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == "Truth tables learned: 3 (expected: 4)"
        x, target = neuron.truth_table("XOR", "cpu")
        single = neuron.learn("XOR", neuron.Network.random((2, 1), 0, "cpu"), 300, "cpu").network
        assert not neuron.is_right(single, x, target)


@pytest.mark.parametrize("sizes", [(2, 1), (2, 2, 1), (2, 3, 4, 1)])
def test_gradients_are_those_of_autograd(neuron: ModuleType, sizes: tuple[int, ...]) -> None:
    """In float64, of torch's own operations; the demo's own comparison says the same."""
    x, target = (t.double() for t in neuron.truth_table("XOR", "cpu"))
    network = neuron.Network.random(sizes, 3, "cpu")
    leaves = [p.double().requires_grad_() for p in network.parameters()]
    half = len(leaves) // 2
    o = x
    for weight, bias in zip(leaves[:half], leaves[half:], strict=True):
        o = torch.sigmoid(o @ weight.T + bias)
    exact = torch.autograd.grad((o - target).square().sum() / 2, leaves)
    double = neuron.Network(
        *([p.detach() for p in part] for part in (leaves[:half], leaves[half:]))
    )
    with gpunn.backend("torch"):
        written = neuron.backpropagate(double, double.outputs(x), target)
        assert neuron.difference_from_autograd(double, x, target) < 1e-15
    for got, expected in zip(written, exact, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(got, expected)


def test_the_kernels_learn_as_torch_does(neuron: ModuleType, device: str) -> None:
    losses = []
    for choice in ("torch", "kernels"):
        network = neuron.Network.random((2, neuron.HIDDEN, 1), 0, device)
        with gpunn.backend(choice), gpunn.trace() as trace:
            found = neuron.learn("XOR", network, 4, torch.device(device))
        losses.append(torch.tensor(found.losses))
    assert not trace.fallbacks
    assert {record.operator for record in trace.launches} == {"linear_forward"}
    assert losses[0][0] > losses[0][-1] > 0.1
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_bad_options_are_refused(neuron: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        neuron.main(["--steps", "0"])
    assert "--steps: expected 1 or more, got 0" in capsys.readouterr().err
