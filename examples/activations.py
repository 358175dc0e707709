"""Why deep networks did not learn: gradients that vanish or explode, layer by layer.

    python examples/activations.py [--device auto] [--seed 0] [--steps 300] [--out FOLDER]
                                   [--quick] [--resume]

The first picture has four activations and their derivatives, as gpunn's backward pass computes
them. A layer multiplies the gradient by such a derivative and by its weights. The sigmoid's is at
most 1/4: of ten layers, the first gets some millionths of what the last gets, and learns nothing.
Weights that are too small do the same to every activation, and weights that are too large make
gradients explode, or push sigmoid and tanh to where they are flat. Xavier's and He's
initialisations are such that the gradient keeps its size, for tanh and for ReLU. Batch
normalisation repairs what the weights have wrong, in every layer and at every step.

So a network of ten layers learns the digits with each activation, from each initialisation, with
and without batch normalisation: the second picture is the gradient's size by layer before the first
step, the third the accuracy that each reaches on digits it never saw, and what the learning rate
does to it.

On a GPU it runs on gpunn's kernels, on a CPU on PyTorch's own ops; the printed trace of a training
step says which ran. With each network that has learned a checkpoint is written to
FOLDER/checkpoints, and with ``--resume`` only those learn that are not in the last one.

Papers: X. Glorot and Y. Bengio, "Understanding the difficulty of training deep feedforward neural
networks", 2010; K. He et al., "Delving deep into rectifiers", 2015; S. Ioffe and C. Szegedy,
"Batch normalization", 2015. Data: the digits of digits_mlp.py, a quarter held out.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import gpunn
import gpunn.functional as GF
from checkpoint import CANNOT_RESUME, Journal, open_journal, what_ran
from command_line import device_of, parser_for
from digits_mlp import MISREAD, Digits, batches, load, predict, train_step
from gpunn import nn
from loops import first_traced, progress_bar, threads

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

LAYERS, WIDTH = 10, 64
LEAK = 0.1
ACTIVATIONS: dict[str, str | tuple[Any, ...]] = {
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "ReLU": "relu",
    "leaky ReLU": ("leaky_relu", LEAK),
}
INITIALISATIONS: dict[str, Callable[[int, int], float]] = {
    "zeros": lambda inputs, outputs: 0.0,
    "N(0, 0.01²)": lambda inputs, outputs: 0.01,
    "N(0, 1)": lambda inputs, outputs: 1.0,
    "Xavier": lambda inputs, outputs: math.sqrt(2 / (inputs + outputs)),
    "He": lambda inputs, outputs: math.sqrt(2 / inputs),
}
"""The deviation of a layer's weights, which are normal; biases start from 0."""
LEARNING_RATE, MOMENTUM = 0.01, 0.9
RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RATED = ("ReLU", "He")
STEPS, QUICK_STEPS = 300, 150
QUICK = ("N(0, 0.01²)", "Xavier")
AT_MOST, AT_LEAST = 0.2, 0.9  # of a deep sigmoid network, without and with batch normalisation


@dataclass(frozen=True)
class Setting:
    """What is varied."""

    activation: str
    initialisation: str
    normalised: bool
    rate: float = LEARNING_RATE


@dataclass(frozen=True)
class Outcome:
    """What became of a setting."""

    gradients: list[float]
    """The norm of each layer's weight gradient, before the first step."""
    accuracy: float
    """On the held-out images."""
    trace: gpunn.Trace
    """Of a pass forward and backward; empty where a checkpoint had the rest."""


def build(setting: Setting) -> nn.Sequential:
    """LAYERS dense layers, all but the last with their activation in the same kernel.

    Or, normalised, in that of the batch normalisation between the two.
    """
    activation, layers = ACTIVATIONS[setting.activation], list[nn.Module]()
    sizes = [64, *[WIDTH] * (LAYERS - 1)]
    for inputs, outputs in itertools.pairwise(sizes):
        if setting.normalised:
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs, activation=activation)]
        else:
            layers.append(nn.Linear(inputs, outputs, activation=activation))
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], 10))
    for layer in dense_layers(model):
        deviation = INITIALISATIONS[setting.initialisation](layer.in_features, layer.out_features)
        torch.nn.init.normal_(layer.weight, std=deviation)
        torch.nn.init.zeros_(layer.bias)
    return model


