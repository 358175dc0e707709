"""LeNet-5 learns to read handwritten digits: convolutions that find strokes, layer by layer.

    python examples/lenet_digits.py [--device auto] [--seed 0] [--steps 300] [--modern]
                                    [--out FOLDER] [--quick] [--resume]

The network is the paper's: tanh and average pooling on images of 32×32 pixels; ``--modern`` takes
ReLU and max pooling instead. The digits are enlarged from 8×8, and in training each is shifted by
up to two pixels of the 32, anew whenever it is seen. On a GPU it runs on gpunn's kernels, on a
CPU on PyTorch's own ops; the printed trace of a training step says which ran.

The images held out are those of digits_mlp.py: a quarter, the same for every seed, never trained
on. The settings below were chosen by four-fold cross-validation among the others. Every 100 steps
a checkpoint is written to FOLDER/checkpoints, and ``--resume`` goes on from the last one with
nothing lost: on a CPU the weights are those of a run that was not interrupted, bit for bit.

Paper: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE 86(11), 1998. Data: as digits_mlp.py says, CC BY 4.0.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
import torch.nn.functional as F

import digits_mlp
import gpunn
from checkpoint import CANNOT_RESUME, Loop, Part, open_journal, what_ran
from command_line import device_of, parser_for
from digits_mlp import Digits, Options, Point, Result, batches
from gpunn import models
from loops import first_traced, progress_bar, threads

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

SIDE = 32
SHIFT = 2  # pixels, half of one of the 8×8
MOMENTUM = 0.9
STEPS, EXPECTED = 300, 0.98
QUICK_STEPS, QUICK_EXPECTED = 150, 0.94
SAVE_EVERY = 100


@dataclass(frozen=True)
class Variant:
    """What ``--modern`` chooses."""

    model: models.LeNet5
    learning_rate: float
    """At the first step; it falls linearly to 0 over the run."""


def variant(*, modern: bool) -> Variant:
    """The paper's network or today's, which a learning rate of 0.1 sometimes breaks."""
    if modern:
        return Variant(models.lenet5(activation="relu", pooling="max"), 0.05)
    return Variant(models.lenet5(), 0.1)


def enlarged(images: torch.Tensor) -> torch.Tensor:
    """Images (n, 64) as the network takes them, (n, 1, 32, 32)."""
    return F.interpolate(images.view(-1, 1, 8, 8), size=(SIDE, SIDE), mode="bilinear")


def load(device: torch.device | str) -> Digits:
    """The digits as digits_mlp.py splits and standardises them, enlarged."""
    digits = digits_mlp.load(device)
    return replace(digits, train_x=enlarged(digits.train_x), held_out_x=enlarged(digits.held_out_x))


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Each image (n, 1, H, W) moved by up to SHIFT pixels, at random, on an empty background."""
    n, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4, value=images.min().item())
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * SHIFT + 1, (2, n))
    return windows[torch.arange(n), :, down, right]


