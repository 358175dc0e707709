"""Triton's interpreter with bfloat16 mended, and whether the mend is still needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from gpunn.kernels.interpreter import (
    INTERPRETING,
    bfloat16_to_float32,
    float32_to_bfloat16,
)
from gpunn.kernels.launch import Launch, run
from kit import short_name

in_the_interpreter = pytest.mark.skipif(
    not INTERPRETING, reason="the kernels run on the GPU here, not in Triton's interpreter"
)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    """c = a b, all (SIZE, SIZE), c in float32."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def convert_kernel(x_ptr, y_ptr, n_elements, BLOCK: tl.constexpr):
    """y = x, in y's type."""
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n_elements, other=0)
    tl.store(y_ptr + index, x.to(y_ptr.dtype.element_ty), mask=index < n_elements)


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    block = triton.next_power_of_2(x.numel())
    run("test", convert_kernel, (1,), x, y, x.numel(), launch=Launch(), BLOCK=block)
    return y


def awkward_float32() -> torch.Tensor:
    """Random bit patterns, ties between two bfloat16, and the extremes."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 2**32, 20_000, dtype=np.uint32)
    ties = (generator.integers(0, 2**16, 4_000, dtype=np.uint32) << 16) + 0x8000
    special = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF]
    special += [0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]
    bits = np.concatenate([patterns, ties, np.array(special, dtype=np.uint32)])
    return torch.from_numpy(bits.view(np.float32))


def test_rounding_is_torchs() -> None:
    values = awkward_float32()
    expected = values.to(torch.bfloat16)
    got = torch.from_numpy(float32_to_bfloat16(values.numpy()).view(np.int16))
    is_nan = values.isnan()
    assert is_nan.any()
    assert torch.equal(got[~is_nan], expected.view(torch.int16)[~is_nan])
    assert got.view(torch.bfloat16)[is_nan].isnan().all()


def test_widening_is_torchs() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(bfloat16_to_float32(bits), expected, equal_nan=True)


@in_the_interpreter
def test_dot_of_bfloat16() -> None:
    a, b = torch.randn(2, 16, 16).bfloat16().unbind()
    c = torch.empty(16, 16)
    run("test", dot_kernel, (1,), a, b, c, launch=Launch(), SIZE=16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@in_the_interpreter
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64], ids=short_name)
def test_conversion_to_bfloat16(source: torch.dtype) -> None:
    x = awkward_float32()[-4000:].to(source)
    torch.testing.assert_close(
        converted(x, torch.bfloat16), x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True
    )


@in_the_interpreter
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64], ids=short_name)
def test_conversion_from_bfloat16(target: torch.dtype) -> None:
    x = awkward_float32()[-4000:].bfloat16()
    torch.testing.assert_close(converted(x, target), x.to(target), rtol=0, atol=0, equal_nan=True)


@in_the_interpreter
def test_conversion_of_integers_to_bfloat16() -> None:
    x = torch.tensor([-(2**20) - 1, -3, 0, 1, 255, 257, 2**24])
    assert torch.equal(converted(x, torch.bfloat16), x.to(torch.bfloat16))


UNMENDED = """
import json, warnings
warnings.simplefilter("ignore")
import torch, triton, triton.language as tl

@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))

@triton.jit
def convert_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr).to(y_ptr.dtype.element_ty))

def dot():
    a, b, c = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, c, SIZE=16)
    return torch.allclose(c, a.float() @ b.float(), rtol=1e-3, atol=1e-3)

def conversion(dtype):
    x, y = torch.tensor([1.01171875], dtype=dtype), torch.zeros(1, dtype=torch.bfloat16)
    convert_kernel[(1,)](x, y)
    return torch.equal(y, x.bfloat16())

def right(check, *arguments):
    try:
        return bool(check(*arguments))
    except Exception:
        return False

print(json.dumps({
    "dot": right(dot),
    "float32": right(conversion, torch.float32),
    "float16": right(conversion, torch.float16),
    "float64": right(conversion, torch.float64),
}))
"""


@pytest.fixture(scope="module")
def unmended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """What Triton's own interpreter gets right, without gpunn."""
    script = tmp_path_factory.mktemp("unmended") / "unmended.py"  # Triton reads the source
    script.write_text(UNMENDED)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("part", ["dot", "float32", "float16", "float64"])
def test_the_mend_is_still_needed(part: str, unmended: dict[str, bool]) -> None:
    assert not unmended[part], (
        f"the mend is no longer needed: Triton {triton.__version__} itself is right about "
        f"bfloat16 in {'tl.dot' if part == 'dot' else f'conversions from {part}'}; once every "
        "supported version is, remove that part of kernels/interpreter.py"
    )


