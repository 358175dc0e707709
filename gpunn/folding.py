"""Folding batch normalisations into the convolutions and linears before them, for inference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

import gpunn.functional as GF
from gpunn.functional.activation import resolve_activation
from gpunn.nn.transformer_layer import HOOKS
from gpunn.replacement import accelerate, has_own_method

IN_PLACE = {
    "iadd", "iand", "ifloordiv", "imod", "imul", "ior", "ipow", "isub", "itruediv", "ixor",
    "setitem",
}  # fmt: skip
"""What ``operator`` calls functions that change their first argument."""


def fold_batch_norm(model: torch.nn.Module) -> torch.fx.GraphModule:
    """A copy of ``model`` for eval, where convolutions and linears do the normalising.

    W' = W s and b' = (b - mean) s + bias, with s = weight / sqrt(var + eps), for a batch
    normalisation by running statistics that alone reads the result of a ``Conv1d``, ``Conv2d``,
    ``Conv3d``, ``ConvTranspose1d``, ``ConvTranspose2d`` or ``Linear``, torch's or gpunn's. What the
    normalisation fused, activation and residual, is fused into that layer. One that follows
    something else stays, as does one with hooks or methods of its own, after a layer with such, or
    after one whose parameters are read elsewhere; and all stay while there is a hook on all
    modules. All layers become gpunn's; the model itself is not changed.

    Source: B. Jacob et al. (2018), https://arxiv.org/abs/1712.05877, section 3.2.

    Raises:
        torch.fx.proxy.TraceError: the model's forward depends on its input's values.
    """
    model = copy.deepcopy(model).eval()
    accelerate(model)
    folded = torch.fx.symbolic_trace(model)
    for node in list(folded.graph.nodes):
        layer, norm = _foldable(folded, node)
        place = None if layer is None else _place(folded, node)
        if norm is not None and place is not None:
            _fold(layer, norm)
            _rewire(folded.graph, node, place, layer, norm)
    folded.graph.lint()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded


def _module_of(model: torch.fx.GraphModule, node: Any) -> torch.nn.Module | None:
    """What a node calls, if nothing else in the graph calls it."""
    if not isinstance(node, torch.fx.Node) or node.op != "call_module":
        return None
    calls = [n for n in model.graph.nodes if n.op == "call_module" and n.target == node.target]
    return model.get_submodule(str(node.target)) if len(calls) == 1 else None


def _foldable(
    model: torch.fx.GraphModule, node: torch.fx.Node
) -> tuple[Any, _BatchNorm] | tuple[None, None]:
    """Layer and normalisation of a pair that can be folded, where ``node`` is the latter."""
    norm, before = _module_of(model, node), node.args[0] if node.args else None
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return None, None
    layer = _module_of(model, before)
    if not isinstance(before, torch.fx.Node) or not isinstance(layer, (_ConvNd, torch.nn.Linear)):
        return None, None
    adds = len(before.args) != 1 or before.kwargs
    fuses = adds or getattr(layer, "activation", None) or getattr(layer, "dropout_p", 0.0)
    in_groups = isinstance(layer, _ConvTransposeNd) and layer.groups > 1
    computed = torch.nn.utils.parametrize.is_parametrized(layer)
    if len(before.users) > 1 or fuses or in_groups or computed or _is_changed(layer, norm):
        return None, None
    return (None, None) if _is_read_elsewhere(model, layer) else (layer, norm)


def _is_changed(layer: Any, norm: _BatchNorm) -> bool:
    """Whether one does more than its class, or the normalisation is none that became gpunn's."""
    hooked = any(vars(module).get(name) for module in (layer, norm) for name in HOOKS)
    watched = hooked or torch.nn.modules.module._has_any_global_hook()
    patched = has_own_method(layer) or has_own_method(norm)
    return watched or patched or not type(norm).__module__.startswith("gpunn.")


def _is_read_elsewhere(model: torch.fx.GraphModule, layer: Any) -> bool:
    """Whether the graph, or what it calls beside the layer, has what folding changes."""
    used: list[torch.Tensor] = []
    for node in model.graph.nodes:
        owner, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr":
            used.append(getattr(model.get_submodule(owner), name))
        elif node.op == "call_module" and model.get_submodule(str(node.target)) is not layer:
            used.extend(model.get_submodule(str(node.target)).parameters())
    return any(own is other for own in layer.parameters() for other in used)


def _place(model: torch.fx.GraphModule, node: torch.fx.Node) -> torch.fx.Node | None:
    """Before which node the layer may stand: itself or, if it is to add a residual, the norm.

    None if what it reads may be written to in between.
    """
    before, nodes = node.args[0], list(model.graph.nodes)
    assert isinstance(before, torch.fx.Node)
    if node.all_input_nodes == [before]:
        return before
    between = nodes[nodes.index(before) + 1 : nodes.index(node)]
    return None if any(_may_write(model, other) for other in between) else node


def _may_write(model: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether a node may change a tensor in place."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else node.target.__name__
    asked = any(argument is True for argument in (*node.args, node.kwargs.get("inplace")))
    return name.endswith("_") or name in IN_PLACE or asked or "out" in node.kwargs


def _fold(layer: Any, norm: _BatchNorm) -> None:
    """Change the layer's parameters."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    layer.weight, layer.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
        norm.bias, isinstance(layer, _ConvTransposeNd),
    )  # fmt: skip


def _of_rows(x: torch.Tensor) -> torch.Tensor:
    """x, if a normalisation of a linear's results was one of its features."""
    if x.dim() != 2:
        raise RuntimeError(
            "input: a linear into which a batch normalisation was folded expects (N, features), "
            f"got shape {tuple(x.shape)}"
        )
    return x


def _rewire(
    graph: torch.fx.Graph, node: torch.fx.Node, place: torch.fx.Node, layer: Any, norm: Any
) -> None:
    """Take the normalisation out of the graph, and keep what it fused."""
    before = node.args[0]
    assert isinstance(before, torch.fx.Node)
    rest = [*node.args[1:], *node.kwargs.values()]
    residual, activation = rest[0] if rest else None, getattr(norm, "activation", None)
    with graph.inserting_before(before):
        if isinstance(layer, torch.nn.Linear):
            before.update_arg(0, graph.call_function(_of_rows, (before.args[0],)))
    fuses = type(layer).__module__.startswith("gpunn.nn.")
    if fuses and residual is None:
        layer.activation, activation = activation, None
    with graph.inserting_before(place):
        result = graph.node_copy(before, lambda given: given)
        if fuses and residual is not None:
            result.kwargs = {"residual": residual}
            layer.needs_gpunn = True
        elif residual is not None:
            result = graph.call_function(torch.add, (result, residual))
        if activation is not None:
            result = _activated(graph, result, activation)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    graph.erase_node(before)


def _activated(graph: torch.fx.Graph, node: torch.fx.Node, activation: Any) -> torch.fx.Node:
    name, parameters = resolve_activation(activation)
    if name == "gelu_tanh":
        return graph.call_function(GF.gelu, (node, "tanh"))
    parameters = [] if name == "relu6" else parameters
    return graph.call_function(getattr(GF, name), (node, *parameters))
