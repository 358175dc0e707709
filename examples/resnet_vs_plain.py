"""Deeper plain networks learn worse, deeper residual networks do not: He et al. (2016).

    python examples/resnet_vs_plain.py [--device auto] [--seed 0] [--seeds 3] [--steps 42]
                                       [--out FOLDER] [--quick] [--resume] [--choose-rates]

``gpunn.models.resnet_cifar`` builds both: blocks of two convolutions, each with its batch
normalisation, that answer relu(F(x) + x), or, plain, relu(F(x)). The shortcut x has no parameters.
So the two networks of a depth start from the very same weights (He's initialisation) and see the
same mini-batches in the same order.

The plain network's training loss is high as well: it does not over-fit, it is hard to optimise.
The second picture shows why. The derivative of F(x) + x is F'(x) + 1, whose 1 carries the gradient
past every block. A plain network multiplies one F'(x) after the other, which with batch
normalisation does not vanish but explode: before the first step, over 56 layers, about a
thousandfold, against five- to eightfold (Yang et al., 2019, https://arxiv.org/abs/1902.08129).

Each network has the learning rate that suits it best, of 0.01, 0.02, 0.05 and 0.1, by four-fold
cross-validation on the training images alone (``--choose-rates`` does it again). The gap depends on
the time there is: after three passes over the images, instead of two, it is 33, 23 and 16 points at
32 layers (seeds 0 to 2); after 12, at a rate of 0.02, the plain network of 32 layers gets to 93 %,
that of 56 layers to 42 % (seed 0). Two passes were chosen by the same cross-validation, in which
the gap of every fold is above 40 points.

On a GPU it runs on gpunn's kernels, in channels_last, on a CPU on PyTorch's own ops. The printed
trace of a training step says which ran. Every 14 steps of a network a checkpoint is written to
FOLDER/checkpoints, and ``--resume`` goes on from the last one with nothing lost: on a CPU the
weights are those of a run that was not interrupted, bit for bit.

Paper: https://arxiv.org/abs/1512.03385, section 4.2. Data: the digits of digits_mlp.py, 8×8, a
quarter held out.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import gpunn
from checkpoint import CANNOT_RESUME, Journal, Loop, Part, open_journal, what_ran
from command_line import device_of, parser_for, positive
from digits_mlp import Digits, batches, load, predict, train_step
from gpunn import nn
from gpunn.models import resnet_cifar
from loops import first_traced, progress_bar, threads

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from rich.console import Console
    from rich.table import Table
    from sklearn.model_selection import StratifiedKFold
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

DEPTHS, QUICK_DEPTHS = (8, 20, 32, 56), (8, 32)
DEEP = 32  # from this depth on, the residual network has to be the better one
EXPECTED = 20  # percentage points, at every such depth and for every seed
STEPS = 42  # two passes over the training images; the rates are for so many
SAVE_EVERY = 14
# Learning rates, which fall linearly to 0 over the run: by depth, residual or not. The best in
# cross-validation, as choose_rates found them; the lower one of equals.
RATES = {
    (8, True): 0.1, (20, True): 0.05, (32, True): 0.05, (56, True): 0.02,
    (8, False): 0.1, (20, False): 0.1, (32, False): 0.05, (56, False): 0.01,
}  # fmt: skip
CANDIDATES = (0.01, 0.02, 0.05, 0.1)
N_FOLDS = 4
FOLD_SEED = 100  # that of the first fold's network: none that the demo is measured with
MOMENTUM = 0.9
KINDS = {True: "residual", False: "plain"}
COLOURS = {True: "tab:blue", False: "tab:orange"}


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    device: torch.device
    seeds: range
    steps: int
    depths: tuple[int, ...]
    out: Path
    choose_rates: bool
    resume: bool


@dataclass(frozen=True)
class Network:
    """A network, and how it is trained."""

    depth: int
    residual: bool
    seed: int
    rate: float

    def __str__(self) -> str:
        return f"{KINDS[self.residual]}, {self.depth} layers, rate {self.rate}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What one network learnt: the loss in the last third of its steps, the held-out accuracy."""

    depth: int
    residual: bool
    seed: int
    loss: float
    accuracy: float
    trace: gpunn.Trace
    """Of a step; empty where a checkpoint had the rest."""


@dataclass(frozen=True)
class Result:
    """What a run found."""

    outcomes: list[Outcome]
    gradients: dict[bool, list[float]]
    """By ``residual``: the gradient's norm in each convolution of the deepest network."""
    pictures: list[Path]

    def of(self, depth: int, residual: bool) -> list[Outcome]:
        """The outcomes of one network, by seed."""
        return [o for o in self.outcomes if (o.depth, o.residual) == (depth, residual)]

    def mean(self, depth: int, residual: bool, name: str) -> float:
        """The mean over the seeds of ``loss`` or ``accuracy``."""
        return float(np.mean([getattr(outcome, name) for outcome in self.of(depth, residual)]))

    def gaps(self, depth: int) -> list[float]:
        """By how many points of accuracy the residual network is better, by seed."""
        pairs = zip(self.of(depth, True), self.of(depth, False), strict=True)
        return [100 * (residual.accuracy - plain.accuracy) for residual, plain in pairs]

    def depths(self) -> list[int]:
        """The depths that were trained."""
        return sorted({outcome.depth for outcome in self.outcomes})


