"""The section of what each part is worth: made of files of the ablation, and absent without one."""

from __future__ import annotations

from benchmarks import readme
from benchmarks.models.results import save_report
from benchmarks.models.worth import Ablation, save_ablation
from benchmarks.pages.ablations import ablation_section
from tests.benchmarks.models.test_worth import measured
from tests.benchmarks.reports import ENVIRONMENT, two_models


def test_a_table_for_each_mode(tmp_path):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    save_ablation(Ablation(ENVIRONMENT, {"frozen-training": measured()}), results / "ablation.json")
    section = ablation_section(results)
    assert section.startswith("## What each part is worth\n")
    assert "m1, m2 (a processor, 2026-01-02; `benchmarks/results/ablation.json`)" in section
    assert "| part | applied | models | beside the others | alone | saves beside | saves alone |" in section
    assert "| `folding` | 3 | 1 | 2.00 [2.00, 2.00] | 3.00 [3.00, 3.00] | 0 MiB | 0 MiB |" in section
    assert "| `memory` | always | 2 | 0.50 " in section
    assert "no option leaves it out by itself: `own_kernels` 5." in section


def test_without_a_file_there_is_no_section_and_other_tables_do_not_read_it(tmp_path):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    save_report(two_models(), results / "cpu.json")
    assert ablation_section(results) == ""
    before = readme.performance_section(results)
    save_ablation(Ablation(ENVIRONMENT, {"frozen-training": measured()}), results / "ablation.json")
    assert readme.performance_section(results) == before


def test_the_command_writes_the_section(tmp_path):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    save_report(two_models(), results / "cpu.json")
    save_ablation(Ablation(ENVIRONMENT, {"frozen-training": measured()}), results / "ablation.json")
    page = tmp_path / "page.md"
    page.write_text("\n".join(readme.markers("ablation")))
    arguments = ["--readme", str(page), "--results", str(results)]
    assert readme.main(["--check", *arguments]) == 1
    assert readme.main(["--write", *arguments]) == 0
    assert readme.main(["--check", *arguments]) == 0
    assert "`folding`" in page.read_text()
