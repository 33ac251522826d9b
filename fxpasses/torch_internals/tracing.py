"""Tracing, and the decompositions of what was traced.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch._ops import OpOverload


def core_decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """What turns a graph into core ATen."""
    from torch._decomp import core_aten_decompositions

    table = cast(Mapping[OpOverload, Callable[..., Any]], core_aten_decompositions())
    return dict(table.items())


def trace_symbolically(model: torch.nn.Module, inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """The model before dispatch, with symbolic sizes; its parameters stay what they are."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(model, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True)
    return traced(*inputs)


@functools.cache
def _export_decompositions() -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What `run_decompositions()` would work out anew at every call: implicit decompositions, and others."""
    from torch.export.exported_program import _split_decomp_table_to_cia_and_python_decomp

    table: dict[Any, Any] = {**torch.export.default_decompositions()}
    implicit, others = _split_decomp_table_to_cia_and_python_decomp(dict(table))
    return {op: (op in table, decompose) for op, decompose in implicit.items()}, others


def run_default_decompositions(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program.run_decompositions()` in a seventh of its time, for small programs.

    The public method overrides some 500 composite operators one by one, and puts them back. All that the
    program does not name decompose in that way without being told, but those that export keeps.
    """
    try:
        from torch.export.exported_program import _decompose_exported_program

        implicit, others = _export_decompositions()
    except ImportError:
        return program.run_decompositions()  # type: ignore[no-any-return]  # decorated without types
    named = {node.target for node in program.graph.nodes}
    return _decompose_exported_program(  # type: ignore[no-any-return]  # written without types
        program,
        cia_to_decomp={
            op: decomposition for op, (known, decomposition) in implicit.items() if op in named or not known
        },
        python_decomp_table=others,
        joint_loss_index=None,
        decompose_custom_triton_ops=False,
    )
