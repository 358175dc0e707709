"""How kernels are launched: configurations, the record of what ran, the choice of backend.

Nothing here knows an operator. A launcher (``kernels/linear.py`` and its like) allocates its
outputs, picks a ``Launch``, and calls ``run``; ``operator`` registers it as a ``torch.library`` op.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch

from gpunn.kernels.compiled import launch_compiled
from gpunn.kernels.direct import directly
from gpunn.kernels.interpreter import INTERPRETING, quiet_numpy

Backend = Literal["auto", "kernels", "torch"]
P = ParamSpec("P")
R = TypeVar("R")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv is many times slower on the host."""
    return -(-a // b)


@dataclass(frozen=True)
class Launch:
    """A launch configuration. A subclass adds its block sizes; each becomes a constexpr."""

    num_warps: int = 4

    @cache  # noqa: B019  (frozen, hashable, and there are a few dozen of them)
    def arguments(self) -> dict[str, int]:
        """Keyword arguments for a kernel: ``BLOCK_ROWS=…`` from a field ``block_rows``."""
        options = ("num_warps", "num_stages")
        return {n if n in options else n.upper(): v for n, v in asdict(self).items()}


@dataclass(frozen=True)
class LaunchRecord:
    """One kernel launch."""

    operator: str
    kernel: str
    grid: tuple[int, ...]
    launch: Launch


@dataclass(frozen=True)
class FallbackRecord:
    """One operator, or part of one, that was left to PyTorch, and why."""

    operator: str
    reason: str


@dataclass
class Trace:
    """What ran inside ``with gpunn.trace() as trace``; printing it shows a table."""

    launches: list[LaunchRecord] = field(default_factory=list)
    fallbacks: list[FallbackRecord] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(r.operator, r.kernel, f"grid {r.grid}  {r.launch}") for r in self.launches]
        rows += [(r.operator, "torch", r.reason) for r in self.fallbacks]
        counted = {row: rows.count(row) for row in dict.fromkeys(rows)}
        if not counted:
            return "nothing was launched"
        widths = [max(len(row[i]) for row in counted) for i in (0, 1)]
        return "\n".join(
            f"{count:5d} × {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}"
            for row, count in counted.items()
        )


@dataclass(frozen=True)
class Call:
    """A launch that was captured instead of made: all that a compiler needs to know of it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    launch: Launch


@dataclass(frozen=True)
class Device:
    """What a launcher may ask of the device that it launches on."""

    capability: int
    n_multiprocessors: int
    shared_memory: int = 232448
    """Bytes that one block may have."""


@dataclass(eq=False)
class _Choice:
    backend: Backend


# Autograd runs a CUDA backward in a thread of its own, so these are the process's, not a thread's.
# Blocks of several threads may end in any order: each removes its own entry, the newest rules.
_lock = threading.Lock()
_traces: list[Trace] = []
_choices: list[_Choice] = []
_backend: Backend = "auto"
_capture: tuple[Device, list[Call]] | None = None


@contextmanager
def trace() -> Iterator[Trace]:
    """Record every kernel launch and every fallback to PyTorch in this block, backward included.

    Inside ``torch.compile`` the launches are recorded when the compiled code runs; the fallbacks
    were decided while it was compiled and are not.
    """
    record = Trace()
    with _lock:
        _traces.append(record)
    try:
        yield record
    finally:
        with _lock:
            _traces[:] = [other for other in _traces if other is not record]


@contextmanager
def backend(choice: Backend) -> Iterator[None]:
    """Choose who computes in this block (for the whole process, in every thread).

    ``"auto"``: gpunn's kernels, or PyTorch's op where that is the faster way.
    ``"kernels"``: gpunn's kernels alone; an error where there is none for the case.
    ``"torch"``: PyTorch's ops alone.
    """
    global _backend
    if choice not in ("auto", "kernels", "torch"):
        raise ValueError(f"backend: expected 'auto', 'kernels' or 'torch', got {choice!r}")
    entry = _Choice(choice)
    with _lock:
        _choices.append(entry)
        _backend = choice
    try:
        yield
    finally:
        with _lock:
            _choices.remove(entry)
            _backend = _choices[-1].backend if _choices else "auto"


def chosen_backend() -> Backend:
    """The backend in force."""
    return _backend


@contextmanager
def captured(device: Device) -> Iterator[list[Call]]:
    """Collect launches for ``device`` instead of making them.

    In this block the functions take meta tensors for tensors of that device, so that what they
    launch, forward and backward, can be known without one.
    """
    global _capture
    calls: list[Call] = []
    previous, _capture = _capture, (device, calls)
    try:
        yield calls
    finally:
        _capture = previous


def record_fallback(operator: str, reason: str) -> None:
    """Note that ``operator`` (or a part of it) was left to PyTorch."""
    if not torch.compiler.is_compiling() and _traces:
        for record in _traces:
            record.fallbacks.append(FallbackRecord(operator, reason))


@cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", Device.shared_memory),
    )


def device_of(tensor: torch.Tensor) -> Device:
    """The device of a launch on ``tensor``; in the interpreter, a Hopper of four processors."""
    if _capture is not None:
        return _capture[0]
    if tensor.is_cuda:
        return _cuda_device(tensor.get_device())
    return Device(capability=90, n_multiprocessors=4)


def run(
    operator: str,
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    launch: Launch,
    **constants: Any,
) -> None:
    """Launch ``kernel`` on the device and stream of its first tensor, and record it."""
    if _capture is not None:
        keywords = {**constants, **launch.arguments()}
        _capture[1].append(Call(kernel, grid, arguments, keywords, launch))
        return
    for record in _traces:
        record.launches.append(LaunchRecord(operator, kernel.__name__, grid, launch))
    if INTERPRETING:
        with quiet_numpy():
            kernel[grid](*arguments, **constants, **launch.arguments())
        return
    index = next(a for a in arguments if isinstance(a, torch.Tensor)).get_device()
    if index == torch.cuda.current_device():
        launch_compiled(kernel, grid, index, arguments, constants, launch)
        return
    with torch.cuda.device(index):
        launch_compiled(kernel, grid, index, arguments, constants, launch)


def assume_constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """As torch.compiler's, but that one first imports the compiler, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@assume_constant_result
def _capability(index: int) -> int:
    return _cuda_device(index).capability


