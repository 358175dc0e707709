"""The networks: parameters as published and as torchvision names them, values as torch computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gpunn
from gpunn import models
from kit import launched

State = dict[str, tuple[int, ...]]
Values = dict[str, Tensor]

N_PARAMETERS = {
    "lenet5": 61_706, "alexnet": 60_965_224, "alexnet_one_tower": 61_100_840,
    "vgg11": 132_863_336, "vgg13": 133_047_848, "vgg16": 138_357_544, "vgg19": 143_667_240,
    "vgg11_bn": 132_868_840, "vgg13_bn": 133_053_736, "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248, "resnet18": 11_689_512, "resnet34": 21_797_672,
    "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808,
}  # fmt: skip


def n_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(build: Callable[..., torch.nn.Module], *arguments: Any) -> torch.nn.Module:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return build(*arguments)


@pytest.mark.parametrize("name", N_PARAMETERS)
def test_numbers_of_parameters_and_of_logits(name: str) -> None:
    model = on_meta(getattr(models, name))
    assert n_parameters(model) == N_PARAMETERS[name]
    shape, n_classes = ((1, 32, 32), 10) if name == "lenet5" else ((3, 227, 227), 1000)
    with gpunn.backend("torch"):
        assert model(torch.empty(2, *shape, device="meta")).shape == (2, n_classes)


def test_layers_of_lenet5_are_the_papers() -> None:
    counts = {name: n_parameters(layer) for name, layer in models.lenet5().named_children()}
    assert counts == {
        "c1": 156, "s2": 0, "c3": 2_416, "s4": 0, "c5": 48_120, "f6": 10_164, "output": 850,
    }  # fmt: skip


def biased(within: str, *layers: tuple[int, ...]) -> State:
    """Of layers given by index and shape of weight; weight and bias of each."""
    state: State = {}
    for index, *shape in layers:
        state |= {f"{within}.{index}.weight": (*shape,), f"{within}.{index}.bias": (shape[0],)}
    return state


def normed(convolution: str, norm: str, out_channels: int, in_channels: int, size: int) -> State:
    """A convolution without a bias, and the normalisation that follows it."""
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {
        f"{convolution}.weight": (out_channels, in_channels, size, size),
        **{f"{norm}.{vector}": (out_channels,) for vector in vectors},
        f"{norm}.num_batches_tracked": (),
    }


def resnet50_state() -> State:
    """Names and shapes in torchvision's resnet50, as its checkpoints have them."""
    state = normed("conv1", "bn1", 64, 3, 7)
    before = 64
    for layer, (width, depth) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], 1):
        for block in range(depth):
            at = f"layer{layer}.{block}"
            state |= normed(f"{at}.conv1", f"{at}.bn1", width, before, 1)
            state |= normed(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            state |= normed(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if block == 0:
                state |= normed(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, before, 1)
            before = 4 * width
    return state | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def alexnet_state() -> State:
    """Names and shapes in torchvision's alexnet."""
    large = biased("features", (0, 64, 3, 11, 11), (3, 192, 64, 5, 5), (6, 384, 192, 3, 3))
    small = biased("features", (8, 256, 384, 3, 3), (10, 256, 256, 3, 3))
    return large | small | biased("classifier", (1, 4096, 9216), (4, 4096, 4096), (6, 1000, 4096))


def vgg16_state() -> State:
    """Names and shapes in torchvision's vgg16."""
    indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    layers = [(index, widths[i + 1], widths[i], 3, 3) for i, index in enumerate(indices)]
    dense = biased("classifier", (0, 4096, 25088), (3, 4096, 4096), (6, 1000, 4096))
    return biased("features", *layers) | dense


TORCHVISION: dict[str, tuple[Callable[..., torch.nn.Module], State]] = {
    "resnet50": (models.resnet50, resnet50_state()),
    "alexnet": (models.alexnet_one_tower, alexnet_state()),
    "vgg16": (models.vgg16, vgg16_state()),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    build, expected = TORCHVISION[name]
    state = on_meta(build).state_dict()
    assert list(state) == list(expected)
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


@pytest.mark.parametrize("name", ["resnet50", "alexnet"])
def test_a_checkpoint_of_torchvisions_loads(name: str) -> None:
    build, expected = TORCHVISION[name]
    checkpoint: Values = {
        name: torch.randn(shape) if shape else torch.tensor(7) for name, shape in expected.items()
    }
    model = on_meta(build).to_empty(device="cpu")
    model.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(value, checkpoint[name]) for name, value in model.state_dict().items())


def values_of(model: torch.nn.Module) -> Values:
    """A copy of the model's parameters and buffers, the parameters with gradients."""
    state = model.state_dict(keep_vars=True).items()
    return {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in state}


def check_values(
    model: torch.nn.Module, by_hand: Callable[[Values, Tensor, bool], Tensor], x: Tensor
) -> None:
    """Outputs, gradients and running statistics in training, then outputs in evaluation.

    In double precision, with normalisations that are not the identity.
    """
    torch.use_deterministic_algorithms(False)  # some of torch's gradients on a GPU are not
    model, x = model.to(x.device, torch.float64), x.double()
    for name, value in model.state_dict().items():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5) if "running_var" in name else value.normal_()
    values, parameters = values_of(model), dict(model.named_parameters())
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with gpunn.backend("torch"):
        y, expected = model.train()(ours), by_hand(values, theirs, True)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(expected)
        got = torch.autograd.grad(y, [ours, *parameters.values()], dy)
        leaves = [theirs, *(values[name] for name in parameters)]
        torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, dy))
        for name, value in model.named_buffers():
            if "running" in name:
                torch.testing.assert_close(value, values[name], msg=name)
        torch.testing.assert_close(model.eval()(x), by_hand(values, x, False))


