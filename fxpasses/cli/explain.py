"""`fxpasses explain SPEC --input SIZES`: a dry run over a model with random weights."""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fxpasses.cli.console import show, working
from fxpasses.errors import FxpassesError, unknown_name

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

SPEC_HELP = (
    "timm:NAME, torchvision:NAME, transformers:CLASS, or package.module:factory, which names a function that "
    "takes no arguments and returns a module; the current directory is importable"
)


def add_command(commands: Commands) -> None:
    """Adds the command to the parser's."""
    explain = commands.add_parser(
        "explain",
        help="say what would fire on a model, what would not, and why",
        description=EXPLAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    explain.add_argument(
        "--input",
        action="append",
        required=True,
        type=InputSpec.parse,
        metavar="SHAPE[:DTYPE]",
        help="sizes of one argument, such as 1,3,224,224 or 1,128:int64; once for each argument",
    )
    mode = explain.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="gradients on, batch norms in eval mode")
    mode.add_argument("--full-train", action="store_true", help="gradients on, batch norms in training mode")
    explain.add_argument("--dtype", default="float32", help="floating dtype of model and inputs (float32)")
    explain.add_argument(
        "--options",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="fields of fxpasses.Options, such as profit=always or disable=efficient_conv_bn_eval",
    )
    output = explain.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the report as JSON")
    output.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    explain.set_defaults(run=run)


@dataclass(frozen=True)
class InputSpec:
    """One argument of the model: sizes, and a dtype or None for that of the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @staticmethod
    def parse(text: str) -> InputSpec:
        """Reads ``"1,3,224,224"`` or ``"1,128:int64"``.

        Raises:
            argparse.ArgumentTypeError: it is neither.
        """
        found = re.fullmatch(r"(\d+(?:,\d+)*)(?::(\w+))?", text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not sizes with commas between them and, if need be, a dtype: 1,3,224,224 or "
                "1,128:int64"
            )
        shape = tuple(int(size) for size in found[1].split(","))
        try:
            return InputSpec(shape, dtype_of(found[2]) if found[2] else None)
        except FxpassesError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def build(self, default: torch.dtype) -> torch.Tensor:
        """Random values; of integers only 0 and 1, which index into anything."""
        import torch

        dtype = self.dtype or default
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(self.shape, dtype=dtype)
        return torch.randint(0, 2, self.shape).to(dtype)


def dtype_of(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        names = [
            str(value).removeprefix("torch.") for value in vars(torch).values() if type(value) is torch.dtype
        ]
        raise FxpassesError(unknown_name("dtype", name, names))
    return found


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


def option_of(text: str) -> tuple[str, object]:
    """``"limit=3"`` as key and value: a Python literal, names with commas between them, or a word."""
    key, equals, given = text.partition("=")
    if not equals:
        raise FxpassesError(f"--options takes KEY=VALUE, such as profit=always; got {text!r}.")
    if key in ("passes", "disable"):
        return key, tuple(name.strip() for name in given.split(",") if name.strip())
    try:
        return key, ast.literal_eval(given)
    except (SyntaxError, ValueError):
        return key, given


def _explained(model: torch.nn.Module, inputs: list[torch.Tensor], options: Options) -> Report:
    """The report; where tracing fails because the model itself does, an error that says so."""
    from fxpasses.api import explain

    try:
        return explain(model, *inputs, options=options)
    except FxpassesError:
        raise
    except Exception:
        try:
            model(*inputs)
        except Exception as error:
            shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in inputs)
            raise FxpassesError(
                f"the model does not run on {shapes}: {type(error).__name__}: {error} (see --input, --dtype)"
            ) from error
        raise


def _print_explained(arguments: argparse.Namespace, report: Report, seconds: float) -> None:
    from fxpasses.report.text import remark_table, summary

    if arguments.json:
        print(report.to_json())
        return
    kind = "inference (eval mode, no gradients)"
    if arguments.full_train:
        kind = "training (batch norms in training mode, gradients on)"
    elif arguments.train:
        kind = "training with frozen statistics (eval mode, gradients on)"
    if arguments.html is not None:
        _save_page(report, arguments.html)
    elif report.remarks:
        show(remark_table(report), "")
    show(f"{arguments.spec}, {kind}, explained in {seconds:.1f} s", summary(report))


def _save_page(report: Report, path: Path) -> None:
    try:
        report.save_html(path)
    except OSError as error:
        raise FxpassesError(f"cannot write the page to {path}: {error.strerror}.") from error
    print(f"the page is in {path}")


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """Lets `package.module:factory` name a module beside the user, as `python -m` would."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
