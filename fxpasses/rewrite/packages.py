"""Rules that other packages bring, by entry points of the group `fxpasses.rules`.

    [project.entry-points."fxpasses.rules"]
    anything = "their_package.rules:RULES"

The object is a rule, a pass, a list of them, or something that gives one of these when it is called without
arguments, such as a class of rules. It is loaded when the first graph comes, once a process. What cannot be
loaded or registered is named in a warning and left out, with all that its entry point brings.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterable
from importlib.metadata import EntryPoint

from fxpasses.errors import UnknownRuleError
from fxpasses.rewrite.graph_pass import GraphPass
from fxpasses.rewrite.registry import AnyRule, Pass, Registry, RulePass
from fxpasses.rewrite.rule import Rule

GROUP = "fxpasses.rules"


def register_packages(registry: Registry) -> None:
    """Registers what the installed packages bring, in the order of their names and then of their entries'."""
    for entry in sorted(
        importlib.metadata.entry_points(group=GROUP), key=lambda entry: (_from(entry), entry.name)
    ):
        try:
            _register(registry, _brought(entry.load()), _from(entry))
        except Exception as error:  # theirs, whatever it is: a compilation does without
            warnings.warn(
                f"the entry point {entry.name!r} of {_from(entry)} (group {GROUP}) is skipped: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def _from(entry: EntryPoint) -> str:
    """The name and version of the distribution."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


def _brought(found: object) -> list[AnyRule | Pass]:
    """What an entry point's object is, or gives when it is called.

    Raises:
        TypeError: something that is neither a rule nor a pass.
    """
    given = found() if callable(found) else found
    rules: Iterable[object] = given if isinstance(given, (list, tuple)) else (given,)
    brought: list[AnyRule | Pass] = []
    for rule in rules:
        if not isinstance(rule, (Rule, RulePass, GraphPass)):
            raise TypeError(f"it should give rules or passes, and gives {rule!r}")
        brought.append(rule)
    return brought


def _register(registry: Registry, brought: list[AnyRule | Pass], source: str) -> None:
    """Registers all of it, or nothing."""
    done: list[str] = []
    try:
        for rule in brought:
            registry.register(rule, source)
            done.append(rule.name)
    except UnknownRuleError:
        for name in done:
            registry.unregister(name)
        raise
