"""How many copies a layout plan puts into the graph of each model, and why. Nothing is compiled or timed.

    python -m benchmarks.layout_copies --suite field
    python -m benchmarks.layout_copies --models resnet18 --layout channels_last --each

The graph is the one that inductor's passes would get, after rewriting; convolutions of one dimension are
written as images of height 1. A tensor is copied once, however many read the copy. `inputs` are copied as
they come, `weights` too or as computed from parameters alone, `outputs` for the user alone; all other copies
lie `inside`, `repairs` among them: of results that did not follow what an operator reads. A loop that
inductor writes may read the other layout without a copy, and what the graph copies anyway is copied into the
wanted one: neither is counted. `stock` is how many stock inductor would make of all these. `--each` prints
the plan's copies, with what wanted them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.fx import Graph, GraphModule, Node

from benchmarks.models.arguments import add_models, models_of, say_what_is_left_out
from benchmarks.models.cases import MODES, Case, build_inputs, build_model
from benchmarks.shared.commands import refuse
from benchmarks.shared.environment import environment_block
from fxpasses.backend.compilation import Compilation
from fxpasses.backend.rewriting import rewrite
from fxpasses.errors import FxpassesError
from fxpasses.graph.context import GraphContext
from fxpasses.graph.copying import copy_graph_module
from fxpasses.graph.modes import Modes
from fxpasses.graph.names import canonical
from fxpasses.options import Options
from fxpasses.passes.layout.assign import Goal
from fxpasses.passes.layout.lines import Lines
from fxpasses.passes.layout.passes import plan_and_carry_out
from fxpasses.passes.layout.sources import CostSource
from fxpasses.report.layout_plan import CutEdge, LayoutPlan
from fxpasses.torch_internals.aot_autograd import is_module_tensor, see_joint_graph
from fxpasses.torch_internals.dynamo import fresh_call


@dataclass(frozen=True)
class Copies:
    """The copies in the graphs of one model.

    Attributes:
        model: its specification.
        graphs: how many graphs Dynamo made of it, those without a convolution not counted.
        labelled: tensors that have a layout.
        inputs, weights, outputs, inside: copies, by what is copied.
        repairs: how many of those inside are of results that did not follow.
        stock: how many copies stock inductor would make; None where no graph was planned.
        each: every copy in words.
    """

    model: str
    graphs: int = 0
    labelled: int = 0
    inputs: int = 0
    weights: int = 0
    outputs: int = 0
    inside: int = 0
    repairs: int = 0
    stock: int | None = None
    each: tuple[str, ...] = ()

    def with_plan(self, plan: LayoutPlan, origins: Mapping[str, str]) -> Copies:
        """The sum of this and of the plan of another graph, whose nodes have these `_origins`."""
        places = [_place(edge, origins) for edge in plan.cut_edges]
        counts = {place: getattr(self, place) + places.count(place) for place in PLACES}
        counts["inside"] += plan.repairs
        return replace(
            self,
            **counts,
            graphs=self.graphs + 1,
            labelled=self.labelled + len(plan.labels),
            repairs=self.repairs + plan.repairs,
            stock=(self.stock or 0) + (plan.stock.copies if plan.stock else 0),
            each=(
                *self.each,
                *(f"{place}: {edge}" for place, edge in zip(places, plan.cut_edges, strict=True)),
            ),
        )


PLACES = ("inputs", "weights", "outputs", "inside")
"""Where a copy may be made."""


def _place(edge: CutEdge, origins: Mapping[str, str]) -> str:
    is_output = all(reader.startswith("output") for reader in edge.readers)
    return origins.get(edge.node) or ("outputs" if is_output else "inside")


def _origins(graph: Graph, weights: frozenset[str]) -> dict[str, str]:
    """Which nodes, by name, are inputs, or weights and what is computed from them alone.

    Args:
        graph: a joint graph.
        weights: the names of its inputs that are parameters and buffers.
    """
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            found[node.name] = "weights" if node.name in weights else "inputs"
            continue
        above = {found.get(operand.name, "inside") for operand in node.all_input_nodes}
        if above == {"weights"}:
            found[node.name] = "weights"
        elif above == {"inputs"} and node.target is torch.ops.aten.unsqueeze.default:
            found[node.name] = "inputs"
    return found


def count_copies(case: Case, layout: Goal = "channels_last") -> Copies:
    """Plans the graphs of a model.

    Raises:
        ModelSpecError: the model cannot be built.
        FxpassesError: it cannot be rewritten.
    """
    model = build_model(case)
    inputs = build_inputs(case, model)
    found: list[Copies] = [Copies(case.model)]

    def planned(graph: GraphModule, sources: Mapping[str, Node]) -> None:
        context = GraphContext(graph, Modes(grad=False), executor="fused")
        if layout == "channels_last" and Lines(context):
            context = GraphContext(graph, Modes(grad=False), executor="fused")
        names = {name: canonical(source.name) for name, source in sources.items()}
        weights = frozenset(name for name, source in sources.items() if is_module_tensor(source))
        origins = _origins(graph.graph, weights)
        outcome = plan_and_carry_out(context, layout, CostSource(None), names, for_inductor=True)
        if outcome.layout is not None:
            found.append(found[-1].with_plan(outcome.layout, origins))

    with torch.no_grad():
        model(*inputs)  # some keep what they make at their first call, for which Dynamo breaks the graph
    with torch.set_grad_enabled(case.trains):
        _see_graphs(model, inputs, Options(layout=layout, tune_seconds=0), planned)
    return found[-1]


def _see_graphs(
    model: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    options: Options,
    see: Callable[[GraphModule, Mapping[str, Node]], None],
) -> None:
    """Shows each graph that inductor would plan, and which input of Dynamo's graph each of its inputs is."""

    def backend(graph_module: GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        compilation = Compilation(graph_module, given, options)
        rewrite(compilation)
        sources = graph_module.graph.find_nodes(op="placeholder")

        def seen(joint: GraphModule) -> None:
            inputs = joint.graph.find_nodes(op="placeholder")
            kept = [node.name for node in inputs if not node.name.startswith("tangents")]
            # The plan is carried out, and the graph that it was made for is partitioned afterwards.
            see(copy_graph_module(joint), dict(zip(kept, sources, strict=False)))

        see_joint_graph(compilation.graph_module, given, seen)
        return graph_module.forward

    # Sizes that vary from one model to the next would make Dynamo trace the later ones with symbols.
    torch.compile(fresh_call(), backend=backend, dynamic=False)(model, inputs)  # type: ignore[arg-type]


def table_of(rows: Sequence[Copies]) -> Table:
    """A row for each model."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    columns = ("graphs", "labelled", *PLACES, "repairs", "stock")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        counts = (getattr(row, column) for column in columns)
        table.add_row(row.model, *("-" if count is None else str(count) for count in counts))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a row for each model; gives 0, 1 where a model has none, or 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layout_copies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_models(parser)
    parser.add_argument("--mode", choices=MODES, default="inference", help="default: inference")
    parser.add_argument("--batch", type=int, default=1, help="default: 1")
    parser.add_argument("--size", type=int, default=224, help="default: 224")
    parser.add_argument("--layout", choices=get_args(Goal)[1:], default="channels_last")
    parser.add_argument("--each", action="store_true", help="print every copy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts")
    given = parser.parse_args(arguments)
    console, errors = Console(width=None if sys.stdout.isatty() else 160), Console(stderr=True)
    try:
        cases = [Case(name, given.mode, given.batch, given.size) for name in models_of(given)]
    except FxpassesError as error:
        refuse(parser, str(error))
    say_what_is_left_out(given, errors)
    rows, failed = [], False
    for case in cases:
        try:
            rows.append(count_copies(case, given.layout))
        except Exception as error:  # whatever a model raises, the others are counted
            failed = True
            errors.print(f"{case.model}: {type(error).__name__}: {error}", highlight=False, markup=False)
    console.print(table_of(rows))
    for row in rows if given.each else ():
        for copy in row.each:
            print(f"{row.model}: {copy}")
    if given.json:
        settings = {"mode": given.mode, "batch": given.batch, "size": given.size, "layout": given.layout}
        content = {
            "benchmark": "layout_copies",
            "environment": environment_block("cpu"),
            "settings": settings,
        }
        counts = [{key: value for key, value in asdict(row).items() if key != "each"} for row in rows]
        given.json.write_text(json.dumps({**content, "models": counts}, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
