"""Style transfer: a photograph as Van Gogh might have painted it.

    python examples/style_transfer.py [--device auto] [--seed 0] [--steps 40] [--out FOLDER]
                                      [--content FILE] [--style FILE] [--weights FILE] [--dream]
                                      [--quick] [--resume]

Nothing learns to paint: L-BFGS changes the pixels themselves, until a convolutional network finds
in them the maps that it finds in the photograph (the content), and the Gram matrices that it finds
in the painting (the style: which channels are strong together, wherever that be). The weight of
the style against the content grows from picture to picture.

The paper's network is VGG-19 as trained on ImageNet, which no package ships; ``--weights`` takes
it from a file of torchvision's (tested with random weights alone). Without one, a small network of
VGG's build learns in a minute from which region of which image a patch comes, and one of random
weights is set beside it. Both are calibrated: over the images, every channel has mean 0 and
deviation 1. The photograph's colours are matched to the painting's first, and the picture is
painted at half its size, then at its size.

Two figures say what was reached. The Gram distance: how far the Gram matrices are from the
painting's, in percent of how far the photograph's are, by another random network, which had no
part in the painting. The edges: how their strengths correlate with the photograph's.

With ``--dream`` there is no painting: what a layer of the network finds in a photograph is
amplified, by gradient ascent, at one size after the other.

Every 50 steps of the training, 20 of a picture, and size of a dream, a checkpoint is written to
FOLDER/checkpoints, and ``--resume`` goes on from the last one with nothing lost: on a CPU the
pictures are those of a run that was not interrupted, bit for bit. With ``--dream``, too, it takes
the network that painted.

On a GPU it runs on gpunn's kernels, on a CPU on PyTorch's own ops; the printed trace of the loss
and its gradient says which ran.

Papers: Gatys, Ecker and Bethge, "A neural algorithm of artistic style", 2015, and "Image style
transfer using convolutional neural networks", CVPR 2016; Mordvintsev, Olah and Tyka,
"Inceptionism: going deeper into neural networks", 2015. Images: The Starry Night by Vincent van
Gogh, 1889, in the public domain (examples/data); china.jpg by danielbuechele and flower.jpg by
vultilion (both flickr.com), which scikit-learn ships, licence CC BY 2.0.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import gpunn
from checkpoint import CANNOT_RESUME, Journal, digest, open_journal
from command_line import device_of, parser_for
from feature_networks import (
    FeatureNetwork,
    calibrate,
    random_network,
    trained_network,
    vgg19_network,
)
from image_optimisation import N_OCTAVES, Goal, dream, judge, strength, transfer
from loops import progress_bar, threads
from photographs import (
    edge_correlation,
    match_colours,
    read_image,
    resized,
    sample_photographs,
)

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

PAINTING = Path(__file__).parent / "data" / "starry_night.jpg"
TRAINING_SIDE = 200  # pixels of the images' shorter side, where regions are told from each other
JUDGE_SEED = 1000  # of the network that judges, added to --seed


@dataclass(frozen=True)
class Setting:
    """How much is computed."""

    side: int
    """Pixels of the picture's shorter side."""
    training_steps: int
    steps: int
    """Of L-BFGS, at each of two sizes."""
    ratios: tuple[float, ...]
    """Weights of the style; that of the content is 1."""
    judged: float
    """The ratio whose pictures are held to the expectation."""
    dream_steps: int
    """Of gradient ascent, in every octave."""
    n_photographs: int


FULL = Setting(192, 250, 40, (0.3, 2.0, 20.0, 200.0), 20.0, 10, n_photographs=2)
QUICK = Setting(96, 12, 20, (40.0,), 40.0, 4, n_photographs=1)
DISTANCE_EXPECTED, EDGES_EXPECTED, DREAM_EXPECTED = 0.01, 0.39, 1.2


@dataclass(frozen=True)
class Picture:
    """How near a painted photograph is to either side."""

    name: str
    ratio: float
    distance: float
    """Of its Gram matrices from the painting's, in units of the photograph's."""
    edges: float
    """The correlation of their strengths with the photograph's."""

    @property
    def title(self) -> str:
        return f"style × {self.ratio:g}: Gram distance {self.distance:.2%}, edges {self.edges:.2f}"


