"""Reports as a page, read as text without a browser: complete, and safe whatever a node is called."""

from __future__ import annotations

import html
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from fxpasses.report.data import Remark
from fxpasses.report.drawing import DrawnNode, GraphDrawing
from fxpasses.report.page import render_html
from fxpasses.report.report import Report
from tests.report.test_text import IDLE, remark_of, report_of

HOSTILE = "</script><script>alert('x')</script><!-- \" & [bold]{{ 7 * 7 }}[/bold] \u2028"


def hostile_report() -> Report:
    fields = dict.fromkeys(
        ("rule", "code", "message", "node", "location", "stage", "module", "blamed", "graph"), HOSTILE
    )
    remarks = [Remark(status=status, **fields) for status in ("applied", "declined", "failed")]  # type: ignore[arg-type]
    return Report(tuple(remarks), {HOSTILE: 0.1}, 1, 2, HOSTILE)


class Elements(HTMLParser):
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


@pytest.mark.parametrize(("report", "words"), IDLE)
def test_the_page_of_a_report_without_applications_says_why(report: Report, words: str) -> None:
    assert words in render_html(report)


def test_the_page_says_what_is_kept_between_calls() -> None:
    report = replace(report_of(remark_of(1)), kept_tensors=3, kept_bytes=2_500_000)
    assert "kept between calls: 3 tensors, 2.5 MB" in render_html(report)


def test_a_remark_about_the_whole_graph_has_a_place_on_the_page() -> None:
    report = report_of(Remark("r", "declined", "code", "why", node="", stage="check"))
    assert "the graph" in Elements(render_html(report)).text


def test_hostile_names_add_no_element_to_the_page() -> None:
    page = Elements(render_html(hostile_report()))
    tame = report_of(
        remark_of(1), remark_of(2, "declined", "c", "check"), remark_of(3, "failed", "d", "check")
    )
    expected = Elements(render_html(tame))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in expected.elements]
    assert HOSTILE in page.text


def test_the_page_holds_the_report_as_json() -> None:
    report = hostile_report()
    page = Elements(render_html(report))
    assert page.attributes("script")[0] == {"type": "application/json", "id": "report"}
    assert Report.from_json(page.scripts[0]) == report


def test_the_page_loads_nothing() -> None:
    text = render_html(report_of(remark_of(1), remark_of(2, "declined", "c", "check")))
    page = Elements(text)
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
    policy = next(
        attributes["content"] for attributes in page.attributes("meta") if "http-equiv" in attributes
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_page_reads_in_light_and_dark_and_works_from_the_keyboard() -> None:
    text = render_html(report_of(remark_of(1), remark_of(2, "declined", "c", "check")))
    page = Elements(text)
    assert "prefers-color-scheme: dark" in text
    controls = [attributes.get("name") for tag in ("select", "input") for attributes in page.attributes(tag)]
    assert controls == ["status", "rule", "text"]
    assert len(page.attributes("label")) == len(controls)
    assert len(page.attributes("button")) == 2
    assert page.attributes("html") == [{"lang": "en"}]
    assert all(attributes.get("scope") == "col" for attributes in page.attributes("th"))


def test_the_page_shows_the_whole_source_line() -> None:
    assert "/a/long/path/to/package/model.py:1" in Elements(render_html(report_of(remark_of(1)))).text


def test_rows_carry_what_the_filters_ask_for() -> None:
    report = report_of(remark_of(1), remark_of(2, "declined", "c", "check"))
    rows = [
        attributes
        for attributes in Elements(render_html(report)).attributes("tr")
        if "data-status" in attributes
    ]
    assert rows == [
        {"data-status": "applied", "data-rule": "some_rule"},
        {"data-status": "declined", "data-rule": "some_rule"},
    ]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to parse the page's script")
def test_the_script_of_the_page_parses() -> None:
    script = Elements(render_html(report_of(remark_of(1)))).scripts[-1]
    assert "addEventListener" in script
    subprocess.run(["node", "--check", "-"], input=script, text=True, check=True, capture_output=True)


def test_save_html_writes_the_page(tmp_path) -> None:  # type: ignore[no-untyped-def]
    report = hostile_report()
    report.save_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(report)


def test_the_page_says_what_to_edit_here_and_shows_a_like_case() -> None:
    drawn = GraphDrawing(
        "before",
        "torch",
        (
            DrawnNode("y", "call_function", "conv2d", (), module="conv"),
            DrawnNode("z", "call_function", "batch_norm", (0,), module="bn"),
            DrawnNode("a", "call_function", "add", (1, 0), location="/m/net.py:7"),
        ),
    )
    remark = Remark("efficient_conv_bn_eval", "declined", "multiple-users", "m", "z", module="bn", blamed="a")
    page = html.unescape(render_html(Report((remark,), graphs=(drawn,))))
    assert "→ here: `add` (m/net.py:7) also reads the result of conv: have it read that of bn" in page
    assert "<summary>A like case in a few lines</summary>" in page
    assert "\n-     return bn(y) + y\n" in page
    page = html.unescape(render_html(Report((replace(remark, code="a-rule-s-own"),), graphs=(drawn,))))
    assert "→ here" not in page
    assert "A like case" not in page
