"""What happened in one compilation, as plain data: a remark for every site, counters, timings, the plan."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from fxpasses.graph.sizes import SizeRange, range_in_words
from fxpasses.report.application import Application
from fxpasses.report.drawing import GraphDrawing
from fxpasses.report.layout_plan import BoundaryTensor, LayoutPlan
from fxpasses.report.precision import Precision
from fxpasses.report.saved import SavedTensor

Status = Literal["applied", "declined", "failed"]

SCHEMA = 1
"""The version of the JSON form."""


@dataclass(frozen=True)
class SizeBound:
    """Values of a size for which a decision stands.

    Attributes:
        name: what the size is, in words: ``"batch"``.
        least: the smallest value.
        most: the largest; None where there is none.
        seen: the size when the graph was traced; None where it was not known.
        symbol: the size as an expression of the graph's symbols; empty where it is a number.
        guarded: whether a call with another size gets another version of the graph.
    """

    name: str
    least: int = 0
    most: int | None = None
    seen: int | None = None
    symbol: str = ""
    guarded: bool = False

    def __str__(self) -> str:
        name = f"{self.name} ({self.symbol})" if self.symbol else self.name
        return range_in_words(name, self.least, self.most)

    @staticmethod
    def of(given: SizeRange) -> SizeBound:
        """The range of a rule, as data."""
        return SizeBound(given.name, given.least, given.most, given.seen, given.symbol, given.guarded)

    def stands(self) -> SizeBound:
        """The values for which the decision is the one that was made: the range, or the side of it."""
        if self.seen is None or self.seen < self.least:
            return replace(self, least=0, most=self.least - 1)
        if self.most is not None and self.seen > self.most:
            return replace(self, least=self.most + 1, most=None)
        return self

    def and_(self, other: SizeBound) -> SizeBound:
        """The values for which both decisions stand."""
        tops = [each for each in (self.most, other.most) if each is not None]
        names = dict.fromkeys([*self.name.split(" / "), other.name])
        return replace(
            self,
            name=" / ".join(names),
            least=max(self.least, other.least),
            most=min(tops) if tops else None,
            guarded=self.guarded and other.guarded,
        )


def optimised_for(remarks: Iterable[Remark]) -> tuple[SizeBound, ...]:
    """For which values of each symbol a graph would be rewritten the same."""
    bounds: dict[str, SizeBound] = {}
    for remark in remarks:
        for each in remark.sizes:
            if each.symbol and each.seen is not None and remark.status != "failed":
                stands = each.stands()
                known = bounds.get(each.symbol)
                bounds[each.symbol] = stands if known is None else known.and_(stands)
    return tuple(bounds.values())


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
        figures: what the rewrite saves and costs here, or would, in bytes: ``"kept_bytes"`` less to keep for
            the backward pass, ``"traffic_bytes"`` less to read and write, ``"weight_bytes"`` of weights moved
            at every call.
        sizes: the sizes for which the rewrite pays, where it does not pay for all.
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
    figures: Mapping[str, float] = field(default_factory=dict, hash=False)
    sizes: tuple[SizeBound, ...] = ()

    def __post_init__(self) -> None:
        given: object = self.sizes
        if isinstance(given, list):  # from JSON
            object.__setattr__(self, "sizes", tuple(SizeBound(**each) for each in given))

    def __str__(self) -> str:
        where = self.location or self.module
        reason = self.status if self.status == "applied" else f"{self.status} [{self.code}]"
        found = f"matched {self.matched} of {self.pattern_size} nodes; " if self.pattern_size else ""
        site = f"{self.node} ({where})" if where else self.node
        return f"{self.rule} at {site}: {found}{reason}: {self.message}"


@dataclass(frozen=True)
class Attempt:
    """Other options, and what they would apply that the report's own do not: a dry run of each.

    Attributes:
        options: the fields of `fxpasses.Options` that differ.
        gained: how many sites more each rule is applied at, by its name.
        figures: of these applications, added up, as in `Remark.figures`.
        seconds, otherwise_seconds: what convolutions, and copies between layouts, are predicted to take
            under these options and under the report's own; None where not all of them were measured here.
    """

    options: Mapping[str, Any]
    gained: Mapping[str, int]
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    otherwise_seconds: float | None = None


@dataclass(frozen=True)
class ReportData:
    """All remarks, counters and timings of one compilation.

    Attributes:
        remarks: one for every site that any rule looked at, in the order of the graph.
        seconds: wall time of each pass, by name, in seconds.
        nodes_before, nodes_after: number of nodes, nested graphs included.
        level: the capture level of the graph.
        layout: the layout plan, or None where no layout pass ran.
        precision: what is computed in a lower precision; None where nothing is.
        io: with ``io="any"``, the images that the graph takes and gives, each with its layout.
        saved: in training by inductor, the tensors that the backward pass reads of the forward pass.
        dry_run: whether nothing was compiled (`fxpasses.explain`).
        tried: in a dry run, options that would apply more, each as it was tried.
        norms, norms_left: how many batch norms the graph had before the passes ran, and has after them.
        kept_tensors, kept_bytes: what `weights="cached"` keeps between calls, or the constants that
            ``"baked"`` stores in the program, in number and in bytes.
        packed_tensors: how many convolutions and linear layers read weights that are kept in the format of
            their kernel: oneDNN's or ours.
        threads: how many torch used on a CPU when the graph was compiled; 0 where it was not.
        graphs: drawings of the graph before and after, nested graphs included; empty for a graph of more
            than `fxpasses.report.drawing.LARGEST` nodes.
        rules: the names of all rules and passes that ran.
        sizes: for which values of each symbolic size the graph would be rewritten the same, where that
            depends on any.
        applications: what each rewrite replaced, where that was kept (`keep_repro`, `verify="numerics"`);
            those that were rolled back are among them. Not part of the JSON form.
    """

    remarks: tuple[Remark, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    nodes_before: int = 0
    nodes_after: int = 0
    level: str = ""
    layout: LayoutPlan | None = None
    precision: Precision | None = None
    io: tuple[BoundaryTensor, ...] = ()
    saved: tuple[SavedTensor, ...] = ()
    dry_run: bool = False
    tried: tuple[Attempt, ...] = ()
    norms: int = 0
    norms_left: int = 0
    kept_tensors: int = 0
    kept_bytes: int = 0
    packed_tensors: int = 0
    threads: int = 0
    graphs: tuple[GraphDrawing, ...] = field(default=(), repr=False)
    rules: tuple[str, ...] = field(default=(), repr=False)
    sizes: tuple[SizeBound, ...] = ()
    applications: tuple[Application, ...] = field(default=(), repr=False, compare=False)

    @property
    def applied(self) -> Mapping[str, int]:
        """Rule name to the number of its applications; a rule that never fired is absent."""
        return MappingProxyType(Counter(remark.rule for remark in self.remarks if remark.status == "applied"))

    @property
    def saved_bytes(self) -> int:
        """Bytes that a training step keeps for its backward pass, beside parameters, buffers and inputs.

        Where layouts are left to inductor (``layout="off"``, and "auto" where no plan was made), it may keep
        channels-last copies of inputs and weights in place of themselves, which do not count here.
        """
        return sum(one.bytes for one in self.saved if one.fate == "kept")

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
            "precision": asdict(self.precision) if self.precision is not None else None,
            "io": [asdict(each) for each in self.io],
            "saved": [asdict(one) for one in self.saved],
            "dry_run": self.dry_run,
            "tried": [asdict(each) for each in self.tried],
            "norms": self.norms,
            "norms_left": self.norms_left,
            "kept_tensors": self.kept_tensors,
            "kept_bytes": self.kept_bytes,
            "packed_tensors": self.packed_tensors,
            "threads": self.threads,
            "rules": list(self.rules),
            "sizes": [asdict(each) for each in self.sizes],
            "graphs": [drawing.to_dict() for drawing in self.graphs],
        }
        return json.dumps(data, indent=2)


_STAGES = {"structure": 1, "hazards": 2, "check": 3, "profit": 4, "rewrite": 5, "verify": 6, "applied": 7}