def train(
    chosen: Variant, digits: Digits, options: Options, part: Part
) -> tuple[list[Point], gpunn.Trace]:
    """The learning curve of a whole training, and the trace of a step.

    If ``part`` was begun, it goes on from there.
    """
    model, trace = chosen.model, gpunn.Trace()
    optimizer = torch.optim.SGD(model.parameters(), chosen.learning_rate, momentum=MOMENTUM)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.steps)
    loop = Loop(part, options.steps, SAVE_EVERY, model=model, optimizer=optimizer, decay=decay)
    if loop.step == 0:
        loop.curve.append(astuple(digits_mlp.measure(model, digits, 0)))
    every = max(10, options.steps // 10)
    order = itertools.islice(batches(len(digits.train_x), options.seed), loop.step, None)
    with threads(2), progress_bar() as progress:
        task = progress.add_task("", total=options.steps, completed=loop.step, loss=math.nan)
        for step in loop:
            batch = next(order)
            x, y = shifted(digits.train_x[batch]), digits.train_y[batch]
            with first_traced(trace):
                loss = digits_mlp.train_step(model, optimizer, x, y)
            decay.step()
            if step % every == 0 or step == options.steps:
                loop.curve.append(astuple(digits_mlp.measure(model, digits, step)))
            progress.update(task, advance=1, loss=loss)
    return [Point(*numbers) for numbers in loop.curve], trace


@torch.no_grad()
def feature_maps(model: models.LeNet5, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps of the first convolution, (6, 28, 28), and of the second, (16, 10, 10)."""
    first = model.c1(image[None])
    second = model.c3(model.s2(first))
    return first[0].cpu(), second[0].cpu()


def draw_feature_maps(model: models.LeNet5, image: torch.Tensor) -> Figure:
    """The six filters that were learnt, and what both layers of them make of one digit."""
    filters = model.c1.weight.detach().cpu()[:, 0]
    first, second = feature_maps(model, image)
    figure = Figure(figsize=(9.6, 7.4), layout="constrained")
    parts = figure.subfigures(3, 1, squeeze=False, height_ratios=(1, 2.1, 2.1))
    digit, top, bottom = parts.flat
    digit.suptitle("The digit, as the network sees it")
    axes = digit.subplots()
    axes.imshow(image[0].cpu().numpy(), cmap="gray_r")
    axes.set(xticks=[], yticks=[])
    top.suptitle("First layer: its six filters (red: positive, blue: negative) and their maps")
    bottom.suptitle("Second layer: its sixteen maps, each made of all six")
    limit = float(filters.abs().max())
    upper, lower = top.subplots(2, 6)
    for axes, values in zip(upper, filters, strict=True):
        axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    for axes, values in zip(lower, first, strict=True):
        axes.imshow(values.numpy(), cmap="gray_r")
    grid = bottom.subplots(2, 8)
    for axes, values in zip(grid.flat, second, strict=True):
        axes.imshow(values.numpy(), cmap="gray_r")
    for axes in (*upper, *lower, *grid.flat):
        axes.set(xticks=[], yticks=[])
    return figure


def pictures(
    curve: Sequence[Point], model: models.LeNet5, digits: Digits, expected: float
) -> dict[str, Figure]:
    """Every picture by its file's name."""
    logits = digits_mlp.predict(model, digits.held_out_x).cpu()
    truth = digits.held_out_y.cpu()
    small = F.interpolate(digits.held_out_x.cpu(), size=(8, 8), mode="area").flatten(1)
    right = (logits.argmax(1) == truth).nonzero().flatten()
    return {
        "learning_curve.png": digits_mlp.draw_learning_curve(curve, expected),
        "feature_maps.png": draw_feature_maps(model, digits.held_out_x[right[0]]),
        "wrong_answers.png": digits_mlp.draw_wrong_answers(small, logits, truth),
    }


def run(options: Options, *, modern: bool = False) -> Result:
    """Train, measure and draw."""
    digits = load(options.device)
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 on the tensor cores
    same = {"demo": "lenet_digits", "seed": options.seed, "steps": options.steps, "modern": modern}
    journal = open_journal(options.out, options.resume, same)
    torch.manual_seed(options.seed)
    chosen = variant(modern=modern)
    chosen.model.to(options.device)
    curve, trace = train(chosen, digits, options, journal.part("training"))
    figures = pictures(curve, chosen.model, digits, options.expected)
    for name, figure in figures.items():
        figure.savefig(options.out / name, dpi=100, bbox_inches="tight", pad_inches=0.15)
    return Result(curve, trace, [options.out / name for name in figures])


def parse(argv: Sequence[str] | None) -> tuple[Options, bool]:
    """The options of a command line, and whether it asks for today's variant."""
    parser = parser_for(
        __doc__, "lenet_digits", seed="of everything random but the split",
        steps=f"mini-batches (default: {STEPS})", quick=f"{QUICK_STEPS} steps",
    )  # fmt: skip
    parser.add_argument("--modern", action="store_true", help="ReLU and max pooling")
    given = parser.parse_args(argv)
    usual, expected = (QUICK_STEPS, QUICK_EXPECTED) if given.quick else (STEPS, EXPECTED)
    device, steps = device_of(parser, given.device), given.steps or usual
    return Options(device, given.seed, steps, given.out, expected, given.resume), given.modern


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print what it found; the last line is the figure that it reached.

    1, saying why, where it cannot go on from a checkpoint.
    """
    options, modern = parse(argv)
    try:
        result = run(options, modern=modern)
    except CANNOT_RESUME as error:
        print(error, file=sys.stderr)
        return 1
    print(what_ran(f"A training step on {options.device}", result.trace))
    print("Pictures:", *result.pictures)
    print(f"Held-out accuracy: {result.accuracy:.1%} (expected: at least {options.expected:.0%})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
