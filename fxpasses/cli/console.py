"""What commands print: results on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    """Where a command adds its parser."""


def show(*renderables: RenderableType) -> None:
    """To standard output: in the terminal's width and colours, or as plain text."""
    from rich.console import Console

    from fxpasses.report.text import plain

    if sys.stdout.isatty():
        Console(highlight=False, markup=False).print(*renderables, sep="\n")
    else:
        for renderable in renderables:
            print(renderable if isinstance(renderable, str) else plain(renderable))


@contextlib.contextmanager
def working(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error, where that is a terminal; call what it gives at each new step."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda step: progress.update(task, description=step, advance=1)


@contextlib.contextmanager
def measuring(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, where that is a terminal; tell it what is done, and of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    text = TextColumn("measuring {task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def positive(text: str) -> int:
    """An argument that is a number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)
