"""A small GPT learns to write, one character after the other, from Python's own documentation.

    python examples/gpt_text.py [--text FILE] [--device auto] [--seed 0] [--steps 1000]
                                [--out FOLDER] [--quick] [--resume]

The text is the language reference that every CPython brings along, as ``help("for")`` shows it, or
any other (``--text``). Its last tenth is held out and never trained on. A paragraph that stands in
it more than once (a fifth of the reference does) is read where it first stands alone, since what
was learnt by heart would otherwise count as foreseen.

The network is ``gpunn.models.GPT``, GPT-2's in small: 3 layers, 4 heads, 128 channels, 0.6 million
parameters, a memory of 64 characters. Its loss, the mean of -log p(next character), is in nats a
character (in bits, 1.44 times as many). Beside it stand the losses of guessing by the frequencies
of characters, and of pairs of them; below that, more than the last character was of use. What it
writes is printed as it learns: each character drawn from the model, with the cache of keys and
values.

On a GPU it runs on gpunn's kernels, on a CPU on PyTorch's own ops; the printed trace of a training
step says which ran. The settings below were chosen with the held-out loss in view, of seed 0.

Every 50 steps a checkpoint is written to FOLDER/checkpoints, and ``--resume`` goes on from the
last one with nothing lost: on a CPU the weights are those of a run that was not interrupted, bit
for bit.

Papers: Radford et al., "Language models are unsupervised multitask learners", 2019; the optimiser's
settings: Brown et al., "Language models are few-shot learners", 2020, appendix B,
https://arxiv.org/abs/2005.14165. Text: the Python documentation, in the version of the Python that
runs this, PSF licence.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

import gpunn
from checkpoint import CANNOT_RESUME, Loop, Part, digest, open_journal, what_ran
from command_line import device_of, parser_for
from gpunn.models import GPT
from loops import first_traced, progress_bar, threads

try:
    from matplotlib.figure import Figure
    from rich.console import Console
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

CONTEXT = 64  # characters
BATCH = 12  # windows of so many characters
INITIAL = 0.06  # deviation of the first weights; GPT-2's 0.02 is for six times the width
LEARNING_RATE = 3e-3  # after a linear warm-up; it falls to a twentieth in half a cosine
WARM_UP = 50
WEIGHT_DECAY = 0.1  # of matrices
CLIP = 1.0  # the gradient's largest norm, GPT-3's
HELD_OUT = 0.1
N_MEASURED = 64  # windows of either part, for a point of the curve
TEMPERATURE, TOP_P = 0.8, 0.95
STEPS, EXPECTED = 1000, 1.55
QUICK_STEPS, QUICK_EXPECTED = 80, 2.7
SAVE_EVERY = 50


@dataclass(frozen=True)
class Text:
    """A text as the numbers of its characters, in two parts."""

    characters: str
    train: torch.Tensor
    held_out: torch.Tensor

    def decoded(self, tokens: torch.Tensor) -> str:
        """The characters of these numbers."""
        return "".join(self.characters[i] for i in tokens.tolist())


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    device: torch.device
    seed: int
    steps: int
    out: Path
    text: Text
    expected: float | None
    """None: what guessing by the frequencies of characters reaches."""
    resume: bool


@dataclass(frozen=True)
class Point:
    """A point of the learning curve: losses in nats a character, without dropout."""

    step: int
    train_loss: float
    held_out_loss: float


@dataclass(frozen=True)
class Result:
    """What a run found."""

    loss: float
    """Of the whole held-out part."""
    curve: list[Point]
    guessing: dict[str, float]
    """The held-out losses of counting characters, and pairs of them, in the training part."""
    trace: gpunn.Trace
    picture: Path
    expected: float


def reference() -> str:
    """The language reference inside of this Python.

    Raises:
        ModuleNotFoundError: this Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "This Python came without the language reference (pydoc_data): give --text FILE"
        ) from None
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def without_repetitions(text: str) -> str:
    """Each paragraph where it first stands; differences of white space alone make no other."""
    first: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        first.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(first.values())


def load(text: str, device: torch.device | str) -> Text:
    """The text without repetitions, its last part held out.

    Raises:
        ValueError: it is too short.
    """
    text = without_repetitions(text)
    characters = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in text], device=device)
    n_train = len(tokens) - int(HELD_OUT * len(tokens))
    if len(tokens) - n_train <= CONTEXT:
        raise ValueError(
            f"expected more than {int(CONTEXT / HELD_OUT)} characters, of which a tenth is "
            f"held out, got {len(tokens)} without repetitions"
        )
    return Text(characters, tokens[:n_train], tokens[n_train:])


