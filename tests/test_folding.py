"""Batch normalisations folded into the layers before them: the same numbers with fewer passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

import gpunn
import gpunn.nn
from gpunn import models
from kit import launched


def with_statistics(model: torch.nn.Module) -> Any:
    """As a training would leave the normalisations: not the identity."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


class Net(torch.nn.Module):
    """A layer, a normalisation with what it fuses, and a shortcut where ``residual``."""

    def __init__(self, layer: torch.nn.Module, norm: torch.nn.Module, residual: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.residual = layer, norm, residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layer(x)
        y: torch.Tensor = self.norm(z, residual=x * 2) if self.residual else self.norm(z)
        return y


PAIRS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "Conv1d": (lambda: gpunn.nn.Conv1d(4, 4, 3, padding=1), gpunn.nn.BatchNorm1d, (2, 4, 6)),
    "Conv2d": (lambda: gpunn.nn.Conv2d(4, 4, 3, padding=1), gpunn.nn.BatchNorm2d, (2, 4, 5, 6)),
    "Conv2d, groups": (
        lambda: gpunn.nn.Conv2d(4, 4, 1, groups=2, bias=False), gpunn.nn.BatchNorm2d, (2, 4, 5, 3)
    ),
    "ConvTranspose2d": (
        lambda: gpunn.nn.ConvTranspose2d(4, 4, 1), gpunn.nn.BatchNorm2d, (2, 4, 5, 3)
    ),
    "Linear": (lambda: gpunn.nn.Linear(4, 4), gpunn.nn.BatchNorm1d, (3, 4)),
    "Conv3d, torch's": (lambda: torch.nn.Conv3d(4, 4, 1), gpunn.nn.BatchNorm3d, (2, 4, 2, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu_tanh", ("leaky_relu", 0.3), "relu6"])
@pytest.mark.parametrize("residual", [False, True])
def test_folded_equals_unfolded(name: str, activation: Any, residual: bool, device: str) -> None:
    layer, norm, shape = PAIRS[name]
    net = with_statistics(Net(layer(), norm(4, activation=activation), residual)).to(device)
    x = torch.randn(shape, device=device)
    folded = gpunn.fold_batch_norm(net)
    with gpunn.backend("torch"):
        torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in folded.modules())


def test_what_a_fold_launches(device: str) -> None:
    """One kernel for convolution, normalisation, activation."""
    net = gpunn.nn.Sequential(
        gpunn.nn.Conv2d(4, 6, 3, bias=False), gpunn.nn.BatchNorm2d(6, activation="relu")
    )
    x = torch.randn(2, 4, 5, 5, device=device)
    with_statistics(net).to(device)
    folded = gpunn.fold_batch_norm(net)
    with gpunn.trace() as trace:
        y = folded(x)
    assert len(launched(trace, "conv_forward")) == len(trace.launches) == 1
    torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-4)


def test_torchs_layers_and_the_model_itself(device: str) -> None:
    """torch's layers become gpunn's, and the model stays what it was."""
    net = with_statistics(
        torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.ReLU())
    ).to(device)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    folded = gpunn.fold_batch_norm(net.train())
    assert net.training
    assert type(net[0]) is torch.nn.Conv2d
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    x = torch.randn(2, 3, 6, 6, device=device)
    torch.testing.assert_close(folded(x), net.eval()(x), rtol=1e-4, atol=1e-4)


class Unfoldable(torch.nn.Module):
    """Normalisations of what is also read elsewhere, activated or computed before; or of no layer.

    And one that is called by keyword.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = gpunn.nn.BatchNorm2d(4)
        self.shared = gpunn.nn.Conv2d(4, 4, 1)
        self.norms = torch.nn.ModuleList(gpunn.nn.BatchNorm2d(4) for _ in range(5))
        self.computed = torch.nn.utils.parametrizations.weight_norm(gpunn.nn.Conv2d(4, 4, 1))
        self.named = gpunn.nn.Conv2d(4, 4, 1)
        self.active = gpunn.nn.Conv2d(4, 4, 1, activation="relu")
        self.untracked = gpunn.nn.BatchNorm2d(4, track_running_stats=False)
        self.last = gpunn.nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.shared(self.first(x))
        z = self.norms[0](z) + z
        z = self.norms[1](self.active(z))
        z = self.norms[2](F.relu(z))
        z = self.norms[3](self.computed(z))
        z = self.norms[4](input=self.named(z))
        y: torch.Tensor = self.untracked(self.last(z))
        return y


def test_what_cannot_be_folded_stays(device: str) -> None:
    net = with_statistics(Unfoldable()).to(device)
    folded = gpunn.fold_batch_norm(net)
    norms = [m for m in folded.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 7
    x = torch.randn(2, 4, 3, 3, device=device)
    with gpunn.backend("torch"):
        torch.testing.assert_close(folded(x), net(x))


def test_a_folded_linear_refuses_what_it_was_not_folded_for(device: str) -> None:
    """Of (N, 4, 4) a BatchNorm1d would have normalised the middle, not the features."""
    net = Net(gpunn.nn.Linear(4, 4), gpunn.nn.BatchNorm1d(4), residual=False)
    folded = gpunn.fold_batch_norm(with_statistics(net)).to(device)
    with pytest.raises(RuntimeError, match="folded"):
        folded(torch.randn(2, 4, 4, device=device))


@pytest.mark.parametrize("build", [models.resnet18, models.resnet50, models.vgg11_bn])
def test_networks_folded(build: Any, device: str) -> None:
    """No normalisation is left in them, and every block's shortcut is added by a convolution."""
    net = with_statistics(build(num_classes=10)).to(device)
    folded = gpunn.fold_batch_norm(net)
    x = torch.randn(1, 3, 64, 64, device=device)
    with gpunn.backend("torch"), torch.no_grad():
        y, expected = folded(x), net(x)
        assert (y - expected).norm() <= 1e-4 * expected.norm()
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in folded.modules())


