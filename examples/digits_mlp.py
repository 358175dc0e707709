"""A multi-layer perceptron learns to read handwritten digits, by gradient descent.

    python examples/digits_mlp.py [--device auto] [--seed 0] [--steps 1500] [--out FOLDER]
                                  [--quick] [--resume]

Each hidden layer is one ``gpunn.nn.Linear``, with its ReLU and its dropout. On a GPU it runs on
gpunn's kernels, on a CPU on PyTorch's own ops, and with TRITON_INTERPRET=1 in the environment on
the kernels, interpreted on the CPU (slow: try ``--steps 10``). The printed trace of a training
step says which ran.

A quarter of the images, the same for every seed, is held out and never trained on. The settings
below were chosen by cross-validation among the others.

Every 100 steps a checkpoint is written to FOLDER/checkpoints, and ``--resume`` goes on from the
last one with nothing lost: on a CPU the weights are those of a run that was not interrupted, bit
for bit.

Data: Optical Recognition of Handwritten Digits, 1,797 images of 8×8 pixels, as scikit-learn ships
them. E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, licence CC BY 4.0.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import gpunn
from checkpoint import CANNOT_RESUME, Loop, Part, open_journal, what_ran
from command_line import device_of, parser_for
from gpunn import nn
from loops import first_traced, progress_bar, threads

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

HIDDEN = 256
DROPOUT = 0.4
BATCH = 64
LEARNING_RATE = 0.1  # falls linearly to 0 over the run
MOMENTUM = 0.9
STEPS, EXPECTED = 1500, 0.97
QUICK_STEPS, QUICK_EXPECTED = 200, 0.95
SAVE_EVERY = 100
MISREAD = "misread {task.fields[misread]:.1%}"
"""Live where the bar counts whole networks: the share of the held-out images."""


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    device: torch.device
    seed: int
    steps: int
    out: Path
    expected: float
    resume: bool


@dataclass(frozen=True)
class Digits:
    """The images: standardised, of shape (n, 64), with their labels, (n,)."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    held_out_x: torch.Tensor
    held_out_y: torch.Tensor


@dataclass(frozen=True)
class Point:
    """A point of the learning curve; losses and accuracies are measured without dropout."""

    step: int
    train_loss: float
    train_accuracy: float
    held_out_loss: float
    held_out_accuracy: float


@dataclass(frozen=True)
class Result:
    """What a run found: the last point of the curve is the figure reached."""

    curve: list[Point]
    trace: gpunn.Trace
    pictures: list[Path]

    @property
    def accuracy(self) -> float:
        return self.curve[-1].held_out_accuracy


def load(device: torch.device | str) -> Digits:
    """The digits, a quarter of every class held out, standardised by the training images."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_x, held_out_x, train_y, held_out_y = (torch.from_numpy(part) for part in split)
    # One mean and one deviation for all pixels: the corners, which are hardly ever inked, would
    # be mostly noise if each pixel were divided by its own.
    mean, deviation = train_x.mean(), train_x.std()
    return Digits(
        ((train_x - mean) / deviation).to(device, torch.float32),
        train_y.to(device),
        ((held_out_x - mean) / deviation).to(device, torch.float32),
        held_out_y.to(device),
    )


def build(hidden: int = HIDDEN, dropout_p: float = DROPOUT) -> nn.Sequential:
    """Two hidden layers, each with its activation and dropout in the same kernel."""
    return nn.Sequential(
        nn.Linear(64, hidden, activation="relu", dropout_p=dropout_p),
        nn.Linear(hidden, hidden, activation="relu", dropout_p=dropout_p),
        nn.Linear(hidden, 10),
    )


def optimizer_for(model: nn.Module) -> torch.optim.SGD:
    """Gradient descent with momentum."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def batches(n: int, seed: int, size: int = BATCH) -> Iterator[torch.Tensor]:
    """The indices of one mini-batch after the other, shuffled anew in every pass; endless."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).split(size)[: n // size]


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> float:
    """One step of gradient descent; the batch's loss before it."""
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The logits without dropout, (n, 10)."""
    model.eval()
    logits: torch.Tensor = model(x)
    model.train()
    return logits


def measure(model: nn.Module, digits: Digits, step: int) -> Point:
    """Loss and accuracy on the training images and on the held-out ones."""
    numbers: list[float] = []
    for x, y in (
        (digits.train_x, digits.train_y),
        (digits.held_out_x, digits.held_out_y),
    ):
        logits = predict(model, x)
        numbers.append(F.cross_entropy(logits, y).item())
        numbers.append((logits.argmax(1) == y).double().mean().item())
    return Point(step, *numbers)


def train(
    model: nn.Module, digits: Digits, options: Options, part: Part
) -> tuple[list[Point], gpunn.Trace]:
    """The learning curve of a whole training, and the trace of a step.

    If ``part`` was begun, it goes on from there.
    """
    optimizer, trace = optimizer_for(model), gpunn.Trace()
    loop = Loop(part, options.steps, SAVE_EVERY, model=model, optimizer=optimizer)
    if loop.step == 0:
        loop.curve.append(astuple(measure(model, digits, 0)))
    every = max(10, options.steps // 50)
    order = itertools.islice(batches(len(digits.train_x), options.seed), loop.step, None)
    with threads(1), progress_bar() as progress:
        task = progress.add_task("", total=options.steps, completed=loop.step, loss=math.nan)
        for step in loop:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - (step - 1) / options.steps)
            batch = next(order)
            with first_traced(trace):
                loss = train_step(model, optimizer, digits.train_x[batch], digits.train_y[batch])
            if step % every == 0 or step == options.steps:
                loop.curve.append(astuple(measure(model, digits, step)))
            progress.update(task, advance=1, loss=loss)
    return [Point(*numbers) for numbers in loop.curve], trace


def _stretch(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scale of the accuracy's axis: wide near 1, where the last percents are won."""
    height: NDArray[np.float64] = -np.log(1.02 - np.minimum(accuracy, 1.01))
    return height


