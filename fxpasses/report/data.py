"""What happened in one compilation, as plain data: a remark for every site, counters, timings, the plan."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Literal

from fxpasses.report.application import Application
from fxpasses.report.drawing import GraphDrawing
from fxpasses.report.layout_plan import BoundaryTensor, LayoutPlan

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
class ReportData:
    """All remarks, counters and timings of one compilation.

    Attributes:
        remarks: one for every site that any rule looked at, in the order of the graph.
        seconds: wall time of each pass, by name, in seconds.
        nodes_before, nodes_after: number of nodes, nested graphs included.
        level: the capture level of the graph.
        layout: the layout plan, or None where no layout pass ran.
        io: with ``io="any"``, the images that the graph takes and gives, each with its layout.
        dry_run: whether nothing was compiled (`fxpasses.explain`).
        kept_tensors, kept_bytes: what `weights="cached"` keeps between calls, or the constants that
            ``"baked"`` stores in the program, in number and in bytes.
        packed_tensors: how many convolutions and linear layers read weights that are kept in the format of
            their kernel: oneDNN's or ours.
        threads: how many torch used on a CPU when the graph was compiled; 0 where it was not.
        graphs: drawings of the graph before and after, nested graphs included; empty for a graph of more
            than `fxpasses.report.drawing.LARGEST` nodes.
        rules: the names of all rules and passes that ran.
        applications: what each rewrite replaced, where that was kept (`keep_repro`, `verify="numerics"`);
            those that were rolled back are among them. Not part of the JSON form.
    """

    remarks: tuple[Remark, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    nodes_before: int = 0
    nodes_after: int = 0
    level: str = ""
    layout: LayoutPlan | None = None
    io: tuple[BoundaryTensor, ...] = ()
    dry_run: bool = False
    kept_tensors: int = 0
    kept_bytes: int = 0
    packed_tensors: int = 0
    threads: int = 0
    graphs: tuple[GraphDrawing, ...] = field(default=(), repr=False)
    rules: tuple[str, ...] = field(default=(), repr=False)
    applications: tuple[Application, ...] = field(default=(), repr=False, compare=False)

    @property
    def applied(self) -> Mapping[str, int]:
        """Rule name to the number of its applications; a rule that never fired is absent."""
        return MappingProxyType(Counter(remark.rule for remark in self.remarks if remark.status == "applied"))

    @property
    def declined(self) -> tuple[Remark, ...]:
        """The remarks of sites where a rule did not fire, nearest miss first."""
        missed = [remark for remark in self.remarks if remark.status != "applied"]
        return tuple(sorted(missed, key=lambda remark: (-_STAGES.get(remark.stage, 0), -remark.matched)))

    def to_json(self) -> str:
        """The report as JSON, with the version of its form under ``"schema"``."""
        data = {
            "schema": SCHEMA,
            "applied": dict(self.applied),
            "remarks": [asdict(remark) for remark in self.remarks],
            "seconds": dict(self.seconds),
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "level": self.level,
            "layout": self.layout.to_dict() if self.layout is not None else None,
            "io": [asdict(each) for each in self.io],
            "dry_run": self.dry_run,
            "kept_tensors": self.kept_tensors,
            "kept_bytes": self.kept_bytes,
            "packed_tensors": self.packed_tensors,
            "threads": self.threads,
            "rules": list(self.rules),
            "graphs": [drawing.to_dict() for drawing in self.graphs],
        }
        return json.dumps(data, indent=2)


_STAGES = {"structure": 1, "hazards": 2, "check": 3, "profit": 4, "rewrite": 5, "verify": 6, "applied": 7}
