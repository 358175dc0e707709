"""What a benchmark found: statistics, rows, the table that is printed and the JSON that is kept."""

from __future__ import annotations

import json
import math
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from gpunn.profiling.case import Case

OURS = ("kernels", "auto")
"""Our two columns: backend("kernels") and backend("auto")."""
PEERS = ("eager", "compile", "library")
"""PyTorch eager, torch.compile, and torch.mm where the case is a bare product."""
CONTENDERS = OURS + PEERS
TIME_RAN_OUT = "time ran out"
NUMERIC = re.compile(r"-?|-?[0-9.]+%?")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which a share of the samples lies, interpolated between neighbours."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Timing:
    """The distribution of one contender's times, in microseconds."""

    median: float
    p20: float
    p80: float
    n_samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The statistics of samples in microseconds."""
        p20, median, p80 = (percentile(samples, share) for share in (0.2, 0.5, 0.8))
        return cls(median, p20, p80, len(samples))

    @property
    def spread(self) -> float:
        """The width of the middle three fifths, as a share of the median."""
        return (self.p80 - self.p20) / self.median


@dataclass(frozen=True)
class Roof:
    """What a device can do at most, as measured: operations and bytes a second."""

    flops: dict[str, float]
    """Of a large product, by ``Case.precision``."""
    bandwidth: float
    """Of a large copy, read plus written."""

    def microseconds(self, case: Case) -> float:
        """The time below which a case cannot run, if the measured rates are the best possible."""
        seconds = case.bytes / self.bandwidth
        if case.flops:
            seconds = max(seconds, case.flops / self.flops[case.precision])
        return seconds * 1e6


@dataclass
class Row:
    """One case as measured, or the reason why it, or a contender, was not."""

    op: str
    case: str
    shapes: str
    precision: str
    bytes: int
    flops: int
    in_graph: bool = False
    """Whether a CUDA graph was replayed, so that launch overhead is not in the times."""
    rivals: tuple[str, ...] = ()
    """Contenders that this case has besides those that all have."""
    roof: float = math.nan
    """Microseconds."""
    times: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    """Contender, or "case", to what went wrong."""

    @classmethod
    def of(cls, case: Case, in_graph: bool = False, **known: Any) -> Row:
        """An empty row for a case."""
        name = case.name + " (CUDA graph)" * in_graph
        sizes = case.precision, case.bytes, case.flops
        return cls(case.op, name, case.shapes, *sizes, in_graph, tuple(case.rivals), **known)

    def share_of_roof(self, contender: str = "kernels") -> float | None:
        """1 where the contender is as fast as the device allows."""
        timing = self.times.get(contender)
        return self.roof / timing.median if timing else None

    def ratio(self, ours: str, peer: str) -> float | None:
        """How many times as fast as a peer we are: above 1 we win, below 1 we lose."""
        if ours not in self.times or peer not in self.times:
            return None
        return self.times[peer].median / self.times[ours].median

    def rate(self, amount: float, contender: str = "kernels") -> float | None:
        """``amount`` (bytes or flops of the case) a second."""
        timing = self.times.get(contender)
        return amount / timing.median * 1e6 if timing and amount else None

    def as_dict(self) -> dict[str, Any]:
        """Everything measured and what follows from it, for JSON."""
        known = {name: value for name, value in vars(self).items() if name != "times"}
        known["roof"] = None if math.isnan(self.roof) else self.roof
        return {
            **known,
            "times": {contender: vars(timing) for contender, timing in self.times.items()},
            "share_of_roof": {c: self.share_of_roof(c) for c in self.times},
            "bytes_a_second": {c: self.rate(self.bytes, c) for c in self.times},
            "flops_a_second": {c: self.rate(self.flops, c) for c in self.times},
            "ratios": {
                f"{ours} to {peer}": ratio
                for ours in OURS
                for peer in (*PEERS, *self.rivals)
                if (ratio := self.ratio(ours, peer)) is not None
            },
        }


@dataclass
class Results:
    """A benchmark's rows, and the device's rates once they are measured."""

    roof: Roof | None = None
    rows: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        roof = None if self.roof is None else vars(self.roof)
        return {"roof": roof, "speed": [row.as_dict() for row in self.rows]}


def number(value: float | None, pattern: str = "{:.2f}") -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else pattern.format(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a header; those of numbers, dashes and percentages to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    right = [all(NUMERIC.fullmatch(row[i]) for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = zip(cells, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in padded).rstrip()

    return "\n".join([line(header), line(["─" * w for w in widths]), *map(line, rows)])


SPEED_HEADER = (
    *("case", "shapes", "type", "roof", "kernels", "auto", "eager", "compile", "cuBLAS", "±%"),
    *("%roof", "TF/s", "GB/s", "k/eager", "k/comp", "k/cuBLAS", "a/eager", "a/comp"),
)
SPEED_NOTE = (
    "roof to cuBLAS: µs, medians; kernels and auto: gpunn's backends; eager and compile: PyTorch;\n"
    "further rivals: other ways of PyTorch's to compute the case, by name.\n"
    "±%: half of p20 to p80, the widest of a row. %roof, TF/s, GB/s: of kernels.\n"
    "k/…, a/…: how many times as fast kernels and auto are; above 1 we win, below 1 we lose."
)


def speed_table(rows: Sequence[Row]) -> str:
    """The benchmark as text: every row, those where we lose too, and then what went wrong."""
    blocks = []
    for op in dict.fromkeys(row.op for row in rows):
        lines = [_speed_cells(row) for row in rows if row.op == op]
        blocks.append(f"{op}\n{table(SPEED_HEADER, lines)}")
        with_rivals = [row for row in rows if row.op == op and row.rivals]
        if with_rivals:
            blocks.append(f"{op}, further rivals\n{_rivals_table(with_rivals)}")
    errors = [
        f"  {row.op}, {row.case}, {row.shapes}, {row.precision}: {who}: {what}"
        for row in rows
        for who, what in row.errors.items()
    ]
    if errors:
        blocks.append("\n".join(["not measured:", *errors]))
    return "\n\n".join([*blocks, SPEED_NOTE])


def _speed_cells(row: Row) -> list[str]:
    """A row of the table."""
    medians = {contender: timing.median for contender, timing in row.times.items()}
    spread = max((timing.spread for timing in row.times.values()), default=math.nan)
    flops, traffic = row.rate(row.flops) or math.nan, row.rate(row.bytes) or math.nan
    ratios = [("kernels", peer) for peer in PEERS] + [("auto", peer) for peer in PEERS[:2]]
    return [
        *(row.case, row.shapes, SHORT.get(row.precision, row.precision)),
        number(row.roof, "{:.1f}"),
        *(number(medians.get(contender), "{:.1f}") for contender in CONTENDERS),
        number(50 * spread, "{:.1f}"),
        number(100 * (row.share_of_roof() or math.nan), "{:.0f}"),
        number(flops / 1e12, "{:.0f}"),
        number(traffic / 1e9, "{:.0f}"),
        *(number(row.ratio(ours, peer)) for ours, peer in ratios),
    ]


def _rivals_table(rows: Sequence[Row]) -> str:
    """The kernels beside the rivals that only some cases have: times, then ratios."""
    rivals = list(dict.fromkeys(rival for row in rows for rival in row.rivals))
    header = ["case", "shapes", "type", "kernels", *rivals, *(f"k/{rival}" for rival in rivals)]
    lines = []
    for row in rows:
        medians = {contender: timing.median for contender, timing in row.times.items()}
        lines.append([
            *(row.case, row.shapes, SHORT.get(row.precision, row.precision)),
            *(number(medians.get(contender), "{:.1f}") for contender in ("kernels", *rivals)),
            *(number(row.ratio("kernels", rival)) for rival in rivals),
        ])  # fmt: skip
    return table(header, lines)


def _output_of(*command: str) -> str | None:
    """The first line that a program prints, or None where it is missing or fails."""
    try:
        here = Path(__file__).resolve().parent
        done = subprocess.run(command, capture_output=True, text=True, cwd=here, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def _commit() -> str | None:
    """The git commit of this source, marked where it has changed since; None outside a checkout."""
    if _output_of("git", "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed, perhaps inside another project's checkout
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no") is not None
    return f"{_output_of('git', 'rev-parse', 'HEAD')}{' and changes' if changed else ''}"


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Where and when something was measured, and with which versions."""
    gpu = torch.cuda.is_available()
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if gpu else None,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "command": shlex.join(sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Keep ``content`` and the environment that it was found in; the file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), **content}, indent=2, allow_nan=False)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)
