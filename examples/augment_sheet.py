"""A contact sheet of random distortions, so that a network does not learn pictures by heart.

    python examples/augment_sheet.py [--device auto] [--seed 0] [--out FOLDER] [--quick]

A picture stays what it is when it is turned, moved, cut or seen in another light, so a network that
is shown it otherwise each time learns more from it. Each row is one distortion of a photograph,
from none to strong, by the same draw; then come draws of flips, of crops and of all at once, and
digits that are bent, as if by another hand. The photographs are bytes, as they are read; in one
pass, a kernel makes of them the distorted ones, as a network takes them.

On a GPU it runs on gpunn's kernel, on a CPU on PyTorch's own operations, and with
TRITON_INTERPRET=1 in the environment on the kernel, compiled for the CPU. The printed trace says
which ran. A seed and a picture's number determine it: some are drawn again in other batches, and
compared.

Data: china.jpg by danielbuechele and flower.jpg by vultilion (both flickr.com; so their addresses
say), licence CC BY 2.0, and the digits, all of which scikit-learn ships. Paper: P. Simard,
D. Steinkraus and J. Platt, "Best practices for convolutional neural networks applied to visual
document analysis", 2003.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import gpunn
import gpunn.functional as GF
from command_line import device_of, parser_for

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits, load_sample_image
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

COLUMNS, QUICK_COLUMNS = 7, 3
REDUCED = 5
DIGITS, DIGIT_SIZE = 10, 85

Asked = dict[str, Any]
# Title, photograph, and what is asked for at a strength from 0 to 1.
GROWING: list[tuple[str, str, Callable[[float], Asked]]] = [
    ("rotation, to 45°", "flower", lambda s: {"rotation": (45 * s, 45 * s), "fill": 127}),
    ("shear, to 30°", "china", lambda s: {"shear_x": (30 * s, 30 * s), "fill": 127}),
    ("scale, to 2.5", "flower", lambda s: {"scale": (1 + 1.5 * s, 1 + 1.5 * s)}),
    (
        "translation, to 40 % across and 20 % down; outside, the picture is reflected",
        "china",
        lambda s: {
            "translation_x": (0.4 * s, 0.4 * s),
            "translation_y": (0.2 * s, 0.2 * s),
            "padding_mode": "reflection",
        },
    ),
    (
        "elastic distortion, to 12 pixels, of nodes 16 pixels apart",
        "china",
        lambda s: {
            "elastic_amplitude": 12 * s,
            "elastic_spacing": 16.0,
            "padding_mode": "border",
        },
    ),
    ("brightness, from 1 to 2", "flower", lambda s: {"brightness": (1 + s, 1 + s)}),
    ("contrast, from 1 to 0.2", "china", lambda s: {"contrast": (1 - 0.8 * s, 1 - 0.8 * s)}),
    ("saturation, from 1 to 0", "flower", lambda s: {"saturation": (1 - s, 1 - s)}),
]
DRAWN: list[tuple[str, str, Asked]] = [
    ("flips, each with probability 1/2", "china", {"horizontal_flip": 0.5, "vertical_flip": 0.5}),
    ("crops of 10 to 60 % of the area", "flower", {"crop_area": (0.1, 0.6)}),
    (
        "all together",
        "china",
        {
            "horizontal_flip": 0.5,
            "rotation": 15,
            "shear_x": 10,
            "crop_area": (0.3, 1.0),
            "elastic_amplitude": 4.0,
            "elastic_spacing": 16.0,
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.6,
            "padding_mode": "reflection",
        },
    ),
]
BENT: Asked = {
    "rotation": 10, "shear_x": 12, "scale": (0.75, 0.95),
    "elastic_amplitude": 8.0, "elastic_spacing": 16.0, "size": DIGIT_SIZE,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Distorted pictures, (n, C, H, W), and what they are."""

    title: str
    pictures: torch.Tensor


