"""LinearCrossEntropyLoss, with and without torch's, and what linear_cross_entropy refuses."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
import gpunn.nn.linear_cross_entropy as layers


def test_the_layer(device: str) -> None:
    x, target = torch.randn(4, 6, device=device), torch.randint(5, (4, 3), device=device)
    cases: list[dict[str, Any]] = [{}, {"bias": True, "out_features": (3,)}]
    for options in cases:
        layer = gpunn.nn.LinearCrossEntropyLoss(
            6, 5, weight=torch.rand(5), ignore_index=1, label_smoothing=0.1, **options
        ).to(device)
        labels = target if options else target[:, 0]
        logits = layer.linear(x).view(4, 5, *options.get("out_features", ()))
        expected = F.cross_entropy(
            logits, labels, layer.weight, ignore_index=1, label_smoothing=0.1
        )
        torch.testing.assert_close(layer(x, labels), expected)


def test_the_constructor_for_releases_without_the_layer() -> None:
    """Is torch's: arguments, attributes, parameters, refusals."""
    ours: Any = layers._WithoutTorchs
    arguments: Any = dict(out_features=(2,), bias=True, weight=torch.rand(5), ignore_index=3)
    found = ours(6, 5, **arguments)
    assert {name: tuple(p.shape) for name, p in found.state_dict().items()} == {
        "weight": (5,), "linear.weight": (10, 6), "linear.bias": (10,)
    }  # fmt: skip
    for wrong in ({"weight": torch.rand(4)}, {"label_smoothing": 1.5}):
        with pytest.raises(RuntimeError):
            ours(6, 5, **wrong)
    theirs: Any = getattr(torch.nn, "LinearCrossEntropyLoss", None)
    if theirs is None:
        pytest.skip("this release of torch has no LinearCrossEntropyLoss to compare with")
    names = [(p.name, p.kind, p.default) for p in inspect.signature(ours).parameters.values()]
    expected = inspect.signature(theirs).parameters.values()
    assert names == [(p.name, p.kind, p.default) for p in expected]
    assert set(vars(found)) == set(vars(theirs(6, 5, **arguments)))


X, W, Y = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((X[None], W, Y), {}), ((X, W[0], Y), {}), ((X[:, 1:], W, Y), {}), ((X, W, Y[:2]), {}),
        ((X, W, Y), {"linear_bias": W[:8, 0]}), ((X[0], W.view(3, 3, 4), Y[:1]), {}),
        ((X, W, torch.rand(3, 9)), {"ignore_index": 1}), ((X, W, Y), {"label_smoothing": 1.5}),
        ((X, W, Y.int()), {}), ((X, W, Y), {"reduction": "average"}),
        ((X, W, Y), {"weight": torch.ones(8)}), ((X, W.double(), Y), {}),
    ],
)  # fmt: skip
def test_refuses_what_torch_refuses(
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is launched, with torch's class of error, and so without torch's function."""
    expected: Any = RuntimeError, ValueError
    arguments = tuple(tensor.to(device) for tensor in arguments)
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    if hasattr(F, "linear_cross_entropy"):
        with pytest.raises(Exception) as refusal:  # noqa: PT011  (torch raises many classes)
            F.linear_cross_entropy(*arguments, **options)
        expected = refusal.type
    with gpunn.trace() as trace, pytest.raises(expected):
        GF.linear_cross_entropy(*arguments, chunk_size=4, **options)
    assert not trace.launches
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(expected):
        GF.linear_cross_entropy(*arguments, chunk_size=4, **options)


def test_refuses_what_is_no_tensor_and_chunks_of_nothing() -> None:
    with pytest.raises(TypeError, match="linear_weight"):
        GF.linear_cross_entropy(X, [1.0], Y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_size"):
        GF.linear_cross_entropy(X, W, Y, chunk_size=0)
