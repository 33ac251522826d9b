"""Sweeps of a pass that runs until nothing changes: what each did, and which rules alternate without end."""

from __future__ import annotations

from collections.abc import Sequence

from fxpasses.report.data import Remark

_SHOWN = 6
"""How many applications of a cycle, and how many sites, a message has."""


class Sweeps:
    """The sweeps of one pass over one graph that changed it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._sweeps: list[list[Remark]] = []

    def __len__(self) -> int:
        return len(self._sweeps)

    def add(self, remarks: Sequence[Remark]) -> None:
        """Enters the remarks of a sweep that changed the graph."""
        self._sweeps.append(list(remarks))

    def with_last(self, last: Sequence[Remark]) -> list[Remark]:
        """The remarks that stay true after a last, quiet sweep; a failure that came again is there once."""
        earlier = [remark for sweep in self._sweeps for remark in sweep if remark.status != "declined"]
        failures: set[Remark] = set()
        remarks = []
        for remark in (*earlier, *last):
            if remark in failures:
                continue
            if remark.status == "failed":
                failures.add(remark)
            remarks.append(remark)
        return remarks

    def message(self) -> str:
        """What an error says: the rules that alternate, at each site that the last sweep still changed."""
        sites = dict.fromkeys((each.graph, each.node) for each in self._applied(self._sweeps[-1]))
        lines = [self._line(site) for site in list(sites)[:_SHOWN]]
        if len(sites) > _SHOWN:
            lines.append(f"and at {len(sites) - _SHOWN} more")
        return (
            f"pass {self._name!r} still changes the graph after {len(self)} sweeps (max_sweeps): "
            f"{'; '.join(lines)}. Have one of the rules decline what the other writes, or raise max_sweeps."
        )

    def _line(self, site: tuple[str, str]) -> str:
        history = [
            remark
            for sweep in self._sweeps
            for remark in self._applied(sweep)
            if (remark.graph, remark.node) == site
        ]
        rules = _shortest_cycle([remark.rule for remark in history])
        place = history[-1].location or history[-1].module
        where = f"{site[1]} ({place})" if place else site[1]
        if rules is None:
            return f"{history[-1].rule} at {where}"
        return f"{' -> '.join([*rules, rules[0]])} at {where}"

    @staticmethod
    def _applied(sweep: Sequence[Remark]) -> list[Remark]:
        return [remark for remark in sweep if remark.status == "applied"]


def _shortest_cycle(names: Sequence[str]) -> list[str] | None:
    """The names that a sequence ends in twice or more; None where it does not."""
    for length in range(1, min(len(names) // 2, _SHOWN) + 1):
        if names[-length:] == names[-2 * length : -length]:
            return list(names[-length:])
    return None
