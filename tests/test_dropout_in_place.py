"""Dropout in place: what is written, what autograd knows of it, and what torch would refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import gpunn
import gpunn.functional as GF
from kit import launched, layouts
from test_dropout_modes import FUNCTIONS, each_function, seeded


@each_function
@pytest.mark.parametrize("differentiable", [False, True])
def test_in_place(name: str, differentiable: bool, device: str) -> None:
    """The input itself is written, returned, and is known to have changed."""
    function, _, shape = FUNCTIONS[name]
    leaf = torch.randn(shape, device=device, requires_grad=differentiable)
    dy = torch.randn(shape, device=device)
    expected = seeded(function, 0.5, True)(leaf)
    x = leaf.clone()
    address, version = x.data_ptr(), x._version
    with gpunn.trace() as trace:
        y = seeded(function, 0.5, True, True)(x)
    launched(trace, "dropout_forward")
    assert y is x
    assert x.data_ptr() == address
    assert x._version > version
    assert torch.equal(x, expected)
    if differentiable:
        got, wanted = (torch.autograd.grad(result, leaf, dy)[0] for result in (y, expected))
        assert torch.equal(got, wanted)


def test_in_place_in_every_layout(device: str) -> None:
    """Where the input is not dense, or a mask's order is another, too."""
    base = torch.randn(2, 3, 4, 5, device=device)
    mask = GF.dropout_mask(base.shape, device=device)
    for layout, x in layouts(base):
        for given in (None, mask):
            expected = seeded(GF.dropout, mask=given)(x)
            if "expanded" in layout:
                before = x.clone()
                with pytest.raises(RuntimeError, match="more than one element of the written-to"):
                    GF.dropout(x, inplace=True, mask=given)
                assert torch.equal(x, before)
                continue
            mine = torch.empty_strided(x.shape, x.stride(), device=device).copy_(x)
            assert seeded(GF.dropout, inplace=True, mask=given)(mine) is mine
            assert mine.stride() == x.stride()
            assert torch.equal(mine, expected), layout


def test_what_was_overwritten_is_not_used_by_mistake(device: str) -> None:
    x = torch.randn(9, device=device, requires_grad=True)
    y = x.exp()  # whose gradient needs its value
    GF.dropout(y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    view = (x * 2).view(3, 3)
    GF.dropout(view[1], 1.0, inplace=True)
    (dx,) = torch.autograd.grad(view.sum(), x)
    assert dx.tolist() == [2, 2, 2, 0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("case", ["leaf", "view of a leaf", "one of several views"])
def test_torch_refuses_and_so_do_these(case: str, device: str) -> None:
    """In its words, and before anything is written."""
    leaf = torch.randn(2, 9, device=device, requires_grad=True)
    x = {
        "leaf": leaf,
        "view of a leaf": leaf[1:],
        "one of several views": (leaf * 2).unbind(0)[0],
    }[case]
    before = x.detach().clone()
    with pytest.raises(RuntimeError) as theirs:
        F.dropout(x, 0.5, True, True)
    with pytest.raises(RuntimeError) as ours:
        GF.dropout(x, 0.5, True, True)
    assert str(ours.value) == str(theirs.value)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert GF.dropout(leaf, 1.0, True, True) is leaf
    assert not leaf.any()


def test_an_inference_tensor_changes_in_inference_mode_alone(device: str) -> None:
    """Torch raises its error when it has written."""
    with torch.inference_mode():
        x = torch.randn(9, device=device)
    before = x.clone()
    with pytest.raises(RuntimeError, match="input: an inference tensor"):
        GF.dropout(x, 0.5, True, True)
    assert torch.equal(x, before)
    with torch.inference_mode():
        assert GF.dropout(x, 1.0, True, True).eq(0).all()
    with pytest.raises(RuntimeError):
        F.dropout(x, 0.5, True, True)
