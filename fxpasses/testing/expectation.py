"""Expected counts: a block of code must apply each rule exactly so often."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fxpasses.errors import UnknownRuleError, unknown_name
from fxpasses.pipeline import register_all
from fxpasses.report import counters
from fxpasses.rewrite.registry import REGISTRY, AnyRule, RulePass


@contextlib.contextmanager
def expect(**counts: int) -> Iterator[None]:
    """Fails unless the block applies each named rule exactly as often as said.

    Compilations that happen before the block do not count, so call the compiled function inside it for the
    first time. Rules that are not named may fire as often as they like. A rule of ``options={"rules": ...}``
    is known once something was compiled with it.

    Args:
        counts: rule name to number of applications.

    Raises:
        UnknownRuleError: a name that is no rule, registered or of a compilation in the block.
        AssertionError: the counts differ; the message has the remarks of what was compiled in the block.
    """
    before, seen = counters.applied(), len(counters.reports())
    yield
    _require_known(counts, seen)
    after = counters.applied()
    found = {rule: after[rule] - before[rule] for rule in counts}
    if found != counts:
        raise AssertionError(_difference(counts, found, seen))


@contextlib.contextmanager
def registered(*rules: AnyRule | RulePass) -> Iterator[None]:
    """Has rules or passes in the registry for the time of a block.

    Raises:
        UnknownRuleError: a name is taken.
    """
    done: list[str] = []
    try:
        for rule in rules:
            REGISTRY.register(rule)
            done.append(rule.name)
        yield
    finally:
        for name in done:
            REGISTRY.unregister(name)


def alone(rule: AnyRule | str) -> dict[str, Any]:
    """Options under which one rule runs and no other, whether it is registered or not."""
    register_all()
    name = rule if isinstance(rule, str) else rule.name
    added = () if isinstance(rule, str) or name in REGISTRY.names() else (rule,)
    return {"passes": name, "rules": added}


def _require_known(names: dict[str, int], seen: int) -> None:
    register_all()
    known = {*REGISTRY.names(), *(name for report in counters.reports()[seen:] for name in report.rules)}
    for name in names:
        if name not in known:
            raise UnknownRuleError(unknown_name("rule", name, known))


def _difference(expected: dict[str, int], found: dict[str, int], seen: int) -> str:
    lines = [
        f"{rule}: expected {count} applications, found {found[rule]}"
        for rule, count in expected.items()
        if found[rule] != count
    ]
    compiled = counters.reports()[seen:]
    if not compiled:
        return "\n".join([*lines, "nothing was compiled in the block"])
    remarks = [str(remark) for report in compiled for remark in report.remarks if remark.rule in expected]
    return "\n".join([*lines, "remarks:", *(remarks or ["(no site was looked at)"])])