def draw_sheet(images: Sequence[tuple[str, torch.Tensor]], columns: int) -> Figure:
    """Images (3, H, W), each under its title."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns).flat:
        axes.set_axis_off()
    for axes, (title, image) in zip(figure.axes, images, strict=False):
        axes.imshow(image.permute(1, 2, 0).cpu().numpy())
        axes.set_title(title, fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """As JPEG: in PNG, brush strokes take five times the bytes."""
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.1, pil_kwargs={"quality": 88})
    return path


@dataclass(frozen=True)
class Options:
    """What the command line chooses; images have the setting's size, where nothing is said."""

    device: torch.device
    seed: int
    setting: Setting
    out: Path
    photographs: dict[str, torch.Tensor]
    painting: torch.Tensor
    known: list[torch.Tensor]
    """What a network learns from, beside the painting, in its files' size."""
    vgg: FeatureNetwork | None
    dreams: bool
    usual: bool
    """Whether images and network are those that the expectations are of."""
    resume: bool

    @property
    def images(self) -> list[torch.Tensor]:
        return [*self.photographs.values(), self.painting]

    def chosen(self) -> dict[str, Any]:
        """What has to be the same in a run that goes on."""
        return {
            "seed": self.seed, **asdict(self.setting),
            "content": digest(self.photographs.values()), "style": digest([self.painting]),
            "weights": None if self.vgg is None else digest(self.vgg.parameters()),
        }  # fmt: skip


def networks_for(options: Options, journal: Journal) -> list[FeatureNetwork]:
    """VGG-19 if it was given; or else a network trained here and a random one, calibrated."""
    if options.vgg is not None:
        return [options.vgg]
    known = [*options.known, options.painting.cpu()]
    images = [resized(image, TRAINING_SIDE) for image in known]
    steps = options.setting.training_steps
    part = journal.part("training")
    trained = trained_network(images, steps, options.seed, options.device, part)
    return [calibrated(n, options) for n in (trained, random_network(options.seed))]


def calibrated(network: FeatureNetwork, options: Options) -> FeatureNetwork:
    """The network on the device, calibrated over all images."""
    return calibrate(network.to(options.device), [image[None] for image in options.images])


def paint(
    networks: Sequence[FeatureNetwork], options: Options, journal: Journal
) -> tuple[list[Picture], list[Path]]:
    """Every photograph at every ratio, and a sheet for each, from photograph to painting."""
    setting, painting = options.setting, options.painting
    network = calibrated(random_network(options.seed + JUDGE_SEED), options)
    pictures, sheets = [], []
    total = 2 * setting.steps * len(setting.ratios) * len(options.photographs)
    with progress_bar("painting") as progress:
        task = progress.add_task("", total=total, loss=float("nan"))
        for name, photograph in options.photographs.items():
            cells, matched = [(name, photograph)], match_colours(photograph, painting)
            far = max(judge(network, photograph, painting), 1e-9)  # 0 if it is the painting
            for ratio in setting.ratios:
                image = transfer(
                    networks, matched, painting, ratio, setting.steps,
                    lambda loss: progress.update(task, advance=1, loss=loss),
                    journal.part(f"{name}, style × {ratio:g}"),
                )  # fmt: skip
                distance = judge(network, image, painting) / far
                picture = Picture(name, ratio, distance, edge_correlation(image, photograph))
                pictures.append(picture)
                cells.append((picture.title, image))
            sheet = draw_sheet([*cells, ("painting", painting)], columns=3)
            sheets.append(save(sheet, options.out / f"style_{name}.jpg"))
    return pictures, sheets


def dream_of(
    network: FeatureNetwork, options: Options, journal: Journal
) -> tuple[float, list[Path]]:
    """Every photograph with each layer amplified: by how much at least, and a sheet for each."""
    setting, growths, sheets = options.setting, [], []
    total = N_OCTAVES * setting.dream_steps * len(network.dream) * len(options.photographs)
    with progress_bar("dreaming") as progress:
        task = progress.add_task("", total=total, loss=float("nan"))
        for name, photograph in options.photographs.items():
            cells = [(name, photograph)]
            for layer in network.dream:
                image = dream(
                    network, layer, photograph, setting.dream_steps,
                    lambda reached: progress.update(task, advance=1, loss=-reached),
                    journal.part(f"dream of {name}, layer {layer}"),
                )  # fmt: skip
                before, after = (strength(network, layer, each) for each in (photograph, image))
                growths.append((after / before).item())
                cells.append((f"layer {layer}: {growths[-1]:.1f} times as strong", image))
            sheet = draw_sheet(cells, columns=2)
            sheets.append(save(sheet, options.out / f"dream_{name}.jpg"))
    return min(growths), sheets


