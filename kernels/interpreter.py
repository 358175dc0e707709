"""Running the kernels on a CPU: what Triton's interpreter gets wrong, mended.

With ``TRITON_INTERPRET=1`` in the environment before the first import, ``triton.jit`` functions
run in NumPy, one program after the other. That is how the kernels are tested where there is no
GPU. Triton 3.6 mistreats bfloat16 there, which NumPy lacks and the interpreter keeps as uint16:

- ``tl.dot`` multiplies the 16-bit patterns as integers;
- a conversion to bfloat16 truncates where a GPU rounds to nearest even, and one from float64
  or float16 converts the number to an integer.

And it makes an integer of an array of one element, which NumPy 2.4 refuses and 2.3 warns of; and
``tl.sum`` adds one number after the other, except along the last dimension, where a GPU's threads
add as many partial sums as they are: its rounding errors grow faster than a GPU's.

It is slower than it need be, too. Each call of a device function looks through all of Triton's
language for what to replace, which the launch has replaced already; the type of a tile, with its
name, and the sizes of a tile are made anew for each operation; and whether an integer overflows is
found out with seven more operations. Mended, a kernel takes about a third of the time.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import triton
import triton.language as tl

Array = np.ndarray[Any, Any]
INTERPRETING: bool = bool(triton.knobs.runtime.interpret)


def bfloat16_to_float32(bits: Array) -> Array:
    """The float32 values of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """The bfloat16 bit patterns (uint16) nearest to float32 values, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def mend_interpreter() -> None:
    """Replace the faulty functions of Triton's interpreter. Called once, on import."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    patch_tensor = interpreter._patch_lang_tensor

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle(bfloat16_to_float32(operand.data), tl.float32)

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def mended_cast(self: Any, source: Any, target_type: Any) -> Any:
        source_type, target = source.dtype.scalar, target_type.scalar
        if source_type == target:
            return source
        if source_type == tl.bfloat16:
            return cast(self, widened(source), target_type)
        if target == tl.bfloat16:
            values = cast(self, source, tl.float32).data
            return TensorHandle(float32_to_bfloat16(values), tl.bfloat16)
        return cast(self, source, target_type)

    def mended_patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    InterpreterBuilder.create_dot = mended_dot
    InterpreterBuilder.cast_impl = mended_cast
    interpreter._patch_lang_tensor = mended_patch


def mend_sums() -> None:
    """Add up in partial sums along every dimension. Called once, on import."""
    from triton.runtime.interpreter import ReduceOps

    add = ReduceOps.sum

    def mended_sum(self: Any, tensor: Any) -> Any:
        if self.axis is None:
            return add(self, tensor)
        total = np.ascontiguousarray(np.moveaxis(tensor.handle.data, self.axis, -1)).sum(-1)
        total = np.expand_dims(total, self.axis) if self.keep_dims else total
        return self.to_tensor(total, tensor.dtype)

    ReduceOps.sum = mended_sum


def mend_calls() -> None:
    """Replace Triton's language once a launch, not once a call. Called once, on import."""
    from triton.runtime.interpreter import InterpretedFunction

    call = InterpretedFunction.__call__
    found: dict[Any, list[Any]] = {}

    def modules_of(function: Any) -> list[Any]:
        if function not in found:
            values = function.__globals__.values()
            found[function] = [m for m in (tl, tl.core) if any(m is value for value in values)]
        return found[function]

    def mended_call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not any(tl.core.is_builtin(module.load) for module in modules_of(self.fn)):
            return self.rewrite()(*arguments, **keywords)
        return call(self, *arguments, **keywords)

    InterpretedFunction.__call__ = mended_call


def mend_types() -> None:
    """Remember the types of tiles, their sizes and NumPy types. Called once, on import."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    initialise, find = tl.block_type.__init__, interpreter._get_np_dtype
    broadcast = TritonSemantic.broadcast_impl_value
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    found: dict[str, Any] = {}
    scalar = tl.constexpr(1), tl.tuple([])

    def mended_initialise(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        key = (element_ty.name, *sizes)
        if key not in known:
            initialise(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            self.of_tile = tl.constexpr(math.prod(sizes)), tl.tuple(list(map(tl.constexpr, sizes)))
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    def mended_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_tile if type.is_block() else scalar

    def mended_broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        of_lhs, of_rhs = (t.type.shape if t.type.is_block() else None for t in (lhs, rhs))
        return (lhs, rhs) if of_lhs is of_rhs else broadcast(self, lhs, rhs)

    def mended_find(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if scalar.name not in found:
            found[scalar.name] = find(scalar)
        return found[scalar.name]

    tl.block_type.__init__ = mended_initialise
    tl.tensor.__init__ = mended_tensor
    TritonSemantic.broadcast_impl_value = mended_broadcast
    interpreter._get_np_dtype = mended_find


def mend_overflow() -> None:
    """Ask NumPy whether an integer overflows. Called once, on import."""
    from triton.language.semantic import TritonSemantic

    operations: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def mended_check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        scalar = lhs.type.scalar
        if scalar.int_bitwidth >= 64:
            return
        wide = (operand.handle.data.astype(np.int64) for operand in (lhs, rhs))
        result, name = operations[operation.__name__](*wide), operation.__name__
        low, high = scalar.get_int_min_value(), scalar.get_int_max_value()
        assert result.size == 0 or (result.min() >= low and result.max() <= high), (
            f"int{scalar.int_bitwidth} overflow detected for operation {name}"
        )

    TritonSemantic.binary_op_sanitize_overflow_impl = mended_check


def quiet_numpy() -> AbstractContextManager[None]:
    """NumPy silent about overflow and NaN, as a GPU is: both sides of ``tl.where`` are computed."""
    return np.errstate(all="ignore")


if INTERPRETING:
    mend_interpreter()
    mend_sums()
    mend_calls()
    mend_types()
    mend_overflow()