@triton.jit
def sum_kernel(x_ptr, y_ptr, AXIS: tl.constexpr, KEEP: tl.constexpr, SIZE: tl.constexpr):
    """y = Σ x along an axis of (SIZE, SIZE)."""
    lane = tl.arange(0, SIZE)
    x = tl.load(x_ptr + lane[:, None] * SIZE + lane[None, :])
    total = tl.sum(x, axis=AXIS, keep_dims=KEEP)
    tl.store(y_ptr + lane, tl.reshape(total, (SIZE,)))


@in_the_interpreter
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("keep", [False, True])
def test_a_sum_has_the_errors_of_partial_sums(axis: int, keep: bool) -> None:
    """One after the other, 1,024 numbers of one sign err by tens of units in the last place."""
    size = 1024
    x, y = torch.rand(size, size), torch.empty(size)
    run("test", sum_kernel, (1,), x, y, launch=Launch(), AXIS=axis, KEEP=keep, SIZE=size)
    exact = x.double().sum(axis)
    assert (y.double() - exact).abs().max() <= 4 * 2**-24 * exact.max()
    in_order = torch.from_numpy(np.cumsum(x.numpy(), axis)).select(axis, -1)
    assert (in_order.double() - exact).abs().max() > 8 * 2**-24 * exact.max()


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def doubling_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    """y = 8 x, by calls of a device function."""
    lane = tl.arange(0, SIZE)
    tl.store(y_ptr + lane, doubled(doubled(doubled(tl.load(x_ptr + lane)))))


@in_the_interpreter
def test_the_language_is_replaced_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And given back after it."""
    from triton.runtime import interpreter

    replace, calls = interpreter._patch_lang, []

    def counted(function: object) -> object:
        calls.append(function)
        return replace(function)

    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    x, y = torch.arange(8.0), torch.empty(8)
    run("test", doubling_kernel, (3,), x, y, launch=Launch(), SIZE=8)
    assert torch.equal(y, 8 * x)
    assert len(calls) == 1
    assert tl.core.is_builtin(tl.load)


@in_the_interpreter
def test_remembered_types_are_told_apart() -> None:
    shapes = ([4, 8], [8, 4], [32], [tl.constexpr(4), 8])
    types = [tl.block_type(dtype, shape) for dtype in (tl.float32, tl.int32) for shape in shapes]
    assert [list(t.shape) for t in types[:4]] == [[4, 8], [8, 4], [32], [4, 8]]
    assert types[0] == types[3] != types[4]
    assert types[0].numel == 32
    assert len({str(t) for t in types}) == 6
    pointer = tl.block_type(tl.pointer_type(tl.float32), [4, 8])
    assert pointer.element_ty.is_ptr()
    assert not types[0].element_ty.is_ptr()


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    """y = x ∘ x + 0, or 0 - x, in the type of x."""
    lane = tl.arange(0, SIZE)
    x = tl.load(x_ptr + lane)
    if OPERATION == "add":
        y = x + x
    elif OPERATION == "mul":
        y = x * x
    else:
        y = (x - x) - x
    tl.store(y_ptr + lane, y)


@in_the_interpreter
@pytest.mark.parametrize(
    ("operation", "largest"), [("add", 2**30 - 1), ("mul", 46340), ("sub", 2**31 - 1)]
)
def test_integers_that_overflow_are_refused(operation: str, largest: int) -> None:
    """32 bits, of which one element is too large; 64 bits have room for it."""
    expected = {"add": 2 * largest, "mul": largest**2, "sub": -largest}[operation]
    x = torch.tensor([1, 2, 3, largest], dtype=torch.int32)
    y = torch.empty_like(x)

    def launch(x: torch.Tensor, y: torch.Tensor) -> None:
        run("test", arithmetic_kernel, (1,), x, y, launch=Launch(), OPERATION=operation, SIZE=4)

    launch(x, y)
    assert y[-1] == expected
    x[-1] = -(2**31) if operation == "sub" else largest + 1
    with pytest.raises(
        InterpreterError, match=rf"int32 overflow detected for operation {operation}"
    ):
        launch(x, y)
    wide = torch.empty(4, dtype=torch.int64)
    launch(x.long(), wide)
    assert wide[-1].abs() > 2**31 - 1


@triton.jit
def outer_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """y = 2 x xᵀ + 1 over its first COLS columns, by broadcasts of each kind."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    x = tl.load(x_ptr + rows)
    y = 2 * (x[:, None] * tl.load(x_ptr + cols)) + 1
    tl.static_assert(y.shape[0] == ROWS)
    tl.static_assert(y.numel == ROWS * COLS)
    tl.store(y_ptr + rows[:, None] * COLS + cols, y)


@in_the_interpreter
def test_remembered_sizes_are_broadcast_as_before() -> None:
    x, y = torch.arange(8.0), torch.empty(8, 4)
    run("test", outer_kernel, (1,), x, y, launch=Launch(), ROWS=8, COLS=4)
    assert torch.equal(y, 2 * x[:, None] * x[:4] + 1)