def convolved(values: Values, name: str, x: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, values[f"{name}.weight"], values[f"{name}.bias"], stride, padding)


def dense(values: Values, names: list[str], x: Tensor, activation: Any) -> Tensor:
    """Dense layers with an activation between them."""
    for i, name in enumerate(names):
        x = F.linear(activation(x) if i else x, values[f"{name}.weight"], values[f"{name}.bias"])
    return x


def lenet5_by_hand(values: Values, x: Tensor, modern: bool) -> Tensor:
    activation: Any = torch.relu if modern else torch.tanh
    pool: Any = F.max_pool2d if modern else F.avg_pool2d
    y = pool(activation(convolved(values, "c1", x, 1, 0)), 2)
    y = pool(activation(convolved(values, "c3", y, 1, 0)), 2)
    y = activation(convolved(values, "c5", y, 1, 0))
    return dense(values, ["f6", "output"], y[:, :, 0, 0], activation)


@pytest.mark.parametrize("modern", [False, True])
def test_values_of_lenet5(modern: bool, device: str) -> None:
    options: dict[str, Any] = {"activation": "relu", "pooling": "max"} if modern else {}
    x = torch.randn(2, 1, 32, 32, device=device)
    check_values(models.lenet5(7, **options), lambda v, x, _: lenet5_by_hand(v, x, modern), x)


def test_lenet5_on_the_kernels(device: str) -> None:
    model, x = models.lenet5().to(device), torch.randn(1, 1, 32, 32, device=device)
    with gpunn.trace() as trace:
        y = model(x)
    launched(trace, "conv_forward", "linear_forward")
    torch.testing.assert_close(y, lenet5_by_hand(values_of(model), x, False), rtol=1e-4, atol=1e-4)


def normalised(values: Values, name: str, x: Tensor, training: bool) -> Tensor:
    statistics = values[f"{name}.running_mean"], values[f"{name}.running_var"]
    return F.batch_norm(x, *statistics, values[f"{name}.weight"], values[f"{name}.bias"], training)


def block_by_hand(values: Values, at: str, x: Tensor, stride: int, training: bool) -> Tensor:
    """A basic block or, where there is a third convolution, a bottleneck."""
    strides = (1, stride, 1) if f"{at}conv3.weight" in values else (stride, 1)
    y = x
    for i, step in enumerate(strides, 1):
        weight = values[f"{at}conv{i}.weight"]
        y = F.conv2d(y if i == 1 else F.relu(y), weight, None, step, weight.shape[-1] // 2)
        y = normalised(values, f"{at}bn{i}", y, training)
    if f"{at}downsample.0.weight" in values:
        x = F.conv2d(x, values[f"{at}downsample.0.weight"], None, stride)
        x = normalised(values, f"{at}downsample.1", x, training)
    elif x.shape != y.shape:  # CIFAR's: every second pixel, and maps of zeros
        x = x[:, :, ::stride, ::stride]
        x = torch.cat([x, x.new_zeros(x.shape[0], y.shape[1] - x.shape[1], *x.shape[2:])], 1)
    return F.relu(y + x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck, models.CifarBlock])
def test_values_of_a_block(block: Any, stride: int, device: str) -> None:
    in_channels = 8 if block is models.Bottleneck else 2
    x = torch.randn(3, in_channels, 5, 6, device=device)
    model = block(in_channels, 2 * stride, stride)
    check_values(model, lambda v, x, training: block_by_hand(v, "", x, stride, training), x)


