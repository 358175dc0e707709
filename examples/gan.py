"""Two networks play against each other: one draws digits, the other tells them from real ones.

    python examples/gan.py [--setting mlp] [--device auto] [--seed 0] [--steps 4000]
                           [--out FOLDER] [--quick]

A generator G makes images of noise z, a discriminator D says how likely an image is real. They
play for V = E log D(x) + E log (1 - D(G(z))), which D maximises and G minimises: so they do with
``--setting minimax``. Where D is sure, this gives G hardly a gradient; by default (``mlp``) G
maximises E log D(G(z)) instead, with one-sided label smoothing, dropout in D, and noise on what D
sees, which fades. When G's images are as the real ones, D can only answer 1/2, and its loss is
2 ln 2. ``dcgan`` plays with convolutions on images of 28×28. ``wgan-gp`` has a critic in D's place,
whose gradient is held to length 1 by a penalty, which is differentiated twice.

What is drawn comes from a moving average of G's weights. A judge (a support vector machine that has
learnt the digits) scores it: exp E KL(p(digit | image) || p(digit)), the inception score, is high
where each image is surely some digit, and all digits are there. Beside it stands the score of real
images that were held out, which neither network nor judge was trained on.

On a GPU it runs on gpunn's kernels, on a CPU on PyTorch's own ops; the printed trace of a step says
which ran.

Papers: I. Goodfellow et al., "Generative adversarial nets", 2014; A. Radford et al. (DCGAN), 2016;
T. Salimans et al., "Improved techniques for training GANs", 2016; I. Gulrajani et al., "Improved
training of Wasserstein GANs", 2017. Data: the digits of digits_mlp.py, enlarged for ``dcgan``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import gpunn
from command_line import device_of, parser_for
from digits_mlp import one_thread
from gan_training import N_LATENT, SETTINGS, Setting, Training

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

N_JUDGED = 1000
N_MEASURED = 12  # points of the curves
COVERED = 0.01  # the share of a digit among the images, from which on it counts as there
COLUMNS, WALKS = 10, 5


@dataclass(frozen=True)
class Images:
    """Digits from -1 to 1, (n, 1, size, size), and what they are."""

    train: torch.Tensor
    train_y: torch.Tensor
    held_out: torch.Tensor


@dataclass(frozen=True)
class Point:
    """What the judge says after so many steps."""

    step: int
    score: float
    covered: int
    """How many of the ten digits are there."""


class Judge:
    """A classifier of digits with probabilities."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.model = CalibratedClassifierCV(SVC(gamma="scale"), ensemble=False)
        self.model.fit(images.flatten(1).numpy(), labels.numpy())

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """p(digit | image), (n, 10)."""
        found = self.model.predict_proba(images.flatten(1).numpy())
        return torch.from_numpy(np.asarray(found))


def inception_score(p: torch.Tensor) -> float:
    """exp E KL(p(digit | image) || p(digit)) of probabilities (n, 10): from 1 to 10."""
    p = p.clamp(min=1e-12)
    return math.exp((p * (p / p.mean(0)).log()).sum(1).mean().item())


def digits_covered(p: torch.Tensor) -> int:
    """How many digits the images are taken for, each a hundredth of them at least."""
    shares = torch.bincount(p.argmax(1), minlength=10) / len(p)
    return int((shares >= COVERED).sum())


