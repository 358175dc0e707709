"""A GPT for tests, and tokens for it."""

from __future__ import annotations

from typing import Any

import torch

from gpunn import models

SIZES: dict[str, int] = dict(vocab_size=23, n_positions=12, n_embd=24, n_layer=2, n_head=3)


def small_gpt(device: str = "cpu", **arguments: Any) -> models.GPT:
    """Of two layers; every parameter, bias and norm included, differs from its start."""
    model = models.GPT(**{**SIZES, "dropout": 0.0, **arguments}).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens_for(model: models.GPT, *shape: int) -> torch.Tensor:
    """Drawn uniformly, on the model's device."""
    weight = model.wte.weight
    return torch.randint(len(weight), shape, device=weight.device)
