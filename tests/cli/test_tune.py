"""`fxpasses tune`: what it measures, shows, writes and reads, and what it refuses, changing nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fxpasses.cli import main
from fxpasses.devices.own import own_store
from fxpasses.devices.profile import CONVOLUTION_FORWARD, OPERATORS_OF_CONVOLUTIONS


class Small(nn.Sequential):
    """Two convolutions and a pooling."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)
        )


SPEC = ("tests.cli.test_tune:Small", "--input", "2,3,16,16")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path / "profiles"))
    monkeypatch.setattr("fxpasses.devices.arena.far", lambda device: 2**20)
    return tmp_path


def operators() -> set[str]:
    return {row.operator for row in own_store().profile().measurements}


def test_it_measures_a_model_and_says_what_is_gained_and_where_it_is_kept(capsys):
    assert main(["tune", *SPEC]) == 0
    out = capsys.readouterr().out
    assert str(own_store().path) in out
    assert "of 2 convolutions 2 measured" in out
    # Whether the plan is carried out depends on what this machine needed just now.
    assert re.search(r"; (gains|would gain) [\d.]+( ± [\d.]+)? ms of [\d.]+ ms", out)
    assert operators() & set(OPERATORS_OF_CONVOLUTIONS) == {CONVOLUTION_FORWARD}


def test_training_measures_the_gradients_too():
    assert main(["tune", *SPEC, "--full-train"]) == 0
    assert operators() >= set(OPERATORS_OF_CONVOLUTIONS)


def test_a_second_time_measures_nothing_but_has_what_was_compiled_planned_anew(capsys):
    assert main(["tune", *SPEC]) == 0
    before = own_store().profile()
    assert main(["tune", *SPEC]) == 0
    after = own_store().profile()
    assert after.measurements == before.measurements
    assert after.revision != before.revision
    assert "0 measurements" in capsys.readouterr().out


def test_what_is_kept_is_listed(capsys):
    assert main(["tune", "--show"]) == 0
    assert "nothing is kept in" in capsys.readouterr().out
    assert main(["tune", *SPEC]) == 0
    capsys.readouterr()
    assert main(["tune", "--show"]) == 0
    out = capsys.readouterr().out
    for said in (own_store().empty.device, torch.__version__, own_store().path.name):
        assert said in out
    assert f"{len(own_store().profile().measurements)} measurements" in out


def test_a_store_is_exported_and_imported(folder, monkeypatch):
    assert main(["tune", *SPEC]) == 0
    known = own_store().profile()
    assert main(["tune", "--export", str(folder / "mine.json")]) == 0
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(folder / "elsewhere"))
    assert own_store().profile().measurements == ()
    assert main(["tune", "--import", str(folder / "mine.json")]) == 0
    assert own_store().profile().measurements == known.measurements
    assert own_store().profile().rooflines == known.rooflines


def exported(folder: Path) -> Path:
    assert main(["tune", *SPEC]) == 0
    path = folder / "mine.json"
    assert main(["tune", "--export", str(path)]) == 0
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 99}, "its schema version is 99"),
        ({"device": "Imaginary 9000"}, "it was measured on 'Imaginary 9000'"),
        ({"settings": {"operands": "hot"}}, "different settings"),
        ({"torch_version": "1.0"}, "different torch_version"),
        ({"measurements": 3}, "not a profile's"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_a_file_of_something_else_is_refused_and_nothing_is_changed(folder, capsys, change, reason):
    path = exported(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = own_store().path.read_bytes()
    capsys.readouterr()
    assert main(["tune", "--import", str(path)]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "nothing is changed" in error
    assert own_store().path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tune"], "name a model and its inputs"),
        (["tune", "timm:resnet18"], "name a model and its inputs"),
        (["tune", *SPEC, "--show"], "take no SPEC"),
        (["tune", "--export", "profile.json"], "nothing was measured on this device yet"),
        (["tune", "--import", "missing.json"], "cannot be read"),
        (["tune", "tests.cli.test_tune:Nothing", "--input", "1,3,8,8"], "Nothing"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_status_2(capsys, arguments, reason):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_a_model_without_convolutions_has_nothing_to_measure(capsys):
    assert main(["tune", "torch.nn:Identity", "--input", "2,3"]) == 0
    assert "nothing to measure" in capsys.readouterr().out
