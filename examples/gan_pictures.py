"""The pictures of ``gan.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gan_judge import N_DIGITS, Judge
from gan_training import Training

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

N_WALKS, N_PLACES = 6, 11
POINTS_SHOWN = (0, 1, 2, 4, 8)  # of the curves, and the last: what changes, changes early
COLOURS = {"D": "tab:orange", "G": "tab:blue"}


def strip(axes: Axes, images: torch.Tensor, label: str) -> None:
    """Images (n, 1, size, size) in a row, with its name before it."""
    n, _, size, _ = images.shape
    gap = max(1, size // 8)
    padded = torch.nn.functional.pad(images, (gap, gap, gap, gap), value=-1)
    row = padded[:, 0].transpose(0, 1).reshape(size + 2 * gap, n * (size + 2 * gap))
    axes.imshow(row.numpy(), cmap="gray_r", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(label, rotation=0, ha="right", va="center")
    for spine in axes.spines.values():
        spine.set_visible(False)


def strips(title: str, rows: Sequence[tuple[str, torch.Tensor]]) -> Figure:
    """Rows of images, each with its name."""
    n_columns = len(rows[0][1])
    figure = Figure(
        figsize=(0.75 * n_columns + 1.6, 0.68 * len(rows) + 0.5),
        layout=ConstrainedLayoutEngine(h_pad=0.02, hspace=0),
    )
    figure.suptitle(title)
    for axes, (label, images) in zip(figure.subplots(len(rows), 1), rows, strict=True):
        strip(axes, images, label)
    return figure


def nearest(images: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Of each image the real one with the least distance in pixels."""
    return real[torch.cdist(images.flatten(1), real.flatten(1)).argmin(1)]


def draw_samples(training: Training) -> Figure:
    """What becomes of the same z; and what the last row might have been copied from."""
    steps = sorted(training.drawn)
    chosen = dict.fromkeys([*(steps[i] for i in POINTS_SHOWN if i < len(steps)), steps[-1]])
    rows = [(f"step {step:,}", training.drawn[step]) for step in chosen]
    rows.append(("nearest\ntraining image", nearest(rows[-1][1], training.real.cpu())))
    return strips("A column is one z, drawn as the training goes on", rows)


def between(start: torch.Tensor, end: torch.Tensor, n: int) -> torch.Tensor:
    """n points on the arc from start to end, both included.

    The chord would pass nearer to 0 than normal numbers ever come.
    """
    angle = torch.acos(torch.cosine_similarity(start, end, dim=0))
    share = torch.linspace(0, 1, n, device=start.device)[:, None]
    return (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / angle.sin()


def draw_walk(training: Training) -> Figure:
    """From one latent point to another, in each row: images change, and remain images."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.randn(N_WALKS, 2, training.setting.latent, generator=generator)
    walks = [between(start, end, N_PLACES).to(training.device) for start, end in ends]
    rows = [(f"walk {i}", training.draw(walk)) for i, walk in enumerate(walks, start=1)]
    return strips("Each row walks from one latent point (left) to another (right)", rows)


def draw_losses(axes: Axes, training: Training) -> None:
    """Of both networks, beside what they come to where D cannot tell."""
    points = training.curve[1:]
    steps = [point.step for point in points]
    critic = training.setting.penalty is not None
    name = "critic's estimate of the distance" if critic else "D: -V(D, G)"
    axes.plot(steps, [p.discriminator_loss for p in points], color=COLOURS["D"], label=name)
    axes.plot(steps, [p.generator_loss for p in points], color=COLOURS["G"], label="G: its loss")
    if critic:
        axes.axhline(0, color="grey", linestyle=":", label="0: no distance left")
    else:
        axes.axhline(2 * math.log(2), color="grey", linestyle=":", label="2 ln 2: D cannot tell")
    axes.set(title="Losses", xlabel="step", ylabel="units of C" if critic else "nats")


def draw_curves(training: Training, judge: Judge, expected: float) -> Figure:
    """Losses, inception score and digits covered, by step."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    losses, score, digits = figure.subplots(1, 3)
    draw_losses(losses, training)
    points = training.curve
    steps, last = [point.step for point in points], points[-1]
    label = f"drawn images: {last.score:.2f}"
    score.plot(steps, [point.score for point in points], color=COLOURS["G"], label=label)
    score.axhline(judge.real_score, color="black", label=f"real images: {judge.real_score:.2f}")
    score.axhline(expected, color="grey", linestyle=":", label=f"expected: {expected:.2f}")
    score.set(title="Inception score", xlabel="step", ylim=(1, N_DIGITS))
    label = f"{last.n_covered} of {N_DIGITS}"
    digits.plot(steps, [point.n_covered for point in points], ".-", color=COLOURS["G"], label=label)
    digits.set(title="Digits covered", xlabel="step", ylim=(0, N_DIGITS + 0.4))
    digits.set_yticks(range(0, N_DIGITS + 1, 2))
    for axes in (losses, score, digits):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
