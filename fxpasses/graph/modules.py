"""Leaf modules in a graph: read only where calling them is nothing but their operator.

`symbolic_trace` leaves modules of torch.nn whole. Such a call is read as its operator if the module is
exactly of a known class, with no hook, no parametrisation and no quantisation around it; anything else may
compute something else, and is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn.utils import parametrize

from fxpasses.graph.decline import Decline
from fxpasses.graph.levels import attribute
from fxpasses.graph.operands import ModuleTensor
from fxpasses.graph.schema import signature_of_function
from fxpasses.torch_internals.modules import BatchNormBase, InstanceNormBase, has_global_module_hooks

NORM_BASES = (BatchNormBase, InstanceNormBase)

PRODUCERS: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
        nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    }
)  # fmt: skip

NORMS: frozenset[type[nn.Module]] = frozenset(
    {
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
        nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    }
)  # fmt: skip

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def module_of(node: Node) -> nn.Module | None:
    """The module that a `call_module` node calls."""
    owner = node.graph.owning_module
    found = attribute(owner, str(node.target)) if owner is not None and node.op == "call_module" else None
    return found if isinstance(found, nn.Module) else None


def is_instance(node: Node, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether the node calls a module of one of the classes or of a class derived from them."""
    return isinstance(module_of(node), classes)


def read(node: Node, known: frozenset[type[nn.Module]]) -> tuple[nn.Module, dict[str, Any]] | Decline | None:
    """The module and the arguments of its call, by name.

    Returns:
        None when the module has nothing to do with the known classes; a `Decline` when it derives from one
        but may compute something else.
    """
    module = module_of(node)
    if module is None or not isinstance(module, tuple(known)):
        return None
    if parametrize.is_parametrized(module):
        return Decline("parametrized", "{} computes its parameters anew at every call", node, (node.target,))
    if type(module) not in known:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return Decline("unknown-module", "{} is a {}, which may compute more", node, (node.target, kind))
    if "forward" in vars(module):
        message = "{} has a forward of its own, which is not that of its class"
        return Decline("unknown-module", message, node, (node.target,))
    if any(getattr(module, name) for name in _HOOKS) or has_global_module_hooks():
        return Decline("hooks", "{} has hooks, which would no longer run", node, (node.target,))
    arguments = signature_of_function(type(module).forward).bind((module, *node.args), node.kwargs)
    if isinstance(arguments, str):
        return Decline("unsupported-arguments", "{} was called with {}", node, (node.target, arguments))
    return module, arguments


def operands(node: Node, module: nn.Module, names: tuple[str, ...]) -> dict[str, ModuleTensor | None]:
    """The module's own tensors by name; None for one that is not set."""
    found: dict[str, ModuleTensor | None] = {}
    for name in names:
        held = getattr(module, name, None)
        found[name] = ModuleTensor(f"{node.target}.{name}", held) if isinstance(held, torch.Tensor) else None
    return found
