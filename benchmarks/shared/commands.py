"""What commands have in common."""

from __future__ import annotations

import argparse
from typing import NoReturn


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Ends a command with one line on standard error and exit status 2."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")
