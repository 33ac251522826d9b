"""What a GPU says of fxpasses, in one command that a short lease pays for.

    python -m benchmarks.device_check --out FOLDER

Three stages, each with a limit of its own:

    tests       pytest -m gpu
    speed       stock against ours, and ours in the race: training and inference, static and dynamic batch
    memory      training with frozen statistics: peak memory and bytes kept for the backward pass

`FOLDER/device_check.json` is written anew after each run, with what is known of the bars so far: a check that
is cut short has told what it found. `FOLDER/log.txt` has all that the runs printed. `--rehearse` does the
same with tiny networks on a CPU. Architectures are timm's where it is installed, else those of `networks`.
"""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    from benchmarks.device_check.__main__ import main as command  # networks and workers need none of it

    return command(arguments)