@assume_constant_result
def _transform() -> str | None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None


def _refusal_of(tensor: torch.Tensor, also: Sequence[torch.dtype]) -> str | None:
    on_cuda = tensor.is_cuda
    captures_it = _capture is not None and tensor.is_meta
    if not (on_cuda or tensor.is_cpu or captures_it) or torch.version.hip:
        return f"{tensor.device.type} tensor" + (" on ROCm" if torch.version.hip else "")
    if tensor.dtype not in _DTYPES and tensor.dtype not in also:
        return f"no kernel for {tensor.dtype} on {tensor.device.type}"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "nested tensor" if tensor.is_nested else f"{tensor.layout} tensor"
    if type(tensor) not in _PLAIN:
        return f"tensor subclass {type(tensor).__name__}"
    capability = None
    if captures_it:
        capability = device_of(tensor).capability
    elif on_cuda:
        capability = _capability(tensor.get_device())
    if capability is not None and capability < 80:
        return f"no kernel below compute capability 8.0, and this is {capability / 10}"
    return None


def refusal(tensors: Sequence[torch.Tensor | None], also: Sequence[torch.dtype] = ()) -> str | None:
    """Why no kernel can take these tensors here; None when one can.

    ``also`` are dtypes that an operator takes beside those that all do.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_cpu and not INTERPRETING:  # first, since it is what a CPU's user waits for
            return "cpu tensor, and TRITON_INTERPRET is not 1"
        if (reason := _refusal_of(tensor, also)) is not None:
            return reason
    in_transform: str | None = _transform()
    return in_transform


_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
if INTERPRETING:  # for gradcheck; on a GPU double precision is PyTorch's
    _DTYPES.add(torch.float64)
_PLAIN: tuple[type, ...] = (
    torch.Tensor,
    torch.nn.Parameter,
    torch._subclasses.FakeTensor,
    torch._subclasses.functional_tensor.FunctionalTensor,
)


def decline(operator: str, reason: str) -> None:
    """Leave ``operator`` to PyTorch: noted in the trace, an error under ``backend("kernels")``."""
    if _backend == "kernels":
        raise RuntimeError(f"{operator}: backend('kernels') was asked for, but: {reason}")
    record_fallback(operator, reason)


def takes(operator: str, *tensors: torch.Tensor | None, also: Sequence[torch.dtype] = ()) -> bool:
    """Whether the kernels take these tensors under the chosen backend; the trace says why not.

    ``also`` are dtypes that this operator takes beside those that all do.
    """
    if _backend == "torch":
        record_fallback(operator, "backend('torch')")
        return False
    reason = refusal(tensors, also)
    if reason is not None:
        decline(operator, reason)
    return reason is None


library = torch.library.Library("gpunn", "DEF")
launchers: dict[str, Callable[..., Any]] = {}


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a launcher as the ``torch.library`` op ``gpunn::<schema>``.

    ``fake`` computes the outputs' shapes and dtypes for torch.compile; launchers allocate through
    it too, so that the two cannot differ. While launches are captured the launcher itself takes
    meta tensors: its launches are not made, so all that it does is allocate. It stays in
    ``launchers``.
    """
    name = schema.partition("(")[0]

    def register(launcher: Callable[P, R]) -> Callable[P, R]:
        def of_meta(*arguments: Any, **keywords: Any) -> Any:
            return (fake if _capture is None else launcher)(*arguments, **keywords)

        library.define(schema)
        library.impl(name, launcher, "CPU")
        library.impl(name, launcher, "CUDA")
        torch.library.register_fake(f"gpunn::{name}", of_meta, lib=library)
        launchers[name] = launcher
        op = getattr(torch.ops.gpunn, name).default
        return cast(Callable[P, R], directly(op, launcher))

    return register
