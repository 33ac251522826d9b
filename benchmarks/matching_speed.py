"""How fast a pattern is looked for: a declarative rule against inductor's PatternMatcherPass.

Both look for relu(neg(x) * sigmoid(x)) in the same ATen graph, of which every tenth block has the pattern,
every tenth almost, and the rest is made of the same operators. Both refuse every match by a check of their
own (`extra_check`, `check`), so that the graph stays as it is and only matching is timed. Ours also writes a
remark for every refusal. Samples are taken in turns; a ratio above 1 means that ours is faster.

    python -m benchmarks.matching_speed --nodes 10000 100000 --repeats 5 --json FILE
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.fx import Graph, GraphModule, Node

from benchmarks.shared.environment import save_sizes
from benchmarks.torch_internals import pattern_matcher_pass
from fxpasses.graph.context import GraphContext
from fxpasses.graph.modes import Modes
from fxpasses.options import Options
from fxpasses.rewrite.declarative_rule import DeclarativeRule
from fxpasses.rewrite.driver import Driver
from fxpasses.rewrite.registry import RulePass
from fxpasses.torch_internals.fake_tensors import FakeTensorMode

aten = torch.ops.aten


def chain(nodes: int) -> GraphModule:
    """An ATen graph of about `nodes` nodes with metadata: one block in ten holds the pattern."""
    graph = Graph()
    with FakeTensorMode():
        value = torch.empty(4, 4)
    current = graph.placeholder("x")
    current.meta["val"] = value

    def call(target: Callable[..., Any], *args: Node) -> Node:
        node = graph.call_function(target, args)
        node.meta["val"] = value
        return node

    for block in range(max(1, nodes // 4)):
        negative, gate = call(aten.neg.default, current), call(aten.sigmoid.default, current)
        if block % 10 == 1:
            # Almost the pattern: the gate reads something else.
            gate.args = (negative,)
        product = call(aten.mul.Tensor if block % 10 < 2 else aten.sub.Tensor, negative, gate)
        current = call(aten.relu.default, product)
    graph.output((current,))
    return GraphModule(torch.nn.Module(), graph)


def pattern(x: torch.Tensor) -> torch.Tensor:
    """What both look for."""
    return torch.relu(torch.neg(x) * torch.sigmoid(x))


def replacement(x: torch.Tensor) -> torch.Tensor:
    """What neither writes, since every match is refused."""
    return torch.relu(x)


def ours() -> Callable[[GraphModule], int]:
    """Looks with our driver; returns the number of matches, each refused."""
    found = 0

    def refuse(match: object) -> bool:
        nonlocal found
        found += 1
        return False

    rule = DeclarativeRule("benchmark", pattern, replacement, (torch.randn(2, 3),), check=refuse)
    _ = rule.is_anchor  # traced once, as inductor's patterns are

    def run(module: GraphModule) -> int:
        nonlocal found
        found = 0
        context = GraphContext(module=module, initial_modes=Modes())
        Driver([RulePass("benchmark", (rule,))], Options()).run(context)
        return found

    return run


def inductors() -> Callable[[GraphModule], int]:
    """Looks with inductor's matcher; returns the number of matches, each refused."""
    found = 0

    def refuse(match: object) -> bool:
        nonlocal found
        found += 1
        return False

    matcher = pattern_matcher_pass(refuse)

    def run(module: GraphModule) -> int:
        nonlocal found
        found = 0
        matcher.apply(module)
        return found

    return run


def measure(nodes: int, repeats: int) -> dict[str, float]:
    """Median seconds of both over graphs of about `nodes` nodes, taken in turns, and their ratio."""
    contestants = {"ours": ours(), "inductor": inductors()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    matches: dict[str, int] = {}
    for _ in range(repeats):
        for name, run in contestants.items():
            # A graph of its own each time: both keep what they have computed with the graph.
            module = chain(nodes)
            start = time.perf_counter()
            matches[name] = run(module)
            seconds[name].append(time.perf_counter() - start)
    if matches["ours"] != matches["inductor"]:
        raise SystemExit(f"the patterns are not equivalent: {matches}")
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds["inductor"], strict=True)]
    return {
        "nodes": nodes,
        "matches": matches["ours"],
        "ours_seconds": medians["ours"],
        "inductor_seconds": medians["inductor"],
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
    }


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matching_speed", description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each size (default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    measure(100, 1)
    console = Console(stderr=True)
    rows = [
        measure(nodes, arguments.repeats) for nodes in track(arguments.nodes, "matching", console=console)
    ]
    table = Table("nodes", "matches", "ours s", "inductor s", "inductor/ours", "range", title="Matching")
    for row in rows:
        spread = f"{row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f}"
        times = (f"{row['ours_seconds']:.3f}", f"{row['inductor_seconds']:.3f}", f"{row['ratio']:.2f}")
        table.add_row(f"{row['nodes']:,}", f"{row['matches']:,}", *times, spread)
    Console().print(table)
    if arguments.json:
        save_sizes(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
