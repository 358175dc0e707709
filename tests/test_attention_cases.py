"""What is benchmarked of attention: the counts, and that the rivals compute the same."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from gpunn.profiling import attention_cases
from gpunn.profiling.attention_cases import compiled_flex
from gpunn.profiling.case import Case, difference, tolerated_difference
from gpunn.profiling.cases import CASES

ALL = CASES["attention"]
RIVALS = [(case, name) for case in ALL for name in case.rivals]
NOT_HERE = re.compile(
    "No viable backend|No available kernel|cuDNN Frontend error|"
    "does not support backward on CPU|'CPU' backend"
)
"""What torch says of a rival that this machine lacks."""
n = 4 * 16 * 4096 * 128
"""Elements of q, k, v and y of 4 sequences of 4096 tokens, 16 heads of 128."""


def find(name: str, shapes: str) -> Case:
    """The one case with this name."""
    (case,) = [case for case in ALL if (case.name, case.shapes) == (name, shapes)]
    return case


@pytest.mark.parametrize(
    ("name", "shapes", "n_bytes", "flops"),
    [
        # q, k, v are read and y is written; 4 × 4 × 16 × 4096² × 128
        ("all pairs", "4 × 4096, 16 × 128", 2 * 4 * n, 549755813888),
        ("causal", "4 × 4096, 16 × 128", 2 * 4 * n, 274877906944),
        # dy, y, q, k, v are read, dq, dk, dv are written
        ("causal: dq, dk, dv", "4 × 4096, 16 × 128", 2 * 8 * n, 687194767360),
        # both; 4 × 16 × 32 × 1024² × 64 / 2 × 3.5
        ("causal: step", "16 × 1024, 32 × 64", 2 * 12 * n, 240518168576),
        # q and y of 64 heads, k and v of 8
        (
            "causal, grouped heads",
            "4 × 4096, 64 × 128 over 8",
            2 * (2 * 4 + 1) * n,
            4 * 274877906944,
        ),
        # 8 key heads of 64 caches with 8192 positions, twice; q and y of 32 heads; 64 lengths
        (
            "decode",
            "64 × 8192, 32 × 128 over 8",
            2 * (2 * 64 * 8 * 8192 * 128 + 2 * 64 * 32 * 128) + 4 * 64,
            4 * 64 * 32 * 8192 * 128,
        ),
    ],
)
def test_the_work_of_attention(name: str, shapes: str, n_bytes: int, flops: int) -> None:
    case = find(name, shapes)
    assert (case.bytes, case.flops) == (n_bytes, flops)


def test_packed_sequences_hold_as_many_tokens_as_the_others() -> None:
    case = find("causal, packed", "31 of 128 to 4096, 16 × 128")
    starts = case.make(torch.device("cpu"), torch.bfloat16, 0)[3]
    lengths = starts.diff()
    assert starts[-1] == 16384
    assert lengths.tolist() != sorted(lengths.tolist())
    assert case.flops == 2 * int((lengths.double() ** 2).sum()) * 16 * 128


@pytest.mark.filterwarnings("ignore")  # torch's reasons why a backend does not take part
@pytest.mark.parametrize(
    ("case", "name"), RIVALS, ids=[f"{c.name}, {c.shapes}: {name}" for c, name in RIVALS]
)
def test_a_rival_computes_the_same_or_says_that_it_cannot(
    case: Case, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # not compiled, which takes long and, without a GPU, a compiler
    monkeypatch.setattr(attention_cases, "compiled_flex", lambda: flex_attention)
    small = case.small()
    assert small.rivals.keys() == case.rivals.keys()
    inputs = small.make(torch.device(device), small.dtype, 0)
    expected = small.prepared(small.theirs, inputs)()
    try:
        got = small.prepared(small.rivals[name], inputs)()
    except (RuntimeError, NotImplementedError) as error:
        if not NOT_HERE.search(str(error)):
            raise
        assert device == "cuda" or name not in ("flash", "flex") or small.mode != "forward"
        return
    assert difference(small, inputs, got, expected) <= tolerated_difference(small)


def test_flex_attention_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compilations.append(function))
    compiled_flex.cache_clear()
    for _ in range(2):
        compiled_flex()
    compiled_flex.cache_clear()
    assert len(compilations) == 1
