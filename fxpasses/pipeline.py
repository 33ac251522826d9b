"""The pipeline: a graph and options in, a rewritten copy and a report out. Every door leads here."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fxpasses.graph.collector import collector_paused
from fxpasses.graph.context import Executor, GraphContext
from fxpasses.graph.copying import copy_graph_module
from fxpasses.graph.metadata import ensure_metadata
from fxpasses.graph.modes import Modes
from fxpasses.options import Options
from fxpasses.passes.folding.bn_before_conv import BnBeforeConv
from fxpasses.passes.folding.conv_affine import AffineAcrossViews, ConvAffine
from fxpasses.passes.folding.conv_bn import EfficientConvBnEval
from fxpasses.passes.folding.parallel import ParallelConvMerge
from fxpasses.passes.layout.eager_strides import write_out_eagers_strides
from fxpasses.passes.layout.passes import LAYOUT
from fxpasses.passes.precision.lowering import PRECISION
from fxpasses.passes.training.activation_masks import ACTIVATION_MASKS
from fxpasses.report.report import Report
from fxpasses.rewrite.driver import Driver
from fxpasses.rewrite.packages import register_packages
from fxpasses.rewrite.registry import OURS, REGISTRY
from fxpasses.torch_internals.versions import require_supported_torch


def run_passes(
    graph_module: GraphModule,
    example_inputs: Sequence[Any] | None,
    options: Options,
    *,
    executor: Executor,
    trainable: frozenset[str] = frozenset(),
    wanted: frozenset[str] = frozenset(),
    keeps_weights: bool = False,
    held: Mapping[str, torch.Tensor] | None = None,
    parameters: frozenset[str] = frozenset(),
    results: frozenset[int] | None = None,
) -> tuple[GraphModule, Report]:
    """Runs the passes that the options select over a copy of the graph.

    Args:
        graph_module: the graph; it is not changed.
        example_inputs: one value per placeholder, needed where the graph carries no metadata.
        options: what the user chose.
        executor: who will run the graph.
        trainable: names of placeholders that require grad, where the metadata does not tell.
        wanted: names of rules that are applied whether or not it pays.
        keeps_weights: whether parameter work is done once per version.
        held: the parameters and buffers of an exported program, by placeholder, where no input of a call
            shares storage with them.
        parameters: as in `GraphContext`.
        results: likewise.

    Raises:
        FxpassesError: an unknown pass, missing metadata, an unsupported torch.
    """
    require_supported_torch()
    register_all()
    passes = REGISTRY.pipeline(options)
    with collector_paused():
        copied = copy_graph_module(graph_module)
        trainable |= _trainable_inputs(copied, example_inputs)
        ensure_metadata(copied, example_inputs)
        context = GraphContext(
            module=copied,
            initial_modes=Modes(grad=torch.is_grad_enabled()),
            executor=executor,
            weights_cached=keeps_weights,
            trainable=trainable,
            held=held or {},
            parameters=parameters,
            results=results,
        )
        write_out_eagers_strides(context)
        return copied, Driver(passes, options, wanted).run(context)


def _trainable_inputs(graph_module: GraphModule, example_inputs: Sequence[Any] | None) -> frozenset[str]:
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    return frozenset(
        node.name
        for node, given in zip(placeholders, example_inputs or (), strict=False)
        if isinstance(given, torch.Tensor) and given.requires_grad
    )


def register_all() -> None:
    """Registers the passes that fxpasses ships, and once a process those that other packages bring.

    To be called before the registry is asked for anything.
    """
    names = REGISTRY.names()
    family = (
        EfficientConvBnEval(),
        ConvAffine(),
        AffineAcrossViews(),
        ParallelConvMerge(),
        BnBeforeConv(),
    )
    for shipped in (*family, ACTIVATION_MASKS, PRECISION, LAYOUT):
        if shipped.name not in names:
            REGISTRY.register(shipped, OURS)
    _register_packages_once()


_loading = threading.RLock()
_loaded = False


def _register_packages_once() -> None:
    """Other threads wait; what a package imports may lead here again, and goes on."""
    global _loaded
    with _loading:
        if not _loaded:
            _loaded = True
            register_packages(REGISTRY)