def dense_layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def learn(
    setting: Setting, digits: Digits, seed: int, steps: int, trace: gpunn.Trace
) -> tuple[list[float], float]:
    """Train the network of a setting: its gradients on the first mini-batch, and its accuracy."""
    torch.manual_seed(seed)
    model = build(setting).to(digits.train_x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.rate, momentum=MOMENTUM)
    order = batches(len(digits.train_x), seed)
    for step, batch in enumerate(itertools.islice(order, steps)):
        x, y = digits.train_x[batch], digits.train_y[batch]
        if step == 0:
            with first_traced(trace):
                loss = GF.cross_entropy(model(x), y)
                weights = [layer.weight for layer in dense_layers(model)]
                gradients = [g.norm().item() for g in torch.autograd.grad(loss, weights)]
        train_step(model, optimizer, x, y)
    said = predict(model, digits.held_out_x).argmax(1)
    return gradients, (said == digits.held_out_y).double().mean().item()


def learn_all(
    settings: Sequence[Setting], digits: Digits, seed: int, steps: int, journal: Journal
) -> dict[Setting, Outcome]:
    """What becomes of each setting, where the journal does not know."""
    outcomes: dict[Setting, Outcome] = {}
    with threads(1), progress_bar(live=MISREAD) as progress:
        task = progress.add_task("", total=len(settings), misread=math.nan)
        for setting in settings:
            part, trace = journal.part(str(setting)), gpunn.Trace()
            gradients, accuracy = part.once(learn, setting, digits, seed, steps, trace)
            outcomes[setting] = Outcome(gradients, accuracy, trace)
            progress.update(task, advance=1, misread=1 - accuracy)
    return outcomes


def derivative(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An activation of x, and its derivative by gpunn's backward pass."""
    leaf = x.clone().requires_grad_()
    function = getattr(GF, name)
    y = function(leaf, LEAK) if name == "leaky_relu" else function(leaf)
    return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]


def formula(name: str, x: torch.Tensor) -> torch.Tensor:
    """The derivative, as a lecture has it."""
    if name == "sigmoid":
        return x.sigmoid() * (1 - x.sigmoid())
    if name == "tanh":
        return 1 - x.tanh().square()
    return torch.where(x > 0, 1.0, LEAK if name == "leaky_relu" else 0.0)


def function_names() -> dict[str, str]:
    """Of each activation, the name of gpunn's function."""
    return {
        shown: given if isinstance(given, str) else str(given[0])
        for shown, given in ACTIVATIONS.items()
    }


def draw_activations(device: torch.device) -> tuple[Figure, float]:
    """Each activation with its derivative; and the largest difference from the formula."""
    x = torch.linspace(-5, 5, 400, device=device)  # 0, where ReLU has no derivative, is left out
    figure = Figure(figsize=(11, 3), layout="constrained")
    worst = 0.0
    for axes, (shown, name) in zip(figure.subplots(1, 4), function_names().items(), strict=True):
        y, slope = derivative(name, x)
        worst = max(worst, float((slope - formula(name, x)).abs().max()))
        axes.plot(x.cpu(), y.cpu(), color="tab:blue", label="f")
        axes.plot(x.cpu(), slope.cpu(), color="tab:orange", label="f'")
        axes.set(title=shown, xlabel="x", ylim=(-1.2, 2.2))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    return figure, worst


def draw_gradients(outcomes: dict[Setting, Outcome]) -> Figure:
    """The gradient's norm by layer: a panel an initialisation, below with batch normalisation."""
    shown = [
        n for n in INITIALISATIONS if n != "zeros" and any(s.initialisation == n for s in outcomes)
    ]
    figure = Figure(figsize=(3.1 * len(shown) + 0.6, 6), layout="constrained")
    figure.suptitle(
        "Norm of each layer's gradient before the first step; 1 is the layer at the input"
    )
    grid = figure.subplots(2, len(shown), sharex=True, sharey=True, squeeze=False)
    for row, normalised in zip(grid, (False, True), strict=True):
        for axes, name in zip(row, shown, strict=True):
            for activation in ACTIVATIONS:
                norms = outcomes[Setting(activation, name, normalised)].gradients
                style = "--" if activation == "leaky ReLU" else "-"  # over ReLU's line
                shown_norms = [max(g, 1e-20) for g in norms]
                axes.plot(range(1, LAYERS + 1), shown_norms, style, label=activation)
            axes.set(yscale="log", ylim=(1e-13, 1e10), title=name, xticks=range(1, LAYERS + 1))
            axes.grid(alpha=0.3)
        row[0].set_ylabel("with batch normalisation" if normalised else "without")
    grid[0, 0].legend(fontsize=9)
    for axes in grid[1]:
        axes.set_xlabel("layer")
    return figure


