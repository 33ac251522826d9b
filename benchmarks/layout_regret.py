"""What is lost by measuring only for some seconds: a plan's predicted cost over that of the best one.

    python -m benchmarks.layout_regret [--models resnet18,resnet50] [--mode inference] [--seconds 5]

For each model, everything that its layout plan could depend on is measured. Then, with an empty store and so
many seconds, a plan is made as a compilation makes it. Both are priced by the full table: the regret is how
much dearer the second is. Stock inductor's plan stands beside it. Nothing is compiled.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import scipy.stats  # type: ignore[import-untyped]  # its stubs are no test requirement
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule

from benchmarks.shared.environment import physical_cores
from fxpasses.cli.model_specs import load_model
from fxpasses.devices.own import own_store
from fxpasses.graph.context import GraphContext
from fxpasses.graph.modes import Modes
from fxpasses.passes.layout.assign import Assignment, assign
from fxpasses.passes.layout.passes import weighed
from fxpasses.passes.layout.sources import CostSource
from fxpasses.passes.layout.stock import stock_plan
from fxpasses.passes.layout.tuning import Tuner
from fxpasses.torch_internals.aot_autograd import see_joint_graph
from fxpasses.torch_internals.dynamo import fresh_call

MODELS = (
    "resnet18,resnet50,mobilenetv2_100,regnety_008,resnext50_32x4d,efficientnet_b0,densenet121,convnext_atto,"
    "vovnet39a,dla34,repvgg_a0,hrnet_w18_small"
)


def joint_graphs(model: torch.nn.Module, x: torch.Tensor) -> list[GraphModule]:
    """The graphs that inductor would plan, with the model's grad mode."""
    found: list[GraphModule] = []

    def seen(gm: GraphModule, inputs: Sequence[object]) -> object:
        see_joint_graph(gm, inputs, found.append)
        return gm.forward

    torch.compile(fresh_call(), backend=seen)(model, (x,))  # type: ignore[arg-type]  # a backend
    return found


@contextmanager
def empty_store() -> Iterator[None]:
    """A block in which nothing is known of the device."""
    before = os.environ.get("FXPASSES_PROFILE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FXPASSES_PROFILE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["FXPASSES_PROFILE_DIR"]
            if before is not None:
                os.environ["FXPASSES_PROFILE_DIR"] = before


def planned(graph: GraphModule, seconds: float, *, thorough: bool) -> Assignment:
    """The plan that a compilation makes after measuring for so long, with an empty store."""
    device = torch.device("cpu")
    context = GraphContext(graph, Modes(grad=False), executor="fused")
    with empty_store():
        source = CostSource(own_store().profile(), Tuner(own_store(), device, seconds, thorough=thorough))
        best = assign(context, "auto", source.profile, None, source.tuner)
        return best if thorough else weighed(context, best, source, for_inductor=True)


def regret(graph: GraphModule, seconds: float) -> tuple[float, float, Assignment, Assignment]:
    """The plan's cost over the best one's, stock's over the best one's, the best plan and the plan."""
    best = planned(graph, 1e6, thorough=True)
    found = planned(graph, seconds, thorough=False)
    context = GraphContext(graph, Modes(grad=False), executor="fused")
    _, stock = stock_plan(context, best)
    least = best.problem.energy(best.labels)
    return best.problem.energy(found.labels) / least, best.problem.energy(stock) / least, best, found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a row for each graph; gives 0."""
    parser = argparse.ArgumentParser(prog="benchmarks.layout_regret", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=MODELS, help=f"default: {MODELS}")
    parser.add_argument("--mode", choices=("inference", "frozen-training", "training"), default="inference")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure; default: 5")
    given = parser.parse_args(argv)
    torch.set_num_threads(physical_cores())
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("model", "convolutions", "measured", "seconds", "in doubt", "decision", "regret", "stock"):
        table.add_column(header, justify="left" if header in ("model", "decision") else "right")
    regrets = []
    for name in given.models.split(","):
        model = load_model(name, default_source="timm").train(given.mode == "training")
        with torch.set_grad_enabled(given.mode != "inference"):
            graphs = joint_graphs(model, torch.randn(given.batch, 3, given.size, given.size))
        for graph in graphs:
            ratio, stock, best, found = regret(graph, given.seconds)
            tuning = found.plan.tuning
            assert tuning is not None
            counts = (len(best.plan.convolutions), found.plan.measured)
            figures = (*map(str, counts), f"{tuning.seconds:.1f}", str(tuning.in_doubt))
            percent = (f"{100 * (each - 1):.2f} %" for each in (ratio, stock))
            table.add_row(name, *figures, found.plan.decision, *percent)
            regrets.append(ratio)
    Console(width=140).print(table)
    mean, worst = (100 * (each - 1) for each in (scipy.stats.gmean(regrets), max(regrets)))
    print(f"geometric mean {mean:.2f} %, worst {worst:.2f} %")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
