"""The command line: `fxpasses demo`, `fxpasses explain` and `fxpasses rules`.

Results go to standard output; progress and errors go to standard error. An error on the user's side is one
line and exit status 2, a demo whose result is wrong is exit status 1. torch is imported by the commands
that need it, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fxpasses.errors import FxpassesError

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from fxpasses.demo import DemoResult
    from fxpasses.report import Report

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments after the command's name; None for those of this process.

    Returns:
        The exit status: 0; 1 where the demo's result is wrong; 2 after an error on the user's side; 130 and
        141, as shells have it, where the user or the reader of the output broke it off.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        status = run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has had enough; nothing is left to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        found = _user_error(error)
        if found is None:
            raise
        print(f"fxpasses: error: {' '.join(str(found).split())}", file=sys.stderr)
        return 2
    return status


def _user_error(error: BaseException | None) -> FxpassesError | None:
    """Our error in what was raised; Dynamo hands on what a backend raises as its `inner_exception`."""
    while error is not None and not isinstance(error, FxpassesError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxpasses", description="Graph passes for torch.compile that can be seen, counted and trusted."
    )
    parser.add_argument("--version", action=_Version, help="print the versions of fxpasses and torch")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_explain(commands)
    rules = commands.add_parser("rules", help="list the passes and rules", description="List the rules.")
    rules.set_defaults(run=_rules)
    return parser


class _Version(argparse.Action):
    """Prints the versions, read when asked for."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:  # noqa: A002  argparse's name
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        versions = {name: importlib.metadata.version(name) for name in ("fxpasses", "torch")}
        print(f"fxpasses {versions['fxpasses']} (torch {versions['torch']})")
        parser.exit()


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="optimise an embedded model, check it against eager, compare it with stock inductor",
        description="Fine-tunes an embedded residual network with frozen statistics through "
        'torch.compile(backend="fxpasses"): prints the report, checks outputs and gradients against eager, '
        "and compares speed and memory with stock inductor. Takes one to two minutes on two cores.",
    )
    demo.add_argument("--threads", type=_positive, metavar="N", help="torch threads (torch's own choice)")
    demo.add_argument("--rounds", type=_positive, default=15, metavar="N", help="timed steps of each (15)")
    demo.add_argument("--json", action="store_true", help="print the result as JSON")
    demo.set_defaults(run=_demo)


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    explain.set_defaults(run=_explain)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


# explain ---------------------------------------------------------------------------------------------------


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
            return InputSpec(shape, _dtype(found[2]) if found[2] else None)
        except FxpassesError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def build(self, default: torch.dtype) -> torch.Tensor:
        """Random values; of integers only 0 and 1, which index into anything."""
        import torch

        dtype = self.dtype or default
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(self.shape, dtype=dtype)
        return torch.randint(0, 2, self.shape).to(dtype)


def _dtype(name: str) -> torch.dtype:
    import torch

    from fxpasses.errors import unknown_name

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        names = [
            str(each).removeprefix("torch.") for each in vars(torch).values() if type(each) is torch.dtype
        ]
        raise FxpassesError(unknown_name("dtype", name, names))
    return found


def _explain(arguments: argparse.Namespace) -> int:
    import torch

    import fxpasses
    from fxpasses.model_specs import load_model

    options = fxpasses.Options.of(dict(_option(each) for each in arguments.options))
    dtype = _dtype(arguments.dtype)
    if not dtype.is_floating_point:
        raise FxpassesError(f"--dtype {arguments.dtype} is not a floating dtype, which weights must have.")
    with _working("building the model", total=3) as proceed, _current_directory_importable():
        torch.manual_seed(0)
        model = load_model(arguments.spec).to(dtype).train(arguments.full_train)
        inputs = [each.build(dtype) for each in arguments.input]
        proceed("loading Dynamo")
        fxpasses.reset()
        proceed("tracing")
        start = time.perf_counter()
        with torch.set_grad_enabled(arguments.train or arguments.full_train):
            report = _explained(model, inputs, options)
        seconds = time.perf_counter() - start
    _print_explained(arguments, report, seconds)
    return 0


def _option(text: str) -> tuple[str, object]:
    """``"limit=3"`` as key and value: a Python literal, names with commas between them, or a word."""
    key, equals, given = text.partition("=")
    if not equals:
        raise FxpassesError(f"--options takes KEY=VALUE, such as profit=always; got {text!r}.")
    if key in ("passes", "disable"):
        return key, tuple(each.strip() for each in given.split(",") if each.strip())
    try:
        return key, ast.literal_eval(given)
    except (SyntaxError, ValueError):
        return key, given


