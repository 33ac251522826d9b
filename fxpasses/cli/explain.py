"""`fxpasses explain SPEC --input SIZES`: a dry run over a model with random weights."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fxpasses.cli.console import show, working
from fxpasses.cli.model_arguments import (
    add_model,
    add_options,
    current_directory_importable,
    dtype_of,
    failure_of,
    option_of,
)
from fxpasses.errors import FxpassesError

if TYPE_CHECKING:
    import torch

    from fxpasses.cli.console import Commands
    from fxpasses.options import Options
    from fxpasses.report.report import Report

EXPLAIN_HELP = """\
A dry run of the passes over a model with random weights: what would fire, what would not, and why.

The model is traced by Dynamo as torch.compile would; nothing is compiled. Without --train it is explained as
inference: eval mode, under torch.no_grad(). With --train gradients are on, every parameter is trainable, and
batch norms stay in eval mode: fine-tuning with frozen statistics. With --full-train batch norms are in
training mode too.
"""


def add_command(commands: Commands) -> None:
    """Adds the command to the parser's."""
    explain = commands.add_parser(
        "explain",
        help="say what would fire on a model, what would not, and why",
        description=EXPLAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(explain, required=True)
    add_options(explain)
    explain.add_argument("--all", action="store_true", help="print every site, and every copied tensor")
    output = explain.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the report as JSON")
    output.add_argument(
        "--why", metavar="PLACE", help="ask about a module, a node or a source line, such as model.py:41"
    )
    output.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    explain.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Traces the model and prints the report."""
    import torch

    from fxpasses.cli.model_specs import load_model
    from fxpasses.options import Options
    from fxpasses.report import counters

    options = Options.of(dict(option_of(option) for option in arguments.options))
    dtype = dtype_of(arguments.dtype)
    if not dtype.is_floating_point:
        raise FxpassesError(f"--dtype {arguments.dtype} is not a floating dtype, which weights must have.")
    with working("building the model", total=3) as proceed, current_directory_importable():
        torch.manual_seed(0)
        model = load_model(arguments.spec).to(dtype).train(arguments.full_train)
        inputs = [spec.build(dtype) for spec in arguments.input]
        proceed("loading Dynamo")
        counters.reset()
        proceed("tracing")
        start = time.perf_counter()
        with torch.set_grad_enabled(arguments.train or arguments.full_train):
            report = _explained(model, inputs, options)
        seconds = time.perf_counter() - start
    _print_explained(arguments, report, seconds)
    return 0


def _explained(model: torch.nn.Module, inputs: list[torch.Tensor], options: Options) -> Report:
    """The report; where tracing fails because the model itself does, an error that says so."""
    from fxpasses.api import explain

    try:
        return explain(model, *inputs, options=options)
    except FxpassesError:
        raise
    except Exception as error:
        if failure := failure_of(model, inputs):
            raise failure from error
        raise


def _print_explained(arguments: argparse.Namespace, report: Report, seconds: float) -> None:
    from fxpasses.report.text import remark_table, summary

    if arguments.json:
        print(report.to_json())
        return
    if arguments.why is not None:
        print(report.why(arguments.why))
        return
    kind = "inference (eval mode, no gradients)"
    if arguments.full_train:
        kind = "training (batch norms in training mode, gradients on)"
    elif arguments.train:
        kind = "training with frozen statistics (eval mode, gradients on)"
    if arguments.html is not None:
        _save_page(report, arguments.html)
    elif arguments.all and report.remarks:
        show(remark_table(report), "")
    found = summary(report, everything=arguments.all)
    show(f"{arguments.spec}, {kind}, explained in {seconds:.1f} s", found)


def _save_page(report: Report, path: Path) -> None:
    try:
        report.save_html(path)
    except OSError as error:
        raise FxpassesError(f"cannot write the page to {path}: {error.strerror}.") from error
    print(f"the page is in {path}")
