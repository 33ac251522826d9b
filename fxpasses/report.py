"""Reports: what happened in one compilation, as plain data that merges, serialises and prints.

A `Remark` says what happened at one site; a `Report` holds all remarks of one compilation, how often each
rule was applied, and how long each pass took. Both are frozen; text, JSON and HTML are renderings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from fxpasses.picture import GraphPicture

if TYPE_CHECKING:
    from fxpasses.passes.layout.plan import LayoutPlan
    from fxpasses.rewrite.application import Application

Status = Literal["applied", "declined", "failed"]

SCHEMA = 1
"""The version of the JSON form."""


@dataclass(frozen=True)
class Remark:
    """What happened at one site.

    Attributes:
        rule: the rule that looked at the site.
        status: ``"applied"``, ``"declined"`` (legal reasons, or it would not pay) or ``"failed"``.
        code: a stable reason code; ``"applied"`` for an application.
        message: the reason in words.
        node: the node that the rule anchors at.
        location: the user's source line, ``"model.py:41"``; empty where the graph does not carry it.
        stage: how far the site came: structure, hazards, check, profit, applied.
        module: the qualified name of the module that the node came from, where it is known.
        blamed: the node to blame, which may be another one than the anchor.
        graph: the path of the nested graph that holds the site; empty for the outermost one.
        matched: how many operators of the pattern were found.
        pattern_size: how many there are; 0 where the pattern is not known.
    """

    rule: str
    status: Status
    code: str
    message: str
    node: str
    location: str = ""
    stage: str = ""
    module: str = ""
    blamed: str = ""
    graph: str = ""
    matched: int = 0
    pattern_size: int = 0

    def __str__(self) -> str:
        where = self.location or self.module
        reason = self.status if self.status == "applied" else f"{self.status} [{self.code}]"
        found = f"matched {self.matched} of {self.pattern_size} nodes; " if self.pattern_size else ""
        site = f"{self.node} ({where})" if where else self.node
        return f"{self.rule} at {site}: {found}{reason}: {self.message}"


@dataclass(frozen=True)
class Report:
    """All remarks, counters and timings of one compilation.

    Attributes:
        remarks: one for every site that any rule looked at, in the order of the graph.
        seconds: wall time of each pass, by name, in seconds.
        nodes_before, nodes_after: number of nodes, nested graphs included.
        level: the capture level of the graph.
        layout: the layout plan, or None where no layout pass ran.
        dry_run: whether nothing was compiled (`fxpasses.explain`).
        kept_tensors, kept_bytes: what `weights="cached"` keeps between calls, in number and in bytes.
        packed_tensors: how many convolutions and linear layers read weights that are kept in the format of
            their kernel: oneDNN's or ours.
        graphs: pictures of the graph before and after, nested graphs included; empty for a graph of more
            than `fxpasses.picture.LARGEST` nodes.
        applications: what each rewrite replaced, where that was kept (`keep_repro`, `verify="numerics"`);
            those that were rolled back are among them. Not part of the JSON form.
    """

    remarks: tuple[Remark, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    nodes_before: int = 0
    nodes_after: int = 0
    level: str = ""
    layout: LayoutPlan | None = None
    dry_run: bool = False
    kept_tensors: int = 0
    kept_bytes: int = 0
    packed_tensors: int = 0
    graphs: tuple[GraphPicture, ...] = field(default=(), repr=False)
    applications: tuple[Application, ...] = field(default=(), repr=False, compare=False)

    @property
    def applied(self) -> Mapping[str, int]:
        """Rule name to the number of its applications; a rule that never fired is absent."""
        return MappingProxyType(Counter(each.rule for each in self.remarks if each.status == "applied"))

    @property
    def declined(self) -> tuple[Remark, ...]:
        """The remarks of sites where a rule did not fire, nearest miss first."""
        missed = [each for each in self.remarks if each.status != "applied"]
        return tuple(sorted(missed, key=lambda each: (-_STAGES.get(each.stage, 0), -each.matched)))

    @staticmethod
    def merge(reports: Iterable[Report]) -> Report:
        """One report over several compilations: remarks in order, times and sizes added up."""
        parts = list(reports)
        seconds: Counter[str] = Counter()
        for part in parts:
            seconds.update(part.seconds)
        return Report(
            remarks=tuple(remark for part in parts for remark in part.remarks),
            seconds=dict(seconds),
            nodes_before=sum(part.nodes_before for part in parts),
            nodes_after=sum(part.nodes_after for part in parts),
            level="+".join(dict.fromkeys(part.level for part in parts if part.level)),
            layout=next((part.layout for part in reversed(parts) if part.layout is not None), None),
            dry_run=any(part.dry_run for part in parts),
            kept_tensors=sum(part.kept_tensors for part in parts),
            kept_bytes=sum(part.kept_bytes for part in parts),
            packed_tensors=sum(part.packed_tensors for part in parts),
            graphs=_numbered(parts),
            applications=tuple(each for part in parts for each in part.applications),
        )

    def to_json(self) -> str:
        """The report as JSON, with the version of its form under ``"schema"``."""
        data = {
            "schema": SCHEMA,
            "applied": dict(self.applied),
            "remarks": [asdict(each) for each in self.remarks],
            "seconds": dict(self.seconds),
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "level": self.level,
            "layout": self.layout.to_dict() if self.layout is not None else None,
            "dry_run": self.dry_run,
            "kept_tensors": self.kept_tensors,
            "kept_bytes": self.kept_bytes,
            "packed_tensors": self.packed_tensors,
            "graphs": [each.to_dict() for each in self.graphs],
        }
        return json.dumps(data, indent=2)

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            ValueError: the text is not such a report, or of another version.
        """
        try:
            data = json.loads(text)
            if data.pop("schema") != SCHEMA:
                raise ValueError(f"this fxpasses reads version {SCHEMA}")
            data.pop("applied")
            remarks = tuple(Remark(**each) for each in data.pop("remarks"))
            graphs = tuple(GraphPicture.from_dict(each) for each in data.pop("graphs"))
            return Report(remarks=remarks, graphs=graphs, layout=_plan(data.pop("layout")), **data)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a report of fxpasses, or of another version: {error}") from error

    def __str__(self) -> str:
        from fxpasses.rendering import render_text

        return render_text(self)

    def save_html(self, path: str | Path) -> None:
        """Writes the report as one self-contained page."""
        from fxpasses.rendering import render_html

        Path(path).write_text(render_html(self), encoding="utf-8")

    def save_repro(self, directory: str | Path) -> list[Path]:
        """Writes each application as a pytest file of its own that needs no model; returns their paths.

        Raises:
            ReproError: rewrites were applied, and what they replaced was not kept.
        """
        from fxpasses.rewrite.repro import save_repro

        return save_repro(self, Path(directory))


def _numbered(parts: Iterable[Report]) -> tuple[GraphPicture, ...]:
    """The pictures of all parts; each compilation gets a number of its own."""
    graphs: list[GraphPicture] = []
    first = 0
    for part in parts:
        graphs += [replace(each, compilation=first + each.compilation) for each in part.graphs]
        first += 1 + max((each.compilation for each in part.graphs), default=-1)
    return tuple(graphs)


def _plan(data: Mapping[str, Any] | None) -> LayoutPlan | None:
    from fxpasses.passes.layout.plan import LayoutPlan

    return LayoutPlan.from_dict(data) if data is not None else None


_STAGES = {"structure": 1, "hazards": 2, "check": 3, "profit": 4, "rewrite": 5, "verify": 6, "applied": 7}
