"""Limits on the whole process, for bisection: the first N rewrites happen, the rest do not.

`fxpasses bisect` runs a user's check again and again under two environment variables:

    FXPASSES_LIMIT=N             apply at most N rewrites in this process, over all its graphs
    FXPASSES_BISECT_FILE=FILE    append one line of JSON for every rewrite applied
    FXPASSES_BISECT_REPROS=DIR   save every application as a test file, `0001_...py` and so on

They are read at every compilation, so that a test may set them. `Options.limit` does the same for one graph.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from fxpasses.errors import UnknownOptionError
from fxpasses.report.application import Application
from fxpasses.report.data import Remark
from fxpasses.report.repro import save_application

LIMIT = "FXPASSES_LIMIT"
FILE = "FXPASSES_BISECT_FILE"
REPROS = "FXPASSES_BISECT_REPROS"


class ProcessLimit:
    """How many rewrites this process has applied, and whether it may apply another."""

    def __init__(self) -> None:
        self.applied = 0

    @property
    def limit(self) -> int | None:
        """The limit that the environment sets, or None.

        Raises:
            UnknownOptionError: the variable holds something else than a number from 0 up.
        """
        given = os.environ.get(LIMIT)
        if given is None:
            return None
        if not given.isdecimal():
            raise UnknownOptionError(f"{LIMIT} takes a number from 0 up; got {given!r}.")
        return int(given)

    def check(self) -> None:
        """Raises `UnknownOptionError` where the environment sets a limit that is no number."""
        _ = self.limit

    @property
    def wants_repros(self) -> bool:
        """Whether applications are to be saved."""
        return REPROS in os.environ

    def allows(self) -> bool:
        """Whether one more rewrite may be applied."""
        limit = self.limit
        return limit is None or self.applied < limit

    def note(self, remark: Remark, application: Application | None) -> None:
        """Counts an application, and writes it down where the environment says so."""
        self.applied += 1
        if path := os.environ.get(FILE):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(remark)) + "\n")
        if application is not None and (directory := os.environ.get(REPROS)):
            save_application(application, Path(directory), self.applied)


PROCESS = ProcessLimit()
"""The limit of this process."""
