"""`fxpasses demo`: runs the demonstration and prints what it found."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from fxpasses.cli.console import positive, show, working

if TYPE_CHECKING:
    from fxpasses.cli.console import Commands
    from fxpasses.cli.demonstration import DemoResult


def add_command(commands: Commands) -> None:
    """Adds the command to the parser's."""
    demo = commands.add_parser(
        "demo",
        help="optimise an embedded model, check it against eager, compare it with stock inductor",
        description="Fine-tunes an embedded residual network with frozen statistics through "
        'torch.compile(backend="fxpasses"): prints the report, checks outputs and gradients against eager, '
        "and compares speed and memory with stock inductor. Takes one to two minutes on two cores.",
    )
    demo.add_argument("--threads", type=positive, metavar="N", help="torch threads (torch's own choice)")
    demo.add_argument("--rounds", type=positive, default=15, metavar="N", help="timed steps of each (15)")
    demo.add_argument("--json", action="store_true", help="print the result as JSON")
    demo.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs it; exit status 1 where the result is wrong."""
    from fxpasses.cli.demonstration import VARIANTS, run_demo

    with working("importing", total=1 + len(VARIANTS) + arguments.rounds) as proceed:
        result = run_demo(arguments.rounds, arguments.threads, proceed)
    if arguments.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        _print_demo(result)
    return 0 if result.right else 1


def _print_demo(result: DemoResult) -> None:
    from fxpasses.cli.demonstration import BATCH, IMAGE
    from fxpasses.report.text import summary, table_of

    checks = table_of("check", "error", "allowed", "")
    for check in result.checks:
        verdict = "right" if check.right else "WRONG"
        if check.eager_error is not None:
            verdict += f" (eager: {check.eager_error:.1e})"
        checks.add_row(check.name, f"{check.error:.1e}", f"{check.allowed:.1e}", verdict)
    times = table_of("variant", "ms a step", "middle half", "MB saved for backward")
    for name, timing in result.timings.items():
        lower, median, upper = (1e3 * seconds for seconds in timing.quartiles)
        times.add_row(name, f"{median:.1f}", f"{lower:.1f} to {upper:.1f}", f"{timing.saved_bytes / 1e6:.1f}")
    show(
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
