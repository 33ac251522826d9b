"""Reports: what happened in one compilation, as data that merges, serialises and prints.

A `Remark` says what happened at one site; a `Report` holds all remarks of one compilation, how often each
rule was applied, and how long each pass took. Both are frozen; text, JSON and HTML are renderings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fxpasses.report.data import SCHEMA, Attempt, Remark, ReportData, SizeBound
from fxpasses.report.drawing import GraphDrawing
from fxpasses.report.grouping import added
from fxpasses.report.layout_plan import BoundaryTensor, LayoutPlan
from fxpasses.report.page import render_html
from fxpasses.report.precision import Precision
from fxpasses.report.repro import save_repro
from fxpasses.report.saved import SavedTensor
from fxpasses.report.text import memory_table, plain, render_text
from fxpasses.report.why import Answer, why


@dataclass(frozen=True)
class Report(ReportData):
    """All remarks, counters and timings of one compilation; `ReportData` has the attributes.

    `print(report)` gives one screen of text.
    """

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
            precision=Precision.merge(part.precision for part in parts),
            io=tuple(each for part in parts for each in part.io),
            saved=tuple(one for part in parts for one in part.saved),
            dry_run=any(part.dry_run for part in parts),
            tried=_tried(parts),
            norms=sum(part.norms for part in parts),
            norms_left=sum(part.norms_left for part in parts),
            kept_tensors=sum(part.kept_tensors for part in parts),
            kept_bytes=sum(part.kept_bytes for part in parts),
            packed_tensors=sum(part.packed_tensors for part in parts),
            threads=next((part.threads for part in reversed(parts) if part.threads), 0),
            graphs=_numbered(parts),
            sizes=tuple(each for part in parts for each in part.sizes),
            rules=tuple(dict.fromkeys(name for part in parts for name in part.rules)),
            applications=tuple(application for part in parts for application in part.applications),
        )

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
            remarks = tuple(Remark(**fields) for fields in data.pop("remarks"))
            graphs = tuple(GraphDrawing.from_dict(fields) for fields in data.pop("graphs"))
            rules = tuple(data.pop("rules", ()))
            io = tuple(BoundaryTensor(**fields) for fields in data.pop("io", ()))
            tried = tuple(Attempt(**fields) for fields in data.pop("tried", ()))
            plan = _plan(data.pop("layout"))
            precision = Precision.from_dict(data.pop("precision", None))
            saved = tuple(map(SavedTensor.from_dict, data.pop("saved", ())))
            sizes = tuple(SizeBound(**fields) for fields in data.pop("sizes", ()))
            return Report(
                remarks=remarks,
                graphs=graphs,
                layout=plan,
                precision=precision,
                io=io,
                tried=tried,
                saved=saved,
                rules=rules,
                sizes=sizes,
                **data,
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a report of fxpasses, or of another version: {error}") from error

    def __str__(self) -> str:
        return render_text(self)

    def why(self, place: str) -> Answer:
        """Every rule's verdict at a place, how far it got, and what would change it; `print` it.

        Args:
            place: a module's path (``"layer1.0.bn2"``), a node's name, or a source line (``"model.py:41"``).

        Raises:
            FxpassesError: the report knows no such place.
        """
        return why(self, place)

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, for `load` and `fxpasses diff`."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Report:
        """The report that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no report, or one of another version.
        """
        found = Path(path).read_bytes()
        try:
            return Report.from_json(found.decode())
        except UnicodeDecodeError as error:
            raise ValueError("not a report of fxpasses: it is no text") from error

    def memory_table(self) -> str:
        """What a training step keeps for its backward pass, tensor by tensor, the largest first.

        Behind it come tensors that the backward pass computes again, and those that rules made needless.
        Empty in inference, and where inductor did not compile.
        """
        return plain(memory_table(self)) if self.saved else ""

    def save_html(self, path: str | Path) -> None:
        """Writes the report as one self-contained page."""
        Path(path).write_text(render_html(self), encoding="utf-8")

    def save_repro(self, directory: str | Path) -> list[Path]:
        """Writes each application as a pytest file of its own that needs no model; returns their paths.

        Raises:
            ReproError: rewrites were applied, and what they replaced was not kept.
        """
        return save_repro(self, Path(directory))


def _tried(parts: Iterable[Report]) -> tuple[Attempt, ...]:
    """What each choice of options would apply more, in all parts together."""
    found: dict[str, list[Attempt]] = {}
    for part in parts:
        for attempt in part.tried:
            found.setdefault(repr(sorted(attempt.options.items())), []).append(attempt)
    return tuple(
        Attempt(
            group[0].options,
            dict(sum((Counter(each.gained) for each in group), Counter[str]())),
            added(each.figures for each in group),
            _together([each.seconds for each in group]),
            _together([each.otherwise_seconds for each in group]),
        )
        for group in found.values()
    )


def _together(seconds: Sequence[float | None]) -> float | None:
    """The sum, where all are known."""
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None


def _numbered(parts: Iterable[Report]) -> tuple[GraphDrawing, ...]:
    """The drawings of all parts; each compilation gets a number of its own."""
    graphs: list[GraphDrawing] = []
    first = 0
    for part in parts:
        graphs += [replace(drawing, compilation=first + drawing.compilation) for drawing in part.graphs]
        first += 1 + max((drawing.compilation for drawing in part.graphs), default=-1)
    return tuple(graphs)


def _plan(data: Mapping[str, Any] | None) -> LayoutPlan | None:
    return LayoutPlan.from_dict(data) if data is not None else None
