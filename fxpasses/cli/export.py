"""`fxpasses export SPEC --input SIZES -o FILE.pt2`: a model as a file, with its weights baked."""

from __future__ import annotations

import argparse
import dataclasses
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
    from torch.export import ExportedProgram

    from fxpasses.cli.console import Commands

EXPORT_HELP = """\
Exports a model with random weights for inference, optimizes the program, and writes it to a file.

What depends on weights alone is computed now and stored (weights=baked). The file needs no fxpasses where it
runs: torch.export.load reads it, and with --aoti torch._inductor.aoti_load_package, which runs compiled code.
"""


def add_command(commands: Commands) -> None:
    """Adds the command to the parser's."""
    export = commands.add_parser(
        "export",
        help="write a model to a file, optimized, with what depends on weights alone computed",
        description=EXPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(export, required=True, trains=False)
    export.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="what to write: a file named .pt2"
    )
    export.add_argument("--aoti", action="store_true", help="compile it, for machines of this kind")
    add_options(export)
    export.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exports, optimizes and writes a model, and prints the report."""
    import torch

    from fxpasses.api import optimize
    from fxpasses.cli.model_specs import load_model
    from fxpasses.options import Options
    from fxpasses.report.text import summary

    options = Options.of({"weights": "baked", **dict(map(option_of, arguments.options))})
    _check_output(arguments.output)
    dtype = dtype_of(arguments.dtype)
    if not dtype.is_floating_point:
        raise FxpassesError(f"--dtype {arguments.dtype} is not a floating dtype, which weights must have.")
    start = time.perf_counter()
    with working("building the model", total=4) as proceed, current_directory_importable(), torch.no_grad():
        torch.manual_seed(0)
        model = load_model(arguments.spec).to(dtype).eval()
        inputs = tuple(spec.build(dtype) for spec in arguments.input)
        proceed("exporting")
        program = _exported(model, inputs)
        proceed("optimizing")
        result = optimize(program, options=options)
        proceed("compiling" if arguments.aoti else "saving")
        assert result.exported_program is not None
        _write(result.exported_program, arguments.output, aoti=arguments.aoti)
    report = result.report
    seconds = time.perf_counter() - start
    unbaked = dataclasses.replace(report, kept_tensors=0)  # what is baked has a line of its own
    show(f"{arguments.spec}, exported for inference in {seconds:.1f} s", summary(unbaked))
    size = arguments.output.stat().st_size / 1e6
    show(f"{_baked(report.kept_tensors, report.kept_bytes)}; {arguments.output} has {size:.1f} MB")
    return 0


def _check_output(path: Path) -> None:
    """Refuses what torch would refuse after minutes of work."""
    if path.suffix != ".pt2":
        raise FxpassesError(f"-o takes a file named .pt2, as torch's loaders do; got {path}.")
    if not path.parent.is_dir():
        raise FxpassesError(f"cannot write to {path}: {path.parent} is no directory.")


def _exported(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> ExportedProgram:
    """The program; where exporting fails, an error that says whether the model runs at all."""
    import torch

    try:
        return torch.export.export(model, inputs)
    except Exception as error:
        if failure := failure_of(model, inputs):
            raise failure from error
        found = f"{type(error).__name__}: {error}"
        raise FxpassesError(f"torch.export.export cannot capture the model, which runs: {found}") from error


def _write(program: ExportedProgram, path: Path, *, aoti: bool) -> None:
    import torch

    from fxpasses.torch_internals.inductor import compile_ahead

    try:
        if aoti:
            compile_ahead(program, path)
        else:
            torch.export.save(program, path)
    except OSError as error:
        raise FxpassesError(f"cannot write the program to {path}: {error.strerror}.") from error


def _baked(count: int, size: int) -> str:
    return f"{count} constants baked, {size / 1e6:.1f} MB" if count else "nothing was baked"
