"""What attention refuses: what torch does, and options that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpunn
import gpunn.functional as GF

Q, V = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "one dimension": ((Q[0, 0, 0], V, V), {}, "query"),
    "sizes of heads": ((Q, V[..., :7], V), {}, "key"),
    "rows of values": ((Q, V, V[:, :, :4]), {}, "value"),
    "dtypes": ((Q, V.half(), V), {}, "key"),
    "leading dimensions": ((Q, V[:, :2], V[:, :2]), {}, "broadcast|size"),
    "grouped heads": ((Q[:, :2], V, V), {"enable_gqa": True}, "key"),
    "grouped heads of nothing": ((Q[0, 0], V[0, 0], V[0, 0]), {"enable_gqa": True}, "enable_gqa"),
    "a mask that does not broadcast": ((Q, V, V, torch.ones(3, 5)), {}, "attn_mask"),
    "a mask of more dimensions": ((Q, V, V, torch.ones(2, 1, 1, 4, 5)), {}, "attn_mask"),
    "a mask of one dimension": ((Q, V, V, torch.ones(5)), {}, "attn_mask"),
    "a mask of integers": ((Q, V, V, torch.ones(4, 5).int()), {}, "attn_mask"),
    "a mask in another dtype": ((Q, V, V, torch.ones(4, 5).half()), {}, "attn_mask"),
    "a mask that is none": ((Q, V, V, "mask"), {}, "attn_mask"),
    "a mask and causality": ((Q, V, V, torch.ones(4, 5)), {"is_causal": True}, "attn_mask"),
    "a query that is none": (([1.0], V, V), {}, "query"),
    "a probability": ((Q, V, V), {"dropout_p": 1.5}, "dropout_p"),
}
OURS: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "softcap: expected": ({"softcap": 0.0}, ValueError),
    "window: expected bounds": ({"window": (-1, 2)}, ValueError),
    "window: expected integers": ({"window": (1.5, 2)}, TypeError),
    "window: expected two": ({"window": 3}, TypeError),
    "alignment": ({"alignment": "left"}, ValueError),
    "alibi_slopes: attention expects shape": ({"alibi_slopes": torch.ones(4)}, RuntimeError),
    "alibi_slopes: attention expects floating": (
        {"alibi_slopes": torch.ones(3).int()}, RuntimeError,
    ),
    "alibi_slopes: expected|alibi_slopes: attention expects a tensor": (
        {"alibi_slopes": [1.0]}, TypeError,
    ),
    "dropout_p: expected a prob": ({"dropout_p": -0.5}, ValueError),
    "dropout_p: expected a num": ({"dropout_p": "much"}, TypeError),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("backend", ["kernels", "torch"])
def test_refuses_what_torch_refuses(name: str, backend: Any) -> None:
    """With an error of torch's class, or, of a probability, of ValueError, as dropout's is."""
    arguments, keywords, what = REFUSED[name]
    expected: type[Exception] = RuntimeError
    try:
        # its formula, which tests on a GPU compare with, takes a mask of one dimension
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            F.scaled_dot_product_attention(*arguments, **keywords)
    except (RuntimeError, IndexError, TypeError) as error:
        expected = type(error)
    else:  # torch's fused op for CPUs reads past the end of keys, and masks twice
        assert name in ("rows of values", "a mask and causality")
    expected = ValueError if name == "a probability" else expected
    with gpunn.backend(backend), pytest.raises(expected, match=what):
        GF.scaled_dot_product_attention(*arguments, **keywords)


@pytest.mark.parametrize("message", OURS)
def test_refuses_options_that_are_none(message: str) -> None:
    keywords, expected = OURS[message]
    with pytest.raises(expected, match=message):
        GF.scaled_dot_product_attention(Q, V, V, **keywords)


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_probabilities_of_numpy_and_of_tensors(kind: Callable[[float], Any], device: str) -> None:
    query = torch.randn(1, 2, 5, 8, device=device)
    layer = gpunn.nn.MultiheadAttention(8, 2, dropout=0.5).to(device)
    results = []
    for p in (0.5, kind(0.5)):
        layer.dropout = p
        torch.manual_seed(1)
        y = GF.scaled_dot_product_attention(query, query, query, dropout_p=p)
        results.append([y, *layer(*[query[0].transpose(0, 1)] * 3)])
    assert all(map(torch.equal, *results))
    assert not torch.equal(results[0][0], GF.scaled_dot_product_attention(query, query, query))