def load(size: int) -> Images:
    """The digits, enlarged to size × size; held out are those that digits_mlp.py holds out."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images / 8 - 1, labels, test_size=0.25, stratify=labels, random_state=0
    )
    train, held_out = (
        torch.from_numpy(part).float().view(-1, 1, 8, 8) for part in (split[0], split[1])
    )
    if size != 8:
        train, held_out = (
            F.interpolate(part, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
            for part in (train, held_out)
        )
    return Images(train, torch.from_numpy(split[2]), held_out)


def progress_bar() -> Progress:
    """A bar with both losses beside it."""
    return Progress(
        TextColumn("playing"), BarColumn(), MofNCompleteColumn(),
        TextColumn("G {task.fields[g]:.3f}  D {task.fields[d]:.3f}"), TimeElapsedColumn(),
    )  # fmt: skip


class Match:
    """A training, and what is measured and kept of it on the way."""

    def __init__(
        self, setting: Setting, images: Images, device: torch.device, seed: int, steps: int
    ) -> None:
        self.training = Training(setting, images.train.to(device), seed, steps)
        self.judge = Judge(images.train, images.train_y)
        generator = torch.Generator().manual_seed(seed)
        self.latent = torch.randn(N_JUDGED, N_LATENT, generator=generator).to(device)
        self.real = inception_score(self.judge.probabilities(images.held_out))
        self.losses: list[tuple[float, float]] = []
        self.curve: list[Point] = []
        self.drawn: dict[int, torch.Tensor] = {}
        self.measured = {*range(0, steps, max(1, steps // N_MEASURED)), steps}
        self.kept = {0, *(round(steps * share) for share in (0.02, 0.1, 0.3)), steps}

    def look(self) -> None:
        """Measure and keep what is due at this step."""
        step = self.training.step
        if step in self.kept:
            self.drawn[step] = self.training.draw(self.latent[:COLUMNS]).cpu()
        if step in self.measured:
            p = self.judge.probabilities(self.training.draw(self.latent).cpu())
            self.curve.append(Point(step, inception_score(p), digits_covered(p)))

    def play(self) -> gpunn.Trace:
        """All steps; the trace of the first."""
        training = self.training
        self.look()
        with one_thread(), progress_bar() as progress:
            task = progress.add_task("", total=training.steps, g=math.nan, d=math.nan)
            with gpunn.trace() as trace:
                losses = training.train_step()
            while True:
                self.losses.append(losses)
                progress.update(task, completed=training.step, g=losses[0], d=losses[1])
                self.look()
                if training.step == training.steps:
                    return trace
                losses = training.train_step()


def tile(axes: Axes, images: torch.Tensor) -> None:
    """Images (n, 1, size, size) side by side."""
    padded = F.pad(images[:, 0], (1, 1, 1, 1), value=-1.0)
    axes.imshow(torch.cat(list(padded), 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])


def draw_samples(match: Match, held_out: torch.Tensor) -> Figure:
    """A row a step, of the same z; below them, real images."""
    rows = {f"step {step}": images for step, images in match.drawn.items()}
    rows["real"] = held_out[:COLUMNS]
    figure = Figure(figsize=(8, 0.85 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(f"Digits drawn by the generator ({match.training.setting.title})")
    for axes, (label, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        tile(axes, images)
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def draw_walk(training: Training) -> Figure:
    """From one z to another, in steps along a great circle, on which all are as likely."""
    ends = training.latent(WALKS + 1)
    shares = torch.linspace(0, math.pi / 2, COLUMNS, device=ends.device)[:, None]
    figure = Figure(figsize=(8, 0.85 * WALKS + 0.4), layout="constrained")
    figure.suptitle("Walks between two points of the noise: every image in between is a digit, too")
    for axes, (start, end) in zip(figure.subplots(WALKS, 1), itertools.pairwise(ends), strict=True):
        tile(axes, training.draw(shares.cos() * start + shares.sin() * end).cpu())
    return figure


def draw_curves(match: Match) -> Figure:
    """Losses, score, and how many digits are there, against the step."""
    setting, losses = match.training.setting, torch.tensor(match.losses)
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = max(1, len(losses) // 100)
    smooth = losses[: len(losses) // width * width].unflatten(0, (-1, width)).mean(1)
    steps = torch.arange(1, len(smooth) + 1) * width
    for column, name in enumerate(("generator", "discriminator")):
        left.plot(steps, smooth[:, column], label=name)
    if setting.game != "wasserstein":
        left.axhline(2 * math.log(2), color="grey", linestyle=":", label="2 ln 2")
    left.set(title=f"Losses ({setting.title})", xlabel="step", ylabel="nats")
    points = [point.step for point in match.curve]
    right.plot(points, [p.score for p in match.curve], marker="o", label="inception score")
    right.axhline(
        match.real, color="tab:blue", linestyle=":", label=f"real images: {match.real:.2f}"
    )
    right.plot(points, [p.covered for p in match.curve], marker="s", label="digits covered")
    right.set(title="What a judge says", xlabel="step", ylim=(0, 10.5))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    setting: Setting
    device: torch.device
    seed: int
    steps: int
    out: Path
    expected: float


def parse(argv: Sequence[str] | None) -> Options:
    """The options of a command line."""
    parser = parser_for(__doc__, "gan")
    parser.add_argument("--setting", choices=SETTINGS, default="mlp", help="what is played")
    parser.add_argument("--seed", type=int, default=0, help="of everything random but the split")
    parser.add_argument("--steps", type=int, help="of the generator")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    given = parser.parse_args(argv)
    setting = SETTINGS[given.setting]
    steps = setting.quick_steps if given.quick else setting.steps
    if given.steps is not None:
        steps = given.steps
    if steps < 1:
        parser.error(f"--steps: expected 1 or more, got {steps}")
    expected = setting.quick_expected if given.quick else setting.expected
    device = device_of(parser, given.device)
    return Options(setting, device, given.seed, steps, given.out, expected)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print what it found; the last line is the figure that it reached."""
    options = parse(argv)
    images = load(options.setting.size)
    match = Match(options.setting, images, options.device, options.seed, options.steps)
    trace = match.play()
    figures = {
        "samples.png": draw_samples(match, images.held_out),
        "walk.png": draw_walk(match.training),
        "curves.png": draw_curves(match),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(options.out / name, dpi=90, bbox_inches="tight", pad_inches=0.15)
    print(f"A training step on {options.device} ran:\n{trace}")
    print("Pictures:", *(options.out / name for name in figures))
    last = match.curve[-1]
    print(
        f"Inception score: {last.score:.2f}, {last.covered} of 10 digits covered "
        f"(expected: at least {options.expected:.1f}; real images: {match.real:.2f})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
