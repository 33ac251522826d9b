"""Models under several compilers, in processes of their own: `python -m benchmarks.models --help`.

    __main__ (the command) ─ suite ─ workers ═ worker (one process a variant)
                               │                 └ cases, variants, accuracy, memory, saved_tensors
                               └ results ─ reporting, gates, worth

`messages` is what goes over the double line; `parts` is what `python -m benchmarks.ablation` leaves out.
"""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    from benchmarks.models.__main__ import main as command  # a worker is of this package and needs none of it

    return command(arguments)
