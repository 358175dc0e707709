"""Which methods of torch's a user replaced in a layer: gpunn's must not compute past them."""

from __future__ import annotations

import torch


def overrides(module: torch.nn.Module, base: type[torch.nn.Module], *names: str) -> bool:
    """Whether the module, or its class, has a method of its own in the place of one of ``base``."""
    # Not by the __func__ of a bound method, which torch.compile does not know.
    return any(
        name in vars(module) or getattr(type(module), name, None) is not getattr(base, name, None)
        for name in names
    )
