"""Reports as text: complete, short, and plain whatever a message holds."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fxpasses.report.data import Remark
from fxpasses.report.layout_plan import CutEdge, LayoutPlan
from fxpasses.report.report import Report
from fxpasses.report.text import WIDTH, reasons, render_remarks


def remark_of(number: int, status: str = "applied", code: str = "applied", stage: str = "applied") -> Remark:
    return Remark(
        rule="some_rule",
        status=status,  # type: ignore[arg-type]
        code=code,
        message=f"message {number}",
        node=f"node_{number}",
        location=f"/a/long/path/to/package/model.py:{number}",
        stage=stage,
        module=f"layer.{number}",
    )


def report_of(*remarks: Remark) -> Report:
    return Report(
        remarks=remarks, seconds={"some_rule": 0.25}, nodes_before=10, nodes_after=12, level="torch"
    )


def test_a_report_of_many_sites_fits_on_a_screen() -> None:
    declined = [remark_of(number, "declined", f"code-{number % 4}", "check") for number in range(100)]
    text = str(report_of(*[remark_of(number) for number in range(200)], *declined))
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= WIDTH
    assert re.search(r"some_rule +200 +0\.250", text)


_CODES = ("live-weights", "mutation", "multiple-users", "no-producer")


def _planned(reasons_told: int) -> str:
    """The text of a report with so many reasons, and a plan that was carried out and copies five tensors."""
    edges = tuple(
        CutEdge(f"image_{number}", "relu", (2, 3, 8, 8), "contiguous", 2e-6, (f"conv_{number}",), ())
        for number in range(5)
    )
    plan = LayoutPlan({}, (), edges, 5e-6, 6e-6, 7e-6, 1, copies=5)
    declined = [remark_of(at, "declined", code, "check") for at, code in enumerate(_CODES[:reasons_told])]
    return str(replace(report_of(remark_of(9), *declined), layout=plan))


def test_the_text_has_as_much_detail_as_fits_on_a_screen() -> None:
    texts = [_planned(reasons_told) for reasons_told in range(5)]
    shown = [len(re.findall(r"image_\d", text)) for text in texts]
    assert shown[0] == 3  # of five copies, the dearest
    assert shown[4] < 3
    assert sorted(shown, reverse=True) == shown
    assert max(len(text.splitlines()) for text in texts) <= 24
    for reasons_told, text in enumerate(texts):
        assert all(code in text for code in _CODES[:reasons_told])


def test_the_headline_has_level_sizes_and_seconds() -> None:
    first = str(report_of(remark_of(1))).splitlines()[0]
    assert first == "fxpasses report: torch level, 10 -> 12 nodes, 0.25 s in passes"


def test_reasons_are_grouped_with_count_and_the_nearest_miss_comes_first() -> None:
    report = report_of(
        remark_of(1, "declined", "no-producer", "structure"),
        remark_of(2, "declined", "live-weights", "profit"),
        remark_of(3, "declined", "no-producer", "structure"),
        remark_of(4, "declined", "mutation", "hazards"),
    )
    found = [(reason.example.code, reason.count, reason.example.node) for reason in reasons(report)]
    assert found == [("live-weights", 1, "node_2"), ("mutation", 1, "node_4"), ("no-producer", 2, "node_1")]
    text = str(report)
    assert text.index("[live-weights]") < text.index("[mutation]") < text.index("[no-producer]")
    assert "layer.2 (package/model.py:2): message 2" in text


def test_the_table_of_remarks_has_every_site_with_its_place() -> None:
    nested = Remark("some_rule", "declined", "code", "why", "node_7", graph="wrap_body_0")
    text = render_remarks(report_of(remark_of(1), nested, remark_of(3, "failed", "rewrite-error")))
    assert "layer.1" in text
    assert "wrap_body_0: node_7" in text
    assert "rewrite-error" in text
    assert max(map(len, text.splitlines())) <= WIDTH


IDLE = [
    (Report(), "nothing to do: no graph was captured"),
    (Report(nodes_before=3, nodes_after=3), "nothing to do: the options select no pass"),
    (Report(nodes_before=3, nodes_after=3, seconds={"r": 0.1}), "no rule found a site"),
    (report_of(remark_of(1, "declined", "mutation", "hazards")), "nothing applied"),
]
"""Reports of nothing, and what is said of them."""


@pytest.mark.parametrize(("report", "words"), IDLE)
def test_a_report_without_applications_says_why(report: Report, words: str) -> None:
    assert words in str(report)


def test_a_report_with_applications_does_not_say_nothing_was_done() -> None:
    assert "nothing" not in str(report_of(remark_of(1)))


def test_what_is_kept_between_calls_is_said() -> None:
    report = replace(report_of(remark_of(1)), kept_tensors=3, kept_bytes=2_500_000)
    assert "kept between calls: 3 tensors, 2.5 MB" in str(report)
    assert "kept" not in str(report_of(remark_of(1)))


def test_a_remark_about_the_whole_graph_has_a_place() -> None:
    report = report_of(Remark("r", "declined", "code", "why", node="", stage="check"))
    for text in (str(report), render_remarks(report)):
        assert "the graph" in text


def test_text_is_plain_whatever_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "40"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    text = str(report_of(*[remark_of(number, "declined", "a-code", "check") for number in range(3)]))
    assert "\x1b" not in text
    assert "layer.0 (package/model.py:0): message 0" in text


def test_square_brackets_in_a_message_are_text_and_no_markup() -> None:
    remark = Remark("r", "declined", "code", "sizes [2, 3] [bold]and[/bold] [/]", "node", stage="check")
    assert "sizes [2, 3] [bold]and[/bold] [/]" in str(report_of(remark))


def test_another_number_of_threads_than_was_compiled_for_is_noticed():
    now = torch.get_num_threads()
    assert "threads" not in str(Report(nodes_before=1, threads=now))
    assert "threads" not in str(Report(nodes_before=1))
    text = " ".join(str(Report(nodes_before=1, threads=now + 3)).split())
    assert f"compiled with {now + 3} threads, and torch uses {now} by now" in text
    assert Report.from_json(Report(threads=5).to_json()).threads == 5
