"""`python -m benchmarks.operatorbench`: ATen operators on recorded inputs, compiled against eager.

    python -m benchmarks.operatorbench --suite timm --op aten.convolution.default --max-samples 5
    python -m benchmarks.operatorbench --suite timm --op all --max-samples 2 --csv rows.csv --json rows.json
    python -m benchmarks.operatorbench --input-file LOG --op all --dtype log --configs inductor,fxpasses

Every operator of the log gets a row: with its speed-ups, or with the reason why it has none. The most
frequent inputs come first. Rows are written to the CSV file as they come.

The exit status is 0 when every operator that was run is right; 1 when a configuration computed something
wrong (`inaccurate`) or raised where eager did not (`failed`); 2 when the command line or a log is refused.
A run goes on to its last row whatever the earlier ones say.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from benchmarks.environment import check_device, environment_block, physical_cores
from benchmarks.operator_call import Compiler
from benchmarks.operator_inputs.log import LogError, OperatorLog, read_log, resolve_operator
from benchmarks.operator_inputs.materialise import Target
from benchmarks.operator_inputs.suites import MODES, SUITES, load_suite
from benchmarks.operator_rows import EAGER, LEVELS, CsvRows, Row, make_row, pairs, row_to_json, total_seconds
from benchmarks.operator_runs import CONFIGURATIONS, Plan, measure_operator
from benchmarks.turns import Effort
from fxpasses.errors import FxpassesError, unknown_name
from fxpasses.model_specs import declare_torchvision_operators

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "log": None}
Observe: TypeAlias = Callable[[str, str, Callable[[], object]], None]
_STYLES = {"ok": "", "skipped": "dim", "inaccurate": "bold red", "failed": "red"}


class OperatorbenchError(FxpassesError, ValueError):
    """An option of the command line that names nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except FxpassesError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operatorbench",
        description="Time ATen operators on recorded inputs, compiled against eager.",
        epilog="Exit status: 1 if a configuration is inaccurate or fails where eager does not, else 0.",
    )
    add = parser.add_argument
    add("--suite", choices=sorted(SUITES), default="timm", help="recorded inputs (default: timm)")
    add("--mode", choices=(*MODES, "all"), default="all", help="of the suite's recordings (default: all)")
    add("--input-file", type=Path, help="a log in PyTorch's format, in place of a suite")
    add("--op", default="aten.convolution.default", help="an operator with its overload, or all")
    add("--dtype", choices=sorted(_DTYPES), default="float32", help="of floating tensors; log: as recorded")
    add(
        "--max-samples",
        type=_positive,
        default=5,
        help="inputs an operator (default: 5)",
    )
    add("--start-index", type=int, default=0, help="of the first input that is run (default: 0)")
    add("--configs", default="inductor", help=f"by commas, of {', '.join(CONFIGURATIONS)}")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=_positive, default=physical_cores(), help="of the CPU (default: its cores)")
    add("--channels-last", action="store_true", help="make 4-D and 5-D inputs channels-last")
    add("--repeats", type=_positive, default=7, help="rounds of eager and all configurations (default: 7)")
    add("--accuracy", action=argparse.BooleanOptionalAction, default=True, help="check results first")
    add(
        "--memory-limit",
        type=float,
        default=4.0,
        help="GiB that one input may take (default: 4)",
    )
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace of one more call of everything")
    add("--csv", type=Path, metavar="FILE", help="append each row as soon as it is there")
    add("--json", type=Path, metavar="FILE", help="write rows, samples, totals and the environment")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def _run(options: argparse.Namespace) -> int:
    configurations = _configurations(options.configs)
    environment = environment_block(options.device)
    torch.set_num_threads(options.threads)
    declare_torchvision_operators()
    log = read_log(options.input_file) if options.input_file else load_suite(options.suite, options.mode)
    names = log.names() if options.op == "all" else [options.op]
    if not set(names) <= set(log.operators):
        raise OperatorbenchError(unknown_name("operator", options.op, log.names(), "Or write all."))
    rows: list[Row] = []
    try:
        with _profiler(options) as observe, torch.no_grad(), _csv(options.csv, list(configurations)) as add:
            for row in _rows(names, log, configurations, options, observe):
                rows.append(row)
                add(row)
    finally:
        _report(rows, list(configurations), options, environment)
    return int(any(row.status in ("inaccurate", "failed") for row in rows))


def _configurations(text: str) -> dict[str, Compiler]:
    names = [each.strip() for each in text.split(",") if each.strip()]
    for name in names:
        if name not in CONFIGURATIONS:
            raise OperatorbenchError(unknown_name("configuration", name, CONFIGURATIONS))
    if not names or len(set(names)) != len(names):
        raise OperatorbenchError(f"--configs {text!r}: name one configuration or several different ones.")
    return {name: CONFIGURATIONS[name] for name in names}