def photograph(name: str) -> torch.Tensor:
    """(H, W, 3) bytes: the mean of each square of REDUCED pixels a side."""
    pixels = load_sample_image(f"{name}.jpg").astype(np.float64)
    height, width = (length // REDUCED for length in pixels.shape[:2])
    squares = pixels[: height * REDUCED, : width * REDUCED].reshape(
        height, REDUCED, width, REDUCED, 3
    )
    return torch.from_numpy(squares.mean((1, 3)).round().astype(np.uint8))


def digits() -> torch.Tensor:
    """One of each digit, (10, 1, 8, 8), black on white."""
    data = load_digits()
    first = [int(np.flatnonzero(data.target == digit)[3]) for digit in range(DIGITS)]
    return torch.from_numpy(1 - data.images[first, None].astype(np.float32) / 16)


def distorted(photo: torch.Tensor, n: int, seed: int, asked: Asked) -> torch.Tensor:
    """n pictures, (n, 3, H, W) of floats, of one of bytes that is not copied."""
    pictures = photo.expand(n, -1, -1, -1)
    return GF.augment(pictures, layout="NHWC", dtype=torch.float32, seed=seed, **asked)


def grown(
    photo: torch.Tensor, columns: int, seed: int, asked: Callable[[float], Asked]
) -> torch.Tensor:
    """The first draw of a seed, stronger from column to column."""
    strengths = [column / (columns - 1) for column in range(columns)]
    return torch.cat([distorted(photo, 1, seed, asked(strength)) for strength in strengths])


def draw_rows(device: torch.device, columns: int, seed: int) -> list[Row]:
    """All of the sheet."""
    photos = {name: photograph(name).to(device) for name in ("china", "flower")}
    rows = [Row(title, grown(photos[name], columns, seed, asked)) for title, name, asked in GROWING]
    rows += [
        Row(title, distorted(photos[name], columns, seed, asked)) for title, name, asked in DRAWN
    ]
    title = "digits: rotation, shear, scale and elastic distortion, at ten times their resolution"
    bent = GF.augment(digits().to(device), seed=seed, fill=1.0, **BENT)
    return [*rows, Row(title, bent)]


def drawn_again(rows: Sequence[Row], device: torch.device, columns: int, seed: int) -> int:
    """How many of the draws are the same when those behind them in their row are left out."""
    same = 0
    for row, (_, name, asked) in zip(rows[len(GROWING) : -1], DRAWN, strict=True):
        photo = photograph(name).to(device)
        for n in range(1, columns + 1):
            same += torch.equal(distorted(photo, n, seed, asked)[-1], row.pictures[n - 1])
    return same


def strip(pictures: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The pictures side by side, (H, W, 3), with white between them."""
    white = torch.nn.functional.pad(pictures.cpu(), (2, 2), value=1.0).expand(-1, 3, -1, -1)
    return torch.cat(list(white), dim=2).permute(1, 2, 0).numpy()


def draw(rows: Sequence[Row]) -> Figure:
    """A strip a row, under its title."""
    strips = [strip(row.pictures) for row in rows]
    widest = max(image.shape[1] for image in strips)
    figure = Figure(figsize=(9.5, 1.17 * len(rows)), layout="constrained")
    for axes, row, image in zip(figure.subplots(len(rows)), rows, strips, strict=True):
        axes.imshow(image.clip(0, 1), interpolation="lanczos")
        axes.set_xlim(-0.5, widest - 0.5)
        axes.set_axis_off()
        axes.set_title(row.title, loc="left", fontsize=9, pad=2)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print what it found; the last line is the figure that it reached."""
    parser = parser_for(
        __doc__, "augment_sheet", seed="of what is drawn",
        steps="of no effect: nothing is learned", quick=f"{QUICK_COLUMNS} columns",
        resume="of no effect: nothing is learned",
    )  # fmt: skip
    given = parser.parse_args(argv)
    device, columns = device_of(parser, given.device), QUICK_COLUMNS if given.quick else COLUMNS
    with gpunn.trace() as trace:
        rows = draw_rows(device, columns, given.seed)
    print(trace)
    picture = given.out / "sheet.jpg"
    draw(rows).savefig(picture, dpi=90, bbox_inches="tight", pad_inches=0.1)
    print("Picture:", picture)
    expected = len(DRAWN) * columns
    same = drawn_again(rows, device, columns, given.seed)
    print(f"Draws that are the same in another batch: {same} of {expected} (expected: {expected})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
