"""A convolution finds the edges of a photograph.

    python examples/edges.py [--device auto] [--out FOLDER] [--quick]

Sobel's filter weighs the pixels to the right of a point against those to its left: the answer is
large where it gets brighter from left to right. Turned by quarters it makes the four filters of one
``gpunn.functional.conv2d``, whose ReLU keeps the edges that each was made for. It is what the first
layer of a convolutional network does, with filters that nobody had to learn.

On a GPU it runs on gpunn's kernel, on a CPU on PyTorch's own ops, and with TRITON_INTERPRET=1 in
the environment on the kernel, interpreted on the CPU (minutes). The printed trace says which ran.

Data: china.jpg, which scikit-learn ships, by danielbuechele (flickr.com), licence CC BY 2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import gpunn
import gpunn.functional as GF
from command_line import device_of, parser_for

try:
    from matplotlib.figure import Figure
    from scipy.ndimage import sobel
    from sklearn.datasets import load_sample_image
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
DIRECTIONS = ("to the right", "upwards", "to the left", "downwards")
EXPECTED = 1e-5


@dataclass(frozen=True)
class Result:
    """What was found."""

    edges: torch.Tensor
    """(4, H - 2, W - 2): how much brighter it gets in each of the DIRECTIONS."""
    error: float
    """The largest difference from scipy's filter."""
    trace: gpunn.Trace
    picture: Path


def photograph(step: int = 1) -> NDArray[np.float32]:
    """Every ``step``-th pixel of the photograph, (H, W, 3), from 0 to 1."""
    pixels: NDArray[np.float32] = load_sample_image("china.jpg").astype(np.float32) / 255
    return pixels[::step, ::step]


def find_edges(brightness: torch.Tensor) -> torch.Tensor:
    """The edges of an image (H, W), by DIRECTIONS; its outermost pixels have none."""
    filters = torch.stack([torch.rot90(SOBEL, turn) for turn in range(4)]).to(brightness)
    return GF.conv2d(brightness[None], filters[:, None], activation="relu")


def largest_difference(edges: torch.Tensor, brightness: torch.Tensor) -> float:
    """From the same by scipy.ndimage."""
    image = brightness.cpu().numpy()
    right, down = (sobel(image, axis)[1:-1, 1:-1] for axis in (1, 0))
    theirs = np.stack([right, -down, -right, down]).clip(min=0)
    return float(np.abs(edges.cpu().numpy() - theirs).max())


def draw(pixels: NDArray[np.float32], edges: torch.Tensor) -> Figure:
    """The photograph, its edges, and what each filter found."""
    shown = {"photograph": pixels, "edges: of all four": edges.norm(dim=0).cpu().numpy()}
    for direction, found in zip(DIRECTIONS, edges, strict=True):
        shown[f"brighter {direction}"] = found.cpu().numpy()
    figure = Figure(figsize=(9, 9.4), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(3, 2).flat, shown.items(), strict=True):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1.5)
        axes.set(title=title, xticks=[], yticks=[])
    return figure


def run(device: torch.device, out: Path, step: int) -> Result:
    """Find the edges, compare them with scipy's and draw them."""
    pixels = photograph(step)
    brightness = torch.from_numpy(pixels.mean(axis=2)).to(device)
    with gpunn.trace() as trace:
        edges = find_edges(brightness)
    picture = out / "edges.jpg"
    draw(pixels, edges).savefig(picture, dpi=80, bbox_inches="tight", pad_inches=0.1)
    return Result(edges, largest_difference(edges, brightness), trace, picture)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print what it found; the last line is the figure that it reached."""
    parser = parser_for(
        __doc__, "edges", seed="of no effect: nothing is random",
        steps="of no effect: nothing is learned", quick="every second pixel alone",
        resume="of no effect: nothing is learned",
    )  # fmt: skip
    given = parser.parse_args(argv)
    result = run(device_of(parser, given.device), given.out, 2 if given.quick else 1)
    print(result.trace)
    print("Picture:", result.picture)
    print(f"Largest difference from scipy: {result.error:.1e} (expected: at most {EXPECTED:.0e})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