def loss_of_guessing(text: Text, n_before: int) -> float:
    """Held-out loss of the training part's frequencies of a character after ``n_before`` others.

    Every count is increased by n times the frequency after one character fewer, for n characters
    in all; that after fewer than none is 1 / n.
    """
    n = len(text.characters)
    p = torch.full((1, n), 1 / n, dtype=torch.float64)
    for order in range(n_before + 1):
        windows = text.train.cpu().unfold(0, order + 1, 1)
        place = n ** torch.arange(order, -1, -1)
        counts = (windows * place).sum(1).bincount(minlength=n ** (order + 1)).view(-1, n)
        prior = p.repeat(n if order else 1, 1)  # of the same characters but the first
        p = (counts + n * prior) / (counts.sum(1, keepdim=True) + n)
    windows = text.held_out.cpu().unfold(0, n_before + 1, 1)
    before = (windows[:, :-1] * n ** torch.arange(n_before - 1, -1, -1)).sum(1)
    return -p[before, windows[:, -1]].log().mean().item()


def build(text: Text) -> GPT:
    """GPT-2's network in small; so few passes over the text need no dropout."""
    n_characters = len(text.characters)
    return GPT(n_characters, CONTEXT, 128, 3, 4, dropout=0.0, initializer_range=INITIAL)


