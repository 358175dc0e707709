"""``accelerate`` and ``restore``: which layers of a model they change or leave, and why."""

from __future__ import annotations

import torch

import gpunn
import gpunn.nn


def model() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.LocalResponseNorm(2), torch.nn.Linear(8, 3)
    )


def test_accelerate_and_restore(device: str) -> None:
    net = model().to(device)
    x = torch.randn(4, 2, 6, device=device)
    expected, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    record = gpunn.accelerate(net)
    assert set(record.replaced) == {"0", "1", "3"}
    assert set(record.kept) == {"2"}
    assert "LocalResponseNorm" in str(record)
    assert type(net[0]) is gpunn.nn.Linear
    with gpunn.trace() as trace:
        torch.testing.assert_close(net(x), expected)
    assert {r.operator for r in trace.launches} == {"linear_forward", "activation_forward"}
    net(x).sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, state["0.weight"])
    net.load_state_dict(state)
    restored = gpunn.restore(net)
    assert set(restored.replaced) == {"0", "1", "3"}
    assert all(type(layer).__module__.startswith("torch") for layer in net)
    assert torch.equal(net(x), expected)


def test_accelerate_leaves_subclasses_and_restore_leaves_fused_layers() -> None:
    class Special(torch.nn.Linear):
        pass

    net = torch.nn.Sequential(Special(2, 2), gpunn.nn.Linear(2, 2, activation="relu"))
    assert not gpunn.accelerate(net).replaced
    assert not gpunn.restore(net).replaced
    assert type(net[0]) is Special


def test_accelerate_says_what_it_leaves_and_why() -> None:
    named = torch.nn.Linear(2, 2)
    vars(named)["activation"] = "relu"
    net = torch.nn.ModuleDict(
        {
            "named": named,
            "normed": torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)),
            "encoder": type("Encoder", (torch.nn.TransformerEncoderLayer,), {})(2, 1, 4),
        }
    )
    kept = gpunn.accelerate(net).kept
    assert "attribute" in kept["named"]
    assert "parametrization" in kept["normed"]
    assert "fused path" in kept["encoder"]
    assert "no such layer" in gpunn.restore(torch.nn.Sequential(gpunn.nn.SwiGLU())).kept["0"]
