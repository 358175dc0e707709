"""AlexNet: a full-size training step, timed; and a small one that learns, and memorises.

    python examples/alexnet.py [--device auto] [--seed 0] [--steps 800] [--out FOLDER]
                               [--quick] [--resume]

First the network of 2012, with all its 60,965,224 parameters, takes a few training steps on images
of noise: that measures speed alone. On a GPU it runs on gpunn's kernels, on a CPU on PyTorch's own
ops; the printed trace of a step says which ran.

Then a small net of the same build (five convolutions, three dense layers, dropout) learns from
which quarter of which of two photographs a patch comes: eight classes. The middle strip of each
quarter is held out, and no pixel of it is trained on. Of the two accuracies that are reported, the
one on the regions trained on is in part memory, by as much as it exceeds the other: those very
pixels were seen again and again. Only the one on the strips says what the net makes of patches
that it never saw; guessing is 12.5 %. Even that is kind to the net: the strips lie between regions
that it was trained on, and a few settings were chosen with both accuracies in view.

Every 50 steps of this training a checkpoint is written to FOLDER/checkpoints, and ``--resume`` goes
on from the last one with nothing lost, after the speed was measured anew: on a CPU the weights are
those of a run that was not interrupted, bit for bit.

Paper: Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural
networks", NIPS 2012. Data: china.jpg by danielbuechele and flower.jpg by vultilion (both
flickr.com; so their addresses say), which scikit-learn ships, licence CC BY 2.0.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

import gpunn
from checkpoint import CANNOT_RESUME, Journal, Loop, Part, open_journal
from command_line import device_of, parser_for
from digits_mlp import Options, predict, train_step
from gpunn import models, nn
from gpunn.doctor import cpu_name
from loops import progress_bar, threads

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from sklearn.datasets import load_sample_images
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

FULL_BATCH, FULL_STEPS, QUICK_FULL_STEPS = 8, 4, 1
PATCH = 47
SIDES = 115  # columns of a quarter's 320 at its left, and at its right; the strip lies between
N_MEASURED = 512  # patches, in each of the two accuracies
BATCH = 64
LEARNING_RATE = 1e-3  # of Adam; falls linearly to 0 over the run
STEPS, EXPECTED = 800, 0.50
QUICK_STEPS, QUICK_EXPECTED = 60, 0.25
SAVE_EVERY = 50


@dataclass(frozen=True)
class Speed:
    """Of the full-size network: images a second, and what a step ran."""

    images_a_second: float
    trace: gpunn.Trace


@dataclass(frozen=True)
class Region:
    """A part of a photograph, (3, H, W), and the number of the quarter that it belongs to."""

    quarter: int
    pixels: torch.Tensor


@dataclass(frozen=True)
class Patches:
    """Patches (n, 3, PATCH, PATCH), with the quarter that each comes from, (n,)."""

    x: torch.Tensor
    y: torch.Tensor

    def to(self, device: torch.device) -> Patches:
        return Patches(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Point:
    """A point of the curve; both accuracies are measured without dropout."""

    step: int
    trained_on: float
    """On patches of the regions that are trained on."""
    held_out: float
    """On patches of the strips that are not."""


def name_of(device: torch.device) -> str:
    """What the device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def full_size_speed(device: torch.device, steps: int, batch: int = FULL_BATCH) -> Speed:
    """Train AlexNet on noise: the first step is traced, those after it are timed."""
    model = models.alexnet().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(batch, 3, 227, 227, device=device)
    y = torch.randint(1000, (batch,), device=device)
    with gpunn.trace() as trace:
        train_step(model, optimizer, x, y)
    start = time.perf_counter()
    for _ in range(steps):
        train_step(model, optimizer, x, y)  # returns the loss, so it waits for the GPU
    return Speed(steps * batch / (time.perf_counter() - start), trace)


