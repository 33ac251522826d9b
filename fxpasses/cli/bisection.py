"""Bisection: which one rewrite breaks a command.

    fxpasses bisect python check.py

The command succeeds or fails by its exit status. It runs once unrestricted, which must fail and tells how
many rewrites there are; then the smallest limit under which it still fails is searched for by halving, at
most log2(n) + 2 runs in all. The rewrites must come in the same order every time, so the command should
compile in one process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxpasses.errors import BisectError
from fxpasses.report.data import Remark
from fxpasses.rewrite.limits import FILE, LIMIT, REPROS


@dataclass(frozen=True)
class Culprit:
    """The rewrite that breaks a command.

    Attributes:
        number: the how-manyth of all rewrites it is, from 1.
        total: how many there are.
        remark: what it did, and where.
        runs: how often the command was run.
        repro: the application as a test file, where one was asked for.
    """

    number: int
    total: int
    remark: Remark
    runs: int
    repro: Path | None = None


def smallest_failing(fails: Callable[[int], bool], total: int) -> int:
    """The smallest limit from 0 to `total` that fails, given that `total` does.

    It takes ceil(log2(total + 1)) calls at most.
    """
    low, high = 0, total
    while low < high:
        middle = (low + high) // 2
        if fails(middle):
            high = middle
        else:
            low = middle + 1
    return high


def bisect(command: Sequence[str], repro_directory: Path | None = None) -> Culprit:
    """Finds the rewrite that makes a command fail.

    Args:
        command: the command and its arguments.
        repro_directory: where to save the rewrite as a test file.

    Raises:
        BisectError: the command does not fail, applies no rewrite, or fails without any.
    """
    runs = 0
    with tempfile.TemporaryDirectory() as scratch:
        remarks_file, repros = Path(scratch, "remarks"), Path(scratch, "repros")

        def fails(limit: int | None) -> bool:
            nonlocal runs
            runs += 1
            return _run(command, limit, remarks_file, repros if repro_directory else None)

        if not fails(None):
            raise BisectError("the command succeeds with all rewrites applied; there is nothing to find.")
        remarks = _read(remarks_file)
        if not remarks:
            raise BisectError(
                "the command fails, and no rewrite was applied in it: fxpasses is not to blame."
            )
        number = smallest_failing(fails, len(remarks))
        if number == 0:
            raise BisectError("the command fails without any rewrite too: fxpasses is not to blame.")
        saved = _keep(repros, number, repro_directory) if repro_directory else None
    return Culprit(number, len(remarks), remarks[number - 1], runs, saved)


def _run(command: Sequence[str], limit: int | None, remarks: Path, repros: Path | None) -> bool:
    """Whether the command fails under a limit; only the first, unlimited run writes anything down."""
    environment = {key: value for key, value in os.environ.items() if key not in (LIMIT, FILE, REPROS)}
    if limit is None:
        environment[FILE] = str(remarks)
        if repros is not None:
            environment[REPROS] = str(repros)
    else:
        environment[LIMIT] = str(limit)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
    except OSError as error:
        raise BisectError(f"{command[0]!r} cannot be run: {error.strerror}.") from error
    return done.returncode != 0


def _read(path: Path) -> list[Remark]:
    if not path.exists():
        return []
    return [Remark(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _keep(repros: Path, number: int, directory: Path) -> Path | None:
    found = sorted(repros.glob(f"test_{number:04d}_*.py"))
    if not found:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(found[0], directory))
