"""Models that torch.fx traces or torch.export exports are what torch's own would be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import gpunn
import gpunn.functional as GF
from gpunn.kernels.interpreter import INTERPRETING
from test_drop_in import LAYER_CASES, inputs_of


class OfTwo(torch.nn.Module):
    """A layer of two inputs in a model; one of one is in a Sequential."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.add_module("0", layer)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.get_submodule("0")(x, y)


@pytest.mark.filterwarnings("ignore:.*(NLLLoss2d. has been|mean. divides)")
@pytest.mark.parametrize(("name", "arguments"), LAYER_CASES, ids=str)
def test_a_layer_is_traced_whole(name: str, arguments: tuple[Any, ...], device: str) -> None:
    inputs = inputs_of(name, device)
    around = OfTwo if len(inputs) == 2 else torch.nn.Sequential
    model = around(getattr(gpunn.nn, name)(*arguments).to(device))
    traced = torch.fx.symbolic_trace(model)
    calls = [(node.op, node.target) for node in traced.graph.nodes if "call" in node.op]
    assert calls == [("call_module", "0")]
    assert type(traced.get_submodule("0")) is getattr(gpunn.nn, name)
    torch.use_deterministic_algorithms(not name.startswith("MaxUnpool"))  # refused by torch's
    torch.testing.assert_close(traced(*inputs), copy.deepcopy(model)(*inputs))


def test_a_traced_dropout_follows_the_mode(device: str) -> None:
    """Of the traced model, whatever it was when it was traced."""
    x = torch.ones(400, device=device)
    for training in (True, False):
        net = torch.nn.Sequential(gpunn.nn.Dropout(0.5)).to(device).train(training)
        traced = torch.fx.symbolic_trace(net)
        assert torch.equal(traced.eval()(x), x)
        assert (traced.train()(x) == 0).any()


def test_a_users_own_subclass_is_looked_into(device: str) -> None:
    """As torch.fx looks into a subclass of torch's."""

    class Doubled(gpunn.nn.Linear):
        def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            return 2 * super().forward(input, residual)

    net = torch.nn.Sequential(Doubled(3, 4)).to(device)
    traced = torch.fx.symbolic_trace(net)
    assert not [node for node in traced.graph.nodes if node.op == "call_module"]
    x = torch.randn(2, 3, device=device)
    with gpunn.backend("auto"):
        torch.testing.assert_close(traced(x), net(x))


def test_what_is_written_in_place_is_so_in_a_traced_function(device: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        GF.relu(y, inplace=True)
        return y

    x = torch.tensor([-1.0, 2.0], device=device)
    assert torch.fx.symbolic_trace(function)(x).tolist() == [0, 4]


# --- torch.export ---


@pytest.mark.usefixtures("one_precision")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: torch.nn.Linear(4, 3), (2, 4)),
        (lambda: torch.nn.Linear(4, 3), (2, 5, 4)),
        (lambda: torch.nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
        (lambda: torch.nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5)),
        (lambda: torch.nn.BatchNorm2d(3), (2, 3, 5, 5)),
    ],
)
def test_a_batch_of_any_size_is_exported(layer: Any, shape: tuple[int, ...], device: str) -> None:
    """A named Dim may not be bounded by what the program asks of it."""
    net, x = torch.nn.Sequential(layer()).to(device).eval(), torch.randn(shape, device=device)
    expected = net(x)
    gpunn.accelerate(net)
    with gpunn.backend("auto"):
        sizes = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(net, (x,), dynamic_shapes=sizes).module()
        torch.testing.assert_close(exported(x), expected)
        torch.testing.assert_close(exported(x.repeat(3, *[1] * (x.dim() - 1)))[:2], expected)


@pytest.mark.usefixtures("one_precision")
@pytest.mark.skipif(not INTERPRETING, reason="PyTorch's path, which is a CPU's")
def test_dropout_of_a_size_that_the_data_decide_is_exported() -> None:
    class Chosen(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return GF.dropout(x[x > 0], 0.5)

    x = torch.tensor([1.0, -1.0] * 20)
    with gpunn.backend("torch"):
        y = torch.export.export(Chosen(), (x,)).module()(x)
    assert y.shape == (20,)
    assert set(y.tolist()) == {0.0, 2.0}
