"""Geometric means by kind of machine, and the table and the chart that show them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from benchmarks import readme
from benchmarks.models.results import Report, VariantResult, save_report
from benchmarks.pages.chart import draw_chart, is_drawn
from benchmarks.pages.means import Means
from tests.benchmarks.reports import report, timed, two_models


def measured(
    seconds: float,
    *,
    machine: str = "a processor",
    date: str = "2026-01-02",
    names: str = "ab",
    **settings: object,
) -> Report:
    """Models that inductor takes a second for and fxpasses so many."""
    models = {name: [timed("inductor", 1.0), timed("fxpasses", seconds)] for name in names}
    made = report(**models)
    environment = {**made.environment, "device": machine, "date": date}
    return replace(made, environment=environment, settings={**made.settings, **settings})


def means(*reports: Report) -> dict[tuple[str, str, str], float | None]:
    """The value of each figure, by machine, setting and variant."""
    found = Means.of(reports)
    return {
        (machine, found.setting(row), row.variant): figure.mean and round(figure.mean.value, 3)
        for (row, machine), figure in found.figures.items()
    }


def test_a_mean_is_that_of_all_models_of_a_file():
    key = ("a processor", "fine-tuning, statistics frozen, batch 8")
    assert means(two_models()) == {
        (*key, "eager"): pytest.approx((2 / 3 * 1 / 3) ** 0.5, abs=1e-3),
        (*key, "fxpasses"): 1.0,
    }


def test_the_newest_file_of_a_machine_decides_whatever_the_order():
    old, new = measured(0.5, date="2026-01-02"), measured(0.8, date="2026-01-03")
    other = measured(0.25, machine="another", date="2026-01-01")
    expected = {"a processor": 1.25, "another": 4.0}
    for reports in ((old, new, other), (new, other, old)):
        assert {machine: value for (machine, _, _), value in means(*reports).items()} == expected


def test_a_newer_file_of_one_model_decides_nothing():
    assert list(means(measured(0.5), measured(0.8, date="2026-01-03", names="a")).values()) == [2.0]


def test_a_variant_that_is_wrong_in_the_newest_file_has_no_mean():
    wrong = [timed("inductor", 1.0), VariantResult("fxpasses", "wrong", "output 0: error 1")]
    newer = report(a=[timed("inductor", 1.0), timed("fxpasses", 0.5)], b=wrong)
    newer = replace(newer, environment={**newer.environment, "date": "2026-02-01"})
    assert list(means(measured(0.5), newer).values()) == [None]


def test_a_row_says_what_its_setting_differs_in_and_the_caption_what_all_share():
    found = Means.of(
        [measured(0.5), measured(0.5, batch=16), measured(0.5, mode="inference", dtype="bfloat16")]
    )
    assert [found.setting(row) for row in found.rows] == [
        "fine-tuning, statistics frozen, batch 8, float32",
        "fine-tuning, statistics frozen, batch 16, float32",
        "inference, batch 8, bfloat16",
    ]
    assert found.common == "size 64, cpu, 2 threads"


def test_the_table_has_a_column_for_each_machine_and_names_a_setting_once(tmp_path):
    save_report(two_models(), tmp_path / "one.json")
    save_report(measured(0.5, machine="another(R) Processor, model 1"), tmp_path / "two.json")
    caption, _, head, _, *rows = readme.means_section(tmp_path).splitlines()
    assert "(size 64, float32, cpu, 2 threads)" in caption
    assert head == "|  | compiled by | a processor | another, model 1 |"
    assert [row.replace("\u00a0", " ") for row in rows] == [
        "| fine-tuning, statistics frozen, batch 8 | fxpasses | 1.00 [1.00, 1.00], *inconclusive*<br>2 models"
        " | 2.00 [2.00, 2.00]<br>2 models |",
        "|  | `eager` | 0.47 [0.47, 0.47]<br>2 models | - |",
    ]


def test_the_chart_is_out_of_date_once_a_figure_differs(tmp_path):
    chart = tmp_path / "chart.png"
    found = Means.of([measured(0.5)])
    assert not is_drawn(found, chart)
    draw_chart(found, chart)
    assert is_drawn(found, chart)
    assert not is_drawn(Means.of([measured(0.51)]), chart)
    assert not is_drawn(Means.of([measured(0.5, machine="another")]), chart)


def test_the_chart_is_opaque_so_that_it_reads_on_any_page(tmp_path):
    draw_chart(Means.of([measured(0.5), two_models()]), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    assert lowest == 255


def test_results_without_a_mean_make_an_empty_table_and_chart(tmp_path):
    save_report(measured(0.5, names="a"), tmp_path / "one.json")
    assert readme.means_section(tmp_path).endswith("|  | compiled by |\n| --- | --- |")
    draw_chart(readme.means_of(tmp_path), tmp_path / "chart.png")
    assert is_drawn(readme.means_of(tmp_path), tmp_path / "chart.png")


def test_a_page_has_each_section_that_it_has_markers_of(tmp_path):
    save_report(two_models(), tmp_path / "cpu.json")
    begin, end = readme.markers("means")
    page = tmp_path / "README.md"
    page.write_text(f"{begin}\n{end}\n\n{readme.BEGIN}\n{readme.END}\n")
    assert readme.main(["--write", "--readme", str(page), "--results", str(tmp_path)]) == 0
    means_text, performance = page.read_text().split(f"{end}\n")
    assert "compiled by" in means_text
    assert "| model | eager | inductor | fxpasses |" in performance
    assert readme.main(["--check", "--readme", str(page), "--results", str(tmp_path)]) == 0


def test_the_project_s_pages_and_chart_are_what_its_results_say(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out
