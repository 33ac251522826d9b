"""`python -m benchmarks.operator_inputs`: lists the operator logs of a suite, or records them anew.

    python -m benchmarks.operator_inputs --suite timm
    python -m benchmarks.operator_inputs --suite timm --record
    python -m benchmarks.operator_inputs --suite timm --record --models resnet18 --batch 1 --output DIRECTORY

Recording computes nothing (the tensors are fake) and downloads nothing (the weights are random).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.operators.inputs.log import read_log, write_log
from benchmarks.operators.inputs.suites import (
    LOGS,
    MODES,
    SUITES,
    Entry,
    Mode,
    entries_of,
    entry,
    log_path,
    record,
)
from fxpasses.errors import FxpassesError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        entries = [entry(options.suite, name) for name in options.models.split(",") if name]
        entries = entries or list(entries_of(options.suite))
        if options.batch:
            entries = [dataclasses.replace(entry, batch=options.batch) for entry in entries]
        if options.record:
            _record(options.suite, entries, options.modes, options.dtype, options.output)
        _list(options.suite, entries, options.modes, options.output)
    except FxpassesError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operator_inputs",
        description="List or record the operator inputs of a suite of models.",
    )
    parser.add_argument("--suite", required=True, choices=sorted(SUITES))
    parser.add_argument("--models", default="", help="names of the suite's models, by commas (default: all)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--record", action="store_true", help="record, in place of listing what is there")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32", help="of weights and inputs")
    parser.add_argument("--batch", type=int, default=0, help="in place of the suite's batch size")
    parser.add_argument("--output", type=Path, default=LOGS, help="the directory of the logs")
    return parser


def _record(suite: str, entries: list[Entry], modes: list[Mode], dtype: str, output: Path) -> None:
    directory = output / suite
    directory.mkdir(parents=True, exist_ok=True)
    manifest_path = directory / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    for chosen in track(entries, description=f"Recording {suite}"):
        for mode in modes:
            write_log(log_path(output, suite, chosen.name, mode), record(chosen, mode, _DTYPES[dtype]).counts)
        manifest[chosen.name] = {
            **dataclasses.asdict(chosen),
            "dtype": dtype,
            "attention": "math",
            "torch": torch.__version__,
            suite: importlib.metadata.version(suite),  # a suite is named after the library of its models
        }
    manifest_path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _list(suite: str, entries: list[Entry], modes: list[Mode], output: Path) -> None:
    table = Table("log", "operators", "inputs", "occurrences", title=f"Operator inputs of suite {suite}")
    for chosen in entries:
        for mode in modes:
            path = log_path(output, suite, chosen.name, mode)
            log = read_log(path)
            counts = [sample.count for name in log.names() for sample in log.samples(name)]
            table.add_row(path.name, str(len(log.names())), str(len(counts)), str(sum(counts)))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
