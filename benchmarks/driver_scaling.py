"""How the driver's own time grows with the graph: 1,000, 10,000 and 100,000 nodes of conv, batch norm, ReLU.

The graph is built in memory with metadata, as Dynamo would hand it over; what is timed is everything that
fxpasses does with it (copying, metadata, matching, rewriting, linting, recompiling). Each size is timed
several times and the median is printed with its spread, per rewrite and in all.

    python -m benchmarks.driver_scaling --nodes 1000 10000 100000 --repeats 5 --json FILE
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.fx import Graph, GraphModule, Node

from benchmarks.shared.environment import save_sizes
from fxpasses.options import Options
from fxpasses.pipeline import run_passes
from fxpasses.torch_internals.fake_tensors import FakeTensorMode

CHANNELS = 8
TRAINED = ("weight", "gamma", "beta")


def conv_bn_graph(nodes: int) -> GraphModule:
    """A chain of convolution, batch norm and ReLU of about `nodes` nodes, each with parameters of its own."""
    graph = Graph()
    vector, activation = (CHANNELS,), (2, CHANNELS, 8, 8)
    shapes = {"weight": (CHANNELS, CHANNELS, 1, 1), "mean": vector, "var": vector, "gamma": vector}
    shapes["beta"] = vector
    blocks = max(1, nodes // (len(shapes) + 3))
    with FakeTensorMode():
        values = [
            {name: torch.empty(shape, requires_grad=name in TRAINED) for name, shape in shapes.items()}
            for _ in range(blocks)
        ]
        results = [torch.empty(activation, requires_grad=True) for _ in range(3 * blocks + 1)]
    current = _with_value(graph.placeholder("x"), results.pop())
    parameters = [
        {name: _with_value(graph.placeholder(f"{name}_{index}"), value) for name, value in block.items()}
        for index, block in enumerate(values)
    ]
    for block in parameters:
        normal = (block["mean"], block["var"], block["gamma"], block["beta"])
        current = _with_value(graph.call_function(torch.conv2d, (current, block["weight"])), results.pop())
        current = _with_value(
            graph.call_function(torch.nn.functional.batch_norm, (current, *normal)), results.pop()
        )
        current = _with_value(graph.call_function(torch.relu, (current,)), results.pop())
    graph.output((current,))
    return GraphModule(torch.nn.Module(), graph)


def _with_value(node: Node, value: torch.Tensor) -> Node:
    node.meta["example_value"] = value
    return node


def measure(nodes: int, repeats: int) -> dict[str, float]:
    """Seconds of one pipeline over a graph of about `nodes` nodes: median, quartiles, rewrites."""
    graph_module = conv_bn_graph(nodes)
    samples, passes, applied = [], [], 0
    for _ in range(repeats):
        start = time.perf_counter()
        _, report = run_passes(graph_module, None, Options(), executor="fused")
        samples.append(time.perf_counter() - start)
        passes.append(sum(report.seconds.values()))
        applied = sum(report.applied.values())
    quartiles = statistics.quantiles(samples, n=4) if repeats > 1 else [samples[0]] * 3
    return {
        "nodes": len(graph_module.graph.nodes),
        "rewrites": applied,
        "median_seconds": statistics.median(samples),
        "passes_median_seconds": statistics.median(passes),
        "lower_quartile_seconds": quartiles[0],
        "upper_quartile_seconds": quartiles[2],
        "microseconds_per_node": statistics.median(samples) / len(graph_module.graph.nodes) * 1e6,
    }


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.driver_scaling", description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each size (default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    measure(100, 1)
    rows = [
        measure(nodes, arguments.repeats)
        for nodes in track(arguments.nodes, "driver", console=Console(stderr=True))
    ]
    table = Table(
        "nodes",
        "rewrites",
        "median s",
        "quartiles s",
        "of that in passes s",
        "µs a node",
        title="Driver time",
    )
    for row in rows:
        spread = f"{row['lower_quartile_seconds']:.3f} to {row['upper_quartile_seconds']:.3f}"
        cells = (f"{row['nodes']:,}", f"{row['rewrites']:,}", f"{row['median_seconds']:.3f}", spread)
        table.add_row(*cells, f"{row['passes_median_seconds']:.3f}", f"{row['microseconds_per_node']:.1f}")
    Console().print(table)
    if arguments.json:
        save_sizes(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
