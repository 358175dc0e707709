"""convolution under every mode of PyTorch, its layouts and sizes, and its refusals."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from gpunn.kernels import convolve
from gpunn.kernels.interpreter import INTERPRETING
from kit import far_apart

NAMES = ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")


def operands(
    device: str, dtype: torch.dtype = torch.float32, size: tuple[int, ...] = (5, 4)
) -> list[torch.Tensor]:
    """x, weight, bias and residual of a convolution by 3 × 3 that keeps the size."""
    shapes = [(2, 6, *size), (5, 6, 3, 3), (5,), (2, 5, *size)]
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def agree(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    dy = torch.randn_like(theirs)
    got, expected = (torch.autograd.grad(y, inputs, dy) for y in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- what PyTorch does with an op ---


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_nothing_is_kept(
    name: str, activation: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything when no input needs one."""
    keeps = []

    def launch(*arguments: Any) -> Any:
        keeps.append(arguments[-1])
        return launchers[arguments[0]](*arguments[1:])

    module = gpunn.functional.convolution
    launchers = {n: getattr(module, n) for n in ("conv_forward", "conv_transpose_forward")}
    for launcher in launchers:
        monkeypatch.setattr(module, launcher, lambda *a, n=launcher: launch(n, *a))
    n = int(name[-2])
    x, weight = torch.randn(1, 4, 5, 6, device=device), torch.randn(4, 4, 3, 2, device=device)
    x, weight = (x, weight) if n == 2 else (x[..., 0], weight[..., 0])
    with torch.no_grad():
        y = getattr(GF, name)(x.requires_grad_(), weight, activation=activation)
    assert y.grad_fn is None
    assert getattr(GF, name)(x.detach(), weight, activation=activation).grad_fn is None
    assert getattr(GF, name)(x, weight, activation=activation).grad_fn is not None
    assert keeps == [False, False, True]


