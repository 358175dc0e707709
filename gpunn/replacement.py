"""Replacing the layers of an existing model by gpunn's, in place, and back.

gpunn's layers subclass torch's and add no parameters, so a layer is replaced by changing its class:
parameters, buffers, hooks, optimizer references and the ``state_dict`` stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import gpunn.nn

# What gpunn's layers have beside torch's attributes, and the values that ask for nothing.
PLAIN = {
    "activation": None, "dropout_p": 0.0, "positional": None, "return_sum": False, "scale": 1.0,
}  # fmt: skip


@dataclass
class Replacement:
    """What ``accelerate`` or ``restore`` did to a model; printing it shows a table."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Module name to the class that it was given."""
    kept: dict[str, str] = field(default_factory=dict)
    """Module name to the reason why it was left as it is."""

    def __str__(self) -> str:
        rows = [(name or "(model)", "→", text) for name, text in self.replaced.items()]
        rows += [(name or "(model)", "·", f"kept: {text}") for name, text in self.kept.items()]
        width = max((len(row[0]) for row in rows), default=0)
        return "\n".join(f"{name:{width}} {mark} {text}" for name, mark, text in rows)


def _counterparts() -> dict[type[torch.nn.Module], type[torch.nn.Module]]:
    """torch's class to gpunn's class of the same name, for all that gpunn defines."""
    pairs = {}
    for name in gpunn.nn.__all__:
        ours, theirs = getattr(gpunn.nn, name), getattr(torch.nn, name, None)
        if theirs is not None and ours is not theirs:
            pairs[theirs] = ours
    return pairs


def accelerate(model: torch.nn.Module) -> Replacement:
    """Give every layer of ``model`` that gpunn has a counterpart of gpunn's class, in place.

    A subclass of a torch layer is left alone, since its own code may depend on torch's forward.
    """
    return _change_classes(model, _counterparts(), "gpunn has no such layer")


def restore(model: torch.nn.Module) -> Replacement:
    """Give every gpunn layer of ``model`` its torch class back, in place.

    A layer with a fused activation or dropout has no torch counterpart, and is left as it is; so
    are the layers of a module that calls them with what torch's do not take, such as a residual. It
    says so by an attribute ``needs_gpunn = True``, as ``gpunn.models.GPT`` does, and layers to
    which ``fold_batch_norm`` gave a residual.
    """
    back = {ours: theirs for theirs, ours in _counterparts().items()}
    needed = [m for module in model.modules() if _needs_gpunn(module) for m in module.modules()]
    return _change_classes(model, back, "not a gpunn layer", needed)


def _needs_gpunn(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "needs_gpunn", False))


def _change_classes(
    model: torch.nn.Module,
    classes: dict[type[torch.nn.Module], type[torch.nn.Module]],
    otherwise: str,
    needed: Sequence[torch.nn.Module] = (),
) -> Replacement:
    record, as_they_are = Replacement(), set(needed)
    for name, module in model.named_modules():
        new, reason = classes.get(type(module)), _reason_to_keep(module)
        if module in as_they_are:
            reason = "it, or the module around it, needs gpunn's"
        if new is not None and reason is None:
            module.__class__ = new
            record.replaced[name] = f"{new.__module__.partition('.')[0]} {new.__name__}"
        elif reason is not None or not any(True for _ in module.children()):
            record.kept[name] = f"{type(module).__name__}: {reason or otherwise}"
    return record


def _reason_to_keep(module: torch.nn.Module) -> str | None:
    """Why a layer should stay what it is, although its class has a counterpart."""
    given, layer = vars(module) | module._parameters | module._buffers, type(module)
    given |= module._modules
    fusing = (
        torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.modules.batchnorm._BatchNorm,
        torch.nn.modules.instancenorm._InstanceNorm, torch.nn.GroupNorm, torch.nn.LayerNorm,
        torch.nn.RMSNorm, torch.nn.Softmax, torch.nn.LogSoftmax, torch.nn.Softmin,
        torch.nn.Embedding,
    )  # fmt: skip
    if layer is torch.nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "the attention around it computes it"
    if has_own_method(module):
        return "it has a method of its own in the place of its class's"
    if layer.__module__.startswith("gpunn."):
        if not _namesake(layer):
            return "torch has no such layer"
        fused = isinstance(module, fusing) and _fuses(given)
        return "its fused parts have no torch layer" if fused else None
    if isinstance(module, fusing) and _fuses(given):
        return "it has an attribute that gpunn's layer would take for its own"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its parameters are computed by a parametrization"
    watched = torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer
    if isinstance(module, watched) and layer not in watched:
        return "in eval mode torch's fused path may compute it, past the layers in it"
    return None


def has_own_method(module: torch.nn.Module) -> bool:
    """Whether a layer has a function of its own in the place of one of its class."""
    # What torch compiled of it in place follows its class.
    own = {name for name, value in vars(module).items() if callable(value)}
    return any(hasattr(type(module), name) for name in own - {"_compiled_call_impl"})


def _fuses(given: dict[str, object]) -> bool:
    """Whether a layer's settings ask for more than torch's layer does.

    An attribute of the user's own may be anything: a tensor is not equal to a number, or not.
    """
    found = {name: given[name] for name in PLAIN if name in given}
    plain = {n: v is None or isinstance(v, (int, float)) for n, v in found.items()}
    return any(not (plain[name] and value == PLAIN[name]) for name, value in found.items())


def _namesake(layer: type) -> bool:
    return hasattr(torch.nn, layer.__name__)
