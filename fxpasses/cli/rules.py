"""`fxpasses rules`: the passes and rules of this process."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fxpasses.cli.console import show

if TYPE_CHECKING:
    from fxpasses.cli.console import Commands


def add_command(commands: Commands) -> None:
    """Adds the command to the parser's."""
    rules = commands.add_parser("rules", help="list the passes and rules", description="List the rules.")
    rules.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Prints the table."""
    from rich.text import Text

    from fxpasses.options import Options
    from fxpasses.pipeline import register_all
    from fxpasses.report.text import table_of
    from fxpasses.rewrite.registry import REGISTRY

    register_all()
    table = table_of("rule", "pass", "default", "what it does")
    for pass_ in REGISTRY.pipeline(Options(passes=tuple(REGISTRY.names()))):
        for rule in pass_.rules:
            what = (type(rule).__doc__ or "").strip().partition("\n")[0]
            table.add_row(rule.name, pass_.name, "yes" if pass_.default else "no", Text(what))
    show(table)
    return 0