def draw_table(axes: Axes, outcomes: dict[Setting, Outcome], normalised: bool) -> None:
    """Accuracy by activation and initialisation, as a labelled grid."""
    names = [n for n in INITIALISATIONS if any(s.initialisation == n for s in outcomes)]
    cells = [
        [outcomes[Setting(activation, name, normalised)].accuracy for name in names]
        for activation in ACTIVATIONS
    ]
    axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (row, column), accuracy in (
        ((r, c), a) for r, line in enumerate(cells) for c, a in enumerate(line)
    ):
        axes.text(column, row, f"{accuracy:.0%}", ha="center", va="center")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(ACTIVATIONS)), list(ACTIVATIONS))
    axes.set_title("with batch normalisation" if normalised else "without batch normalisation")


def draw_accuracies(outcomes: dict[Setting, Outcome]) -> Figure:
    """Two tables, and, if it was tried, what the learning rate does."""
    rated = len({setting.rate for setting in outcomes}) > 1
    figure = Figure(figsize=(15 if rated else 10.5, 3.6), layout="constrained")
    figure.suptitle(f"Held-out digits read correctly by networks of {LAYERS} layers")
    without, with_, *rates = figure.subplots(1, 3 if rated else 2, squeeze=False)[0]
    draw_table(without, outcomes, False)
    draw_table(with_, outcomes, True)
    for axes in rates:
        for normalised, label in ((False, "without"), (True, "with")):
            accuracies = [outcomes[Setting(*RATED, normalised, rate)].accuracy for rate in RATES]
            axes.plot(RATES, accuracies, marker="o", label=f"{label} batch normalisation")
        axes.set(xscale="log", ylim=(0, 1.02), xlabel="learning rate")
        axes.set_title(f"{RATED[0]}, {RATED[1]}: by learning rate")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def settings_of(quick: bool) -> list[Setting]:
    """What is tried."""
    names = QUICK if quick else tuple(INITIALISATIONS)
    rates = [] if quick else [Setting(*RATED, n, rate) for n in (False, True) for rate in RATES]
    every = itertools.product(ACTIVATIONS, names, (False, True))
    return list(dict.fromkeys([*(Setting(*one) for one in every), *rates]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print what it found; the last line is the figure that it reached.

    1, saying why, where it cannot go on from a checkpoint.
    """
    parser = parser_for(
        __doc__, "activations", seed="of the weights and the mini-batches",
        steps=f"mini-batches of each (default: {STEPS})",
        quick=f"{QUICK_STEPS} steps of fewer networks",
    )  # fmt: skip
    given = parser.parse_args(argv)
    steps = given.steps or (QUICK_STEPS if given.quick else STEPS)
    device = device_of(parser, given.device)
    try:
        chosen = {"demo": "activations", "seed": given.seed, "steps": steps}
        journal = open_journal(given.out, given.resume, chosen)
    except CANNOT_RESUME as error:
        print(error, file=sys.stderr)
        return 1
    outcomes = learn_all(settings_of(given.quick), load(device), given.seed, steps, journal)
    activations, apart = draw_activations(device)
    figures = {
        "activations.png": activations,
        "gradients.png": draw_gradients(outcomes),
        "accuracies.png": draw_accuracies(outcomes),
    }
    for name, figure in figures.items():
        figure.savefig(given.out / name, dpi=90, bbox_inches="tight", pad_inches=0.15)
    bare, repaired = (outcomes[Setting("sigmoid", "Xavier", n)] for n in (False, True))
    print(what_ran(f"A training step with batch normalisation on {device}", repaired.trace))
    print(f"Derivatives differ from the formulas by {apart:.1e} at most.")
    print(
        f"Sigmoid, Xavier: gradient of layer 1 over that of layer {LAYERS}: "
        f"{bare.gradients[0] / bare.gradients[-1]:.1e}"
    )
    print("Pictures:", *(given.out / name for name in figures))
    print(
        f"Sigmoid, Xavier: {bare.accuracy:.1%} of held-out digits, {repaired.accuracy:.1%} with "
        f"batch normalisation (expected: at most {AT_MOST:.0%}, at least {AT_LEAST:.0%})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
