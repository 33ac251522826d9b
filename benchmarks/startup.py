"""How long the first answer takes in a fresh process, with nothing cached and with what another one left.

    python -m benchmarks.startup [--models resnet18,mobilenetv2_100] [--repeats 3]

Every figure is of a process of its own. A cold one has empty caches: inductor's, and those of what fxpasses
measures and compiles; the warm one after it has what that left. `first answer` is from a model in memory to
its first result, with every library imported; `process` also has the start of Python, the imports and
building the model. The runtimes export the model in both, as a program does that ships no file. `generated`
counts the graphs for which inductor generated code in the warm process.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.models.cases import Case
from benchmarks.models.messages import Prepare, Prepared
from benchmarks.models.variants import Variant, parse_variants
from benchmarks.models.workers import Worker, WorkerError
from benchmarks.shared.commands import refuse
from benchmarks.shared.environment import physical_cores
from fxpasses.errors import FxpassesError

MODELS = "resnet18,mobilenetv2_100,ultralytics.nn.tasks:DetectionModel"
VARIANTS = "inductor,inductor-frozen,fxpasses,fxpasses:weights=cached,onnxruntime,openvino"


@dataclass
class Figures:
    """What was measured of one variant, in seconds, a value a repeat.

    Attributes:
        first, process: of the first answer alone, and of the whole process, by ``"cold"`` and ``"warm"``.
        generated: graphs in warm processes for which code was generated.
        failure: why there are none.
    """

    first: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    process: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    generated: int = 0
    failure: str = ""


def answer(case: Case, variant: Variant, folder: Path) -> tuple[Prepared, float]:
    """The first answer of a process that keeps what it caches in a folder, and the seconds of the process.

    Raises:
        WorkerError: there is none.
    """
    start = time.perf_counter()
    kept = {"XDG_CACHE_HOME": str(folder / "user"), "FXPASSES_PROFILE_DIR": str(folder / "profiles")}
    with Worker(threads=case.threads, cache=folder / "inductor", environment=kept) as worker:
        told = worker.request(Prepare(case, variant, None, "compilation"))
        seconds = time.perf_counter() - start
    assert isinstance(told, Prepared)
    return told, seconds


def measure(case: Case, variants: Sequence[Variant], repeats: int) -> dict[str, Figures]:
    """What each variant takes, in random order within each repeat."""
    figures = {variant.name: Figures() for variant in variants}
    for _ in range(repeats):
        for variant in random.sample(variants, len(variants)):
            found = figures[variant.name]
            try:
                with tempfile.TemporaryDirectory() as folder:
                    for state in ("cold", "warm"):
                        told, seconds = answer(case, variant, Path(folder))
                        assert told.compile_seconds is not None
                        found.first[state].append(told.compile_seconds)
                        found.process[state].append(seconds)
                    found.generated += told.generated
            except WorkerError as error:
                found.failure = str(error)
    return figures


def table_of(figures: dict[str, Figures], baseline: str) -> Table:
    """Medians of seconds, and how many times the baseline's they are."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("variant")
    for state in ("cold", "warm"):
        for column in (f"{state}: first answer s", "times stock's", "process s"):
            table.add_column(column, justify="right")
    table.add_column("generated", justify="right")
    for name, found in figures.items():
        if found.failure:
            table.add_row(name, found.failure)
            continue
        cells = []
        for state in ("cold", "warm"):
            seconds = statistics.median(found.first[state])
            stock = figures[baseline].first[state]
            times = f"{seconds / statistics.median(stock):.2f}" if stock else "-"
            cells += [f"{seconds:.1f}", times, f"{statistics.median(found.process[state]):.1f}"]
        table.add_row(name, *cells, str(found.generated))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table for each model; gives 0, or 2 where the arguments are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=MODELS, help=f"default: {MODELS}")
    parser.add_argument(
        "--variants", default=VARIANTS, help=f"the first is the baseline; default: {VARIANTS}"
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind; default: 3")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    given = parser.parse_args(arguments)
    try:
        variants = parse_variants(given.variants)
        if given.repeats < 1:
            raise FxpassesError(f"--repeats {given.repeats} measures nothing; write 1 or more.")
        cases = [
            Case(name, mode="inference", batch=given.batch, size=given.size, threads=physical_cores())
            for name in given.models.split(",")
        ]
        for variant in variants:
            variant.check(cases[0])
    except FxpassesError as error:
        refuse(parser, str(error))
    console = Console(width=None if sys.stdout.isatty() else 160)
    for case in cases:
        figures = measure(case, variants, given.repeats)
        console.print(
            f"{case.model}: batch {case.batch}, size {case.size}, {case.threads} threads", highlight=False
        )
        console.print(table_of(figures, variants[0].name))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
