"""Augmentation by torch operations: what a CPU computes, and what a double backward goes through.

The same parameters are drawn as in ``kernels/augment.h``, in float64, and the same arithmetic is
done in float32 (or float64, for pictures in it), so that pictures differ by roundings alone.
"""

from __future__ import annotations

import torch

from gpunn.kernels.augment import (
    ANGLES,
    LARGEST_BYTE,
    PARAMETERS,
    Settings,
    bound_of,
    n_node_columns,
)
from gpunn.kernels.philox import random_words

QUADS = 4
"""Counters of a picture's parameters; behind them, one a node."""
SHARES_OF_GREY = (0.2989, 0.587, 0.114)
Parameters = dict[str, torch.Tensor]


def _uniform(words: torch.Tensor) -> torch.Tensor:
    return (words >> 8) * 2.0**-24


def draw(seed: torch.Tensor, n: int, settings: Settings) -> Parameters:
    """The parameters of n pictures, each (n,) in float64; angles are in radians."""
    picture = torch.arange(n, device=seed.device)[:, None] << 32
    quad = torch.arange(QUADS, device=seed.device)
    words = torch.stack(random_words(seed, picture | quad), dim=-1).flatten(1)
    uniform, drawn = _uniform(words).double(), {}
    for i, name in enumerate(PARAMETERS):
        least, greatest = settings.range_of(name)
        if name == "crop_ratio":
            drawn[name] = least * (greatest / least) ** uniform[:, i]
        else:
            drawn[name] = least + (greatest - least) * uniform[:, i]
    for name in ANGLES:
        drawn[name] = torch.deg2rad(drawn[name])
    return drawn