def quarters() -> list[torch.Tensor]:
    """The quarters of both photographs, each (3, H, W), from -1 to 1."""
    found: list[torch.Tensor] = []
    for photograph in load_sample_images().images:
        pixels = torch.tensor(photograph).permute(2, 0, 1).float() / 127.5 - 1
        for half in pixels.tensor_split(2, dim=1):
            found.extend(half.tensor_split(2, dim=2))
    return found


def regions() -> tuple[list[Region], list[Region]]:
    """Those to train on, left and right of the middle strips; and the strips, held out."""
    train_on, held_out = [], []
    for number, pixels in enumerate(quarters()):
        left, strip, right = pixels.split((SIDES, pixels.shape[2] - 2 * SIDES, SIDES), dim=2)
        train_on += [Region(number, left), Region(number, right)]
        held_out.append(Region(number, strip))
    return train_on, held_out


def draw_patches(sources: Sequence[Region], n: int, generator: torch.Generator) -> Patches:
    """Patches from anywhere in the regions."""
    chosen = torch.randint(len(sources), (n,), generator=generator).tolist()
    place = torch.rand(n, 2, generator=generator).tolist()
    x, y = [], []
    for index, (down, right) in zip(chosen, place, strict=True):
        label, region = sources[index].quarter, sources[index].pixels
        top = int(down * (region.shape[1] - PATCH + 1))
        left = int(right * (region.shape[2] - PATCH + 1))
        x.append(region[:, top : top + PATCH, left : left + PATCH])
        y.append(label)
    return Patches(torch.stack(x), torch.tensor(y))