def trace_of(networks: Sequence[FeatureNetwork], options: Options) -> gpunn.Trace:
    """What the loss, or the strength of the deepest dream, and its gradient run."""
    photograph = next(iter(options.photographs.values()))
    goal = Goal.of(networks, photograph, options.painting)
    image = photograph.clone().requires_grad_()
    with gpunn.trace() as trace:
        if options.dreams:
            strength(networks[0], networks[0].dream[-1], image).backward()
        else:
            goal.loss(image[None], options.setting.judged).backward()
    return trace


def image_for(parser: argparse.ArgumentParser, option: str, path: Path) -> torch.Tensor:
    """The image of a file; one that cannot be used is a usage error."""
    try:
        return read_image(path)
    except ValueError as error:
        parser.error(f"{option}: {error}")


def parse(argv: Sequence[str] | None) -> Options:
    """The options of a command line."""
    parser = parser_for(
        __doc__, "style_transfer", seed="of everything random",
        steps=f"of a picture or dream, at each size (default: {FULL.steps}, {FULL.dream_steps})",
        quick="one picture, half the size",
    )  # fmt: skip
    parser.add_argument("--content", type=Path, help="a photograph, for the two that are here")
    parser.add_argument("--style", type=Path, default=PAINTING, help="a painting, for Van Gogh's")
    parser.add_argument("--weights", type=Path, help="torchvision's of VGG-19: a state_dict's file")
    parser.add_argument("--dream", action="store_true", help="amplify what a layer sees")
    given = parser.parse_args(argv)
    setting = QUICK if given.quick else FULL
    if given.steps is not None:
        setting = replace(setting, **{"dream_steps" if given.dream else "steps": given.steps})
    device, samples = device_of(parser, given.device), sample_photographs()
    chosen = dict(itertools.islice(samples.items(), setting.n_photographs))
    if given.content is not None:
        chosen = {given.content.stem: image_for(parser, "--content", given.content)}
    style = image_for(parser, "--style", given.style)
    # By their pixels: another photograph can have the name of one of the samples.
    known = {digest([image]): image for image in (*chosen.values(), *samples.values())}
    known.pop(digest([style]), None)
    painting = resized(style, setting.side).to(device)
    photographs = {k: resized(image, setting.side).to(device) for k, image in chosen.items()}
    try:
        vgg = vgg19_network(given.weights).to(device) if given.weights is not None else None
    except ValueError as error:
        parser.error(f"--weights: {error}")
    usual = given.content is None and given.style == PAINTING and vgg is None
    return Options(
        device, given.seed, setting, given.out, photographs, painting, list(known.values()), vgg,
        given.dream, usual, given.resume,
    )  # fmt: skip


def figure_of(pictures: Sequence[Picture], options: Options) -> str:
    """The figures of the worst of the pictures that are held to the expectation."""
    held = [picture for picture in pictures if picture.ratio == options.setting.judged]
    distance, edges = max(p.distance for p in held), min(p.edges for p in held)
    expected = ("", "")
    if options.usual:
        expected = (
            f" (expected: at most {DISTANCE_EXPECTED:.0%})",
            f" (expected: at least {EDGES_EXPECTED})",
        )
    return (
        f"Gram distance from the painting: {distance:.2%} of the photograph's{expected[0]}; "
        f"correlation of edges with the photograph: {edges:.2f}{expected[1]}"
    )


def growth_of(growth: float, options: Options) -> str:
    """The figure of the dreams."""
    expected = f" (expected: at least {DREAM_EXPECTED})" if options.usual else ""
    return f"What a layer sees is {growth:.2f} times as strong, or more{expected}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, whose last line is the figure that it reached; 1 if it cannot be resumed."""
    options = parse(argv)
    try:
        journal = open_journal(options.out, options.resume, options.chosen())
    except CANNOT_RESUME as error:
        print(error, file=sys.stderr)
        return 1
    with threads(2):
        networks = networks_for(options, journal)
        print(f"On {options.device} ran:\n{trace_of(networks, options)}")
        if options.dreams:
            growth, sheets = dream_of(networks[0], options, journal)
            reached = growth_of(growth, options)
        else:
            pictures, sheets = paint(networks, options, journal)
            reached = figure_of(pictures, options)
            for picture in pictures:
                print(f"{picture.name}, {picture.title}")
    print("Pictures:", *sheets)
    print(reached)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