def test_a_block_on_the_kernels(device: str) -> None:
    """In training, where the last normalisation adds the shortcut."""
    model, x = models.BasicBlock(2, 4, 2).to(device), torch.randn(2, 2, 5, 4, device=device)
    values = values_of(model)
    with gpunn.trace() as trace:
        got = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    launched(trace, "conv_forward", "batch_norm_forward", "batch_norm_backward")
    loss = block_by_hand(values, "", x, 2, True).square().sum()
    leaves = [value for value in values.values() if value.requires_grad]
    torch.testing.assert_close(got, torch.autograd.grad(loss, leaves), rtol=1e-3, atol=1e-3)


def resnet_by_hand(values: Values, x: Tensor, depths: tuple[int, ...], training: bool) -> Tensor:
    """Four stages: ImageNet's stem; three: CIFAR's."""
    small = len(depths) == 3
    x = F.conv2d(x, values["conv1.weight"], None, 1 if small else 2, 1 if small else 3)
    x = F.relu(normalised(values, "bn1", x, training))
    x = x if small else F.max_pool2d(x, 3, 2, 1)
    for layer, depth in enumerate(depths, 1):
        for i in range(depth):
            stride = 2 if layer > 1 and i == 0 else 1
            x = block_by_hand(values, f"layer{layer}.{i}.", x, stride, training)
    return F.linear(x.mean((2, 3)), values["fc.weight"], values["fc.bias"])


@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck, models.CifarBlock])
def test_values_of_a_whole_resnet(block: Any, device: str) -> None:
    small = block is models.CifarBlock
    depths = (2, 2, 2) if small else (1, 2, 1, 1)
    model = models.resnet_cifar(14, 5) if small else models.ResNet(block, depths, 5)
    x = torch.randn(2, 3, 24, 35, device=device)
    check_values(model, lambda v, x, training: resnet_by_hand(v, x, depths, training), x)


def vgg11_bn_by_hand(values: Values, x: Tensor) -> Tensor:
    for index in (0, 4, 8, 11, 15, 18, 22, 25):
        x = convolved(values, f"features.{index}", x, 1, 1)
        x = F.relu(normalised(values, f"features.{index + 1}", x, False))
        x = F.max_pool2d(x, 2) if index in (0, 4, 11, 18, 25) else x
    x = F.adaptive_avg_pool2d(x, 7).flatten(1)
    return dense(values, [f"classifier.{i}" for i in (0, 3, 6)], x, F.relu)


def alexnet_one_tower_by_hand(values: Values, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(convolved(values, "features.0", x, 4, 2)), 3, 2)
    x = F.max_pool2d(F.relu(convolved(values, "features.3", x, 1, 2)), 3, 2)
    for index in (6, 8, 10):
        x = F.relu(convolved(values, f"features.{index}", x, 1, 1))
    x = F.adaptive_avg_pool2d(F.max_pool2d(x, 3, 2), 6).flatten(1)
    return dense(values, [f"classifier.{i}" for i in (1, 4, 6)], x, F.relu)


def two_towers(values: Values, name: str, x: Tensor, padding: int) -> Tensor:
    """A convolution of which either half sees one half of the maps, and ReLU."""
    weights, biases = values[f"{name}.weight"].chunk(2), values[f"{name}.bias"].chunk(2)
    towers = zip(x.chunk(2, 1), weights, biases, strict=True)
    return torch.cat([F.relu(F.conv2d(x, w, b, padding=padding)) for x, w, b in towers], 1)


def alexnet_by_hand(values: Values, x: Tensor, norm: Any = torch.clone) -> Tensor:
    x = norm(F.relu(convolved(values, "features.0", x, 4, 0)))
    x = norm(two_towers(values, "features.3", F.max_pool2d(x, 3, 2), 2))
    x = F.relu(convolved(values, "features.6", F.max_pool2d(x, 3, 2), 1, 1))
    x = two_towers(values, "features.8", two_towers(values, "features.7", x, 1), 1)
    x = F.max_pool2d(x, 3, 2).flatten(1)
    return dense(values, [f"classifier.{i}" for i in range(3)], x, F.relu)


def response_normalised(x: Tensor) -> Tensor:
    """The formula of AlexNet's section 3.3."""
    n = x.shape[1]
    sums = [x[:, max(0, i - 2) : min(n, i + 3)].square().sum(1) for i in range(n)]
    return x / (2 + 1e-4 * torch.stack(sums, 1)) ** 0.75


