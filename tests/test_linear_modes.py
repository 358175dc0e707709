"""linear beyond its values: dropout, double backward, torch.compile, autocast, errors, backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
import gpunn.nn
from gpunn.functional.activation import ActivationName
from gpunn.kernels.dropout import dropout_factors
from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import Backend, launchers

interpreter_only = pytest.mark.skipif(
    not INTERPRETING, reason="float64 runs on the kernels in the interpreter alone"
)


def operands(
    n_rows: int, n_cols: int, n_inner: int, device: str, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """x, weight, bias and residual that require gradients."""
    shapes = [(n_rows, n_inner), (n_cols, n_inner), (n_cols,), (n_rows, n_cols)]
    return [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]


@interpreter_only
@pytest.mark.parametrize(
    ("activation", "dropout_p"),
    [(None, 0.0), ("sigmoid", 0.0), (("leaky_relu", 0.2), 0.0), ("gelu", 0.25)],
)
def test_gradients_and_double_gradients_agree_with_differences(
    activation: ActivationName, dropout_p: float
) -> None:
    tensors = operands(2, 4, 2, "cpu", torch.float64)

    def function(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        torch.manual_seed(1)
        return GF.linear(
            x, weight, bias, activation=activation, residual=residual, dropout_p=dropout_p
        )

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@interpreter_only
def test_a_tensor_given_twice_gets_both_gradients() -> None:
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: GF.linear(x, x, activation="tanh"), (x,))
    assert torch.autograd.gradgradcheck(lambda x: GF.linear(x, x, activation="tanh"), (x,))


def test_a_double_backward_through_the_residual_alone(device: str) -> None:
    x, weight, bias, residual = operands(3, 4, 5, device)
    y = GF.linear(x.detach(), weight.detach(), bias.detach(), residual=residual)
    (gradient,) = torch.autograd.grad((y**2).sum(), residual, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), residual)
    torch.testing.assert_close(second, torch.full_like(second, 2.0))


@pytest.mark.parametrize("n_cols", [16, 18])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "sigmoid"])
def test_dropout_is_the_mask_of_its_seed(activation: str, n_cols: int, device: str) -> None:
    """Fused dropout, forward and backward, is the product with ``dropout_factors``.

    16 columns share Philox calls between four neighbours, 18 do not.
    """
    x, weight, bias, residual = operands(33, n_cols, 8, device)
    forward, backward = launchers["linear_forward"], launchers["linear_epilogue_backward"]
    seed = torch.randint(2**62, (1,), device=device)
    y, saved = forward(x, weight, bias, residual, seed, activation, [], 0.4, True)
    factors = dropout_factors(seed, y, 0.4)
    assert 0.4 < (factors > 0).double().mean() < 0.8
    z = F.linear(x, weight, bias)
    expected = gpunn.functional.activation.TORCH[activation](z) * factors + residual
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    kept = None if activation == "identity" else saved
    dz, dbias = backward(dy, kept, seed, activation, [], 0.4, dy.dtype, True, True)
    (expected_dz,) = torch.autograd.grad(expected, z, dy)
    torch.testing.assert_close(dz, expected_dz)
    torch.testing.assert_close(dbias, expected_dz.sum(0))


def test_dropout_extremes_and_modes(device: str) -> None:
    x, weight, bias, residual = operands(8, 12, 4, device)
    plain = GF.linear(x, weight, bias, activation="relu")
    torch.testing.assert_close(
        GF.linear(x, weight, bias, activation="relu", dropout_p=0.7, training=False), plain
    )
    everything = GF.linear(x, weight, bias, residual=residual, dropout_p=1.0)
    torch.testing.assert_close(everything, residual)
    (dx,) = torch.autograd.grad(everything.sum(), x)
    assert not dx.any()


def test_dropout_is_reproducible_and_fresh(device: str) -> None:
    x, weight, bias, _ = operands(64, 64, 4, device)

    def draw() -> torch.Tensor:
        return GF.linear(x, weight, bias, dropout_p=0.5) == 0

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(first, draw())
    assert torch.equal(second, draw())
    flat, other = first.flatten().double(), second.flatten().double()
    for shift in range(-8, 9):
        agreement = (flat.roll(shift) == other).double().mean()
        assert abs(agreement - 0.5) < 4 * 0.5 / flat.numel() ** 0.5, shift


def test_under_checkpointing_the_mask_is_the_same(device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    x, weight, bias, _ = operands(16, 16, 4, device)
    torch.manual_seed(5)
    plain = GF.linear(x, weight, bias, activation="gelu", dropout_p=0.5)
    torch.manual_seed(5)
    kept = checkpoint(
        lambda x: GF.linear(x, weight, bias, activation="gelu", dropout_p=0.5),
        x,
        use_reentrant=False,
    )
    dy = torch.randn_like(plain)
    (ours,) = torch.autograd.grad(kept, x, dy)
    (expected,) = torch.autograd.grad(plain, x, dy)
    assert torch.equal(ours, expected)


def test_backward_twice_and_inputs_untouched(device: str) -> None:
    tensors = operands(16, 20, 12, device)
    before = [t.detach().clone() for t in tensors]
    y = GF.linear(*tensors[:3], activation="silu", residual=tensors[3], dropout_p=0.3)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    again = torch.autograd.grad(y, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("which", range(4))
def test_only_the_gradients_that_are_asked_for(which: int, device: str) -> None:
    tensors = operands(16, 20, 12, device)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i == which)
    y = GF.linear(*tensors[:3], activation="relu", residual=tensors[3])
    with gpunn.trace() as trace:
        (gradient,) = torch.autograd.grad(y, tensors[which], torch.ones_like(y))
    assert gradient.shape == tensors[which].shape
    ran = [r.operator for r in trace.launches]
    products = ["linear_input_gradient", "linear_weight_gradient"]
    wanted = [["linear_epilogue_backward", products[0]], ["linear_epilogue_backward", products[1]]]
    assert ran == (*wanted, ["linear_epilogue_backward"], [])[which]


def test_without_gradients_nothing_is_saved(device: str) -> None:
    x, weight, bias, _ = operands(16, 20, 12, device)
    with torch.no_grad():
        y = GF.linear(x, weight, bias, activation="gelu")
    assert y.grad_fn is None
    torch.testing.assert_close(y, F.gelu(F.linear(x, weight, bias)).detach())


def test_the_result_changed_in_place_is_noticed(device: str) -> None:
    """relu's gradient is computed from the result, so changing that must be an error."""
    x, weight, bias, _ = operands(4, 4, 4, device)
    y = GF.linear(x, weight, bias, activation="relu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


BAD = {
    "weight of the wrong shape": ({"weight": torch.zeros(3, 4, 5)}, "weight.*out_features.*3, 4"),
    "input that does not fit": ({"input": torch.zeros(2, 5)}, r"input.*\(\*, 4\).*\(2, 5\)"),
    "input of no dimension": ({"input": torch.zeros(())}, "input.*expected shape"),
    "bias of the wrong shape": ({"bias": torch.zeros(4)}, r"bias.*\(3,\).*\(4,\)"),
    "residual of the wrong shape": ({"residual": torch.zeros(3)}, r"residual.*\(2, 3\).*\(3,\)"),
    "another dtype": ({"weight": torch.zeros(3, 4).half()}, "weight.*float32.*float16"),
    "another device": ({"weight": torch.zeros(3, 4, device="meta")}, "weight.*device.*meta"),
    "a bad probability": ({"dropout_p": 1.5}, "dropout_p.*0 to 1.*1.5"),
    "an unknown activation": ({"activation": "rleu"}, "activation.*'rleu'.*allowed.*relu"),
    "too many parameters": ({"activation": ("elu", 1.0, 2.0)}, "activation.*elu.*at most 1"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("choice", ["kernels", "torch"])
def test_bad_input_is_refused_before_anything_runs(
    change: dict[str, Any], message: str, choice: Backend
) -> None:
    arguments = {"input": torch.zeros(2, 4), "weight": torch.zeros(3, 4), **change}
    kind = ValueError if {"dropout_p", "activation"} & set(change) else RuntimeError
    with gpunn.backend(choice), gpunn.trace() as trace, pytest.raises(kind, match=message):
        GF.linear(**arguments)
    assert not trace.launches


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": [1.0]}, "input: linear expects a tensor, got list"),
        ({"weight": None}, "weight: linear expects a tensor, got NoneType"),
        ({"bias": 1.0}, "bias: expected a tensor, got float"),
        ({"residual": 2}, "residual: expected a tensor, got int"),
        ({"dropout_p": "a"}, "dropout_p: expected a number, got str"),
        ({"activation": F.relu}, "activation: expected a name.*got <function"),
        ({"activation": ()}, r"activation: expected a name.*got \(\)"),
        ({"activation": ("elu", "x")}, "activation: expected a name.*'x'"),
        ({"activation": ("elu", torch.ones(2))}, "activation: expected a name.*tensor"),
    ],
)
def test_what_is_not_of_its_type_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        GF.linear(**{"input": torch.zeros(2, 4), "weight": torch.zeros(3, 4), **change})


def mlp(device: str) -> torch.nn.Module:
    return gpunn.nn.Sequential(
        gpunn.nn.Linear(12, 20, activation="gelu"),
        gpunn.nn.Linear(20, 16, activation="relu"),
        gpunn.nn.GLU(),
        gpunn.nn.Linear(8, 5),
        gpunn.nn.Tanh(),
    ).to(device)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(compiler: str, device: str) -> None:
    torch._dynamo.reset()
    model = mlp(device)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    x = torch.randn(6, 12, device=device)
    expected, got = model(x), compiled(x)
    torch.testing.assert_close(got, expected)
    dy = torch.randn_like(expected)
    parameters = list(model.parameters())
    with gpunn.trace() as trace:
        ours = torch.autograd.grad(got, parameters, dy)
    assert "linear_weight_gradient" in {r.operator for r in trace.launches}
    for mine, theirs in zip(ours, torch.autograd.grad(expected, parameters, dy), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compiles_with_dropout_and_a_changing_batch(device: str) -> None:
    torch._dynamo.reset()
    x, weight, bias, _ = operands(64, 32, 12, device)
    function = torch.compile(
        lambda x: GF.linear(x, weight, bias, activation="relu", dropout_p=0.5),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for n_rows in (64, 48, 31):
        y = function(x.detach()[:n_rows].requires_grad_())
        full = F.relu(F.linear(x[:n_rows], weight, bias)) * 2
        kept = y != 0
        torch.testing.assert_close(y[kept], full[kept])
        assert 0.1 < kept.double().mean() < 0.4
        y.sum().backward()


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_is_torchs(lower: torch.dtype, device: str) -> None:
    x, weight, bias, residual = operands(16, 20, 12, device)
    with torch.autocast(device, dtype=lower):
        ours = GF.linear(x, weight, bias, activation="relu")
        theirs = F.relu(F.linear(x, weight, bias))
        with_residual = GF.linear(x, weight, bias, residual=residual)
        assert with_residual.dtype == (F.linear(x, weight, bias) + residual).dtype
    assert ours.dtype == theirs.dtype == lower
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, [x, weight, bias], dy)
    expected = torch.autograd.grad(theirs, [x, weight, bias], dy)
    assert [g.dtype for g in mine] == [g.dtype for g in expected] == [torch.float32] * 3
    torch.testing.assert_close(mine, expected, rtol=2e-2, atol=2e-2)


def test_backends(device: str) -> None:
    x, weight, bias, _ = operands(4, 8, 4, device)
    with gpunn.trace() as trace, gpunn.backend("torch"):
        y = GF.linear(x, weight, bias, activation="relu")
    assert not trace.launches
    assert [f.reason for f in trace.fallbacks] == ["backend('torch')"]
    torch.testing.assert_close(y, GF.linear(x, weight, bias, activation="relu"))


def test_auto_leaves_bare_products_to_cublas(device: str) -> None:
    x, weight, bias, _ = operands(4, 8, 4, device)
    with gpunn.trace() as trace, gpunn.backend("auto"):
        y = GF.linear(x, weight, bias)
    assert "nothing to fuse" in trace.fallbacks[0].reason
    assert not trace.launches
    torch.testing.assert_close(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_fuses_the_epilogue_after_a_product_of_cublas(dtype: torch.dtype, device: str) -> None:
    """float32 without TF32, and long inner dimensions: torch.mm, then ``epilogue_kernel``."""
    tensors = operands(5, 8, 3400, device, dtype)
    with gpunn.trace() as trace, gpunn.backend("auto"):
        y = GF.linear(*tensors[:3], activation="relu", residual=tensors[3])
        dy = torch.randn_like(y)
        gradients = torch.autograd.grad(y, tensors, dy)
    assert "matmul_kernel" not in {r.kernel for r in trace.launches}
    assert "epilogue_kernel" in {r.kernel for r in trace.launches}
    assert {f.operator for f in trace.fallbacks} == {
        "linear_forward: the product",
        "linear_input_gradient: the product",
        "linear_weight_gradient: the product",
    }
    expected = F.relu(F.linear(*tensors[:3])) + tensors[3]
    theirs = torch.autograd.grad(expected, tensors, dy)
    error = 1e-4 if dtype == torch.float32 else 2e-2
    for got, right in zip([y, *gradients], [expected, *theirs], strict=True):
        largest = float(right.detach().abs().max())
        torch.testing.assert_close(got, right, rtol=error, atol=error * largest)


def test_float32_follows_torchs_tf32_setting() -> None:
    from gpunn.kernels.product import precision_of

    previous = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert precision_of(torch.float32) == expected
            assert precision_of(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous


def test_a_slope_that_changes_the_sign(device: str) -> None:
    """leaky_relu's gradient then needs the input, which is kept instead of the result."""
    tensors = operands(4, 8, 4, device)[:3]
    y = GF.linear(*tensors, activation=("leaky_relu", -0.5))
    expected = F.leaky_relu(F.linear(*tensors), -0.5)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(r, tensors, dy) for r in (y, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_residual_stream_in_float32(device: str) -> None:
    """The result is in the wider dtype, as that of torch's sum; each gradient in its own."""
    tensors = operands(6, 8, 4, device, torch.bfloat16)[:3]
    residual = torch.randn(6, 8, device=device, requires_grad=True)
    x, weight, bias = tensors
    for activation in (None, "gelu"):
        y = GF.linear(x, weight, bias, activation=activation, residual=residual)
        z = F.linear(x, weight, bias)
        expected = (z if activation is None else F.gelu(z)) + residual
        assert y.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        dy = torch.randn_like(y)
        wanted = [*tensors, residual]
        ours, theirs = (torch.autograd.grad(r, wanted, dy) for r in (y, expected))
        assert [g.dtype for g in ours] == [t.dtype for t in wanted]
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


def test_a_frozen_weight_needs_no_input(device: str) -> None:
    """As in torch, the input may then change before the backward pass, and a double one."""
    x, weight, bias, residual = operands(6, 8, 4, device)
    given = x.clone()
    y = GF.linear(given, weight.detach(), bias, residual=residual)
    with torch.no_grad():
        given.zero_()
    dy = torch.randn_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    torch.testing.assert_close(dx, dy @ weight)
    (ddy,) = torch.autograd.grad(dx.sum(), dy)
    torch.testing.assert_close(ddy, weight.sum(1).expand_as(ddy))


def test_runs_are_bit_identical(device: str) -> None:
    """Also with the inner dimension split into parts, whose sums have a fixed order."""
    x, weight, bias, _ = operands(9, 12, 700, device)
    first = GF.linear(x, weight, bias, activation="gelu")
    dy = torch.randn_like(first)
    gradients = torch.autograd.grad(first, [x, weight, bias], dy)
    for _ in range(3):
        y = GF.linear(x, weight, bias, activation="gelu")
        assert torch.equal(y, first)
        again = torch.autograd.grad(y, [x, weight, bias], dy)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