def test_backward_twice_and_inputs_untouched(device: str) -> None:
    tensors = operands(device)
    before = [t.detach().clone() for t in tensors]
    x, weight, bias, residual = tensors
    y = GF.conv2d(x, weight, bias, padding=1, activation="silu", residual=residual)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    again = torch.autograd.grad(y, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_only_the_gradients_that_are_asked_for(name: str, which: int, device: str) -> None:
    shapes = [(1, 4, 3, 3), (4, 4, 3, 3), (4,), (1, 4, 3, 3)]
    tensors = [torch.randn(s, device=device) for s in shapes]
    tensors[which].requires_grad_()
    x, weight, bias, residual = tensors
    y = getattr(GF, name)(x, weight, bias, padding=1, activation="relu", residual=residual)
    with gpunn.trace() as trace:
        (gradient,) = torch.autograd.grad(y, tensors[which], torch.randn_like(y))
    assert gradient.shape == tensors[which].shape
    of_x = "conv_forward" if "transpose" in name else "conv_transpose_forward"
    wanted = [{of_x}, {"conv_weight_gradient"}, set(), set()][which]
    before = {"linear_epilogue_backward"} if which < 3 else set()
    assert {record.operator for record in trace.launches} == wanted | before


def test_the_result_changed_in_place_is_noticed(device: str) -> None:
    """relu's gradient is computed from the result, so changing that must be an error."""
    x, weight, *_ = operands(device)
    y = GF.conv2d(x, weight, activation="relu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_a_gradient_penalty(name: str, device: str) -> None:
    """The gradient of a gradient's norm, as WGAN-GP's critic needs it."""
    x, weight, bias, _ = (t.detach().double().cpu() for t in operands(device))
    weight = weight if name == "conv2d" else weight.transpose(0, 1)
    given = [t.to(device, torch.float32).requires_grad_() for t in (x, weight, bias)]

    def penalty(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        y = function(*given)
        (dx,) = torch.autograd.grad(y.pow(2).sum(), given[0], create_graph=True)
        return torch.autograd.grad((dx.norm() - 1) ** 2, given)

    options: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 2}
    ours = penalty(lambda *t: getattr(GF, name)(*t, **options, activation="tanh"))
    theirs = penalty(lambda *t: torch.tanh(getattr(F, name)(*t, **options)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # sums of squares of sums


def test_runs_are_bit_identical(device: str) -> None:
    """Also where the places are summed in parts, which are added in a fixed order."""
    x, weight, bias, _ = operands(device, size=(20, 20))
    results = []
    for _ in range(3):
        y = GF.conv2d(x, weight, bias, activation="gelu")
        dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)
        results.append((y, *torch.autograd.grad(y, (x, weight, bias), dy)))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_is_torchs(lower: torch.dtype, device: str) -> None:
    """In values, dtypes and gradients; a residual may stay in float32."""
    x, weight, bias, residual = operands(device)
    leaves = [x, weight, bias, residual]
    for added in (None, residual):
        with torch.autocast(device, dtype=lower):
            theirs = F.relu(F.conv2d(x, weight, bias, padding=1))
            theirs = theirs if added is None else theirs + added
            ours = GF.conv2d(x, weight, bias, padding=1, activation="relu", residual=added)
        assert ours.dtype == theirs.dtype == (lower if added is None else torch.float32)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        dy = torch.randn_like(theirs)
        wanted = leaves[:3] if added is None else leaves
        got, expected = (torch.autograd.grad(y, wanted, dy) for y in (ours, theirs))
        assert [g.dtype for g in got] == [torch.float32] * len(wanted)
        torch.testing.assert_close(got, expected, rtol=5e-2, atol=1e-1)


def test_a_residual_of_another_dtype_is_torchs_to_add(device: str) -> None:
    x, weight, bias, residual = operands(device, torch.bfloat16)
    with gpunn.trace() as trace:
        y = GF.conv2d(x, weight, bias, padding=1, activation="relu", residual=residual.float())
    assert [f.reason for f in trace.fallbacks] == ["a residual in torch.float32: PyTorch's sum"]
    assert [r.operator for r in trace.launches] == ["conv_forward"]
    expected = F.relu(F.conv2d(x, weight, bias, padding=1)) + residual.float()
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_backends(device: str) -> None:
    x, weight, bias, residual = operands(device)
    with gpunn.trace() as trace, gpunn.backend("torch"):
        theirs = GF.conv2d(x, weight, bias, padding=1, activation="relu", residual=residual)
    assert not trace.launches
    assert [f.reason for f in trace.fallbacks] == ["backend('torch')"]
    ours = GF.conv2d(x, weight, bias, padding=1, activation="relu", residual=residual)
    agree(ours, theirs, [x, weight, bias, residual])


@pytest.mark.skipif(not INTERPRETING, reason="a GPU has more processors, and other parts")
@pytest.mark.parametrize(
    ("n_channels", "n_outputs", "kernel", "groups", "n_tiles"),
    [(3, 5, (3, 3), 1, 1), (16, 5, (1, 2), 1, 2), (32, 32, (1, 1), 2, 2), (8, 8, (1, 2), 8, 2)],
    ids=["taps together", "taps apart", "groups", "groups of one"],
)
def test_a_weights_gradient_in_uneven_parts(
    n_channels: int,
    n_outputs: int,
    kernel: tuple[int, int],
    groups: int,
    n_tiles: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The places are no multiple of what a part takes: the last part has fewer."""
    monkeypatch.setattr(convolve, "MOST_PARTS", 2)
    x = torch.randn(1, n_channels, 17, 17)
    weight = torch.randn(n_outputs, n_channels // groups, *kernel, requires_grad=True)
    with gpunn.trace() as trace:
        y = GF.conv2d(x, weight, groups=groups)
        (got,) = torch.autograd.grad(y, weight, dy := torch.randn_like(y))
    records = [r for r in trace.launches if r.operator == "conv_weight_gradient"]
    assert records[0].grid == (2 * n_tiles,)
    assert math.ceil(dy[:, 0].numel() / 16) % 2 == 1, "the parts are even"
    z = F.conv2d(x.double(), wide := weight.detach().double().requires_grad_(), groups=groups)
    (expected,) = torch.autograd.grad(z, wide, dy.double())
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_of_a_weights_gradient_are_float32(dtype: torch.dtype, device: str) -> None:
    """The halves sum to 4097 and -4096, which is 1; 4097 has no place in 16 bits."""
    x = torch.ones(1, 3, 16, 16, dtype=dtype, device=device)
    weight = torch.randn(5, 3, 1, 1, dtype=dtype, device=device, requires_grad=True)
    dy = torch.zeros(1, 5, 16, 16, dtype=dtype, device=device)
    dy[..., 0, :2] = torch.tensor([4096.0, 1.0])
    dy[..., -1, -1] = -4096
    (dweight,) = torch.autograd.grad(GF.conv2d(x, weight), weight, dy)
    assert torch.equal(dweight, torch.ones_like(weight))


def test_compiles_with_a_changing_batch_and_size(device: str) -> None:
    torch._dynamo.reset()
    _, weight, bias, _ = operands(device)

    def function(x: torch.Tensor) -> torch.Tensor:
        return GF.conv2d(x, weight, bias, stride=2, padding=1, activation="gelu")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 6, 5, 4), (3, 6, 7, 6), (4, 6, 4, 9)):
        x = torch.randn(shape, device=device, requires_grad=True)
        with gpunn.trace() as trace:
            agree(compiled(x), function(x), [x, weight, bias])
        assert "conv_weight_gradient" in {r.operator for r in trace.launches}


def test_more_places_than_are_counted_are_torchs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias, _ = operands(device)
    module = importlib.import_module("gpunn.functional.convolution")
    monkeypatch.setattr(module, "MOST_PLACES", 10)
    with gpunn.trace() as trace, gpunn.backend("auto"):
        y = GF.conv2d(x, weight, bias, activation="gelu")
        GF.conv_transpose2d(x, weight.transpose(0, 1), activation="gelu")
    torch.testing.assert_close(y, F.gelu(F.conv2d(x, weight, bias)))
    assert not trace.launches
    reason = f"no kernel for images of shape {tuple(x.shape)}"
    assert [fallback.reason for fallback in trace.fallbacks] == [reason] * 2


# --- layouts, sizes and places ---


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of its padded copy
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("kernel", [(2, 2), (4, 3), (1, 2), (5, 4)])
@pytest.mark.parametrize("dilation", [1, (1, 3), 2])
def test_same_and_valid(kernel: tuple[int, int], dilation: Any, device: str) -> None:
    """Of an even total, the odd zero lies below and on the right, as torch has it."""
    x = torch.randn(1, 3, 9, 10, device=device, requires_grad=True)
    weight = torch.randn(4, 3, *kernel, device=device, requires_grad=True)
    for padding in ("same", "valid"):
        options: Any = {"padding": padding, "dilation": dilation}
        agree(
            GF.conv2d(x, weight, **options, activation="silu"),
            F.silu(F.conv2d(x, weight, **options)),
            [x, weight],
        )


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_results_lie_in_memory_as_torchs(name: str, kernel: int, device: str) -> None:
    x = torch.randn(2, 6, 5, 4, device=device)
    weight = torch.randn(6, 6, kernel, kernel, device=device)
    for images_last in (True, False):
        for weight_last in (True, False):
            formats = [
                torch.channels_last if last else torch.contiguous_format
                for last in (images_last, weight_last)
            ]
            given = [
                t.clone(memory_format=f).requires_grad_()
                for t, f in zip((x, weight), formats, strict=True)
            ]
            ours, theirs = (getattr(m, name)(*given) for m in (GF, F))
            assert ours.stride() == theirs.stride()
            agree(ours, theirs, given)


EMPTY: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "conv1d": ((0, 4, 5), (3, 4, 2)),
    "conv2d": ((0, 4, 5, 5), (3, 4, 2, 3)),
    "conv_transpose1d": ((0, 4, 5), (4, 3, 2)),
    "conv_transpose2d": ((0, 4, 5, 5), (4, 3, 2, 3)),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_an_empty_batch(name: str, activation: str | None, device: str) -> None:
    shapes = (*EMPTY[name], (3,))
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    y = getattr(GF, name)(*leaves, stride=2, activation=activation)
    theirs = getattr(F, name)(*leaves, stride=2)
    assert y.shape == theirs.shape
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("stride", [1, 2])
def test_output_padding_up_to_a_dilation(stride: int, device: str) -> None:
    """More than the stride: places that the convolution it is the gradient of never reaches."""
    x = torch.randn(1, 4, 3, 3, device=device, requires_grad=True)
    for kernel in (1, 2):
        weight = torch.randn(4, 5, kernel, kernel, device=device, requires_grad=True)
        options: Any = {"stride": stride, "dilation": 3, "output_padding": 2}
        ours, theirs = (m.conv_transpose2d(x, weight, **options) for m in (GF, F))
        agree(ours, theirs, [x, weight])


@pytest.mark.parametrize("which", ["x", "weight", "dy"])
def test_offsets_past_two_to_the_31(which: str, device: str) -> None:
    """Three images, or outputs, 2^30 elements apart: an index times its stride in 32 bits."""
    shapes = {"x": (3, 2, 3, 3), "weight": (3, 2, 2, 2), "dy": (3, 3, 2, 2)}
    near = {n: torch.randn(s, device=device).half() for n, s in shapes.items()}
    _, _, h, w = shapes[which]
    far = far_apart(near[which], (2**30, h * w, w, 1))

    def run(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [given[n].detach().requires_grad_() for n in ("x", "weight")]
        y = GF.conv2d(leaves[0], leaves[1], activation="gelu")
        return y, *torch.autograd.grad(y, leaves, given["dy"])

    for a, b in zip(run(near), run({**near, which: far}), strict=True):
        torch.testing.assert_close(a, b)
