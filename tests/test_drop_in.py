"""gpunn.nn and gpunn.functional stand in for torch's: names, arguments, state_dict, numbers."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
import gpunn.nn
from gpunn.kernels.launch import Backend
from gpunn.replacement import PLAIN
from kit import CONTAINERS

LAYERS = sorted(set(gpunn.nn.__all__) - CONTAINERS)
NAMESAKES = [name for name in LAYERS if hasattr(torch.nn, name)]
FUNCTIONS = [n for n in GF.__all__ if hasattr(F, n) or hasattr(torch, n)]

# Probabilities of a dropout at which it is not random.
CERTAIN = [(1.0,), (0.0, True)]
# Arguments other than the defaults, for the layers that have any.
ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    **{name: [(3,)] for name in ("AdaptiveAvgPool1d", "AdaptiveMaxPool1d")},
    "AdaptiveAvgPool2d": [((3, None),), (1,)],
    "AdaptiveMaxPool2d": [(3, True), ((None, 2),)],
    "AvgPool1d": [(3, 2, 1, True, False)],
    "AvgPool2d": [(3, 2, 1, True, False, 5), ((2, 3),)],
    "BatchNorm1d": [(3, 1e-3, 0.3), (3, 1e-5, None, False), (3, 1e-5, 0.1, True, False)],
    "BatchNorm2d": [(3, 1e-3, 0.3), (3, 1e-5, None, False), (3, 1e-5, 0.1, True, False)],
    "BatchNorm3d": [(3, 1e-3, 0.3), (3, 1e-5, 0.1, False, False)],
    **{name: [(0.5,)] for name in ("CELU", "ELU")},
    "Conv1d": [(3, 4, 2), (3, 6, 3, 2, 1, 2, 3, False)],
    "Conv2d": [(3, 4, 3, 1, "same"), (3, 6, (2, 3), 1, 1, 1, 3, True, "reflect")],
    "ConvTranspose1d": [(3, 4, 3, 2, 1, 1)],
    "ConvTranspose2d": [(3, 6, 4, 2, 1, 1, 3, False)],
    **dict.fromkeys(
        ("AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"),
        CERTAIN,
    ),
    "Embedding": [(9, 5), (9, 5, -2)],
    "GELU": [("tanh",)],
    "GLU": [(0,)],
    **{name: [(0.25,)] for name in ("Hardshrink", "LeakyReLU", "Softshrink")},
    "GroupNorm": [(3, 6), (2, 6, 1e-3), (1, 6, 1e-5, False)],
    "Hardtanh": [(-0.5, 0.25)],
    **{f"InstanceNorm{d}d": [(3,), (3, 1e-3, 0.3, True, True)] for d in (1, 2, 3)},
    "Linear": [(6, 5, False), (6, 5)],
    "LinearCrossEntropyLoss": [(6, 5)],
    "MaxPool1d": [(3, 2, 1, 2, True, True), (2,)],
    "MaxPool2d": [(3, 2, 1, 1, True, True), ((2, 3),)],
    "MaxUnpool1d": [(2,), (3, 2, 1)],
    "MaxUnpool2d": [(2,), ((3, 2), 2, (1, 0))],
    **{name: [(1,)] for name in ("LogSoftmax", "Softmax", "Softmin")},
    "Softmax2d": [()],
    "Softplus": [(2.0, 1.0)],
    "SyncBatchNorm": [(3, 1e-3, 0.3)],
}
# Layers that have no defaults for all arguments, or are random with them.
WITHOUT_DEFAULTS = {"Embedding", "Linear", "LinearCrossEntropyLoss"} | {
    name
    for name in NAMESAKES
    if any(part in name for part in ("Conv", "Dropout", "Norm", "Trans", "head", "oftm", "ool"))
}
# Shapes of the inputs of layers that do not take every shape.
SHAPES: dict[str, tuple[int, ...]] = {
    "Dropout2d": (4, 6, 3, 5),
    "Dropout3d": (4, 6, 3, 2, 5),
    **{n: (4, 3, 6) for n in NAMESAKES if n.endswith(("ool2d", "Conv1d", "pose1d", "Norm1d"))},
    **{n: (2, 3, 4, 6) for n in NAMESAKES if n.endswith(("Conv2d", "max2d", "pose2d", "Norm2d"))},
    **dict.fromkeys(("BatchNorm3d", "InstanceNorm3d"), (2, 3, 2, 4, 3)),
    "SyncBatchNorm": (2, 3, 4),
}


def signatures_of(name: str, ours: Any, theirs: Any) -> None:
    """Ours takes torch's parameters, in torch's order and with its defaults; more by keyword."""
    expected = list(inspect.signature(theirs).parameters.values())
    got = list(inspect.signature(ours).parameters.values())
    for mine, other in zip(got, expected, strict=False):
        assert mine.name == other.name, f"{name}: {mine} instead of {other}"
        assert mine.default == other.default, f"{name}: {mine} instead of {other}"
    assert len(got) >= len(expected), name
    for extra in got[len(expected) :]:
        assert extra.kind is inspect.Parameter.KEYWORD_ONLY, f"{name}: {extra}"


def test_the_containers_are_torchs_and_nothing_else_is() -> None:
    torchs = {n for n in gpunn.nn.__all__ if getattr(torch.nn, n, 0) is getattr(gpunn.nn, n)}
    assert torchs == CONTAINERS
    assert len(NAMESAKES) > 20
    for name in LAYERS:
        assert getattr(gpunn.nn, name).__module__.startswith("gpunn.nn.")


@pytest.mark.parametrize("name", NAMESAKES)
def test_layer_signature(name: str) -> None:
    ours, theirs = getattr(gpunn.nn, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    signatures_of(name, ours, theirs)
    assert "forward" in vars(ours)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_signature(name: str) -> None:
    ours, theirs = getattr(GF, name), getattr(F, name, None) or getattr(torch, name)
    assert ours is not theirs
    theirs = getattr(F, f"{name}_with_indices", theirs)  # of two functions, the one to read
    if name in BUILTINS:
        got = {n: p.default for n, p in inspect.signature(ours).parameters.items()}
        assert list(got.items())[1 : 1 + len(BUILTINS[name])] == list(BUILTINS[name].items())
    else:
        try:
            inspect.signature(theirs)
        except ValueError:
            pytest.fail(f"torch's {name} is a builtin: give its parameters in BUILTINS")
        signatures_of(name, ours, theirs)


WEIGHTED = {"weight": inspect.Parameter.empty, "bias": None, "stride": 1, "padding": 0}
CONVOLUTION = {**WEIGHTED, "dilation": 1, "groups": 1}
TRANSPOSED = {**WEIGHTED, "output_padding": 0, "groups": 1, "dilation": 1}
AVG_POOL: dict[str, Any] = {
    "kernel_size": inspect.Parameter.empty, "stride": None, "padding": 0, "ceil_mode": False,
    "count_include_pad": True,
}  # fmt: skip
ATTENTION = {
    "key": inspect.Parameter.empty, "value": inspect.Parameter.empty, "attn_mask": None,
    "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
}  # fmt: skip
# Functions of torch's that are builtins and have no signature to read: what follows the first
# argument, from torch's documentation.
BUILTINS: dict[str, dict[str, Any]] = {
    "adaptive_avg_pool1d": {"output_size": inspect.Parameter.empty},
    "avg_pool1d": AVG_POOL,
    "avg_pool2d": {**AVG_POOL, "divisor_override": None},
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), CONVOLUTION),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), TRANSPOSED),
    "gelu": {"approximate": "none"},
    "hardshrink": {"lambd": 0.5},
    "linear": {"weight": inspect.Parameter.empty, "bias": None},
    "logsigmoid": {},
    "scaled_dot_product_attention": ATTENTION,
    "sigmoid": {},
    "softplus": {"beta": 1, "threshold": 20},
    "softshrink": {"lambd": 0.5},
    "tanh": {},
}

LAYER_CASES = [
    (name, arguments)
    for name in NAMESAKES
    for arguments in [*ARGUMENTS.get(name, []), *([] if name in WITHOUT_DEFAULTS else [()])]
]


def inputs_of(name: str, device: str) -> tuple[torch.Tensor, ...]:
    """What a layer takes; of unpooling also where in a plane of its output the values belong."""
    x = torch.randn(SHAPES.get(name, (4, 6)), device=device)
    if name == "Embedding":
        return (torch.arange(8, device=device).view(2, 4),)
    if "Loss" in name:
        of_classes = name.startswith(("Cross", "Linear", "NLL"))
        return x, torch.arange(4, device=device) if of_classes else torch.rand_like(x)
    places = torch.arange(x[0].numel(), device=device).view(x.shape[1:]).expand(x.shape)
    return (x, places.contiguous()) if name.startswith("MaxUnpool") else (x,)


@pytest.mark.filterwarnings("ignore:.*(NLLLoss2d. has been|mean. divides)")
@pytest.mark.parametrize(("name", "arguments"), LAYER_CASES, ids=str)
@pytest.mark.parametrize("choice", ["kernels", "torch"])
def test_layer_is_interchangeable(
    name: str, arguments: tuple[Any, ...], choice: Backend, device: str
) -> None:
    """Same parameters, same state_dict both ways, same numbers, and a copy works as well."""
    torch.manual_seed(0)
    ours = getattr(gpunn.nn, name)(*arguments).to(device)
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*arguments).to(device)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(ours.state_dict()[key], state[key]) for key in state)
    ours.load_state_dict(state)
    theirs.load_state_dict(ours.state_dict())
    inputs = inputs_of(name, device)
    torch.use_deterministic_algorithms(not name.startswith("MaxUnpool"))  # refused by torch's
    expected = theirs(*inputs)
    with gpunn.backend(choice):
        torch.testing.assert_close(ours(*inputs), expected)
        torch.testing.assert_close(copy.deepcopy(ours)(*inputs), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(ours))(*inputs), expected)
    assert repr(ours) == repr(theirs)
    # ``accelerate`` makes the one the other by its class alone
    fused = {key: value for key, value in vars(ours).items() if key not in vars(theirs)}
    assert fused == {key: PLAIN.get(key, "missing") for key in fused}, (
        "what torch's layer lacks stands in PLAIN of gpunn/replacement.py"
    )
    gpunn.accelerate(theirs)
    assert type(theirs) is type(ours)
    with gpunn.backend(choice):
        torch.testing.assert_close(theirs(*inputs), expected)


def test_linear_with_its_fused_parts(device: str) -> None:
    layer = gpunn.nn.Linear(6, 5, activation=("leaky_relu", 0.2), dropout_p=0.5).to(device)
    plain = torch.nn.Linear(6, 5).to(device)
    plain.load_state_dict(layer.state_dict())
    x, residual = torch.randn(4, 6, device=device), torch.randn(4, 5, device=device)
    expected = F.leaky_relu(plain(x), 0.2)
    torch.testing.assert_close(layer.eval()(x, residual), expected + residual)
    dropped = layer.train()(x)
    assert (dropped == 0).any()
    torch.testing.assert_close(dropped[dropped != 0], 2 * expected[dropped != 0])
    assert "activation=('leaky_relu', 0.2), dropout_p=0.5" in repr(layer)
    with pytest.raises(ValueError, match=r"activation.*'rleu'"):
        gpunn.nn.Linear(6, 5, activation="rleu")
    with pytest.raises(ValueError, match=r"dropout_p.*2"):
        gpunn.nn.Linear(6, 5, dropout_p=2)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.func's own
def test_symbolic_tracing_and_function_transforms() -> None:
    """What works on torch's functions works on these: torch.fx, torch.func, forward mode."""
    net = gpunn.nn.Sequential(
        gpunn.nn.Linear(4, 6, activation="relu", dropout_p=0.5), gpunn.nn.GLU(), gpunn.nn.GELU()
    ).eval()
    x = torch.randn(3, 4)
    with gpunn.backend("auto"):
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))
        gradients = torch.func.vmap(torch.func.grad(lambda x: net(x).sum()))(x)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(gradients, torch.autograd.grad(net(leaf).sum(), leaf)[0])
        tangent = torch.func.jvp(net, (x,), (x,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = net(torch.autograd.forward_ad.make_dual(x, x))
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.func's own
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_function_transforms_inside_of_torch_compile(compiler: str, device: str) -> None:
    """A custom op without an autograd formula would give zeros there."""
    torch._dynamo.reset()
    x, weight = torch.randn(4, 6, device=device), torch.randn(3, 6, device=device)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return GF.linear(x, weight, activation="gelu").sum()

    with gpunn.backend("auto"):
        per_row = torch.func.vmap(torch.func.grad(loss))
        got = torch.compile(per_row, fullgraph=True, backend=compiler)(x)
    leaf = x.clone().requires_grad_()
    F.gelu(F.linear(leaf, weight)).sum().backward()
    torch.testing.assert_close(got, leaf.grad)


def test_floating_point_operations_are_counted(device: str) -> None:
    """By torch's FlopCounterMode, as of torch's own linear."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(4, 6, device=device, requires_grad=True)
    counts = []
    for layer in (gpunn.nn.Linear(6, 8, activation="gelu"), torch.nn.Linear(6, 8)):
        with FlopCounterMode(display=False) as counter:
            layer.to(device)(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 4 * 6 * 8] * 2


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_floating_point_operations_of_convolutions_are_counted(name: str, device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, counts = torch.randn(2, 4, 6, 5, device=device, requires_grad=True), []
    for package, fused in ((gpunn.nn, {"activation": "gelu"}), (torch.nn, {})):
        layer = getattr(package, name)(4, 3, 3, stride=2, **fused).to(device)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 3 * 2 * 4 * 3 * 9


def test_a_traced_model_keeps_its_dropout() -> None:
    net = torch.fx.symbolic_trace(gpunn.nn.Sequential(gpunn.nn.Linear(4, 400, dropout_p=0.5)))
    assert 0.3 < (net(torch.ones(1, 4)) == 0).double().mean() < 0.7


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_other_devices_and_dtypes_are_torchs(device: str) -> None:
    sparse = torch.tensor([[0.0, -1.0]], device=device).to_sparse()
    ones = torch.ones(2, 3, device=device)
    with gpunn.backend("auto"), gpunn.trace() as trace:
        assert GF.relu(torch.tensor([-1, 2], device=device)).tolist() == [0, 2]
        assert GF.linear(torch.ones(2, 3, device="meta"), torch.ones(4, 3, device="meta")).is_meta
        assert GF.relu(sparse).to_dense().tolist() == [[0, 0]]
        assert GF.linear(ones, torch.ones(3, device=device)).tolist() == [3, 3]
        assert GF.linear(ones, ones, ones[0, 0]).tolist() == [[4, 4], [4, 4]]
        nested = torch.nested.nested_tensor([ones, ones[:1]])
        parts = GF.linear(nested, ones).unbind()
        assert [part.tolist() for part in parts] == [[[3, 3], [3, 3]], [[3, 3]]]
        assert len(GF.relu(nested).unbind()) == 2
    assert [f.reason for f in trace.fallbacks] == [
        f"no kernel for torch.int64 on {device}",
        "meta tensor",
        "torch.sparse_coo tensor",
        "the weight is a vector",
        "the bias is a scalar",
        "the input is nested",
        "nested tensor",
    ]


DATA_PARALLEL = """
import os, sys, torch, gpunn
import torch.distributed as dist
device = sys.argv[1]
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
net = gpunn.nn.Sequential(gpunn.nn.Linear(4, 8, activation="gelu"), gpunn.nn.Linear(8, 2))
wrapped = torch.nn.parallel.DistributedDataParallel(net.to(device))
x, dy = torch.randn(5, 4, device=device), torch.randn(5, 2, device=device)
with gpunn.backend("kernels"):
    expected = torch.autograd.grad(net(x), list(net.parameters()), dy)
    wrapped(x).backward(dy)
for parameter, gradient in zip(net.parameters(), expected):
    torch.testing.assert_close(parameter.grad, gradient)
print("the gradients agree", flush=True)
os._exit(0)  # gloo's threads can wait for ever on the interpreter that is shutting down
"""


def test_data_parallel_training_gives_the_gradients_of_one_process(
    device: str, tmp_path: Path
) -> None:
    """DistributedDataParallel over gloo, one process: hooks and buckets work on gpunn's layers."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    done = subprocess.run(
        [sys.executable, "-c", DATA_PARALLEL, device, str(tmp_path / "store")],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "the gradients agree", done.stderr


def test_the_readmes_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    example = readme.partition("```python\n")[2].partition("```")[0]
    with gpunn.backend("auto"):
        exec(compile(example, "README.md", "exec"), {})
    assert "linear" in capsys.readouterr().out
