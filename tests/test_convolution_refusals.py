"""What convolutions refuse, and in what words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from gpunn.kernels.launch import Backend

X, WEIGHT = torch.zeros(2, 4, 5, 5), torch.zeros(6, 2, 3, 3)
LINE, TAPS = torch.zeros(2, 4, 5), torch.zeros(4, 2, 3)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("conv2d", {"input": X[0, 0]}, r"input: conv2d .*3 or 4 dimensions, got 2: \(5, 5\)"),
    ("conv2d", {"weight": WEIGHT[0]}, r"weight: conv2d .*4 dimensions, got 3: \(2, 3, 3\)"),
    ("conv2d", {"input": X[:, :3]}, r"input: .*4 channels .*got \(2, 3, 5, 5\)"),
    ("conv2d", {"input": X[..., :0]}, r"input: .*no empty image, got shape \(2, 4, 5, 0\)"),
    ("conv2d", {"weight": WEIGHT[:5]}, r"weight: .*divisible by groups=2, got \(5, 2, 3, 3\)"),
    ("conv2d", {"groups": 0}, "groups: .*at least 1, got 0"),
    ("conv2d", {"stride": 0}, "stride: .*at least 1, got 0"),
    ("conv2d", {"stride": (1, 1, 1)}, r"stride: .*got \(1, 1, 1\)"),
    ("conv2d", {"padding": -1}, "padding: .*at least 0, got -1"),
    ("conv2d", {"padding": "full"}, "padding: .*'same' or 'valid', got 'full'"),
    ("conv2d", {"padding": "same", "stride": 2}, r"padding: .*'same' for stride 1.*got \[2, 2\]"),
    ("conv2d", {"dilation": (0, 1)}, r"dilation: .*at least 1, got \(0, 1\)"),
    ("conv2d", {"dilation": 4}, "weight: .*takes 9 of a dimension that has 5"),
    ("conv2d", {"bias": torch.zeros(5)}, r"bias: expected shape \(6,\), got \(5,\)"),
    ("conv2d", {"bias": torch.zeros(6).half()}, "bias: .*torch.float32.*got torch.float16"),
    ("conv2d", {"weight": WEIGHT.half()}, "weight: .*torch.float32.*got torch.float16"),
    ("conv1d", {"input": X}, "input: conv1d .*2 or 3 dimensions, got 4"),
    ("conv1d", {"weight": TAPS[..., None]}, "weight: conv1d .*3 dimensions, got 4"),
    ("conv1d", {"stride": (1, 1)}, r"stride: .*got \(1, 1\)"),
    ("conv_transpose2d", {"weight": WEIGHT}, "input: .*6 channels"),
    ("conv_transpose2d", {"output_padding": 1}, "output_padding: .*less than stride .*got 1"),
    ("conv_transpose2d", {"output_padding": -1}, "output_padding: .*at least 0, got -1"),
    ("conv_transpose2d", {"padding": 4}, "input: too small for conv_transpose2d"),
    ("conv_transpose2d", {"bias": torch.zeros(5)}, r"bias: expected shape \(6,\), got \(5,\)"),
    ("conv_transpose1d", {"groups": 3}, "weight: .*divisible by groups=3"),
]
DEFAULTS: dict[str, dict[str, Any]] = {
    "conv1d": {"input": LINE, "weight": TAPS, "groups": 2},
    "conv2d": {"input": X, "weight": WEIGHT, "groups": 2},
    "conv_transpose1d": {"input": LINE, "weight": TAPS, "groups": 2},
    "conv_transpose2d": {"input": X, "weight": torch.zeros(4, 3, 3, 3), "groups": 2},
}


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=str)
def test_refused_as_torch_refuses(
    name: str, change: dict[str, Any], message: str, device: str
) -> None:
    """Before anything runs, in the words of whoever reads them."""
    given = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in {**DEFAULTS[name], **change}.items()
    }
    with pytest.raises(RuntimeError) as theirs:
        getattr(F, name)(**given)
    with gpunn.trace() as trace, pytest.raises(RuntimeError, match=message) as ours:
        getattr(GF, name)(**given)
    assert isinstance(ours.value, type(theirs.value))
    assert not trace.launches


@pytest.mark.parametrize("choice", ["kernels", "torch", "auto"])
@pytest.mark.parametrize("shape", [(2, 6, 3, 2), (6, 3, 3), (1,)])
def test_a_residual_is_not_broadcast(shape: tuple[int, ...], choice: Backend, device: str) -> None:
    x, weight, residual = (t.to(device) for t in (X, WEIGHT, torch.zeros(shape)))
    message = r"residual: expected shape \(2, 6, 3, 3\), got"
    with gpunn.backend(choice), pytest.raises(RuntimeError, match=message):
        GF.conv2d(x, weight, groups=2, residual=residual)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"input": [1.0]}, TypeError, "input: conv2d expects a tensor, got list"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
        ({"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
        ({"residual": 2}, TypeError, "residual: expected a tensor, got int"),
        ({"stride": 1.5}, TypeError, "stride: conv2d expects integers, got 1.5"),
        ({"padding": None}, TypeError, "padding: conv2d expects integers, got None"),
        ({"groups": 1.0}, TypeError, "groups: conv2d expects an integer, got 1.0"),
        ({"activation": F.relu}, TypeError, "activation: expected a name.*got <function"),
        ({"activation": "rleu"}, ValueError, "activation.*'rleu'.*allowed.*relu"),
    ],
)
def test_what_is_not_of_its_type_is_refused(
    change: dict[str, Any], kind: type[Exception], message: str, device: str
) -> None:
    given: dict[str, Any] = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in {**DEFAULTS["conv2d"], **change}.items()
    }
    with pytest.raises(kind, match=message):
        GF.conv2d(**given)
