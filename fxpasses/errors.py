"""Every error that fxpasses raises on bad input: what was given, what is valid, what to do next.

All derive from `FxpassesError`, and from the built-in exception that a caller would expect
(`ValueError` for a bad option, `RuntimeError` for a bad environment), so that either catches them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxpassesError(Exception):
    """Base class of the errors that fxpasses raises."""


class UnknownOptionError(FxpassesError, ValueError):
    """An option that `fxpasses.Options` does not have, or a value that it does not take."""


class UnknownRuleError(FxpassesError, ValueError):
    """A pass or rule name that is not registered, or a registration that cannot be honoured."""


class ModelSpecError(FxpassesError, ValueError):
    """A model specification that does not parse, does not import or does not build."""


class MissingMetadataError(FxpassesError, ValueError):
    """A graph whose tensors have no metadata, given without example inputs to compute it from."""


class UnsupportedTorchError(FxpassesError, RuntimeError):
    """The installed torch is outside the range of versions that fxpasses is known to work with."""


class MissingCompilerError(FxpassesError, RuntimeError):
    """Inductor needs a C++ compiler and found none."""


class RewriteError(FxpassesError, RuntimeError):
    """A rule failed while it changed a graph; the graph was rolled back."""


class FixpointError(FxpassesError, RuntimeError):
    """A pass that was to run until nothing changes, and changes a graph for ever."""


class ReproError(FxpassesError, ValueError):
    """An application that cannot be saved as a test."""


class BisectError(FxpassesError, RuntimeError):
    """A command whose failure cannot be laid at one rewrite's door."""


class PatternError(FxpassesError, ValueError):
    """A declarative rule whose pattern or replacement cannot be traced or matched."""


def unknown_name(kind: str, given: str, valid: Iterable[str], advice: str = "") -> str:
    """The message for a name that is not among the valid ones, with the closest of them.

    Args:
        kind: what the name stands for, such as ``"option"``.
        given: the name that was not found.
        valid: the names that exist.
        advice: a sentence to append.
    """
    names = sorted(valid)
    closest = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {closest[0]!r}?" if closest else ""
    message = f"unknown {kind} {given!r}.{hint} Valid: {', '.join(names) or '(none)'}."
    return f"{message} {advice}".rstrip()