WITH_DROPOUT: dict[str, tuple[Any, ...]] = {
    "vgg11_bn": (vgg11_bn_by_hand,),
    "alexnet_one_tower": (alexnet_one_tower_by_hand,),
    "alexnet": (alexnet_by_hand, torch.clone),
    "alexnet, normalised": (alexnet_by_hand, response_normalised),
}


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_values_of_a_net_with_dropout(name: str, device: str) -> None:
    """In evaluation; in training two outputs differ."""
    by_hand, *norm = WITH_DROPOUT[name]
    options = {"local_response_norm": True} if response_normalised in norm else {}
    model = getattr(models, name.split(",")[0])(7, **options).to(device).eval()
    x = 9 * torch.randn(2, 3, *((227, 227) if "alexnet" in name else (33, 40)), device=device)
    with gpunn.backend("torch"), torch.no_grad():
        expected = by_hand(model.state_dict(), x, *norm)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        model.classifier.train()
        assert not torch.equal(model(x), model(x))


def test_the_plain_net_differs_in_nothing_but_the_shortcuts(device: str) -> None:
    for depth, expected in {20: 269_722, 56: 853_018, 110: 1_727_962}.items():
        nets = [on_meta(models.resnet_cifar, depth, 10, 3, residual) for residual in (True, False)]
        for net in nets:
            assert sum(isinstance(layer, gpunn.nn.Conv2d) for layer in net.modules()) == depth - 1
            assert n_parameters(net) == expected
        assert list(nets[0].state_dict()) == list(nets[1].state_dict())
    x = torch.rand(2, 3, 5, 5, device=device)
    for residual in (False, True):
        block = models.CifarBlock(3, 3, residual=residual).to(device).eval()
        torch.nn.init.zeros_(block.conv2.weight)
        with gpunn.backend("torch"):
            assert torch.equal(block(x), x if residual else torch.zeros_like(x))


REFUSED: dict[str, Callable[[], object]] = {
    r"depth: .*6 n \+ 2.*got 18": lambda: models.resnet_cifar(18),
    r"depth: .*6 n \+ 2.*got 2": lambda: models.resnet_cifar(2),
    r"pooling: .*average, max.*'mean'": lambda: models.lenet5(pooling="mean"),
    r"input: .*32, 32.*28, 28.*pad": lambda: models.lenet5()(torch.zeros(1, 1, 28, 28)),
    r"input: .*227, 227.*224": lambda: models.alexnet()(torch.zeros(1, 3, 224, 224)),
    r"stage_depths: .*five.*\(1, 1\)": lambda: models.VGG((1, 1)),
    r"stage_depths: .*four.*\(1, 1\)": lambda: models.ResNet(models.BasicBlock, (1, 1)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_refused_by_name(message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        REFUSED[message]()


@pytest.mark.parametrize(("build", "last"), [(models.resnet18, "bn2"), (models.resnet50, "bn3")])
def test_how_a_resnet_starts(build: Any, last: str) -> None:
    model = build(zero_init_residual=True)
    weight = model.layer4[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / weight[:, 0].numel()) ** 0.5, rel=0.02)
    for name, value in model.named_parameters():
        if "bn" in name and name.endswith("weight"):
            assert (value == (0 if last in name else 1)).all(), name
    assert (getattr(build().layer1[0], last).weight == 1).all()


def test_how_a_vgg_starts() -> None:
    model: Any = models.vgg11()
    assert model.features[3].weight.std().item() == pytest.approx((2 / 1152) ** 0.5, rel=0.02)
    assert model.classifier[3].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not any(bias.any() for name, bias in model.named_parameters() if "bias" in name)


@pytest.mark.parametrize("name", ["resnet18", "resnet_cifar", "lenet5"])
def test_channels_last_gives_the_same(name: str, device: str) -> None:
    model: Any = getattr(models, name)(8).to(device).eval()  # a depth, or classes
    x = torch.randn(2, 1 if name == "lenet5" else 3, 32, 32, device=device)
    inner: list[Tensor] = []
    with gpunn.backend("torch"), torch.no_grad():
        expected = model(x)
        layer = model.c3 if name == "lenet5" else model.layer3
        layer.register_forward_hook(lambda module, given, y: inner.append(y))
        y = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert inner[0].is_contiguous(memory_format=torch.channels_last)


def test_a_step_under_autocast(device: str) -> None:
    torch.use_deterministic_algorithms(False)  # some of torch's gradients on a GPU are not
    model = models.resnet_cifar(8).to(device)
    with gpunn.backend("torch"), torch.autocast(device, torch.bfloat16):
        logits = model(torch.randn(2, 3, 16, 16, device=device))
    assert logits.dtype == torch.bfloat16
    gradients = torch.autograd.grad(logits.float().logsumexp(1).sum(), list(model.parameters()))
    assert all(0 < gradient.abs().max() < torch.inf for gradient in gradients)
