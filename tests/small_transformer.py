"""A Transformer that translates for tests, and sentences for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpunn import models

SIZES: dict[str, Any] = {
    "source_size": 11, "target_size": 9, "d_model": 24, "n_heads": 3, "n_layers": 2, "d_hidden": 20,
    "max_length": 12,
}  # fmt: skip
PADDING, START, END = 0, 1, 2


def small(device: str = "cpu", **options: Any) -> models.TranslationTransformer:
    """No bias or norm as it starts, and not sure of one token, whatever was said before."""
    model = models.TranslationTransformer(**{**SIZES, "dropout": 0.0, **options}).to(device)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.output.weight.data *= 3
    return model.eval()


def words(size: int, *shape: int) -> Tensor:
    """None of them special."""
    return torch.randint(3, size, shape)


def sentences(device: str) -> tuple[Tensor, Tensor]:
    """Of five and three words, padded; and the beginnings of translations, (2, 4)."""
    source = words(11, 2, 5)
    source[1, 3:] = PADDING
    target = torch.cat([torch.full((2, 1), START), words(9, 2, 3)], 1)
    return source.to(device), target.to(device)


def assert_same_sentences(got: Tensor, without_padding: Tensor) -> None:
    """Up to their end; then ``got`` is padded."""
    for mine, theirs in zip(got.tolist(), without_padding.tolist(), strict=True):
        n = theirs.index(END) + 1 if END in theirs else len(theirs)
        assert mine[:n] == theirs[:n]
        assert set(mine[n:]) <= {PADDING}
