"""The command `fxpasses`, also `python -m fxpasses`."""

from __future__ import annotations

from fxpasses.cli.main import main as main
