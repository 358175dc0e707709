"""Pictures of attention: maps with words on both axes, and lines between two columns of words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown",
           "tab:pink", "tab:olive")  # fmt: skip
THINNEST = 0.05  # a line of less probability is not drawn


def draw_maps(
    layers: Sequence[torch.Tensor], rows: Sequence[str], columns: Sequence[str], title: str
) -> Figure:
    """One map a head, layers from top to bottom: (heads, rows, columns) each, darkest at 1.

    A row says where the word at its left, the one that is predicted there, comes from.
    """
    n_heads = len(layers[0])
    size = 0.9 + 0.16 * len(columns), 0.9 + 0.2 * len(rows)
    figure = Figure(
        figsize=(1.2 + n_heads * size[0], 0.8 + len(layers) * size[1]), layout="constrained"
    )
    grid = figure.subplots(len(layers), n_heads, sharex=True, sharey=True, squeeze=False)
    for i, heads in enumerate(layers):
        for j, weights in enumerate(heads):
            axes = grid[i, j]
            axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set_title(f"layer {i + 1}, head {j + 1}", fontsize=9)
            axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
            axes.set_yticks(range(len(rows)), rows, fontsize=8)
            axes.tick_params(length=0)
    figure.suptitle(title, fontsize=11)
    return figure


def _lines(axes: Axes, heads: torch.Tensor, left: Sequence[str], right: Sequence[str]) -> None:
    """From each word at the left to what it attends to at the right, a colour a head."""
    bottom = max(len(left), len(right)) - 1
    places = [
        [i + (bottom - len(words) + 1) / 2 for i in range(len(words))] for words in (left, right)
    ]
    for head, (weights, colour) in enumerate(zip(heads.tolist(), COLOURS, strict=False)):
        shift = 0.08 * (head - (len(heads) - 1) / 2)  # so that no head hides another
        for i, row in enumerate(weights):
            for j, weight in enumerate(row):
                if weight >= THINNEST:
                    y = places[0][i] + shift, places[1][j] + shift
                    axes.plot([0, 1], y, color=colour, alpha=weight, linewidth=2.5)
    for words, heights, x, align in (
        (left, places[0], -0.04, "right"),
        (right, places[1], 1.04, "left"),
    ):
        for word, height in zip(words, heights, strict=True):
            axes.text(x, height, word, ha=align, va="center", fontsize=11)
    axes.set(xlim=(-0.75, 1.75), ylim=(bottom + 0.6, -0.6))
    axes.axis("off")


def draw_lines(
    panels: Sequence[tuple[str, torch.Tensor, Sequence[str], Sequence[str]]], title: str
) -> Figure:
    """Panels side by side: a title, weights (heads, left, right), and the words of either side."""
    tallest = max(max(len(left), len(right)) for _, _, left, right in panels)
    figure = Figure(figsize=(4.6 * len(panels), 1.6 + 0.36 * tallest), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, heads, left, right) in zip(grid, panels, strict=True):
        _lines(axes, heads, left, right)
        axes.set_title(name, fontsize=10)
    n_heads = max(len(heads) for _, heads, _, _ in panels)
    handles = [
        Line2D([], [], color=colour, linewidth=2.5, label=f"head {i + 1}")
        for i, colour in enumerate(COLOURS[:n_heads])
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=n_heads, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure
