"""How the time of planning a layout grows with the graph: reading, solving and carrying out, by joint graph.

    python -m benchmarks.layout_growth [--models timm:resnet50] [--depths 10 40 160] [--repeat 3]

The graphs are joint graphs in training mode, traced as AOTAutograd does: of models that one knows, and of
residual networks as deep as one likes. A row has the medians of a few runs, and the range of their sums.
Planning includes one solution, which is measured apart once more. The bars, for the sum: under 0.5 seconds
for resnet50 and under 3 seconds at 10,000 nodes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fxpasses.cli.model_specs import load_model
from fxpasses.graph.context import GraphContext
from fxpasses.graph.copying import copy_graph_module
from fxpasses.graph.modes import Modes
from fxpasses.passes.layout.assign import assign
from fxpasses.passes.layout.materialise import materialise
from fxpasses.passes.layout.solve import solve
from fxpasses.torch_internals.tracing import core_decompositions


class Residual(nn.Module):
    """`depth` residual blocks of two convolutions with batch norm, 16 channels wide."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2 * depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2 * depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(0, len(self.convs), 2):
            y = F.relu(self.norms[i](self.convs[i](x)))
            x = F.relu(self.norms[i + 1](self.convs[i + 1](y)) + x)
        return x


def joint_graph(model: nn.Module, x: torch.Tensor) -> GraphModule:
    """The graph that computes the output and the gradients of its sum, on fake tensors."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    trained = dict(model.named_parameters())

    def joint(x: torch.Tensor, *given: torch.Tensor) -> list[torch.Tensor]:
        named = dict(zip(state, given, strict=True))
        output = functional_call(model, named, (x,))
        return [output, *torch.autograd.grad(output.sum(), [named[name] for name in trained])]

    table = core_decompositions()
    return make_fx(joint, decomposition_table=table, tracing_mode="fake")(x, *state.values())


def measure(graph_module: GraphModule, repeat: int) -> tuple[list[tuple[float, float, float]], int]:
    """Seconds of planning, of solving alone and of carrying out, by run; and the number of convolutions."""
    runs, convolutions = [], 0
    for _ in range(repeat):
        context = GraphContext(copy_graph_module(graph_module), Modes(grad=False), executor="fused")
        start = time.perf_counter()
        assignment = assign(context)
        planning = time.perf_counter() - start
        problem = assignment.network.problem({})
        start = time.perf_counter()
        solve(problem)
        solving = time.perf_counter() - start
        start = time.perf_counter()
        materialise(context, assignment)
        runs.append((planning, solving, time.perf_counter() - start))
        convolutions = len(assignment.plan.convolutions)
    return runs, convolutions


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the growth; gives 0."""
    parser = argparse.ArgumentParser(prog="benchmarks.layout_growth", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="*", default=["timm:resnet50"], help="specs, for images of 2x3x224x224"
    )
    parser.add_argument("--depths", type=int, nargs="*", default=[10, 40, 160], help="residual blocks")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each")
    arguments = parser.parse_args(argv)
    image = torch.randn(2, 3, 224, 224)
    subjects = [(spec, load_model(spec), image) for spec in arguments.models]
    for depth in arguments.depths:
        subjects.append((f"{depth} blocks", Residual(depth), torch.randn(2, 16, 16, 16)))
    headers = ("model", "nodes", "convs", "plan", "solve", "carry out", "sum, s", "range")
    table = Table(*headers, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, model, x in subjects:
        graph_module = joint_graph(model, x)
        runs, convolutions = measure(graph_module, arguments.repeat)
        medians = (f"{statistics.median(times):.3f}" for times in zip(*runs, strict=True))
        both = [planning + carrying for planning, _, carrying in runs]
        spread = f"{statistics.median(both):.3f}", f"{min(both):.2f}-{max(both):.2f}"
        table.add_row(name, str(len(graph_module.graph.nodes)), str(convolutions), *medians, *spread)
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
