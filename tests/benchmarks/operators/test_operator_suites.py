"""Suites of operator logs: those that are shipped, and PyTorch's published ones, found in their folder."""

from __future__ import annotations

import gzip
import json

import pytest

from benchmarks.operators.inputs.log import (
    resolve_operator,
)
from benchmarks.operators.inputs.suites import (
    LOGS,
    MODES,
    SUITES,
    SuiteError,
    entries_of,
    load_suite,
    log_path,
)


@pytest.mark.parametrize("suite", SUITES)
def test_every_shipped_log_parses_and_names_operators_that_exist(suite):
    for mode in MODES:
        log = load_suite(suite, mode)
        assert log.names()
        for name in log.names():
            assert str(resolve_operator(name)) == name
        assert any("backward" in name for name in log.names()) == (mode == "training")


def test_every_shipped_log_is_in_the_manifest_and_all_are_small():
    files = [path for path in LOGS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    expected = {LOGS / suite / "manifest.json" for suite in SUITES}
    for suite in SUITES:
        manifest = json.loads((LOGS / suite / "manifest.json").read_text())
        assert sorted(manifest) == sorted(each.name for each in entries_of(suite))
        for each in entries_of(suite):
            assert manifest[each.name]["batch"] == each.batch
            expected |= {log_path(LOGS, suite, each.name, mode) for mode in MODES}
    assert set(files) == expected


RELU = "Operator: aten.relu.default\ncnt: {count}, ((T([2], f32),), {{}})\n"


def occurrences(suite, folder, mode="all"):
    (sample,) = load_suite(suite, mode, folder).samples("aten.relu.default")
    return sample.count


@pytest.fixture
def published_suites(tmp_path):
    """A folder like PyTorch's `operator_inp_logs`; its counts tell the logs apart."""
    folder = tmp_path / "operator_inp_logs"
    files = ["hf_train/A_training.txt", "hf_train/B_training.txt.gz", "torchbench_train/C_training.txt"]
    files += ["timm_train/D_training.txt", "timm_train/E_inference.txt", "timm_train/README.md"]
    for place, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = RELU.format(count=10**place).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return folder


def test_a_suite_of_pytorch_is_read_from_its_folder(published_suites):
    assert occurrences("huggingface", published_suites) == 11
    assert occurrences("huggingface", published_suites / "hf_train") == 11
    assert occurrences("torchbench", published_suites) == 100
    assert occurrences("timm", published_suites) == 11000
    assert occurrences("timm", published_suites, "training") == 1000
    assert occurrences("timm", published_suites, "inference") == 10000


def test_a_folder_of_any_other_name_may_be_the_suites_own(published_suites):
    renamed = (published_suites / "hf_train").rename(published_suites / "mine")
    assert occurrences("torchbench", renamed) == 11


def test_logs_that_were_recorded_into_a_folder_are_read_from_there(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "A_inference.txt").write_text(RELU.format(count=7))
    assert occurrences("transformers", tmp_path) == 7


@pytest.mark.parametrize(
    ("suite", "place", "mode", "message"),
    [
        ("huggingface", None, "all", "are not shipped.*by --log-folder.*transformers"),
        ("torchbench", None, "training", "are not shipped"),
        ("huggingface", "timm_train", "all", "another suite than 'huggingface'"),
        ("timm", "hf_train", "all", "another suite than 'timm'"),
        ("torchvision", "", "all", "no logs .* of suite 'torchvision'"),
        ("huggingface", "", "inference", "no logs .*_inference"),
        ("huggingface", "missing", "all", "no logs"),
        ("torchbanch", None, "all", "unknown suite"),
    ],
)
def test_a_suite_without_logs_is_refused_with_where_they_would_be(
    published_suites, suite, place, mode, message
):
    with pytest.raises(SuiteError, match=message):
        load_suite(suite, mode, None if place is None else published_suites / place)
