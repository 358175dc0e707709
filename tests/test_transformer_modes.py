"""The Transformer with what users change inside of it, under PyTorch's modes, and refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import gpunn
from test_transformer import LAYERS, compare, pair

pytestmark = [
    pytest.mark.usefixtures("one_path_of_torchs"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


INTERCHANGEABLE: dict[str, list[tuple[Any, ...]]] = {
    "MultiheadAttention": [(6, 2), (6, 3, 0.0, False, True, True, 4, 5, True)],
    "Transformer": [(6, 2, 1, 2, 8, 0.0)],
    "TransformerDecoder": [(torch.nn.TransformerDecoderLayer(6, 2, 8, 0.0), 2)],
    "TransformerDecoderLayer": [(6, 2, 8, 0.0, "gelu", 1e-3, True, True, False)],
    "TransformerEncoder": [(torch.nn.TransformerEncoderLayer(6, 2, 8, 0.0), 1, None, False)],
    "TransformerEncoderLayer": [(6, 2), (6, 2, 8, 0.0, "gelu", 1e-3, True, True, False)],
}
CASES = [(name, each) for name, given in INTERCHANGEABLE.items() for each in given]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[name for name, _ in CASES])
def test_state_is_torchs(name: str, arguments: tuple[Any, ...], device: str) -> None:
    """The same parameters from the same seed, state_dict both ways, copies, and repr."""
    made = []
    for package in (gpunn.nn, torch.nn):
        torch.manual_seed(0)
        made.append(getattr(package, name)(*arguments).to(device))
    ours, theirs = made
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(ours.state_dict()[key], state[key]) for key in state)
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(module) for module in again.modules()] == [type(m) for m in ours.modules()]
        again.load_state_dict(state)


# --- what users change inside ---


def test_hooks_see_what_torchs_see(device: str) -> None:
    ours, theirs = pair(LAYERS[0], device, 8, 2, 12, dropout=0.0, activation=torch.nn.ReLU())
    x = torch.randn(4, 2, 8, device=device)
    parts = ["linear1", "activation", "linear2", "norm1", "norm2", "dropout1", "self_attn"]
    for part in parts:
        seen: list[Any] = []
        for layer in (ours, theirs):
            hook = layer.get_submodule(part).register_forward_hook(
                lambda _module, inputs, output, seen=seen: seen.append((inputs, output))
            )
            layer(x)
            hook.remove()
        torch.testing.assert_close(*seen, rtol=1e-3, atol=1e-4)


def test_a_hook_on_all_modules_sees_and_changes_what_it_does_in_torchs(device: str) -> None:
    ours, theirs = pair(LAYERS[0], device, 8, 2, 12, dropout=0.0)
    x = torch.randn(4, 2, 8, device=device)
    before, seen = theirs(x), []

    def doubled(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        seen.append(module.__class__.__name__)
        return 2 * output if isinstance(module, torch.nn.LayerNorm) else None

    hook = torch.nn.modules.module.register_module_forward_hook(doubled)
    try:
        results = [layer(x) for layer in (ours, theirs)]
    finally:
        hook.remove()
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(results[0], before, rtol=1e-2, atol=1e-2)
    assert seen.count("LayerNorm") == 4


def test_layers_of_the_users_own(device: str) -> None:
    """Other normalisations, a subclass with its own forward, and one with a fused activation."""

    class Doubled(gpunn.nn.Linear):
        def forward(self, input: torch.Tensor, residual: Any = None) -> torch.Tensor:
            return 2 * super().forward(input, residual)

    x = torch.randn(4, 2, 8, device=device)
    for part, own, torchs in (
        ("norm1", gpunn.nn.RMSNorm(8), torch.nn.RMSNorm(8)),
        ("norm1", gpunn.nn.Linear(8, 8), torch.nn.Linear(8, 8)),
        ("linear1", Doubled(8, 12), None),
        ("linear1", torch.nn.Linear(8, 12), None),
        ("linear2", gpunn.nn.Linear(12, 8, activation="tanh"), None),
        ("self_attn", torch.nn.MultiheadAttention(8, 2), torch.nn.MultiheadAttention(8, 2)),
    ):
        for norm_first in (False, True):
            ours, theirs = pair(LAYERS[0], device, 8, 2, 12, dropout=0.0, norm_first=norm_first)
            setattr(ours, part, own.to(device))
            setattr(theirs, part, copy.deepcopy(own if torchs is None else torchs).to(device))
            theirs.load_state_dict(ours.state_dict())
            with torch.no_grad(), gpunn.trace() as trace:
                torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
            is_fused_else = part in ("norm1", "linear1") or (part == "linear2" and norm_first)
            assert len(trace.fallbacks) == is_fused_else
            assert all("not fused" in fallback.reason for fallback in trace.fallbacks)


OWN = "a block of the user's own: torch's forward, of which nothing is fused"
BLOCKS = [
    (LAYERS[0], "_sa_block"), (LAYERS[0], "_ff_block"),
    (LAYERS[1], "_sa_block"), (LAYERS[1], "_mha_block"), (LAYERS[1], "_ff_block"),
]  # fmt: skip


def give_own_block(layer: Any, block: str, is_the_instances: bool) -> None:
    """A method in the place of torch's, the layer's or of a class for it, which it calls."""
    before = getattr(type(layer), block)

    def own(self: Any, x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        y: torch.Tensor = 2 * before(self, x + 1, *arguments, **keywords)
        return y

    if is_the_instances:
        setattr(layer, block, own.__get__(layer))
    else:
        layer.__class__ = type("Special", (type(layer),), {block: own})


@pytest.mark.parametrize("is_the_instances", [False, True])
@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_blocks_of_the_users_own(
    name: str, block: str, is_the_instances: bool, device: str
) -> None:
    """They are called as torch's layer calls them; in inference too, where torch passes them by."""
    shapes = [(2, 4, 8)] * (1 if name == LAYERS[0] else 2)
    inputs = {f"x{i}": torch.randn(shape, device=device) for i, shape in enumerate(shapes)}
    prefix = "src" if name == LAYERS[0] else "tgt"
    call = {
        f"{prefix}_mask": torch.ones(4, 4, device=device).triu(1) > 0,
        f"{prefix}_key_padding_mask": torch.tensor([[False] * 4, [False] * 3 + [True]]).to(device),
    }
    for norm_first in (False, True):
        settings: Any = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
        ours, theirs = pair(name, device, 8, 2, 12, **settings)
        for layer in (ours, theirs):
            give_own_block(layer, block, is_the_instances)
        errors, trace = compare(ours, theirs, inputs, torch.randn(2, 4, 8, device=device), **call)
        assert all(error <= allowed for error, allowed in errors.values()), errors
        assert [fallback.reason for fallback in trace.fallbacks] == [OWN]
        with torch.no_grad():
            expected = theirs.eval()(*inputs.values(), **call)
            torch.backends.mha.set_fastpath_enabled(True)
            y = ours.eval()(*inputs.values(), **call)
            torch.backends.mha.set_fastpath_enabled(False)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
        assert "" not in gpunn.restore(ours).replaced
        assert "" not in gpunn.accelerate(theirs).replaced
        torch.testing.assert_close(theirs(*inputs.values(), **call), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_blocks_of_the_users_own_on_nested_tensors(layout: Any, device: str) -> None:
    """Of either layout; what torch's operations take of them is torch's."""
    torch.backends.mha.set_fastpath_enabled(True)
    settings: Any = {"dropout": 0.0, "batch_first": True}
    layer, _ = pair(LAYERS[0], device, 8, 2, 12, **settings)
    give_own_block(layer.eval(), "_sa_block", is_the_instances=False)
    parts = [torch.randn(n, 8, device=device) for n in (3, 5)]
    with gpunn.backend("auto"), torch.no_grad():
        y = layer(torch.nested.nested_tensor(parts, layout=layout))
        for mine, part in zip(y.unbind(), parts, strict=True):
            torch.testing.assert_close(mine, layer(part[None])[0], rtol=1e-3, atol=1e-4)


def test_custom_parts_stay_what_they_are(device: str) -> None:
    class Layer(torch.nn.Module):
        """As a user's: it adds the mask, which torch gives it in numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.self_attn = torch.nn.MultiheadAttention(8, 2)

        def forward(self, src: torch.Tensor, src_mask: Any, **others: Any) -> torch.Tensor:
            total: torch.Tensor = others["src_key_padding_mask"].exp().sum()
            return src + torch.softmax(src_mask, -1).amax(-1).sum() + total

    mask = torch.ones(4, 4, device=device).triu(1) > 0
    padding = torch.zeros(2, 4, device=device) > 0
    x = torch.randn(4, 2, 8, device=device)
    stacks = [
        package.TransformerEncoder(Layer(), 2, enable_nested_tensor=False)
        for package in (gpunn.nn, torch.nn)
    ]
    expected = stacks[1](x, mask, padding)
    torch.testing.assert_close(stacks[0](x, mask, padding), expected)
    whole = gpunn.nn.Transformer(8, 2, custom_encoder=stacks[1], custom_decoder=stacks[0])
    assert whole.encoder is stacks[1]
    assert type(whole.encoder) is torch.nn.TransformerEncoder
    layer = gpunn.nn.TransformerEncoderLayer(8, 2, 12, activation=torch.nn.Linear(12, 12))
    assert type(layer.activation) is torch.nn.Linear
    assert type(layer.self_attn.out_proj) is type(torch.nn.MultiheadAttention(8, 2).out_proj)


# --- modes ---


def test_sequences_of_different_lengths(device: str) -> None:
    """Jagged, as each alone; encoder and decoder, both orders, with the norm at the end."""
    lengths = [(3, 4), (5, 2)]
    src, tgt = (
        torch.nested.nested_tensor(
            [torch.randn(n, 8, device=device) for n in each], layout=torch.jagged
        )
        for each in zip(*lengths, strict=True)
    )
    for norm_first in (False, True):
        model, _ = pair(
            "Transformer", device, 8, 2, 1, 1, 12, 0.0, batch_first=True, norm_first=norm_first
        )
        with gpunn.trace() as trace:
            y = model.decoder(tgt, model.encoder(src))
        assert not trace.fallbacks
        for mine, one, other in zip(y.unbind(), src.unbind(), tgt.unbind(), strict=True):
            torch.testing.assert_close(mine, model(one, other), rtol=1e-3, atol=1e-4)


def test_nested_tensors_that_are_not_jagged_are_torchs(device: str) -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    settings: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
    ours, theirs = (
        package.TransformerEncoder(layer, 2, package.LayerNorm(8)).to(device).eval()
        for package, layer in zip(
            (gpunn.nn, torch.nn), pair(LAYERS[0], device, 8, 2, 12, **settings), strict=True
        )
    )
    x = torch.nested.nested_tensor([torch.randn(n, 8, device=device) for n in (3, 6)])
    with gpunn.backend("auto"), gpunn.trace() as trace, torch.no_grad():
        y, expected = ours(x), theirs(x)
    for mine, torchs in zip(y.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(mine, torchs)
    reasons = {fallback.reason for fallback in trace.fallbacks}
    assert reasons == {"a nested tensor that is not jagged", "nested tensor"}


@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast(norm_first: bool, device: str) -> None:
    layers = pair(LAYERS[0], device, 8, 2, 12, dropout=0.0, norm_first=norm_first)
    x = torch.randn(4, 2, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, expected = (layer(x) for layer in layers)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=5e-2, atol=5e-2)


def test_compiles(device: str) -> None:
    """Without a graph break, to the same launches; the functions compile further in their tests."""
    torch._dynamo.reset()
    model, _ = pair("Transformer", device, 8, 2, 1, 1, 12, 0.1)
    model.encoder.layers[0].norm_first = True  # so that one model has both orders
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    src, tgt = (torch.randn(n, 2, 8, device=device) for n in (3, 4))
    mask = model.generate_square_subsequent_mask(4, device=torch.device(device))
    found, ran = [], []
    for each in (compiled, model):
        torch.manual_seed(1)
        with gpunn.trace() as trace:
            found.append(each(src, tgt, tgt_mask=mask, tgt_is_causal=True))
        ran.append([record.operator for record in trace.launches])
    torch.testing.assert_close(*found)
    assert ran[0] == ran[1]


@pytest.mark.parametrize("name", LAYERS)
def test_a_block_of_the_users_own_compiles(name: str, device: str) -> None:
    torch._dynamo.reset()
    layer, _ = pair(name, device, 8, 2, 12, dropout=0.0)
    give_own_block(layer, "_ff_block", is_the_instances=False)
    inputs = [torch.randn(4, 2, 8, device=device)] * (1 if name == LAYERS[0] else 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))


def test_a_gradient_penalty(device: str) -> None:
    penalties = []
    layers = pair(LAYERS[0], device, 8, 2, 12, dropout=0.0, activation="gelu", norm_first=True)
    x, dy = (torch.randn(3, 2, 8, device=device).requires_grad_() for _ in range(2))
    for layer in layers:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # torch's
            y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        penalties.append(torch.autograd.grad(dx.norm(), [x, layer.linear1.weight]))
    for mine, torchs in zip(*penalties, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-3, atol=1e-4)


def test_refuses_as_torch_does(device: str) -> None:
    models = pair("Transformer", device, 8, 2, 1, 1, 12, 0.0)
    src, tgt = (torch.randn(n, 2, 8, device=device) for n in (3, 4))
    for arguments, message in (
        ((src, tgt[:, :1]), "tgt: expected 2 sequences|batch number"),
        ((src[..., :4], tgt), "src: expected 8 features|feature number"),
        ((src, tgt[..., :4]), "tgt: expected 8 features|feature number"),
    ):
        for model in models:
            with pytest.raises(RuntimeError, match=message):
                model(*arguments)
    with pytest.raises(RuntimeError, match="activation should be relu/gelu"):
        gpunn.nn.TransformerDecoderLayer(8, 2, activation="silu")
    with pytest.raises(RuntimeError, match="is_causal"):
        models[0](src, tgt, tgt_is_causal=True)