class Tied(torch.nn.Module):
    """The weight is read a second time, past its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(self.layer(x)), self.layer.weight.t())


class Inside(torch.nn.Module):
    """The layer is also part of another, which computes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)
        self.layer, self.norm = self.encoder.linear1, torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.encoder(self.norm(self.layer(x))[None])
        return y


class Overwritten(torch.nn.Module):
    """The layer's input is changed in place before the normalisation."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.layer, self.norm = gpunn.nn.Linear(4, 4), gpunn.nn.BatchNorm1d(4)
        self.relu, self.residual = torch.nn.ReLU(inplace=True), residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layer(x)
        shortcut = self.relu(x)
        y: torch.Tensor = (
            self.norm(z, residual=shortcut) if self.residual else self.norm(z) + shortcut
        )
        return y


class Late(torch.nn.Module):
    """The residual, known before the layer, is changed in place after it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = gpunn.nn.Linear(4, 4), gpunn.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = 2 * x
        z = self.layer(x)
        residual.add_(1)
        y: torch.Tensor = self.norm(z, residual=residual)
        return y


def hooked(place: int) -> torch.nn.Sequential:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    net[place].register_forward_hook(lambda module, args, output: output * 2)
    return net


def pruned() -> torch.nn.Sequential:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def patched(place: int, name: str) -> torch.nn.Sequential:
    """What the layer, or the normalisation, makes of its input is doubled by its own method."""
    net = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1), torch.nn.BatchNorm1d(4))
    before = getattr(net[place], name)
    setattr(net[place], name, lambda x, *rest: before(x.mul_(2), *rest))
    return torch.nn.Sequential(torch.nn.Unflatten(1, (4, 1)), net, torch.nn.Flatten())


def misnamed() -> torch.nn.Sequential:
    """torch's normalisation does not activate."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    vars(net[1])["activation"] = "relu"
    return net


LEFT: dict[str, Any] = {
    "a method of the layer's own": lambda: patched(0, "_conv_forward"),
    "a method of the normalisation's own": lambda: patched(1, "_check_input_dim"),
    "an attribute that only gpunn's normalisation reads": misnamed,
    "a weight that is read elsewhere": Tied,
    "a layer that is part of another, too": Inside,
    "an input that is overwritten before the residual is known": lambda: Overwritten(True),
    "a residual that is overwritten after the layer": Late,
    "hooks on the layer": lambda: hooked(0),
    "hooks on the normalisation": lambda: hooked(1),
    "a weight that a hook computes": pruned,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_is_left(name: str, device: str) -> None:
    net, x = with_statistics(LEFT[name]().to(device)), torch.randn(3, 4, device=device)
    with torch.no_grad(), gpunn.backend("torch"):
        net(x.clone())  # a hook computes the weight
        folded = gpunn.fold_batch_norm(net)
        torch.testing.assert_close(folded(x.clone()), net(x.clone()))
    assert any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in folded.modules())


GLOBAL_HOOKS = (
    "register_module_forward_hook", "register_module_forward_pre_hook",
    "register_module_full_backward_hook", "register_module_full_backward_pre_hook",
)  # fmt: skip


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_hooks_on_all_modules_see_the_layers_of_the_model(register: str, device: str) -> None:
    """So nothing is folded while there is such a hook; without it, the same model is."""
    net = with_statistics(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)))
    net, x = net.to(device), torch.randn(3, 4, device=device, requires_grad=True)
    seen: list[str] = []

    def see(module: torch.nn.Module, *_: Any) -> None:
        if not any(True for _ in module.children()):
            seen.append(type(module).__name__)

    def what_is_seen(model: torch.nn.Module) -> list[str]:
        seen.clear()
        model(x).sum().backward()
        return [*seen]

    hook = getattr(torch.nn.modules.module, register)(see)
    try:
        expected, found = what_is_seen(net), what_is_seen(gpunn.fold_batch_norm(net))
    finally:
        hook.remove()
    assert sorted(expected) == ["BatchNorm1d", "Linear"]
    assert found == expected
    assert [type(m) for m in gpunn.fold_batch_norm(net).children()] == [gpunn.nn.Linear]


def test_a_layer_reads_its_input_where_it_did(device: str) -> None:
    net, x = with_statistics(Overwritten(False).to(device)), torch.randn(3, 4, device=device)
    with torch.no_grad(), gpunn.backend("torch"):
        folded = gpunn.fold_batch_norm(net)
        torch.testing.assert_close(folded(x.clone()), net(x.clone()))
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in folded.modules())


def test_a_fold_that_adds_a_residual_needs_gpunns_layers(device: str) -> None:
    """So ``restore`` leaves them, in a copy of the fold, too."""
    net = with_statistics(Net(gpunn.nn.Linear(4, 4), gpunn.nn.BatchNorm1d(4), residual=True))
    x = torch.randn(3, 4, device=device)
    folded = copy.deepcopy(gpunn.fold_batch_norm(net.to(device)))
    expected = folded(x)
    assert not gpunn.restore(folded).replaced
    assert torch.equal(folded(x), expected)


def test_a_fold_without_a_residual_can_be_restored() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    assert set(gpunn.restore(gpunn.fold_batch_norm(with_statistics(net))).replaced) == {"0"}
