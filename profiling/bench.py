"""How fast the kernels are, measured on a GPU beside PyTorch eager, torch.compile and cuBLAS.

A case may name further rivals, such as each backend of torch's attention.

A sample is one pass over several sets of inputs, between two CUDA events, divided by the number of
sets. The sets together exceed twice the L2 cache, and a pass keeps all its results until it ends,
so that neither inputs nor outputs are found in the cache. Contenders take turns, so that a GPU that
grows warm treats all alike. Before its time is taken each contender's result is compared with
PyTorch's eager one, and an op is measured only after ``gpunn check`` holds it to be right, a
network after all the ops in it.

Outside a CUDA graph a short kernel is timed with the overhead of launching it, as a model has it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch._functorch.config

from gpunn.kernels.interpreter import INTERPRETING
from gpunn.kernels.launch import backend
from gpunn.profiling.case import Case, Function, Tensors, difference, tolerated_difference
from gpunn.profiling.cases import CASES, CHECKED_AS
from gpunn.profiling.results import CONTENDERS, TIME_RAN_OUT, Results, Roof, Row, Timing

Call = Callable[[], Tensors]

ROUNDS = 4
FEWEST_SAMPLES, MOST_SAMPLES = 10, 200
"""Of a contender, in all rounds together."""
MOST_SETS = 64
WARM_UP_SECONDS = 0.05
PRODUCT_SIZE = 8192
COPY_BYTES = 2**31
SAMPLES_OF_ROOF = 20


def why_not_here() -> str | None:
    """Why speed cannot be measured on this machine; None where it can."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU here (torch.cuda.is_available() is False)"
    if INTERPRETING:
        return "TRITON_INTERPRET=1 runs the kernels on the CPU; unset it"
    return None


def require_gpu() -> torch.device:
    """The current GPU.

    Raises:
        RuntimeError: there is none, or the kernels would not run on it.
    """
    reason = why_not_here()
    if reason is not None:
        raise RuntimeError(f"bench: speed was not measured: {reason}")
    return torch.device("cuda", torch.cuda.current_device())


def n_sets(bytes_a_set: int, cache_bytes: int) -> int:
    """How many sets of inputs exceed twice the cache; not more than MOST_SETS."""
    return min(2 * cache_bytes // max(bytes_a_set, 1) + 1, MOST_SETS)


def n_samples(seconds: float, seconds_a_sample: float) -> int:
    """How many samples of one contender fit in a time, within the limits."""
    fitting = seconds / max(seconds_a_sample, 1e-9)
    return int(min(max(fitting, FEWEST_SAMPLES), MOST_SAMPLES))


def one_pass(calls: Sequence[Call]) -> list[Tensors]:
    """Make every call and keep all results until the last is there."""
    return [call() for call in calls]


def take_samples(calls: Sequence[Call], n: int, n_runs: int) -> list[float]:
    """Microseconds a run, of ``n`` passes by CUDA events; in a pass the case runs ``n_runs`` times.

    That is once a call, except that a CUDA graph's one call holds them all.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for start, end in events:
        start.record()
        one_pass(calls)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1000 / n_runs for start, end in events]


def warm_up(calls: Sequence[Call]) -> float:
    """Run until kernels are compiled and clocks are up; seconds of the last pass."""
    started = time.perf_counter()
    while True:
        before = time.perf_counter()
        one_pass(calls)
        torch.cuda.synchronize()
        after = time.perf_counter()
        if after - started > WARM_UP_SECONDS and before > started:
            return after - before


def in_graph(calls: Sequence[Call]) -> Call:
    """A call that replays a CUDA graph of all the calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        one_pass(calls)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = one_pass(calls)

    def replay() -> Tensors:
        graph.replay()
        return results[0]

    return replay


def measure_roof(cases: Iterable[Case]) -> Roof:
    """This device's rates, for the arithmetic that the cases need: large products, and a copy."""
    device = require_gpu()
    flops = {}
    for precision, case in {case.precision: case for case in cases if case.flops}.items():
        square = (PRODUCT_SIZE, PRODUCT_SIZE)
        a, b = (torch.randn(square, device=device, dtype=case.dtype) for _ in range(2))
        with case.settings():
            flops[precision] = 2 * PRODUCT_SIZE**3 / _median_seconds(partial(_product, a, b))
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: (target.copy_(source),))
    return Roof(flops, 2 * source.nbytes / seconds)


def _product(a: torch.Tensor, b: torch.Tensor) -> Tensors:
    return (torch.mm(a, b),)


def _median_seconds(call: Call) -> float:
    warm_up([call])
    return statistics.median(take_samples([call], SAMPLES_OF_ROOF, 1)) / 1e6


def function_of(case: Case, contender: str) -> Function | None:
    """What a contender computes the case with; None where it does not take part."""
    if contender in case.rivals:
        return case.rivals[contender]
    if contender in ("kernels", "auto"):
        return case.ours
    if contender == "eager":
        return case.theirs
    if contender == "compile":
        return torch.compile(case.theirs, dynamic=False, fullgraph=True)
    return case.library


def backend_of(contender: str) -> AbstractContextManager[None]:
    """The backend that a contender runs under."""
    if contender == "kernels":
        return backend("kernels")
    return backend("auto") if contender == "auto" else nullcontext()


def calls_of(case: Case, contender: str, sets: Sequence[Tensors]) -> list[Call]:
    """A contender's calls, one a set of inputs; none where it does not take part."""
    function = function_of(case, contender)
    if function is None:
        return []
    if contender == "library":
        case = replace(case, mode="forward")
    return [case.prepared(function, inputs) for inputs in sets]


