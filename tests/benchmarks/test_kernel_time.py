"""`python -m benchmarks.kernel_time`: what it refuses, and one small model in all runtimes."""

from __future__ import annotations

import json

import pytest

from benchmarks.kernel_time import main
from tests.benchmarks.refusals import refusal

TINY = "tests.benchmarks.tiny_models:tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtimes", "fxpasses,openvinno"], "openvino"),
        (["--runtimes", "onednn"], "must have fxpasses"),
        (["--rounds", "0"], "--rounds 0 measures nothing"),
        (["--batch", "0"], "must be at least 1"),
        (["--threads", "-1"], "must be at least 1"),
        (["--models", ","], "names no model"),
        (["--json", "/nowhere/at/all.json"], "does not exist"),
    ],
)
def test_arguments_that_do_not_do_are_refused_before_anything_runs(arguments, message, capsys):
    assert message in refusal(main, arguments, capsys)


@pytest.mark.full
@pytest.mark.timed
@pytest.mark.needs_kernels
def test_a_small_model_has_its_layers_in_every_runtime(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    path = tmp_path / "found.json"
    assert (
        main(["--models", TINY, "--size", "32", "--threads", "1", "--rounds", "2", "--json", str(path)]) == 0
    )
    (model,) = json.loads(path.read_text(encoding="utf-8"))["models"]
    assert (model["layers"], model["failures"], model["not_matched"]) == (3, {}, {})
    runtimes = {"fxpasses", "onednn", "onnxruntime", "openvino"}
    for row in model["rows"]:
        for (name,) in row["names"]:
            lacking = {runtime for runtime, names in model.get("not_found", {}).items() if name in names}
            assert set(row["microseconds"]) == runtimes - lacking
            # Inductor computes so small a product in a kernel that it generates.
            assert lacking <= ({"onednn", "fxpasses"} if name == "classifier.weight" else set()), name
    assert "milliseconds by kind" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.timed
def test_a_model_that_does_not_exist_fails_in_every_runtime(capsys):
    assert main(["--models", "resnet1800", "--runtimes", "fxpasses", "--rounds", "1"]) == 1
    assert "failed: ModelSpecError" in capsys.readouterr().out
