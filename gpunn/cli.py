"""The command line: ``gpunn doctor``, ``gpunn check``, ``gpunn profile``, ``gpunn demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

Step = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="gpunn", description="GPU kernels for neural networks: what runs here, and how well."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="what hardware and versions there are, and what runs here")
    check = commands.add_parser("check", help="every op's kernels against its NumPy reference")
    check.add_argument("ops", nargs="*", metavar="OP", help="only these ops")
    profile = commands.add_parser("profile", help="what the kernels cost, and how fast they are")
    if given[:1] == ["profile"]:
        from gpunn.profiling.command import add_arguments

        add_arguments(profile)
    demo = commands.add_parser(
        "demo", help="networks that learn and draw what they learnt", allow_abbrev=False,
        add_help=False,
    )  # fmt: skip
    own = "this, or of one NAME its own options"
    demo.add_argument("-h", "--help", action="store_true", help=own)
    demo.add_argument("names", nargs="*", metavar="NAME", help="none: lists them; all: each")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder of pictures and page")
    arguments, others = parser.parse_known_args(given)
    if others and arguments.command != "demo":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if arguments.command == "demo":
        if arguments.help and (len(arguments.names) != 1 or arguments.names == ["all"]):
            demo.print_help()
            return 0
        others += ["--help"] * arguments.help
        return run_demo_command(arguments.names, others, arguments.out, parser.error)
    if arguments.command == "doctor":
        from gpunn.doctor import report

        print(report())
        return 0
    if arguments.command == "check":
        return run_check_command(arguments.ops, parser.error)
    from gpunn.profiling.command import run

    return int(run(arguments))


def run_check_command(ops: Sequence[str], refuse: Callable[[str], object]) -> int:
    """``gpunn check``: prints the table; 1 if a row of it fails."""
    from gpunn import check

    for op in ops:
        if op not in check.CHECKS:
            refuse(f"unknown op {op!r}; known are {', '.join(check.CHECKS)}")
    if not check.kernels_run_here():
        print("No GPU here: the kernels run through Triton's interpreter.", flush=True)
        return check.interpreted(["check", *ops])
    names = list(ops) or list(check.CHECKS)
    total = sum(len(check.checks_of(op)) for op in names) * len(check.DTYPES)
    with progress("checking", total) as step:
        rows = check.run_checks(
            names, lambda row: step(f"{row.op} {row.case}"), check.n_processes_here()
        )
    print(table([check.HEADER, *(row.cells() for row in rows)]))
    failed = [row for row in rows if not row.ok]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} checks passed.")
    return 1 if failed else 0


def run_demo_command(
    names: Sequence[str], options: Sequence[str], out: Path, refuse: Callable[[str], object]
) -> int:
    """``gpunn demo``: lists the demos, or runs those named with the options that are theirs."""
    from gpunn import demo

    for name in names:
        if name not in (*demo.DEMOS, "all"):
            order = "; names come before a demo's options" if options else ""
            refuse(f"unknown demo {name!r}{order}; known are {', '.join(demo.DEMOS)}, all")
    if not names:
        print(demo.listing())
        return 0
    return demo.run_command(names, options, out)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


@contextmanager
def progress(what: str, total: int) -> Iterator[Step]:
    """A progress bar on a terminal, where rich is installed; else nothing."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda text: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