def _crop(
    drawn: Parameters, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Height, width, top and left of what is shown of each picture."""
    area, stretch = drawn["crop_area"], drawn["crop_ratio"].sqrt()
    side = (area * (height * width)).sqrt()
    whole = area == 0
    high = torch.where(whole, float(height), (side / stretch).clamp(max=height))
    wide = torch.where(whole, float(width), (side * stretch).clamp(max=width))
    return high, wide, drawn["crop_y"] * (height - high), drawn["crop_x"] * (width - wide)


def way_back(
    drawn: Parameters, input_size: tuple[int, int], size: tuple[int, int]
) -> list[torch.Tensor]:
    """a to f, each (n,): an output pixel (x, y) from the middle comes from a x + b y + c, ….

    Back through translation, rotation and scale, shear along y, along x, flips, crop.
    """
    sine, cosine = drawn["rotation"].sin(), drawn["rotation"].cos()
    shear_x, shear_y = drawn["shear_x"].tan(), drawn["shear_y"].tan()
    height, width, top, left = _crop(drawn, *input_size)
    by_y, by_x = height / size[0] / drawn["scale"], width / size[1] / drawn["scale"]
    by_x = torch.where(drawn["horizontal_flip"] < 0, -by_x, by_x)
    by_y = torch.where(drawn["vertical_flip"] < 0, -by_y, by_y)
    below_x, below_y = sine - shear_y * cosine, cosine + shear_y * sine
    a, b = by_x * (cosine - shear_x * below_x), by_x * (-sine - shear_x * below_y)
    d, e = by_y * below_x, by_y * below_y
    x, y = drawn["translation_x"] * size[1], drawn["translation_y"] * size[0]
    c = left + (width - 1) / 2 - (a * x + b * y)
    f = top + (height - 1) / 2 - (d * x + e * y)
    return [a, b, c, d, e, f]


def _spline(length: int, density: float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each pixel of a line, (length,), the first of its four nodes, and (length, 4) weights."""
    at = torch.arange(length, device=like.device, dtype=like.dtype) * density
    node = at.floor()
    t = at - node
    s = 1 - t
    inner = [(4 + r * r * (3 * r - 6)) for r in (t, s)]
    return node.long(), torch.stack([s * s * s, *inner, t * t * t], dim=1) / 6


def displacements(
    seed: torch.Tensor, n: int, size: tuple[int, int], settings: Settings, like: torch.Tensor
) -> list[torch.Tensor]:
    """By how much each pixel is moved in x and in y, (n, OH, OW) each, as ``like``'s dtype has it.

    Nodes lie on a grid; a cubic B-spline goes smoothly from one to the next.
    """
    amplitude, spacing = settings.field
    columns = n_node_columns(size[1], spacing)
    (row, down), (column, across) = (_spline(length, 1 / spacing, like) for length in size)
    taps = torch.arange(4, device=like.device)
    rows = torch.arange(n_node_columns(size[0], spacing), device=like.device)
    picture = torch.arange(n, device=like.device)[:, None, None] << 32
    node = rows[:, None] * columns + torch.arange(columns, device=like.device)
    moved = []
    for words in random_words(seed, picture | QUADS + node)[:2]:
        nodes = amplitude * (2 * _uniform(words) - 1).to(like.dtype)
        by_column = (nodes[:, :, column[:, None] + taps] * across).sum(-1)
        moved.append((by_column[:, row[:, None] + taps] * down[:, :, None]).sum(2))
    return moved


def _looked_up(at: torch.Tensor, size: int, padding_mode: str) -> torch.Tensor:
    """Where in 0 … size - 1 a place is looked up."""
    if padding_mode == "zeros":
        return at.clamp(-2, size)
    if padding_mode == "reflection":
        at = (at + 0.5).abs()
        turns = (at / size).floor()
        rest = at - turns * size
        at = torch.where(turns == 2 * (turns / 2).floor(), rest, size - rest) - 0.5
    return at.clamp(0, size - 1)


def _sampled(images: torch.Tensor, x: torch.Tensor, y: torch.Tensor, fill: float) -> torch.Tensor:
    """The bilinear mean of the four pixels around (x, y), (n, OH, OW) each, of (n, C, H, W)."""
    height, width = images.shape[2:]
    column, row = x.floor(), y.floor()
    right, below = x - column, y - row
    pixels, total = images.flatten(2), images.new_zeros(())
    for k in range(4):
        across, down = column + k % 2, row + k // 2
        inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
        place = torch.where(inside, down * width + across, 0).long()
        weight = (below if k // 2 else 1 - below) * (right if k % 2 else 1 - right)
        index = place.flatten(1)[:, None].expand(-1, images.shape[1], -1)
        found = pixels.gather(2, index).unflatten(2, x.shape[1:])
        total = total + weight[:, None] * torch.where(inside[:, None], found, fill)
    return total


def _recoloured(
    values: torch.Tensor, drawn: Parameters, settings: Settings, bound: int
) -> torch.Tensor:
    """Brightness, contrast, saturation; each clamped where it is changed."""

    def clamped(values: torch.Tensor) -> torch.Tensor:
        return values.clamp(0, bound) if settings.clamp else values

    changes = settings.recolours
    brightness, contrast, saturation = (
        drawn[name].to(values.dtype)[:, None, None, None]
        for name in ("brightness", "contrast", "saturation")
    )
    if changes[0]:
        values = clamped(brightness * values)
    if changes[1]:
        values = clamped(contrast * values + (1 - contrast) * (settings.colours[1] * bound))
    if changes[2]:
        shares = values.new_tensor(SHARES_OF_GREY)[:, None, None]
        grey = (shares * values).sum(1, keepdim=True)
        values = clamped(saturation * values + (1 - saturation) * grey)
    return values


def composed(
    images: torch.Tensor,
    seed: torch.Tensor,
    size: list[int],
    settings: Settings,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y (N, C, OH, OW), as ``kernels.augment.augment_forward`` makes it."""
    n, (height, width) = images.shape[0], images.shape[2:]
    exact = torch.float64 in (images.dtype, dtype)
    pixels = images.to(torch.float64 if exact else torch.float32)
    drawn = draw(seed, n, settings)
    a, b, c, d, e, f = (
        number.to(pixels.dtype)[:, None, None]
        for number in way_back(drawn, (height, width), (size[0], size[1]))
    )
    y, x = (
        torch.arange(length, device=images.device, dtype=pixels.dtype) - (length - 1) / 2
        for length in size
    )
    x, y = x.expand(n, size[0], -1), y[:, None].expand(n, -1, size[1])
    if settings.field[0]:
        by_x, by_y = displacements(seed, n, (size[0], size[1]), settings, pixels)
        x, y = x + by_x, y + by_y
    x, y = a * x + (b * y + c), d * x + (e * y + f)
    mode, (fill, _) = settings.padding_mode, settings.colours
    values = _sampled(pixels, _looked_up(x, width, mode), _looked_up(y, height, mode), fill)
    values = _recoloured(values, drawn, settings, bound_of(images.dtype))
    if dtype == torch.uint8:
        values = values.round().clamp(0, LARGEST_BYTE)
    elif images.dtype == torch.uint8:
        values = values / LARGEST_BYTE
    return values.to(dtype)
