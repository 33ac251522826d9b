"""A model at many sizes: one dynamic artifact against a static one for each size.

    python -m benchmarks.sizes [--models resnet50] [--sizes 1x224,8x224,32x224,4x160,4x288]

Three processes take turns at every size: stock inductor and fxpasses with every size dynamic, and fxpasses
that compiles each size anew. `over stock` is stock's time over that of fxpasses, both dynamic; `over static`
is the time of its own static artifact over it. At sizes that were not compiled first, results are compared
with eager's. Graphs are those that Dynamo captured; it takes a batch of 1 for a constant.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.models.cases import Case, Dynamic
from benchmarks.models.messages import CountGraphs, Prepare, TimeSteps
from benchmarks.models.variants import Variant, parse_variant
from benchmarks.models.workers import Worker, WorkerError, time_in_rounds
from benchmarks.shared.commands import refuse
from benchmarks.shared.environment import physical_cores
from benchmarks.shared.statistics import Ratio, geometric_mean_ratio, paired_ratio, summarize
from fxpasses.errors import FxpassesError

MODELS = "resnet50,mobilenetv2_100"
SIZES = "8x224,2x224,4x160,4x288,16x224,32x224,1x224"
STOCK, DYNAMIC, STATIC = "stock, dynamic", "dynamic", "static"


@dataclass
class Timed:
    """What was measured of one model.

    Attributes:
        seconds: of steps, one a round, by size and by process.
        launches: how many rounds each launch took.
        graphs: captured in the process of a launch, by process.
    """

    seconds: dict[Case, dict[str, list[float]]] = field(default_factory=dict)
    launches: list[int] = field(default_factory=list)
    graphs: dict[str, int] = field(default_factory=dict)

    def over(self, size: Case, baseline: str) -> Ratio:
        """The time of another process over that of the dynamic artifact."""
        times = self.seconds[size]
        return paired_ratio(times[DYNAMIC], times[baseline], launches=self.launches)

    def mean_over(self, baseline: str) -> Ratio:
        """The geometric mean over the sizes."""
        pairs = [(times[DYNAMIC], times[baseline]) for times in self.seconds.values()]
        return geometric_mean_ratio(pairs, launches=[self.launches] * len(pairs))


@contextlib.contextmanager
def started(case: Case, weights: str) -> Iterator[Mapping[str, Worker]]:
    """The three processes, ready at the sizes of a case."""
    ours = parse_variant(f"fxpasses:weights={weights}")
    variants: dict[str, tuple[Variant, Dynamic]] = {
        STOCK: (parse_variant("inductor"), "all"),
        DYNAMIC: (ours, "all"),
        STATIC: (ours, "none"),
    }
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        workers = {}
        for name, (variant, dynamic) in variants.items():
            worker = Worker(threads=case.threads, cache=folder / name.replace(", ", "-"))
            workers[name] = held.enter_context(worker)
            worker.request(Prepare(replace(case, dynamic=dynamic), variant, None))
        yield workers


def measure(sizes: Sequence[Case], weights: str, rounds: int, launches: int) -> Timed:
    """Times all sizes in each launch, the first of them being what is compiled first.

    Raises:
        WorkerError: a process does not compile or gives wrong results.
    """
    timed = Timed({size: {STOCK: [], DYNAMIC: [], STATIC: []} for size in sizes})
    for launch in range(launches):
        turns = rounds // launches + (launch < rounds % launches)
        with started(sizes[0], weights) as workers:
            for size in sizes:
                found, failures = time_in_rounds(workers, TimeSteps(size), turns, seed=launch)
                for name, reason in failures.items():
                    raise WorkerError(f"{name}: {reason}")
                for name, seconds in found.items():
                    timed.seconds[size][name] += seconds
            for name, worker in workers.items():
                count = worker.request(CountGraphs())
                assert isinstance(count, int)
                timed.graphs[name] = count
        timed.launches.append(turns)
    return timed


def table_of(timed: Timed) -> Table:
    """A row for each size, and one for their means."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("batch x size", "ms", "over stock", "over static"):
        table.add_column(column, justify="right")
    for size, times in timed.seconds.items():
        milliseconds = summarize(times[DYNAMIC]).median * 1e3
        ratios = (_text(timed.over(size, baseline)) for baseline in (STOCK, STATIC))
        table.add_row(f"{size.batch}x{size.size}", f"{milliseconds:.2f}", *ratios)
    table.add_row("mean", "", *(_text(timed.mean_over(baseline)) for baseline in (STOCK, STATIC)))
    return table


def _text(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}, too few rounds"
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _sizes(text: str, model: str) -> list[Case]:
    cases = []
    for piece in text.split(","):
        found = re.fullmatch(r"(\d+)x(\d+)", piece.strip())
        if not found:
            raise FxpassesError(f"size {piece.strip()!r} does not parse; write BATCHxSIZE, such as 8x224.")
        batch, size = map(int, found.groups())
        cases.append(Case(model, batch=batch, size=size, threads=physical_cores()))
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table for each model; gives 0, 1 where a process fails, or 2 where the arguments are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=MODELS, help=f"default: {MODELS}")
    parser.add_argument(
        "--sizes", default=SIZES, help=f"BATCHxSIZE; the first is compiled first; default: {SIZES}"
    )
    parser.add_argument("--weights", default="cached", help="of fxpasses; default: cached")
    parser.add_argument("--rounds", type=int, default=12, help="turns at each size; default: 12")
    parser.add_argument("--launches", type=int, default=2, help="processes of each kind; default: 2")
    given = parser.parse_args(arguments)
    try:
        if not 1 <= given.launches <= given.rounds:
            raise FxpassesError(f"--rounds {given.rounds} cannot be shared by --launches {given.launches}.")
        parse_variant(f"fxpasses:weights={given.weights}")
        sizes = {model: _sizes(given.sizes, model) for model in given.models.split(",")}
    except FxpassesError as error:
        refuse(parser, str(error))
    console = Console(width=None if sys.stdout.isatty() else 160)
    for model, cases in sizes.items():
        try:
            timed = measure(cases, given.weights, given.rounds, given.launches)
        except WorkerError as error:
            print(f"{model}: {error}", file=sys.stderr)
            return 1
        graphs = ", ".join(f"{name} {count}" for name, count in timed.graphs.items())
        console.print(f"{model}: {cases[0].threads} threads; graphs: {graphs}", highlight=False)
        console.print(table_of(timed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