def load_digits_as_images(device: torch.device | str) -> Digits:
    """The digits of digits_mlp.py, of shape (n, 1, 8, 8)."""
    digits = load(device)
    shape = (-1, 1, 8, 8)
    return replace(
        digits, train_x=digits.train_x.view(shape), held_out_x=digits.held_out_x.view(shape)
    )


def build(depth: int, residual: bool, seed: int, device: torch.device) -> nn.Module:
    """A network whose initial weights depend on depth and seed, not on ``residual``."""
    torch.manual_seed(seed)
    model = resnet_cifar(depth, n_classes=10, in_channels=1, residual=residual).to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def learn(
    network: Network,
    images: Digits,
    steps: int,
    part: Part,
    trace: gpunn.Trace,
    told: Callable[[float], None] = lambda loss: None,
) -> tuple[float, float]:
    """Build a network and train it: the loss in the last third of its steps, and the accuracy.

    If ``part`` was begun, the training goes on from there.
    """
    model = build(network.depth, network.residual, network.seed, images.train_x.device)
    optimizer = torch.optim.SGD(model.parameters(), momentum=MOMENTUM)
    loop = Loop(part, steps, SAVE_EVERY, model=model, optimizer=optimizer)
    order = itertools.islice(batches(len(images.train_x), network.seed), loop.step, None)
    for step in loop:
        for group in optimizer.param_groups:
            group["lr"] = network.rate * (1 - (step - 1) / steps)
        batch = next(order)
        with first_traced(trace):
            loss = train_step(model, optimizer, images.train_x[batch], images.train_y[batch])
        loop.curve.append(loss)
        told(loss)
    said = predict(model, images.held_out_x).argmax(1)
    accuracy = (said == images.held_out_y).double().mean().item()
    return float(np.mean(loop.curve[-max(1, steps // 3) :])), accuracy


def choose_rates(
    images: Digits, depths: Sequence[int], steps: int, journal: Journal
) -> dict[tuple[int, bool], float]:
    """The best of CANDIDATES for each network, by cross-validation on the training images."""
    x, y = images.train_x, images.train_y
    halves = StratifiedKFold(N_FOLDS, shuffle=True, random_state=0).split(
        x.cpu().flatten(1), y.cpu()
    )
    folds = [Digits(x[ours], y[ours], x[held], y[held]) for ours, held in halves]
    best = {}
    with threads(1):
        for depth, residual in itertools.product(depths, KINDS):
            means = []
            for rate in CANDIDATES:
                accuracies = []
                for fold, fold_images in enumerate(folds):
                    network = Network(depth, residual, FOLD_SEED + fold, rate)
                    part = journal.part(f"fold {fold}, {network}")
                    _, accuracy = part.once(learn, network, fold_images, steps, part, gpunn.Trace())
                    accuracies.append(accuracy)
                means.append(float(np.mean(accuracies)))
            best[depth, residual] = CANDIDATES[int(np.argmax(np.round(means, 3)))]
            shown = ", ".join(f"{r}: {m:.1%}" for r, m in zip(CANDIDATES, means, strict=True))
            print(f"{depth} layers, {KINDS[residual]}: {shown} -> {best[depth, residual]}")
    return best


def learn_all(options: Options, images: Digits, journal: Journal) -> list[Outcome]:
    """Both networks of every depth, for every seed."""
    networks = [
        Network(depth, residual, seed, RATES[depth, residual])
        for seed, depth, residual in itertools.product(options.seeds, options.depths, KINDS)
    ]
    outcomes: list[Outcome] = []
    with threads(1), progress_bar("{task.description}") as progress:
        task = progress.add_task("", total=len(networks) * options.steps, loss=float("nan"))

        def told(loss: float) -> None:
            progress.update(task, advance=1, loss=loss)

        for i, network in enumerate(networks):
            progress.update(task, description=str(network), completed=i * options.steps)
            part, trace = journal.part(str(network)), gpunn.Trace()
            loss, accuracy = part.once(learn, network, images, options.steps, part, trace, told)
            outcomes.append(
                Outcome(network.depth, network.residual, network.seed, loss, accuracy, trace)
            )
        progress.update(task, completed=len(networks) * options.steps)
    return outcomes


def gradient_norms(model: nn.Module, images: Digits) -> list[float]:
    """The norm of the gradient in the weight of each convolution, from the first to the last."""
    x, y = images.train_x[:512], images.train_y[:512]
    with threads(1):
        F.cross_entropy(model(x), y).backward()
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return [weight.grad.norm().item() for weight in weights if weight.grad is not None]


def draw_depths(result: Result) -> Figure:
    """Training loss and held-out accuracy against depth: lines are means, points are seeds."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    depths = result.depths()
    for residual, kind in KINDS.items():
        points = [o for o in result.outcomes if o.residual == residual]
        for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
            means = [result.mean(depth, residual, name) for depth in depths]
            axes.plot(depths, means, color=COLOURS[residual], label=kind)
            values = [getattr(point, name) for point in points]
            axes.scatter([point.depth for point in points], values, color=COLOURS[residual])
    loss.set(
        title="Training loss, last third of the steps",
        ylabel="cross-entropy (nats)",
        ylim=(0, None),
    )
    accuracy.set(title="Held-out accuracy", ylabel="images read correctly", ylim=(0, 1.02))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (loss, accuracy):
        axes.set(xlabel="layers", xticks=depths)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_gradients(gradients: dict[bool, list[float]], depth: int) -> Figure:
    """The gradient's norm against the layer."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for residual, norms in gradients.items():
        label = f"{KINDS[residual]}: first / last = {norms[0] / norms[-1]:,.0f}"
        layers = range(1, len(norms) + 1)
        axes.plot(layers, norms, ".-", color=COLOURS[residual], label=label)
    axes.set(
        title=f"The gradient before the first step, {depth} layers",
        xlabel="convolution, from the image to the answer",
        ylabel="norm of the weight's gradient",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def run(options: Options, journal: Journal) -> Result:
    """Train, measure and draw."""
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 on the tensor cores
    images = load_digits_as_images(options.device)
    deepest, seed = max(options.depths), options.seeds[0]
    gradients = {
        residual: gradient_norms(build(deepest, residual, seed, options.device), images)
        for residual in KINDS
    }
    pictures = [options.out / "depth.png", options.out / "gradients.png"]
    result = Result(learn_all(options, images, journal), gradients, pictures)
    for path, figure in zip(
        pictures, (draw_depths(result), draw_gradients(gradients, deepest)), strict=True
    ):
        figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)
    return result


def table_of(result: Result, options: Options) -> Table:
    """The figures, a row a depth: means over the seeds, and the gap of the accuracies by seed."""
    seeds = ", ".join(map(str, options.seeds))
    table = Table(title=f"{options.steps} steps, seeds: {seeds}")
    for heading in (
        "layers",
        "loss: residual",
        "plain",
        "held out: residual",
        "plain",
        "gaps",
    ):
        table.add_column(heading, justify="right")
    for depth in result.depths():
        losses = [f"{result.mean(depth, residual, 'loss'):.3f}" for residual in KINDS]
        accuracies = [f"{result.mean(depth, residual, 'accuracy'):.1%}" for residual in KINDS]
        gaps = " / ".join(f"{gap:+.0f}" for gap in result.gaps(depth))
        table.add_row(str(depth), *losses, *accuracies, gaps)
    return table


def parse(argv: Sequence[str] | None) -> Options:
    """The options of a command line."""
    parser = parser_for(
        __doc__, "resnet_vs_plain", seed="the first, of everything random but the split",
        steps=f"mini-batches of each network (default: {STEPS}, which its rate is for)",
        quick=f"only the depths {QUICK_DEPTHS}, and one seed unless --seeds says more",
    )  # fmt: skip
    parser.add_argument("--seeds", type=positive, help="how many, from --seed on (default: 3)")
    parser.add_argument(
        "--choose-rates", action="store_true", help="only compare learning rates: 6 minutes"
    )
    given = parser.parse_args(argv)
    n_seeds = given.seeds or (1 if given.quick else 3)
    seeds = range(given.seed, given.seed + n_seeds)
    depths = QUICK_DEPTHS if given.quick else DEPTHS
    device, steps = device_of(parser, given.device), given.steps or STEPS
    return Options(device, seeds, steps, depths, given.out, given.choose_rates, given.resume)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print what it found; the last line is the figure that it reached.

    1, saying why, where it cannot go on from a checkpoint.
    """
    options = parse(argv)
    chosen = {
        "demo": "resnet_vs_plain", "seeds": list(options.seeds), "steps": options.steps,
    }  # fmt: skip
    try:
        journal = open_journal(options.out, options.resume, chosen)
    except CANNOT_RESUME as error:
        print(error, file=sys.stderr)
        return 1
    if options.choose_rates:
        images = load_digits_as_images(options.device)
        choose_rates(images, options.depths, options.steps, journal)
        return 0
    result = run(options, journal)
    last = result.outcomes[-1]
    network = f"{last.depth} {KINDS[last.residual]} layers"
    print(what_ran(f"A training step of {network} on {options.device}", last.trace))
    Console().print(table_of(result, options))
    print("Pictures:", *result.pictures)
    deep = [depth for depth in result.depths() if depth >= DEEP]
    gaps = ", ".join(f"at depth {d}: {min(result.gaps(d)):+.1f} points or more" for d in deep)
    print(f"Residual over plain {gaps} (expected: at least {EXPECTED})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
