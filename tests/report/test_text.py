"""Reports as text and as a page: complete, short, and safe whatever a node is called."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fxpasses.report import text as rendering
from fxpasses.report.data import Remark
from fxpasses.report.page import render_html
from fxpasses.report.report import Report

HOSTILE = "</script><script>alert('x')</script><!-- \" & [bold]{{ 7 * 7 }}[/bold] \u2028"


def _remark(number: int, status: str = "applied", code: str = "applied", stage: str = "applied") -> Remark:
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


def _report(*remarks: Remark) -> Report:
    return Report(
        remarks=remarks, seconds={"some_rule": 0.25}, nodes_before=10, nodes_after=12, level="torch"
    )


def _hostile_report() -> Report:
    fields = dict.fromkeys(
        ("rule", "code", "message", "node", "location", "stage", "module", "blamed", "graph"), HOSTILE
    )
    remarks = [Remark(status=status, **fields) for status in ("applied", "declined", "failed")]  # type: ignore[arg-type]
    return Report(tuple(remarks), {HOSTILE: 0.1}, 1, 2, HOSTILE)


class _Page(HTMLParser):
    """Every element with its attributes, the text of scripts, and whether the tags balance."""

    _VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif self._open and self._open[-1] != "style":
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# Text ------------------------------------------------------------------------------------------------------


def test_a_report_of_many_sites_fits_on_a_screen() -> None:
    declined = [_remark(each, "declined", f"code-{each % 4}", "check") for each in range(100)]
    text = str(_report(*[_remark(each) for each in range(200)], *declined))
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= rendering.WIDTH
    assert re.search(r"some_rule +200 +0\.250", text)


def test_the_headline_has_level_sizes_and_seconds() -> None:
    first = str(_report(_remark(1))).splitlines()[0]
    assert first == "fxpasses report: torch level, 10 -> 12 nodes, 0.25 s in passes"


def test_reasons_are_grouped_with_count_and_the_nearest_miss_comes_first() -> None:
    report = _report(
        _remark(1, "declined", "no-producer", "structure"),
        _remark(2, "declined", "live-weights", "profit"),
        _remark(3, "declined", "no-producer", "structure"),
        _remark(4, "declined", "mutation", "hazards"),
    )
    found = [(each.example.code, each.count, each.example.node) for each in rendering.reasons(report)]
    assert found == [("live-weights", 1, "node_2"), ("mutation", 1, "node_4"), ("no-producer", 2, "node_1")]
    text = str(report)
    assert text.index("[live-weights]") < text.index("[mutation]") < text.index("[no-producer]")
    assert "layer.2 (package/model.py:2): message 2" in text


def test_the_table_of_remarks_has_every_site_with_its_place() -> None:
    nested = Remark("some_rule", "declined", "code", "why", "node_7", graph="wrap_body_0")
    text = rendering.render_remarks(_report(_remark(1), nested, _remark(3, "failed", "rewrite-error")))
    assert "layer.1" in text
    assert "wrap_body_0: node_7" in text
    assert "rewrite-error" in text
    assert max(map(len, text.splitlines())) <= rendering.WIDTH


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (Report(), "nothing to do: no graph was captured"),
        (Report(nodes_before=3, nodes_after=3), "nothing to do: the options select no pass"),
        (Report(nodes_before=3, nodes_after=3, seconds={"r": 0.1}), "no rule found a site"),
        (_report(_remark(1, "declined", "mutation", "hazards")), "nothing applied"),
    ],
)
def test_a_report_without_applications_says_why(report: Report, words: str) -> None:
    assert words in str(report)
    assert words in render_html(report)


def test_a_report_with_applications_does_not_say_nothing_was_done() -> None:
    assert "nothing" not in str(_report(_remark(1)))


def test_what_is_kept_between_calls_is_said() -> None:
    report = replace(_report(_remark(1)), kept_tensors=3, kept_bytes=2_500_000)
    for text in (str(report), render_html(report)):
        assert "kept between calls: 3 tensors, 2.5 MB" in text
    assert "kept" not in str(_report(_remark(1)))


def test_a_remark_about_the_whole_graph_has_a_place() -> None:
    report = _report(Remark("r", "declined", "code", "why", node="", stage="check"))
    for text in (str(report), rendering.render_remarks(report), _Page(render_html(report)).text):
        assert "the graph" in text


def test_text_is_plain_whatever_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "40"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    text = str(_report(*[_remark(each, "declined", "a-code", "check") for each in range(3)]))
    assert "\x1b" not in text
    assert "layer.0 (package/model.py:0): message 0" in text


def test_square_brackets_in_a_message_are_text_and_no_markup() -> None:
    remark = Remark("r", "declined", "code", "sizes [2, 3] [bold]and[/bold] [/]", "node", stage="check")
    assert "sizes [2, 3] [bold]and[/bold] [/]" in str(_report(remark))


# Page ------------------------------------------------------------------------------------------------------


def test_hostile_names_add_no_element_to_the_page() -> None:
    page = _Page(render_html(_hostile_report()))
    tame = _report(_remark(1), _remark(2, "declined", "c", "check"), _remark(3, "failed", "d", "check"))
    expected = _Page(render_html(tame))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in expected.elements]
    assert HOSTILE in page.text


def test_the_page_holds_the_report_as_json() -> None:
    report = _hostile_report()
    page = _Page(render_html(report))
    assert page.attributes("script")[0] == {"type": "application/json", "id": "report"}
    assert Report.from_json(page.scripts[0]) == report


def test_the_page_loads_nothing() -> None:
    text = render_html(_report(_remark(1), _remark(2, "declined", "c", "check")))
    page = _Page(text)
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href")
    ]
    assert addresses == ["data:,"]
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    policy = next(each["content"] for each in page.attributes("meta") if "http-equiv" in each)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_page_reads_in_light_and_dark_and_works_from_the_keyboard() -> None:
    text = render_html(_report(_remark(1), _remark(2, "declined", "c", "check")))
    page = _Page(text)
    assert "prefers-color-scheme: dark" in text
    controls = [each.get("name") for tag in ("select", "input") for each in page.attributes(tag)]
    assert controls == ["status", "rule", "text"]
    assert len(page.attributes("label")) == len(controls)
    assert len(page.attributes("button")) == 2
    assert page.attributes("html") == [{"lang": "en"}]
    assert all(each.get("scope") == "col" for each in page.attributes("th"))


def test_the_page_shows_the_whole_source_line() -> None:
    assert "/a/long/path/to/package/model.py:1" in _Page(render_html(_report(_remark(1)))).text


def test_rows_carry_what_the_filters_ask_for() -> None:
    report = _report(_remark(1), _remark(2, "declined", "c", "check"))
    rows = [each for each in _Page(render_html(report)).attributes("tr") if "data-status" in each]
    assert rows == [
        {"data-status": "applied", "data-rule": "some_rule"},
        {"data-status": "declined", "data-rule": "some_rule"},
    ]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to parse the page's script")
def test_the_script_of_the_page_parses() -> None:
    script = _Page(render_html(_report(_remark(1)))).scripts[-1]
    assert "addEventListener" in script
    subprocess.run(["node", "--check", "-"], input=script, text=True, check=True, capture_output=True)


def test_save_html_writes_the_page(tmp_path) -> None:  # type: ignore[no-untyped-def]
    report = _hostile_report()
    report.save_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(report)