def _rows(
    names: Sequence[str],
    log: OperatorLog,
    configurations: dict[str, Compiler],
    options: argparse.Namespace,
    observe: Observe | None,
) -> Iterator[Row]:
    target = Target(
        check_device(options.device),
        _DTYPES[options.dtype],
        options.channels_last,
        int(options.memory_limit * 2**30),
    )
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            named = None if observe is None else partial(observe, name)
            plan = Plan(target, configurations, _effort(options.repeats), options.accuracy, named)
            yield _row(name, log, plan, options)
            progress.advance(task)


def _row(name: str, log: OperatorLog, plan: Plan, options: argparse.Namespace) -> Row:
    samples = log.samples(name)
    chosen = samples[options.start_index : options.start_index + options.max_samples]
    start = time.perf_counter()
    try:
        reason, measurements = measure_operator(resolve_operator(name), chosen, plan)
    except LogError as error:
        reason, measurements = str(error), []
    elapsed = time.perf_counter() - start
    logged = sum(each.count for each in samples)
    return make_row(name, reason, measurements, list(plan.configurations), logged, elapsed)


def _effort(repeats: int) -> Effort:
    return Effort(rounds=repeats, sample_seconds=1e-3, case_seconds=1.0)


@contextlib.contextmanager
def _csv(path: Path | None, configurations: list[str]) -> Iterator[Callable[[Row], None]]:
    if path is None:
        yield lambda row: None
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        yield CsvRows(file, configurations).add


@contextlib.contextmanager
def _profiler(options: argparse.Namespace) -> Iterator[Observe | None]:
    """Something that runs a function once under the profiler; timings are taken without it."""
    if options.profile is None:
        yield None
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)

    def observe(operator: str, configuration: str, function: Callable[[], object]) -> None:
        profiler.toggle_collection_dynamic(True, activities)
        with torch.profiler.record_function(f"{operator}: {configuration}"):
            function()
        profiler.toggle_collection_dynamic(False, activities)

    profiler.start()
    profiler.toggle_collection_dynamic(False, activities)
    try:
        yield observe
    finally:
        profiler.stop()
        profiler.export_chrome_trace(str(options.profile))


def _report(
    rows: Sequence[Row],
    configurations: Sequence[str],
    options: argparse.Namespace,
    environment: dict[str, object],
) -> None:
    totals = total_seconds(rows, configurations)
    width = None if sys.stdout.isatty() else 150
    console = Console(width=width)
    for table in (_figures(rows, configurations), _reasons(rows)):
        if table.row_count:
            console.print(table)
    if totals:
        shown = ", ".join(f"{name} {seconds:.4g} s" for name, seconds in totals.items())
        ratios = [f"{a}/{b} {totals[b] / totals[a]:.3f}" for a, b in pairs(configurations)]
        print(f"Weighted by occurrence, over the complete rows: {shown}; {', '.join(ratios)}.")
    if options.json:
        data = {
            "benchmark": "operatorbench",
            "environment": environment,
            "arguments": {name: str(value) for name, value in vars(options).items()},
            "rows": [row_to_json(row) for row in rows],
            "total_seconds": totals,
        }
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _figures(rows: Sequence[Row], configurations: Sequence[str]) -> Table:
    """A line for each operator that was measured and each pair of configurations."""
    table = Table(title="Speed-up A/B: B's time over A's, quantiles over inputs and total, by occurrence")
    table.add_column("operator", no_wrap=True)
    for column in ("inputs", "elapsed", f"{EAGER} s", "A/B", *(f"{level:.0%}" for level in LEVELS), "total"):
        table.add_column(column, no_wrap=True, justify="left" if column == "A/B" else "right")
    for row in rows:
        first = [row.operator, str(len(row.measured)), f"{row.elapsed_seconds:.1f} s"]
        first.append(f"{row.seconds[EAGER]:.3g}" if row.seconds else "")
        for name in [f"{a}/{b}" for a, b in pairs(configurations)]:
            if name in row.ratios:
                table.add_row(*first, name, *(f"{each:.2f}" for each in vars(row.ratios[name]).values()))
                first = [""] * 4
    return table


def _reasons(rows: Sequence[Row]) -> Table:
    """A line for each operator that was skipped, failed, or was not run on all of its inputs."""
    table = Table("operator", "status", "reason", title="Not measured, or not wholly")
    for row in rows:
        if row.reason:
            table.add_row(row.operator, row.status, escape(row.reason), style=_STYLES[row.status])
    return table


if __name__ == "__main__":
    sys.exit(main())
