"""The layout benchmark's command: it writes all that it offers, and a profile that answers and grows."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from layout_settings import CASES, CPU, QUICK

from benchmarks import tensor_layout
from benchmarks.layout.setting import Setting
from benchmarks.layout.sweep import to_profile
from fxpasses.devices.convolutions import (
    Convolution,
)
from fxpasses.devices.profile import (
    LAYOUTS,
    Roofline,
)
from fxpasses.devices.store import device_name, file_name, load


@pytest.mark.timed
def test_the_command_writes_everything_it_offers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png", "trace")}
    files = ["--json", out["json"], "--csv", out["csv"], "--plot", out["png"], "--trace", out["trace"]]
    sizes = ["--input", "2,16,8,8", "--weight", "32,16,1,1", "--device", "cpu", "--repeats", "6"]
    assert tensor_layout.main([*sizes, "--dtype", "float32,bfloat16", *map(str, files)]) == 0
    assert "fastest of each" in capsys.readouterr().out

    data = json.loads(out["json"].read_text("utf-8"))
    assert data["environment"]["libraries"]["torch"] == torch.__version__
    measured = [each for each in data["variants"] if each["status"] == "measured"]
    assert len(measured) >= 2 * 3 * 3  # dtypes x directions x (two layouts, and mm)
    assert all(seconds > 0 for each in measured for seconds in each["times"])
    assert len(data["speedups"]) == 2 * 3

    with out["csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(data["variants"])
    assert all(float(each["seconds"]) > 0 for each in rows if each["status"] == "measured")
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    labels = {each["name"] for each in json.loads(out["trace"].read_text("utf-8"))["traceEvents"]}
    assert any(str(each).startswith("weight_grad channels_last input=2x16x8x8") for each in labels)


@pytest.mark.parametrize("hot", [True, False], ids=["hot", "cold"])
def test_a_trace_has_the_python_stacks_of_labelled_calls(tmp_path: Path, hot: bool) -> None:
    path = tmp_path / "trace.json"
    setting = Setting("float32", CPU, QUICK, hot=hot)
    tensor_layout._write_trace(path, [CASES["plain"]], ["weight_grad"], setting)
    events = [each for each in json.loads(path.read_text("utf-8"))["traceEvents"] if "dur" in each]
    frames = [each for each in events if each["cat"] == "python_function"]
    for layout in LAYOUTS:
        label = f"weight_grad {layout} {CASES['plain'].key}"
        (span,) = (each for each in events if each["name"] == label and each["cat"] == "user_annotation")
        (operator,) = (
            each for each in events if each["name"] == "aten::convolution_backward" and encloses(span, each)
        )
        around = [each["name"] for each in frames if encloses(each, operator)]
        assert any("benchmarks/tensor_layout.py" in each for each in around)
        assert any("fxpasses/devices/convolutions.py" in each for each in around)
    # What clears the caches before each of the two.
    assert sum(each["name"] == "aten::zero_" for each in events) == (0 if hot else 2)


def encloses(outer: dict[str, float], inner: dict[str, float]) -> bool:
    """Whether an event of a trace lies within another one."""
    end = inner["ts"] + inner["dur"]
    return outer["ts"] <= inner["ts"] and end <= outer["ts"] + outer["dur"]


def test_a_profile_for_a_folder_is_named_after_its_device(tmp_path: Path) -> None:
    def path(given: str) -> Path | None:
        return tensor_layout._profile_path(tensor_layout._parser().parse_args(["--profile", given]), CPU)

    assert path(str(tmp_path)) == path(f"{tmp_path}/") == tmp_path / file_name(device_name(CPU))
    assert path(f"{tmp_path}/new/") == tmp_path / "new" / file_name(device_name(CPU))
    assert path(f"{tmp_path}/mine.json") == tmp_path / "mine.json"


@pytest.mark.timed
def test_a_sweep_writes_a_profile_that_answers_and_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.layout.sweep._copy_sizes", lambda _: [2**14, 2**16])
    monkeypatch.setattr(
        "benchmarks.layout.sweep._measure_roofline",
        lambda setting: Roofline(setting.dtype, 1e11, 2e11, 1e10, 1e-6),
    )
    path = tmp_path / "profile.json"
    common = ["--sweep", "resnet18", "--size", "32", "--device", "cpu", "--repeats", "1", "--hot"]
    assert tensor_layout.main([*common, "--profile", str(path)]) == 0
    assert "convolution.forward" in capsys.readouterr().out

    profile = load(path)
    assert profile is not None
    case = Convolution.of((1, 64, 8, 8), (64, 64, 3, 3), (1,), (1,))
    for layout in LAYOUTS:
        estimate = profile.seconds("convolution.forward", case.key, layout)
        assert estimate is not None
        assert estimate.seconds > 0
        copy = profile.copy_seconds(3 * 2**14, layout)
        assert copy is not None
        assert math.isfinite(copy)
    assert profile.roofline("bfloat16") is None
    assert profile.operands == "hot"

    assert tensor_layout.main([*common, "--profile", str(path), "--dtype", "bfloat16"]) == 0
    grown = load(path)
    assert grown is not None
    assert grown.roofline("bfloat16") is not None
    assert grown.seconds("convolution.forward", case.key, "channels_last", "bfloat16") is not None
    assert grown.seconds("convolution.forward", case.key, "channels_last", "float32") is not None


def test_a_profile_says_whether_its_operands_were_in_a_cache() -> None:
    profiles = {hot: to_profile([], CPU, tf32=False, hot=hot) for hot in (True, False)}
    assert {hot: each.settings["operands"] for hot, each in profiles.items()} == {True: "hot", False: "cold"}


def test_cold_measurements_do_not_go_into_a_profile_of_hot_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    to_profile([], CPU, tf32=False, hot=True).save(path)
    monkeypatch.setattr(tensor_layout, "collect", lambda *_, **__: pytest.fail("it was measured"))
    assert tensor_layout.main(["--sweep", "resnet18", "--device", "cpu", "--profile", str(path)]) == 2
    error = capsys.readouterr().err
    assert "'operands': 'hot'" in error
    assert "'operands': 'cold'" in error


def test_a_profile_of_another_device_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    text = '{"schema": 1, "device": "Other", "torch_version": "1", "libraries": {}, "settings": {}, '
    path.write_text(text + '"rooflines": [], "measurements": []}', "utf-8")
    monkeypatch.setattr(tensor_layout, "collect", lambda *_, **__: pytest.fail("it was measured"))
    assert tensor_layout.main(["--sweep", "resnet18", "--device", "cpu", "--profile", str(path)]) == 2
    assert "different device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--passes", "fwd"], "unknown pass 'fwd'. Did you mean 'forward'?"),
        (["--dtype", "float31"], "Did you mean 'float32'?"),
        (["--kinds", "plane"], "Did you mean 'plain'?"),
        (["--input", "1,3,8,8"], "--input and --weight go together"),
        (["--device", "tpu"], "tpu"),
        (["--sweep", "resnet1812"], "no model 'resnet1812'"),
        (["--sweep", "resnet18", "--modes", "testing"], "unknown mode 'testing'"),
    ],
)
def test_bad_arguments_are_one_clear_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert tensor_layout.main([*arguments, *device]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1


def test_every_kind_of_convolution_can_be_built() -> None:
    for case, gpu_batch, cpu_batch in tensor_layout.KINDS.values():
        assert min(case.output_size) >= 1
        assert gpu_batch >= cpu_batch >= 1
    default, gpu_batch, _ = tensor_layout.KINDS["plain"]
    assert (gpu_batch, *default.input_size[1:]) == (256, 3, 224, 224)
    assert default.weight_size == (64, 3, 7, 7)
    assert (default.stride, default.padding) == ((2, 2), (3, 3))
