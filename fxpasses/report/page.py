"""The report as one page. It goes through jinja2 with autoescape, since a message may hold anything."""

from __future__ import annotations

import json

from fxpasses.report.data import ReportData
from fxpasses.report.drawing import LARGEST, STAGES
from fxpasses.report.edits import edit_here
from fxpasses.report.examples import EXAMPLES
from fxpasses.report.grouping import applications, reasons, site
from fxpasses.report.layout_plan import DECISIONS, how_sure
from fxpasses.report.memory_text import memory_line, memory_rows
from fxpasses.report.text import copies, copies_by_cause, dearest, headline, notes


def render_html(report: ReportData) -> str:
    """The report as one page that needs nothing from the network and holds the report's JSON."""
    import jinja2

    found = reasons(report)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fxpasses.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=headline(report).partition(": ")[0],
        headline=headline(report).partition(": ")[2],
        notes=notes(report),
        applied=applications(report),
        seconds=report.seconds,
        reasons=found,
        remarks=report.remarks,
        site=site,
        edits=[edit_here(report.graphs, reason.example) for reason in found],
        examples=EXAMPLES,
        statuses=sorted({remark.status for remark in report.remarks}),
        rules=sorted({remark.rule for remark in report.remarks}),
        layout=report.layout,
        memory_line=memory_line(report),
        memory_rows=memory_rows(report),
        decisions=DECISIONS,
        how_sure=how_sure,
        copies=copies,
        copies_by_cause=copies_by_cause,
        dearest=dearest,
        graphs=report.graphs,
        stages=STAGES,
        nodes=max(report.nodes_before, report.nodes_after),
        largest=LARGEST,
        data=json.loads(report.to_json()),
    )
