"""FX graphs and the modules that hold them.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import torch


def make_graph_module(root: torch.nn.Module, graph: torch.fx.Graph, class_name: str) -> torch.fx.GraphModule:
    """A graph module that writes its Python code when it is first called or printed, not before."""
    from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph, class_name=class_name)


def is_erased(node: torch.fx.Node) -> bool:
    """Whether a node has been taken out of its graph."""
    return bool(node._erased)
