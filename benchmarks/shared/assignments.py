"""Settings as they are written on a command line: ``NAME=VALUE;NAME=VALUE``."""

from __future__ import annotations


def assignments(text: str, name: str) -> dict[str, str]:
    """The values of ``NAME=VALUE;...`` as they stand, by name.

    Raises:
        ValueError: a piece is no assignment, or a name is given twice; the message begins with it.
    """
    values: dict[str, str] = {}
    for piece in text.split(";"):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not key or not equals or not value:
            raise ValueError(f"{piece!r} is not {name}=VALUE.")
        if key in values:
            raise ValueError(f"{key!r} is given twice.")
        values[key] = value
    return values