def _unstretch(height: NDArray[np.float64]) -> NDArray[np.float64]:
    accuracy: NDArray[np.float64] = 1.02 - np.exp(-height)
    return accuracy


def draw_learning_curve(curve: Sequence[Point], expected: float) -> Figure:
    """Loss and accuracy against the step."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    steps = [point.step for point in curve]
    for name, label, colour in (
        ("train", "training", "tab:blue"),
        ("held_out", "held out", "tab:orange"),
    ):
        losses = [getattr(point, f"{name}_loss") for point in curve]
        accuracies = [getattr(point, f"{name}_accuracy") for point in curve]
        loss.plot(steps, losses, color=colour, label=label)
        accuracy.plot(steps, accuracies, color=colour, label=f"{label}: {accuracies[-1]:.1%}")
    loss.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats)", yscale="log")
    accuracy.axhline(expected, color="grey", linestyle=":", label=f"expected: {expected:.0%}")
    accuracy.set(title="Accuracy", xlabel="step", ylabel="images read correctly", ylim=(0, 1.002))
    accuracy.set_yscale("function", functions=(_stretch, _unstretch))
    accuracy.set_yticks([0, 0.5, 0.8, 0.9, 0.95, 0.98, 1])
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_confusion_matrix(said: torch.Tensor, truth: torch.Tensor) -> Figure:
    """How many held-out images of each digit were taken for each digit."""
    counts = torch.bincount(truth * 10 + said, minlength=100).view(10, 10)
    wrong = int(counts.sum() - counts.trace())
    figure = Figure(figsize=(5.6, 5.6), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True)
    axes.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)  # so that one in 45 is seen
    for row, column in counts.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.25 else "black"
        text = str(int(counts[row, column]))
        axes.text(column, row, text, ha="center", va="center", color=colour)
    axes.set(
        title=f"{len(truth)} held-out digits, {wrong} of them misread",
        xlabel="predicted digit",
        ylabel="true digit",
        xticks=range(10),
        yticks=range(10),
    )
    return figure


def draw_wrong_answers(images: torch.Tensor, logits: torch.Tensor, truth: torch.Tensor) -> Figure:
    """The misread held-out images, the surest mistake first."""
    columns, rows = 6, 4
    probability, said = logits.softmax(1).max(1)
    wrong = (said != truth).nonzero().flatten()
    shown = wrong[probability[wrong].argsort(descending=True)][: columns * rows]
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(1.45 * columns, 1.75 * rows + 0.6), layout="constrained")
    number = f"{len(shown)} of {len(wrong)}" if len(shown) < len(wrong) else str(len(wrong))
    figure.suptitle(f"Misread digits: {number} (in brackets: how sure the network was)")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, index in zip(grid.flat, shown.tolist(), strict=False):
        axes.set(xticks=[], yticks=[])
        axes.imshow(images[index].view(8, 8).numpy(), cmap="gray_r")
        axes.set_title(
            f"says {said[index]} ({probability[index]:.0%})\nis {truth[index]}", fontsize=10
        )
    return figure


def draw(curve: Sequence[Point], model: nn.Module, digits: Digits, options: Options) -> list[Path]:
    """Write the three pictures into the folder that the options name."""
    logits = predict(model, digits.held_out_x).cpu()
    images, truth = digits.held_out_x.cpu(), digits.held_out_y.cpu()
    figures = {
        "learning_curve.png": draw_learning_curve(curve, options.expected),
        "confusion_matrix.png": draw_confusion_matrix(logits.argmax(1), truth),
        "wrong_answers.png": draw_wrong_answers(images, logits, truth),
    }
    for name, figure in figures.items():
        figure.savefig(options.out / name, dpi=100, bbox_inches="tight", pad_inches=0.15)
    return [options.out / name for name in figures]


def run(options: Options) -> Result:
    """Train, measure and draw."""
    digits = load(options.device)
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 on the tensor cores
    chosen = {"demo": "digits_mlp", "seed": options.seed, "steps": options.steps}
    journal = open_journal(options.out, options.resume, chosen)
    torch.manual_seed(options.seed)
    model = build().to(options.device)
    curve, trace = train(model, digits, options, journal.part("training"))
    return Result(curve, trace, draw(curve, model, digits, options))


def parse(argv: Sequence[str] | None) -> Options:
    """The options of a command line."""
    parser = parser_for(
        __doc__, "digits_mlp", seed="of everything random but the split",
        steps=f"mini-batches (default: {STEPS})", quick=f"{QUICK_STEPS} steps",
    )  # fmt: skip
    given = parser.parse_args(argv)
    usual, expected = (QUICK_STEPS, QUICK_EXPECTED) if given.quick else (STEPS, EXPECTED)
    device, steps = device_of(parser, given.device), given.steps or usual
    return Options(device, given.seed, steps, given.out, expected, given.resume)


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
    print("Pictures:", *result.pictures)
    print(f"Held-out accuracy: {result.accuracy:.1%} (expected: at least {options.expected:.0%})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
