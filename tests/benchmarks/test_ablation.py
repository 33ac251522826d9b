"""The command line of the ablation, from what it refuses to a whole run over a tiny model."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import ablation
from benchmarks.ablation import Task, in_time, plan
from benchmarks.models.suite import Suite
from benchmarks.models.worth import load_ablation, worths

TINY = "tests.benchmarks.tiny_models:tiny"


def tasks(*arguments: str) -> list[Task]:
    return plan(ablation._parser().parse_args(arguments))


def test_each_mode_and_model_is_a_task_and_training_has_the_larger_batch():
    found = tasks("--models", "a,b", "--modes", "inference-cached,training", "--threads", "1")
    assert [(task.mode, task.model, task.suite.case.batch) for task in found] == [
        ("inference-cached", "a", 1),
        ("inference-cached", "b", 1),
        ("training", "a", 8),
        ("training", "b", 8),
    ]
    assert all(task.suite.variants[0].name == "full" and task.suite.shares_caches for task in found)


def test_by_default_all_modes_and_four_models_are_measured():
    assert len(tasks()) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--modes", "trainign"), "training"),
        (("--leave-out", "layuot"), "layout"),
        (("--models", ","), "--models"),
        (("--rounds", "0"), "--rounds"),
        (("--json", "/nowhere/at/all.json"), "does not exist"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        ablation.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_no_model_is_begun_that_would_end_too_late():
    many = [Task("training", Suite(tasks()[0].suite.case, (name,), ()), {}) for name in "abcdef"]
    ticks = itertools.count(0, 60)  # every look at the clock is a minute later than the one before
    assert [task.model for task in in_time(many, 10, lambda: next(ticks))] == ["a", "b", "c", "d", "e"]
    assert len(list(in_time(many, None))) == 6
    assert [task.model for task in in_time(many, 0)][:1] == ["a"]


@pytest.mark.full
@pytest.mark.timed
def test_a_whole_run_goes_on_where_its_file_ended(tmp_path, capsys):
    path, folds = tmp_path / "ablation.json", "efficient_conv_bn_eval"
    given = ["--models", TINY, "--modes", "frozen-training", "--size", "8", "--batch", "2", "--launches", "1"]
    given += ["--threads", "1", "--leave-out", f"{folds},affine_across_views", "--json", str(path)]
    assert ablation.main([*given, "--rounds", "2"]) == 0
    first = capsys.readouterr().out
    (report,) = load_ablation(path).reports.values()
    assert {variant.name: variant.status for variant in report.models[0].variants} == dict.fromkeys(
        ["full", f"without {folds}", "none", f"only {folds}"], "ok"
    )
    folding, views = worths(report)
    assert folding.applied == 2
    assert folding.beside.saved_bytes is not None
    for comparison in (folding.beside, folding.alone):
        assert comparison.ratio is not None
        assert comparison.ratio.verdict == "inconclusive"  # of two rounds nothing is claimed
    assert (views.applied, views.beside.ratio, views.alone.ratio) == (0, None, None)  # the same programs
    assert folds in first

    before = path.read_bytes()
    assert ablation.main([*given, "--rounds", "2"]) == 0  # nothing is left to be measured
    assert capsys.readouterr().out == first
    assert path.read_bytes() == before
    with pytest.raises(SystemExit):
        ablation.main([*given, "--rounds", "3"])
    assert "rounds: 2 against 3" in capsys.readouterr().err