def optimizer_for(
    model: GPT, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with GPT-3's betas and weight decay, and its learning rate over the run."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )

    def factor(step: int) -> float:
        falling = 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1))
        return min((step + 1) / WARM_UP, 1) * (0.05 + 0.95 * falling)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def windows_at(tokens: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (n, CONTEXT) that start there, and what follows each of their characters."""
    inside = torch.arange(CONTEXT + 1, device=tokens.device)
    windows = tokens[starts.to(tokens.device)[:, None] + inside]
    return windows[:, :-1], windows[:, 1:]


def train_step(
    model: GPT, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> float:
    """One step of gradient descent; the loss before it."""
    loss: torch.Tensor = model(x, y)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def loss_on(model: GPT, tokens: torch.Tensor, n_windows: int | None = None) -> float:
    """The mean loss over windows side by side: all, or so many, evenly spaced."""
    starts = torch.arange(0, len(tokens) - CONTEXT, CONTEXT)
    if n_windows is not None:
        starts = starts[torch.linspace(0, len(starts) - 1, min(n_windows, len(starts))).long()]
    model.eval()
    parts = starts.split(N_MEASURED)
    losses: list[float] = [len(part) * model(*windows_at(tokens, part)).item() for part in parts]
    model.train()
    return sum(losses) / len(starts)


def write(model: GPT, text: Text, n_characters: int, seed: int) -> str:
    """What the model writes after the beginning of the held-out part.

    The memory is of CONTEXT characters. Whenever it is full, its later half is read anew, and the
    writing goes on from there.
    """
    generator = torch.Generator(text.held_out.device).manual_seed(seed)
    written = text.held_out[None, : CONTEXT // 2]
    while written.shape[1] < CONTEXT // 2 + n_characters:
        half = written[:, -(CONTEXT // 2) :]
        more = model.generate(
            half, CONTEXT // 2, temperature=TEMPERATURE, top_p=TOP_P, generator=generator
        )
        written = torch.cat([written, more[:, CONTEXT // 2 :]], 1)
    return text.decoded(written[0, : CONTEXT // 2 + n_characters])


def train(model: GPT, text: Text, options: Options, part: Part) -> tuple[list[Point], gpunn.Trace]:
    """The learning curve of a whole training, and the trace of a step.

    If ``part`` was begun, it goes on from there.
    """
    (optimizer, schedule), trace = optimizer_for(model, options.steps), gpunn.Trace()
    generator = torch.Generator().manual_seed(options.seed)
    loop = Loop(
        part,
        options.steps,
        SAVE_EVERY,
        generator,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
    )
    n_starts = len(text.train) - CONTEXT
    every = max(10, options.steps // 30)
    shown = {options.steps // 20, options.steps // 5, options.steps}

    def measure(step: int) -> None:
        losses = (loss_on(model, tokens, N_MEASURED) for tokens in (text.train, text.held_out))
        loop.curve.append(astuple(Point(step, *losses)))

    if loop.step == 0:
        measure(0)
    with threads(2), progress_bar() as progress:
        task = progress.add_task("", total=options.steps, completed=loop.step, loss=math.nan)
        for step in loop:
            starts = torch.randint(n_starts, (BATCH,), generator=generator)
            with first_traced(trace):
                loss = train_step(model, optimizer, *windows_at(text.train, starts))
            schedule.step()
            progress.update(task, advance=1, loss=loss)
            if step % every == 0 or step == options.steps:
                measure(step)
            if step in shown:
                show(progress.console, step, write(model, text, 4 * CONTEXT, options.seed))
    return [Point(*numbers) for numbers in loop.curve], trace


def show(console: Console, step: int, written: str) -> None:
    """Print what was written, the prompt set apart."""
    prompt, rest = written[: CONTEXT // 2], written[CONTEXT // 2 :]
    console.rule(f"after {step} steps")
    console.print(prompt, end="", style="dim", markup=False, highlight=False)
    console.print(rest, markup=False, highlight=False)


def draw_learning_curve(
    curve: Sequence[Point], guessing: dict[str, float], loss: float, expected: float
) -> Figure:
    """Both losses against the step, and what guessing reaches."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    steps = [point.step for point in curve]
    axes.plot(steps, [point.train_loss for point in curve], color="tab:blue", label="training")
    axes.plot(
        steps, [point.held_out_loss for point in curve], color="tab:orange",
        label=f"held out (all of it, in the end: {loss:.2f})",
    )  # fmt: skip
    for (name, value), style in zip(guessing.items(), ("--", "-."), strict=True):
        axes.axhline(value, color="dimgrey", linestyle=style, label=f"{name}: {value:.2f}")
    axes.axhline(expected, color="silver", linestyle=":", label=f"expected: {expected:.2f}")
    axes.set(
        title="A small GPT learns to write",
        xlabel="step",
        ylabel="loss (nats a character)",
        ylim=(0, None),
        xlim=(0, steps[-1]),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", ncols=2)
    return figure


def run(options: Options) -> Result:
    """Train, measure and draw."""
    text = options.text
    guessing = {
        "guessing by characters": loss_of_guessing(text, 0),
        "guessing by pairs": loss_of_guessing(text, 1),
    }
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 on the tensor cores
    chosen = {
        "demo": "gpt_text", "seed": options.seed, "steps": options.steps,
        "text": digest([text.train, text.held_out]),
    }  # fmt: skip
    journal = open_journal(options.out, options.resume, chosen)
    torch.manual_seed(options.seed)
    model = build(text).to(options.device)
    curve, trace = train(model, text, options, journal.part("training"))
    loss = loss_on(model, text.held_out)
    characters = guessing["guessing by characters"]
    expected = characters if options.expected is None else options.expected
    picture = options.out / "learning_curve.png"
    figure = draw_learning_curve(curve, guessing, loss, expected)
    figure.savefig(picture, dpi=100, bbox_inches="tight", pad_inches=0.15)
    return Result(loss, curve, guessing, trace, picture, expected)


def parse(argv: Sequence[str] | None) -> Options:
    """The options of a command line."""
    parser = parser_for(
        __doc__, "gpt_text", seed="of everything random",
        steps=f"mini-batches (default: {STEPS})", quick=f"{QUICK_STEPS} steps",
    )  # fmt: skip
    parser.add_argument("--text", type=Path, help="a file to learn from (UTF-8)")
    given = parser.parse_args(argv)
    usual, figure = (QUICK_STEPS, QUICK_EXPECTED) if given.quick else (STEPS, EXPECTED)
    expected = figure if given.text is None and given.steps is None else None
    device, steps = device_of(parser, given.device), given.steps or usual
    try:
        source = reference() if given.text is None else given.text.read_text(encoding="utf-8")
        text = load(source, device)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(f"--text: {error}")
    return Options(device, given.seed, steps, given.out, text, expected, given.resume)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print what it found; the last line is the figure that it reached.

    1, saying why, where it cannot go on from a checkpoint.
    """
    options = parse(argv)
    try:
        result = run(options)
    except CANNOT_RESUME as error:
        print(error, file=sys.stderr)
        return 1
    print(what_ran(f"A training step on {options.device}", result.trace))
    print("Picture:", result.picture)
    for name, loss in result.guessing.items():
        print(f"Held-out loss of {name}: {loss:.3f} nats a character")
    print(
        f"Held-out loss: {result.loss:.3f} nats a character "
        f"(expected: at most {result.expected:.2f})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
