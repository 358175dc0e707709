"""torch.fx leaves gpunn's layers whole when it traces a model, as it leaves torch's.

Looked into, a layer in training would be traced as one that always is, one that asks for the number
of its input's dimensions could not be traced at all, and what ran then would be torch's functions.
"""

from __future__ import annotations

import torch
import torch.fx

_is_leaf = torch.fx.Tracer.is_leaf_module


def is_leaf_module(self: torch.fx.Tracer, m: torch.nn.Module, module_qualified_name: str) -> bool:
    """``torch.fx.Tracer.is_leaf_module``, which knows torch's layers by the name of their file."""
    return type(m).__module__.startswith("gpunn.nn.") or _is_leaf(self, m, module_qualified_name)


def keep_layers_whole() -> None:
    """Have every tracer of torch.fx that does not decide for itself ask ``is_leaf_module``."""
    torch.fx.Tracer.is_leaf_module = is_leaf_module  # type: ignore[method-assign]
