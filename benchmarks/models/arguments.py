"""Which models a command takes: those that `--models` names, or those of a `--suite`."""

from __future__ import annotations

import argparse

from rich.console import Console

from benchmarks.models import field
from benchmarks.models.variants import VariantError

_DEFAULT = "resnet18"


def add_models(parser: argparse.ArgumentParser) -> None:
    """Adds the two options, of which one may be given."""
    which = parser.add_mutually_exclusive_group()
    # Without a default of argparse's: that, given together with a suite, would pass for not given.
    which.add_argument("--models", help=f"default: {_DEFAULT}")
    which.add_argument("--suite", choices=("field",), help="the models of a suite that are installed here")


def models_of(given: argparse.Namespace) -> tuple[str, ...]:
    """The specifications of the models, each once.

    Raises:
        VariantError: there is none.
    """
    if given.suite:
        return field.specifications()
    named = _DEFAULT if given.models is None else given.models
    models = tuple(dict.fromkeys(name.strip() for name in named.split(",") if name.strip()))
    if not models:
        raise VariantError("--models names no model; write one such as resnet18.")
    return models


def say_what_is_left_out(given: argparse.Namespace, console: Console) -> None:
    """Names the models of a suite whose packages are not installed."""
    if given.suite and (missing := field.not_installed()):
        console.print(f"not installed and left out: {', '.join(missing)}", highlight=False)