def _explained(model: torch.nn.Module, inputs: list[torch.Tensor], options: object) -> Report:
    """The report; where tracing fails because the model itself does, an error that says so."""
    import fxpasses

    assert isinstance(options, fxpasses.Options)
    try:
        return fxpasses.explain(model, *inputs, options=options)
    except FxpassesError:
        raise
    except Exception:
        try:
            model(*inputs)
        except Exception as error:
            shapes = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in inputs)
            raise FxpassesError(
                f"the model does not run on {shapes}: {type(error).__name__}: {error} (see --input, --dtype)"
            ) from error
        raise


def _print_explained(arguments: argparse.Namespace, report: Report, seconds: float) -> None:
    from fxpasses.rendering import remark_table, summary

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
        _print(remark_table(report), "")
    _print(f"{arguments.spec}, {kind}, explained in {seconds:.1f} s", summary(report))


def _save_page(report: Report, path: Path) -> None:
    try:
        report.save_html(path)
    except OSError as error:
        raise FxpassesError(f"cannot write the page to {path}: {error.strerror}.") from error
    print(f"the page is in {path}")


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    """Lets `package.module:factory` name a module beside the user, as `python -m` would."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


# rules -----------------------------------------------------------------------------------------------------


def _rules(arguments: argparse.Namespace) -> int:
    from rich.text import Text

    from fxpasses.options import Options
    from fxpasses.passes import register_all
    from fxpasses.rendering import table_of
    from fxpasses.rewrite.registry import REGISTRY

    register_all()
    table = table_of("rule", "pass", "default", "what it does")
    for each in REGISTRY.pipeline(Options(passes=tuple(REGISTRY.names()))):
        for rule in each.rules:
            what = (type(rule).__doc__ or "").strip().partition("\n")[0]
            table.add_row(rule.name, each.name, "yes" if each.default else "no", Text(what))
    _print(table)
    return 0


# demo ------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    from fxpasses.demo import VARIANTS, run_demo

    with _working("importing", total=1 + len(VARIANTS) + arguments.rounds) as proceed:
        result = run_demo(arguments.rounds, arguments.threads, proceed)
    if arguments.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        _print_demo(result)
    return 0 if result.right else 1


def _print_demo(result: DemoResult) -> None:
    from fxpasses.demo import BATCH, IMAGE
    from fxpasses.rendering import summary, table_of

    checks = table_of("check", "error", "allowed", "")
    for check in result.checks:
        verdict = "right" if check.right else "WRONG"
        if check.eager_error is not None:
            verdict += f" (eager: {check.eager_error:.1e})"
        checks.add_row(check.name, f"{check.error:.1e}", f"{check.allowed:.1e}", verdict)
    times = table_of("variant", "ms a step", "middle half", "MB saved for backward")
    for name, timing in result.timings.items():
        lower, median, upper = (1e3 * each for each in timing.quartiles)
        times.add_row(name, f"{median:.1f}", f"{lower:.1f} to {upper:.1f}", f"{timing.saved_bytes / 1e6:.1f}")
    _print(
        f"a residual network, batch {BATCH} at {IMAGE}x{IMAGE}, fine-tuned with frozen statistics "
        f"({result.threads} threads)",
        summary(result.report),
        "",
        checks,
        "",
        times,
        f"\n{_conclusion(result)}",
    )


def _conclusion(result: DemoResult) -> str:
    ratio = result.ratio
    saved = {name: timing.saved_bytes for name, timing in result.timings.items()}
    return (
        f"speed against stock inductor: {ratio.median:.2f}x, {ratio.verdict} "
        f"(middle half of the paired steps: {ratio.lower:.2f}x to {ratio.upper:.2f}x)\n"
        f"memory kept for the backward pass: {saved['fxpasses'] / saved['inductor']:.2f}x of stock inductor's"
    )


# Output ----------------------------------------------------------------------------------------------------


def _print(*renderables: RenderableType) -> None:
    """To standard output: in the terminal's width and colours, or as plain text."""
    from rich.console import Console

    from fxpasses.rendering import plain

    if sys.stdout.isatty():
        Console(highlight=False, markup=False).print(*renderables, sep="\n")
    else:
        for each in renderables:
            print(each if isinstance(each, str) else plain(each))


@contextlib.contextmanager
def _working(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error, where that is a terminal; call what it gives at each new step."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda step: progress.update(task, description=step, advance=1)