class Match:
    """The contenders of one case: who is ready to be timed, and who failed and why."""

    def __init__(self, case: Case, sets: Sequence[Tensors]) -> None:
        self.case, self.sets = case, sets
        self.calls: dict[str, list[Call]] = {}
        self.errors: dict[str, str] = {}
        self.expected = case.prepared(case.theirs, sets[0])()
        for contender in (*CONTENDERS, *case.rivals):
            self._attempt(contender, partial(self._prepare, contender))

    def _attempt(self, contender: str, action: Callable[[], None]) -> None:
        """Do something for a contender; if it raises, that is noted and the others go on."""
        try:
            with backend_of(contender):
                action()
        except Exception as error:  # noqa: BLE001 (whatever it is, the table says it)
            self.errors[contender] = described(error)
            self.calls.pop(contender, None)

    def _prepare(self, contender: str) -> None:
        calls = calls_of(self.case, contender, self.sets)
        if not calls:
            return
        apart = difference(self.case, self.sets[0], calls[0](), self.expected)
        if not apart <= tolerated_difference(self.case):
            raise ArithmeticError(f"differs from PyTorch's result by {apart:.1e}")
        self.calls[contender] = calls

    def timings(self, seconds: float, *, graph: bool = False) -> dict[str, Timing]:
        """Time all contenders in turn, within about so many seconds."""
        runs: dict[str, list[Call]] = {}
        lasts: dict[str, float] = {}
        samples: dict[str, list[float]] = {}

        def start(contender: str) -> None:
            calls = self.calls[contender]
            runs[contender] = [in_graph(calls)] if graph else calls
            lasts[contender] = warm_up(runs[contender])
            samples[contender] = []

        def sample(contender: str) -> None:
            share = seconds / len(runs)
            n = math.ceil(n_samples(share, lasts[contender]) / ROUNDS)
            samples[contender] += take_samples(runs[contender], n, len(self.sets))

        for contender in list(self.calls):
            self._attempt(contender, partial(start, contender))
        for _ in range(ROUNDS):
            for contender in [c for c in runs if c in self.calls]:
                self._attempt(contender, partial(sample, contender))
        return {c: Timing.of(taken) for c, taken in samples.items() if c in self.calls}


def described(error: BaseException) -> str:
    """An error on one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


@contextmanager
def conditions(case: Case) -> Iterator[None]:
    """The settings under which a case is compiled and timed."""
    # Compiled backwards may otherwise overwrite what a kept graph needs once more.
    with case.settings(), torch._functorch.config.patch(donated_buffer=False):
        yield


def measure(case: Case, roof: Roof, seconds: float) -> list[Row]:
    """Time one case: a row, and another in a CUDA graph where launching may take longest."""
    device = require_gpu()
    torch._dynamo.reset()  # else cases that share code are recompiled, up to dynamo's limit
    first = case.make(device, case.dtype, 0)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    n = n_sets(sum(tensor.nbytes for tensor in first), cache_bytes)
    sets = [first, *(case.make(device, case.dtype, seed) for seed in range(1, n))]
    rows = []
    with conditions(case):
        match = Match(case, sets)
        for graph in [False, True] if case.launch_bound else [False]:
            row = Row.of(case, graph, roof=roof.microseconds(case))
            row.times = match.timings(seconds / (1 + case.launch_bound), graph=graph)
            row.errors = dict(match.errors)
            rows.append(row)
    return rows


def attempt(case: Case, roof: Roof, seconds: float) -> list[Row]:
    """``measure``, or one row that says why the case could not be measured."""
    try:
        return measure(case, roof, seconds)
    except Exception as error:  # noqa: BLE001 (whatever it is, the table says it)
        return [_unmeasured(case, described(error), roof)]
    finally:
        torch.cuda.empty_cache()


def _unmeasured(case: Case, reason: str, roof: Roof | None = None) -> Row:
    least = math.nan if roof is None else roof.microseconds(case)
    return Row.of(case, roof=least, errors={"case": reason})


def bench(
    ops: Sequence[str],
    seconds: float,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[Results], None] = lambda results: None,
    green: Mapping[str, bool] | None = None,
) -> Results:
    """Measure the cases of these ops within about so many seconds; a row for every case.

    Cases of an op whose check is not green, and those that time ran out for, get rows that say so.
    ``green`` are the checks that were made before. ``keep`` is given what there is after every
    case, so that nothing is lost if the end is not met.
    """
    from gpunn.check import is_green

    require_gpu()
    started, known = time.perf_counter(), green or {}
    results, waiting = Results(), []
    for op in ops:
        parts = CHECKED_AS.get(op, (op,))
        red = [part for part in parts if not (known[part] if part in known else is_green(part))]
        if not red:
            waiting += CASES[op]
        else:
            reason = f"`gpunn check {' '.join(red)}` is not green, and a wrong kernel is not timed"
            results.rows += [_unmeasured(case, reason) for case in CASES[op]]
    if not waiting:
        return results
    progress("measuring the roof: large products, a large copy")
    results.roof, spent = measure_roof(waiting), [0.0]
    for done, case in enumerate(waiting):
        before = time.perf_counter()
        left = seconds - (before - started)
        if left < statistics.median(spent):
            results.rows.append(_unmeasured(case, TIME_RAN_OUT, results.roof))
            continue
        progress(f"{done + 1}/{len(waiting)}  {case.op}: {case.name}, {case.shapes}")
        results.rows += attempt(case, results.roof, left / (len(waiting) - done) / 2)
        spent.append(time.perf_counter() - before)
        keep(results)
    results.rows.sort(key=lambda row: ops.index(row.op))
    return results