def build(n_classes: int = 8) -> nn.Sequential:
    """AlexNet's order of layers with fewer maps, for patches of 47×47."""
    first = nn.Conv2d(3, 24, 7, stride=2, activation="relu")
    model = nn.Sequential(
        first,
        nn.MaxPool2d(3, 2),
        nn.Conv2d(24, 48, 5, padding=2, activation="relu"),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(48, 64, 3, padding=1, activation="relu"),
        nn.Conv2d(64, 64, 3, padding=1, activation="relu"),
        nn.Conv2d(64, 96, 3, padding=1, activation="relu"),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(96, 128, activation="relu", dropout_p=0.5),
        nn.Linear(128, 128, activation="relu", dropout_p=0.5),
        nn.Linear(128, n_classes),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            # So that what passes through eight layers does not shrink: He et al., 2015.
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    # As in the paper: so little noise that what is learnt shows in the picture of the filters.
    torch.nn.init.normal_(first.weight, std=0.01)
    return model


def accuracy(model: nn.Module, patches: Patches) -> float:
    """The share of patches whose quarter is told, without dropout."""
    return (predict(model, patches.x).argmax(1) == patches.y).double().mean().item()


def train(model: nn.Module, options: Options, part: Part) -> list[Point]:
    """Train on patches drawn anew in every step; both accuracies, by step.

    If ``part`` was begun, the training goes on from there.
    """
    train_on, held_out = regions()
    generator = torch.Generator().manual_seed(options.seed)
    seen, unseen = (
        draw_patches(part, N_MEASURED, generator).to(options.device)
        for part in (train_on, held_out)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.steps)
    loop = Loop(
        part, options.steps, SAVE_EVERY, generator, model=model, optimizer=optimizer, decay=decay
    )

    def measure(step: int) -> None:
        loop.curve.append(astuple(Point(step, accuracy(model, seen), accuracy(model, unseen))))

    if loop.step == 0:
        measure(0)
    every = max(10, options.steps // 20)
    with threads(1), progress_bar() as progress:
        task = progress.add_task("", total=options.steps, completed=loop.step, loss=math.nan)
        for step in loop:
            patches = draw_patches(train_on, BATCH, generator).to(options.device)
            loss = train_step(model, optimizer, patches.x, patches.y)
            decay.step()
            if step % every == 0 or step == options.steps:
                measure(step)
            progress.update(task, advance=1, loss=loss)
    return [Point(*numbers) for numbers in loop.curve]


def draw_learning_curve(curve: Sequence[Point], expected: float) -> Figure:
    """What is remembered, and what is known of patches never seen, against the step."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    steps = [point.step for point in curve]
    trained_on, held_out = curve[-1].trained_on, curve[-1].held_out
    axes.plot(
        steps,
        [p.trained_on for p in curve],
        label=f"trained on: {trained_on:.1%} (the gap is memory)",
    )
    axes.plot(steps, [p.held_out for p in curve], label=f"held out: {held_out:.1%}")
    axes.axhline(expected, color="grey", linestyle=":", label=f"expected: {expected:.0%}")
    axes.axhline(1 / 8, color="black", linestyle="--", linewidth=0.8, label="guessing: 12.5%")
    axes.set(
        title="From which quarter of which photograph is the patch?",
        xlabel="step",
        ylabel="patches told correctly",
        ylim=(0, 1.02),
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_filters(weight: torch.Tensor) -> Figure:
    """The first layer's filters (24, 3, 7, 7) in colour: grey is a weight of 0."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    figure.suptitle("The first layer's filters after training")
    for axes, values in zip(figure.subplots(4, 6).flat, weight, strict=True):
        shown = 0.5 + 0.5 * values / values.abs().max()
        axes.imshow(shown.permute(1, 2, 0).numpy())
        axes.set(xticks=[], yticks=[])
    return figure


def run(options: Options, journal: Journal) -> tuple[list[Point], list[Path]]:
    """Train the small net and draw what became of it."""
    torch.manual_seed(options.seed)
    model = build().to(options.device)
    curve = train(model, options, journal.part("training"))
    first = model[0].weight
    assert isinstance(first, torch.Tensor)
    figures = {
        "filters.png": draw_filters(first.detach().cpu()),
        "learning_curve.png": draw_learning_curve(curve, options.expected),
    }
    for name, figure in figures.items():
        figure.savefig(options.out / name, dpi=100, bbox_inches="tight", pad_inches=0.15)
    return curve, [options.out / name for name in figures]


def parse(argv: Sequence[str] | None) -> tuple[Options, int]:
    """The options of a command line, and the number of full-size steps."""
    parser = parser_for(
        __doc__, "alexnet", seed="of everything random",
        steps=f"of the small net (default: {STEPS})", quick=f"{QUICK_STEPS} steps",
    )  # fmt: skip
    given = parser.parse_args(argv)
    usual, expected = (QUICK_STEPS, QUICK_EXPECTED) if given.quick else (STEPS, EXPECTED)
    device, steps = device_of(parser, given.device), given.steps or usual
    options = Options(device, given.seed, steps, given.out, expected, given.resume)
    return options, QUICK_FULL_STEPS if given.quick else FULL_STEPS


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts and print what they found; the last line is the figure that was reached.

    1, saying why, where it cannot go on from a checkpoint.
    """
    options, full_steps = parse(argv)
    chosen = {"demo": "alexnet", "seed": options.seed, "steps": options.steps}
    try:
        journal = open_journal(options.out, options.resume, chosen)
    except CANNOT_RESUME as error:
        print(error, file=sys.stderr)
        return 1
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 on the tensor cores
    speed = full_size_speed(options.device, full_steps)
    print(f"A full-size training step on {options.device} ran:\n{speed.trace}")
    print(f"Full size: {speed.images_a_second:.1f} images a second on {name_of(options.device)}")
    curve, pictures = run(options, journal)
    print("Pictures:", *pictures)
    remembered = f"{curve[-1].trained_on:.1%} (all above the next line is memory)"
    print(f"Accuracy on the regions trained on: {remembered}")
    reached = f"{curve[-1].held_out:.1%} (expected: at least {options.expected:.0%})"
    print(f"Accuracy on the strips held out, never seen: {reached}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
