"""How far a run is: a bar on a terminal, lines of text elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from benchmarks.models.suite import Progress


@contextlib.contextmanager
def shown_progress(console: Console, units: int) -> Iterator[Progress]:
    """Shows what `run_suite` tells.

    Args:
        console: of the standard errors.
        units: what `done` adds up to.
    """
    with Bar(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("starting", total=units)

        def progress(text: str, done: int = 0) -> None:
            bar.update(task, description=text, advance=done)
            if not console.is_terminal:  # where a bar cannot be seen, a log can
                console.log(text)

        yield progress
