"""The check of a GPU: what it runs, what it writes when it is cut short, and the rehearsal on a CPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.device_check import networks
from benchmarks.device_check.__main__ import main
from benchmarks.device_check.bars import bars_of
from benchmarks.device_check.plan import OURS, RACED, STOCK, Run, on_a_gpu, rehearsal, runs_of
from benchmarks.device_check.running import FILE, Check
from benchmarks.models.cases import Case, build_inputs, build_model
from benchmarks.models.results import ModelResult, Report, VariantResult

LIMITS = (60.0, 60.0, 60.0)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def check_of(folder: Path, **codes: str) -> Check:
    stages = {"first": "tests", "second": "tests", "third": "speed", "fourth": "memory"}
    return Check(
        [Run(stages[name], name, python(code)) for name, code in codes.items()], folder, {"device": "?"}
    )


def test_each_run_is_written_when_it_ends(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    check = check_of(tmp_path, first="pass", second="print('why'); exit(3)", third="pass", fourth="pass")

    def told(_: object) -> None:
        written = json.loads((tmp_path / FILE).read_text())
        seen.append([run["status"] for run in written["runs"]])

    check.go(LIMITS, told)
    assert seen[0] == ["passed", "not begun", "not begun", "not begun"]
    assert seen[1] == ["passed", "failed", "not begun", "not begun"]
    assert seen[-1] == ["passed", "failed", "passed", "passed"]
    written = json.loads((tmp_path / FILE).read_text())
    assert [run["tail"] for run in written["runs"]] == ["", "why\n", "", ""]
    assert written["environment"] == {"device": "?"}
    assert written["bars"][0]["holds"] is False


def test_a_stage_that_is_out_of_time_is_cut_short_and_the_next_has_its_own(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {0!r}]); time.sleep(60)"
    late = tmp_path / "late"
    writes = f"import time; time.sleep(4); open({str(late)!r}, 'w')"
    codes = {
        "first": f"print('so far', flush=True); {child.format(writes)}",
        "second": "pass",
        "third": "pass",
    }
    start = time.monotonic()
    check = check_of(tmp_path, **codes)
    check.go((1.5, 60.0, 60.0), lambda outcome: None)
    assert [outcome.status for outcome in check.outcomes] == ["cut short", "not begun", "passed"]
    assert check.outcomes[0].tail == "so far\n"
    time.sleep(max(0.0, start + 6 - time.monotonic()))
    assert not late.exists(), "the process that it started goes on"


def result(model: str, seconds: dict[str, float], peaks: dict[str, int] | None = None) -> ModelResult:
    peaks = peaks or {}
    variants = [
        VariantResult(name, "ok", seconds=(value,) * 8, calls=1, peak_bytes=peaks.get(name))
        for name, value in seconds.items()
    ]
    return ModelResult(model, tuple(variants), (8,))


def report(*models: ModelResult) -> Report:
    return Report({}, {}, STOCK, models)


def test_the_bars_are_read_off_the_results() -> None:
    unet, plain = networks.specification("unet"), networks.specification("resnet50")
    static = report(result(unet, {STOCK: 1.2, RACED: 1.0}), result(plain, {STOCK: 0.98, RACED: 1.0}))
    dynamic = report(result(plain, {STOCK: 1.2, RACED: 1.0}))
    memory = report(result(plain, {STOCK: 1.1, OURS: 1.0}, {STOCK: 100, OURS: 50}))
    bars = bars_of([True, True], {"training, static": static, "training, dynamic batch": dynamic}, memory)
    assert [bar.holds for bar in bars] == [True, False, True, True, True]
    assert [bar.figure and round(bar.figure, 3) for bar in bars] == [None, 0.98, 1.2, 0.5, 1.1]
    assert [bar.over for bar in bars] == [2, 3, 2, 1, 1]


def test_of_what_was_not_measured_nothing_is_known() -> None:
    failed = report(
        ModelResult(
            "a", (VariantResult(STOCK, "ok", seconds=(1.0,)), VariantResult(RACED, "failed", "no")), (1,)
        )
    )
    for bars in (bars_of([], {}, None), bars_of([], {"training": failed}, failed)):
        assert [bar.holds for bar in bars] == [None] * 5
    assert [bar.holds for bar in bars_of([True, False], {}, None)] == [False, None, None, None, None]


def test_on_a_gpu_the_tests_come_first_and_all_networks_are_raced() -> None:
    runs = runs_of(on_a_gpu(), Path("folder"))
    assert [run.stage for run in runs] == ["tests"] * 2 + ["speed"] * 8 + ["memory"]
    assert all("gpu" in run.command for run in runs[:2])
    raced = " ".join(" ".join(run.command) for run in runs if run.stage == "speed")
    assert all(raced.count(networks.specification(name)) == 4 for name in networks.NAMES)
    assert raced.count(RACED) == 8


@pytest.mark.parametrize("name", [*networks.NAMES, *networks.TINY])
def test_each_network_is_defined_without_timm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And has about as many parameters as timm's, where that is installed."""
    theirs = getattr(networks, name)()
    monkeypatch.setitem(sys.modules, "timm", None)
    with torch.device("meta"):
        ours = getattr(networks, name)()
    assert type(ours).__module__ == networks.__name__
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (theirs, ours)]
    assert 0.7 < sizes[1] / sizes[0] < 1.3
    case = Case(networks.specification(name), batch=2, size=32)
    model = build_model(case)
    with torch.no_grad():
        found = model(*build_inputs(case, model))
    assert found.shape[0] == 2
    assert bool(found.isfinite().all())


def test_without_a_gpu_the_check_says_what_runs_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "--rehearse" in capsys.readouterr().err


@pytest.mark.full
def test_the_rehearsal_runs_every_stage(tmp_path: Path) -> None:
    main(["--rehearse", "--out", str(tmp_path), "--seconds", "600", "900", "300"])
    written = json.loads((tmp_path / FILE).read_text())
    assert [run["status"] for run in written["runs"]] == ["passed"] * len(runs_of(rehearsal(), tmp_path))
    assert all(bar["holds"] is not None for bar in written["bars"][:3])
    for run in written["runs"]:
        if run["report"] is not None:
            assert {
                variant["status"] for model in run["report"]["results"] for variant in model["variants"]
            } == {"ok"}
