"""`fxpasses rules`: the passes and rules that there are, and which package each comes from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fxpasses.cli.console import show

if TYPE_CHECKING:
    from fxpasses.cli.console import Commands


def add_command(commands: Commands) -> None:
    """Adds the command to the parser's."""
    rules = commands.add_parser(
        "rules",
        help="list the passes and rules",
        description="The rules and passes of fxpasses, and those that installed packages bring.",
    )
    rules.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Prints the table."""
    from rich.text import Text

    from fxpasses.options import Options
    from fxpasses.pipeline import register_all
    from fxpasses.report.text import table_of
    from fxpasses.rewrite.graph_pass import GraphPass
    from fxpasses.rewrite.registry import REGISTRY

    register_all()
    table = table_of("rule", "pass", "default", "from", "what it does")
    for pass_ in REGISTRY.pipeline(Options(passes=tuple(REGISTRY.names()))):
        default, source = "yes" if pass_.default else "no", REGISTRY.source(pass_.name)
        if isinstance(pass_, GraphPass):
            table.add_row("", pass_.name, default, source, Text(_first_line(pass_.run)))
        for rule in pass_.rules:
            table.add_row(rule.name, pass_.name, default, source, Text(_first_line(rule)))
    show(table)
    return 0


def _first_line(documented: object) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]
