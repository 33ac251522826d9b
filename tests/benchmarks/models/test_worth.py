"""What a part is worth: ratios and bytes of results made by hand, and the file that holds them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.models.parts import Part
from benchmarks.models.results import ModelResult, Report, ResultsError, VariantResult
from benchmarks.models.worth import Ablation, compared, load_ablation, save_ablation, uncounted, worths
from tests.benchmarks.reports import ENVIRONMENT, SETTINGS, report, timed

PARTS = (Part("folding", "folding"), Part("memory", None))


def full(seconds: float = 1.0, **rules: int) -> VariantResult:
    return replace(timed("full", seconds, saved_bytes=100), rules=rules)


def measured() -> Report:
    """Folding is worth 2 in m1, was not applied in m2; memory is worth 0.5 in both."""
    found = report(
        m1=[
            full(folding=3, own_kernels=5),
            timed("without folding", 2.0, saved_bytes=150),
            timed("without memory", 0.5, saved_bytes=100),
            timed("none", 3.0, saved_bytes=300),
            timed("only folding", 1.0, saved_bytes=180),
            timed("only memory", 3.0, saved_bytes=300),
        ],
        m2=[
            full(),
            timed("without memory", 0.5, saved_bytes=100),
            timed("none", 1.0, saved_bytes=100),
            timed("only memory", 4.0, saved_bytes=100),
        ],
    )
    settings = SETTINGS | {"ablation": "frozen-training", "parts": [vars(part) for part in PARTS]}
    return replace(found, baseline="full", settings=settings)


def test_worth_is_the_time_without_over_the_time_with():
    folding, memory = worths(measured())
    assert folding.beside.ratio.value == pytest.approx(2.0)
    assert folding.alone.ratio.value == pytest.approx(3.0)
    assert memory.beside.ratio.value == pytest.approx(0.5)
    assert memory.alone.ratio.value == pytest.approx(0.5)  # the geometric mean of 1 and 1/4


def test_means_are_over_the_models_in_which_a_part_was_applied():
    folding, memory = worths(measured())
    assert list(folding.beside.models) == ["m1"]
    assert list(memory.beside.models) == ["m1", "m2"]
    assert (folding.applied, memory.applied) == (3, None)


def test_intervals_are_those_of_the_paired_rounds():
    folding = worths(measured())[0].beside.ratio
    assert folding.low <= 2.0 <= folding.high
    assert folding.verdict == "faster"
    assert (folding.n, folding.confidence) == (8, 0.95)


def test_bytes_are_what_the_part_saves_in_all_models():
    folding, memory = worths(measured())
    assert (folding.beside.saved_bytes, folding.alone.saved_bytes) == (50, 120)
    assert memory.beside.saved_bytes == 0


def test_inference_saves_no_bytes():
    found = compared(report(m=[timed("full", 1.0), timed("none", 1.0)]), "full", "none")
    assert found.saved_bytes is None


def test_a_part_that_was_applied_nowhere_has_no_figure():
    without = replace(measured(), models=measured().models[1:])
    folding = worths(without)[0]
    assert (folding.applied, folding.beside.ratio, folding.alone.ratio) == (0, None, None)


def test_a_variant_that_is_wrong_has_a_reason_in_place_of_a_figure():
    wrong = VariantResult("without folding", "wrong", "output 0 is off")
    found = compared(report(m=[full(), wrong]), "full", "without folding")
    assert (found.ratio, found.models) == (None, {})
    assert "output 0 is off" in found.missing["m"]


def test_what_no_part_covers_is_told():
    assert uncounted(measured()) == {"own_kernels": 5}


def test_a_file_is_read_as_it_was_written(tmp_path):
    found = measured()
    ablation = Ablation(ENVIRONMENT, {"training": found})
    save_ablation(ablation, tmp_path / "a.json")
    assert load_ablation(tmp_path / "a.json").to_json() == ablation.to_json()
    content = json.loads((tmp_path / "a.json").read_text())
    assert (content["schema"], content["kind"]) == (1, "ablation")


def test_models_are_added_one_by_one():
    ablation = Ablation(ENVIRONMENT, {})
    assert not ablation.has("training", "m")
    more = ablation.with_model("training", {"mode": "training"}, ModelResult("m", (full(),), (8,)))
    assert more.has("training", "m")
    assert not more.has("training", "n")
    assert more.reports["training"].baseline == "full"


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"schema": 2, "kind": "ablation"}', '{"schema": 1, "kind": "models"}']
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ResultsError, match=r"JSON|no result file"):
        load_ablation(tmp_path / "a.json")


def test_a_file_without_its_fields_is_refused(tmp_path):
    content = {"schema": 1, "kind": "ablation", "environment": {}, "modes": {"training": {}}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ResultsError, match="field is missing"):
        load_ablation(tmp_path / "a.json")
