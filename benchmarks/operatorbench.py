"""`python -m benchmarks.operatorbench`: ATen operators on recorded inputs, compiled against eager.

    python -m benchmarks.operatorbench --suite timm --op aten.convolution.default --max-samples 5
    python -m benchmarks.operatorbench --suite timm --op all --max-samples 2 --csv rows.csv --json rows.json
    python -m benchmarks.operatorbench --input-file LOG --op all --dtype log --configs inductor,fxpasses
    python -m benchmarks.operatorbench --suite huggingface --log-folder operator_inp_logs --op all
    python -m benchmarks.operatorbench --configs "inductor,autotune,inductor:cpp.threads=1;cpp.simdlen=256"

Every operator of the log gets a row: with its speed-ups, or with the reason why it has none. The most
frequent inputs come first. Rows are shown, and appended to the CSV file, as they come, so that an
interrupted run has shown and saved what it did.

Options that PyTorch's script of the same name has are taken under its names as well (`--inp-file`,
`--start-idx`, `--inductor-config`, `--accuracy-checking`).

The exit status is 0 when every operator that was run is right; 1 when a configuration computed something
wrong (`inaccurate`) or raised where eager did not (`failed`); 2 when the command line or a log is refused;
130 when it was interrupted.
A run goes on to its last row whatever the earlier ones say.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from benchmarks.operators.call import Compiler
from benchmarks.operators.configurations import CONFIGURATIONS, parse_configurations
from benchmarks.operators.inputs.log import LogError, OperatorLog, read_log, resolve_operator
from benchmarks.operators.inputs.materialise import Target
from benchmarks.operators.inputs.suites import MODES, PYTORCH_FOLDERS, SUITES, load_suite
from benchmarks.operators.rows import (
    EAGER,
    LEVELS,
    Row,
    appended_rows,
    can_append,
    csv_header,
    make_row,
    pairs,
    row_in_words,
    row_to_json,
    total_seconds,
)
from benchmarks.operators.runs import Plan, measure_operator
from benchmarks.operators.traces import OperatorTraces
from benchmarks.shared.environment import check_device, environment_block, physical_cores
from fxpasses.cli.model_specs import declare_torchvision_operators
from fxpasses.devices.timing import Effort
from fxpasses.errors import FxpassesError, unknown_name

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "log": None}
_PRECISIONS = ("highest", "high", "medium")
_STYLES = {"ok": "", "skipped": "dim", "inaccurate": "bold red", "failed": "red"}
_OF_THE_RUN = ("suite", "mode", "log_folder", "input_file", "dtype", "device", "threads", "channels_last")
"""Options that the CSV file names in each row, since it may hold rows of several runs."""


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
    _add_inputs(parser)
    _add_runs(parser)
    _add_results(parser)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("operators and inputs").add_argument
    suites = sorted({*SUITES, *PYTORCH_FOLDERS})
    add("--suite", choices=suites, default="timm", help="recorded inputs (default: timm)")
    add("--mode", choices=(*MODES, "all"), default="all", help="of the suite's recordings (default: all)")
    add(
        "--log-folder",
        type=Path,
        metavar="FOLDER",
        help="where the suite's logs lie: PyTorch's operator_inp_logs, or the suite's folder in it",
    )
    add("--input-file", "--inp-file", type=Path, help="a log in PyTorch's format, in place of a suite")
    add("--op", default="aten.convolution.default", help="an operator with its overload, or all")
    add("--dtype", choices=sorted(_DTYPES), default="float32", help="of floating tensors; log: as recorded")
    add("--max-samples", type=_positive, default=5, help="inputs an operator (default: 5)")
    add(
        "--start-index",
        "--start-idx",
        type=int,
        default=0,
        help="of the first input that is run (default: 0)",
    )
    add("--channels-last", action="store_true", help="make 4-D and 5-D inputs channels-last")
    add("--memory-limit", type=float, default=4.0, help="GiB that one input may take (default: 4)")


def _add_runs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("running").add_argument
    add(
        "--configs",
        default="inductor",
        help=f"by commas, of {', '.join(CONFIGURATIONS)}; NAME:SETTING=VALUE[;...] sets what inductor has",
    )
    add(
        "--inductor-config",
        action="append",
        default=[],
        metavar="CONFIG",
        help="one more configuration; may be given several times",
    )
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=_positive, default=physical_cores(), help="of the CPU (default: its cores)")
    add("--repeats", type=_positive, default=7, help="rounds of eager and all configurations (default: 7)")
    add("--accuracy", action=argparse.BooleanOptionalAction, default=True, help="check results first")
    add(
        "--accuracy-checking",
        dest="accuracy",
        type=_boolean,
        nargs="?",
        const=True,
        default=argparse.SUPPRESS,
        metavar="BOOLEAN",
        help="the same",
    )
    add(
        "--float32-matmul-precision",
        choices=_PRECISIONS,
        default="highest",
        help="for torch.set_float32_matmul_precision, of eager as well (default: highest)",
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("results").add_argument
    add(
        "--profile",
        type=Path,
        nargs="?",
        const=Path("operatorbench_traces"),
        metavar="FOLDER",
        help="write a Chrome trace an operator, of calls besides those that are timed (default: %(const)s)",
    )
    add(
        "--csv",
        type=Path,
        metavar="FILE",
        help="append each row as soon as it is there (--op all: default operatorbench_SUITE_DTYPE.csv)",
    )
    add("--json", type=Path, metavar="FILE", help="write rows, samples, totals and the environment")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return values[text.lower()]


def _run(options: argparse.Namespace) -> int:
    configurations = parse_configurations(options.configs, options.inductor_config)
    environment = environment_block(options.device)
    torch.set_num_threads(options.threads)
    declare_torchvision_operators()
    log = _log(options)
    names = log.names() if options.op == "all" else [options.op]
    if not set(names) <= set(log.operators):
        raise OperatorbenchError(unknown_name("operator", options.op, log.names(), "Or write all."))
    if options.json and not options.json.absolute().parent.is_dir():
        raise OperatorbenchError(f"--json {options.json}: there is no such folder; make it first.")
    traces = _traces(options)
    run = _columns_of_the_run(options)
    path = _csv_path(options, csv_header(list(configurations), run))
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        csv_file = stack.enter_context(appended_rows(path, list(configurations), run)) if path else None
        stack.callback(_report, rows, list(configurations), options, environment, path)
        stack.enter_context(_precision(options.float32_matmul_precision))
        stack.enter_context(torch.no_grad())
        measured = _rows(names, log, configurations, options, traces)
        for row in stack.enter_context(contextlib.closing(measured)):  # the bar is gone before the report
            rows.append(row)
            if csv_file:
                csv_file.add(row)
            _say(row_in_words(row))
    return int(any(row.status in ("inaccurate", "failed") for row in rows))


def _log(options: argparse.Namespace) -> OperatorLog:
    if not options.input_file:
        return load_suite(options.suite, options.mode, options.log_folder)
    if options.log_folder:
        raise OperatorbenchError("--input-file and --log-folder exclude each other; drop one of them.")
    return read_log(options.input_file)


def _traces(options: argparse.Namespace) -> OperatorTraces | None:
    if options.profile is None:
        return None
    traces = OperatorTraces(options.profile, check_device(options.device), options.repeats)
    traces.make_folder()
    return traces


def _columns_of_the_run(options: argparse.Namespace) -> dict[str, str]:
    chosen = {name: getattr(options, name) for name in (*_OF_THE_RUN, "float32_matmul_precision")}
    if options.input_file:
        chosen |= {"suite": None, "mode": None}
    shown = {name.replace("_", " "): "" if value is None else str(value) for name, value in chosen.items()}
    return shown | {"torch": torch.__version__}


def _csv_path(options: argparse.Namespace, header: Sequence[str]) -> Path | None:
    """The file that was asked for; for all operators one in the working folder that takes the columns."""
    if options.csv or options.op != "all":
        return options.csv  # type: ignore[no-any-return]  # argparse types nothing
    source = options.input_file.name.partition(".")[0] if options.input_file else options.suite
    endings = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
    paths = (Path(f"operatorbench_{source}_{options.dtype}{ending}.csv") for ending in endings)
    return next(path for path in paths if can_append(path, header))


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _say(text: str) -> None:
    print(text, flush=True)  # who reads it through a pipe sees it now


def _rows(
    names: Sequence[str],
    log: OperatorLog,
    configurations: Mapping[str, Compiler],
    options: argparse.Namespace,
    traces: OperatorTraces | None,
) -> Generator[Row, None, None]:
    target = Target(
        check_device(options.device),
        _DTYPES[options.dtype],
        options.channels_last,
        int(options.memory_limit * 2**30),
    )
    # While the bar is there, rich prints on its console, which is not where standard output may go.
    with Progress(console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            with traces.of(name) if traces else contextlib.nullcontext() as observe:
                effort = _effort(options.repeats)
                plan = Plan(target, configurations, effort, options.accuracy, observe, _say)
                row = _row(name, log, plan, options)
            yield row
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
    logged = sum(sample.count for sample in samples)
    return make_row(name, reason, measurements, list(plan.configurations), logged, elapsed)


def _effort(repeats: int) -> Effort:
    return Effort(rounds=repeats, sample_seconds=1e-3, case_seconds=1.0)


def _report(
    rows: Sequence[Row],
    configurations: Sequence[str],
    options: argparse.Namespace,
    environment: dict[str, object],
    csv_path: Path | None,
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
    if csv_path:
        print(f"Appended to {csv_path}: {len(rows)} rows.")
    if options.profile:
        print(f"Traces of what was run: {options.profile}")


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
                table.add_row(*first, name, *(f"{figure:.2f}" for figure in vars(row.ratios[name]).values()))
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
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
