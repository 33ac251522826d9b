"""The generated sections say what the result files say, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.models.results import VariantResult, save_report
from benchmarks.readme import BEGIN, END
from tests.benchmarks.reports import report, timed, two_models


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    save_report(two_models(), tmp_path / "benchmarks" / "results" / "cpu.json")
    (tmp_path / "README.md").write_text(f"# A project\n\n{BEGIN}\n{END}\n\nThe rest.\n")
    return tmp_path


def run(project: Path, action: str) -> int:
    paths = ["--readme", str(project / "README.md"), "--results", str(project / "benchmarks" / "results")]
    return readme.main([action, *paths])


def test_a_section_is_out_of_date_until_it_is_written(project, capsys):
    assert run(project, "--check") == 1
    assert "out of date" in capsys.readouterr().out
    assert run(project, "--write") == 0
    assert run(project, "--check") == 0
    written = (project / "README.md").read_text()
    assert run(project, "--write") == 0
    assert (project / "README.md").read_text() == written


def test_what_stands_around_the_section_is_kept(project):
    run(project, "--write")
    written = (project / "README.md").read_text()
    assert written.startswith(f"# A project\n\n{BEGIN}\n")
    assert written.endswith(f"\n{END}\n\nThe rest.\n")


def test_the_section_holds_the_medians_the_ratios_and_their_source(project):
    section = readme.performance_section(project / "benchmarks" / "results")
    assert "frozen-training, batch 8, size 64, float32, cpu, 2 threads" in section
    assert "(a processor, torch 2.13.0, 2026-01-02; `benchmarks/results/cpu.json`)" in section
    assert "| model | eager | inductor | fxpasses |" in section
    (row,) = (line for line in section.splitlines() if line.startswith("| resnet18 "))
    assert "| 2000.00 saves 0 MiB |" in row
    assert "1000.00 (2.00 [2.00, 2.00]) saves" in row
    (mean,) = (line for line in section.splitlines() if line.startswith("| geometric mean "))
    assert mean.endswith("| 1 | 1.00 [1.00, 1.00], *inconclusive* |")


def test_a_wrong_variant_has_no_figure(project):
    wrong = report(m=[timed("inductor", 1.0), VariantResult("fxpasses", "wrong", "output 0: error 1")])
    save_report(wrong, project / "benchmarks" / "results" / "cpu.json")
    assert "| m | 1000.00 | wrong |" in readme.performance_section(project / "benchmarks" / "results")


def test_a_changed_result_makes_the_section_out_of_date(project):
    run(project, "--write")
    save_report(report(m=[timed("inductor", 1.0)]), project / "benchmarks" / "results" / "cpu.json")
    assert run(project, "--check") == 1


@pytest.mark.parametrize("other", [{"schema": 3, "kind": "layout profile"}, {"benchmark": "tensor_layout"}])
def test_files_of_other_benchmarks_are_left_out(project, other):
    run(project, "--write")
    (project / "benchmarks" / "results" / "other.json").write_text(json.dumps(other))
    assert run(project, "--check") == 0


@pytest.mark.parametrize("content", ["{", '{"schema": 2, "kind": "models"}'])
def test_a_file_that_cannot_be_read_is_an_error(project, content, capsys):
    (project / "benchmarks" / "results" / "cpu.json").write_text(content)
    with pytest.raises(SystemExit) as exit_:
        run(project, "--check")
    assert exit_.value.code == 2
    assert "cpu.json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no markers", f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"])
def test_a_readme_without_its_markers_is_refused(project, text, capsys):
    (project / "README.md").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        run(project, "--write")
    assert exit_.value.code == 2
    assert "each once" in capsys.readouterr().err
    assert (project / "README.md").read_text() == text


def test_a_folder_without_results_is_refused(project, capsys):
    (project / "benchmarks" / "results" / "cpu.json").unlink()
    with pytest.raises(SystemExit):
        run(project, "--check")
    assert "holds no result file" in capsys.readouterr().err
