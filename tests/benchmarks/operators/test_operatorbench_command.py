"""The operator benchmark's command: lines and files as they come, options, and what it refuses."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_compilers import broken, eager_graph, wrong_by_a_factor

from benchmarks import operatorbench
from benchmarks.operators.configurations import CONFIGURATIONS
from benchmarks.operators.inputs.log import resolve_operator
from benchmarks.operators.inputs.suites import SUITES, load_suite

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.txt"
    path.write_text(
        "Operator: aten.no_such_operator.default\ncnt: 1, ((T([4], f32),), {})\n"
        "Operator: aten.relu.default\ncnt: 1, ((T([4], f32),), {})\ncnt: 5, ((T([8], f32),), {})\n"
        "cnt: 3, ((T([16], f32),), {})\n"
        "Operator: aten.sigmoid.default\ncnt: 7, ((T([4], f32),), {})\n"
        "Operator: aten.view.default\ncnt: 1, ((T([4], f32), [2, 2]), {})\n"
    )
    return path


def run(log: Path, *arguments: str) -> int:
    common = ["--input-file", str(log), "--threads", "1", "--repeats", "1"]
    return operatorbench.main([*common, *arguments])


@pytest.mark.timed
def test_the_command_measures_an_operator_of_a_suite_by_inductor(tmp_path, capsys):
    pytest.importorskip("transformers", reason="not installed: pip install -e '.[bench]'")
    path = tmp_path / "rows.json"
    arguments = ["--suite", "transformers", "--op", "aten.tanh.default", "--max-samples", "1"]
    assert operatorbench.main([*arguments, "--threads", "1", "--repeats", "1", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["benchmark"] == "operatorbench"
    assert data["environment"]["libraries"]["torch"] == torch.__version__
    (row,) = data["rows"]
    assert row["status"] == "ok"
    assert row["ratios"]["inductor/eager"]["total"] > 0
    assert "aten.tanh.default" in capsys.readouterr().out


def test_every_operator_has_a_row_and_a_sound_run_exits_with_0(log, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "graph", eager_graph)
    path = tmp_path / "rows.csv"
    assert run(log, "--op", "all", "--configs", "graph", "--csv", str(path)) == 0
    rows = {row["operator"]: row for row in csv.DictReader(path.open(newline=""))}
    assert {name: row["status"] for name, row in rows.items()} == {
        "aten.no_such_operator.default": "skipped",
        "aten.relu.default": "ok",
        "aten.sigmoid.default": "ok",
        "aten.view.default": "skipped",
    }
    assert "no operator" in rows["aten.no_such_operator.default"]["reason"]


@pytest.mark.parametrize(
    ("compiler", "status"), [(wrong_by_a_factor, "inaccurate"), (broken, "failed")], ids=["wrong", "broken"]
)
def test_a_configuration_that_fails_makes_the_exit_status_1(log, monkeypatch, capsys, compiler, status):
    monkeypatch.setitem(CONFIGURATIONS, "injected", compiler)
    assert run(log, "--op", "aten.relu.default", "--configs", "injected") == 1
    shown = capsys.readouterr().out
    assert f" {status} " in shown
    assert " injected: " in shown


def test_results_go_unchecked_only_on_request(log, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "injected", wrong_by_a_factor)
    assert run(log, "--op", "aten.relu.default", "--configs", "injected", "--no-accuracy") == 0


def test_an_interrupted_run_keeps_its_rows(log, tmp_path, monkeypatch):
    def interrupted_at_sigmoid(graph, inputs):
        if any(node.target is aten.sigmoid.default for node in graph.graph.nodes):
            raise KeyboardInterrupt
        return graph

    monkeypatch.setitem(CONFIGURATIONS, "interrupted", interrupted_at_sigmoid)
    rows, data = tmp_path / "rows.csv", tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        run(log, "--op", "all", "--configs", "interrupted", "--csv", str(rows), "--json", str(data))
    expected = ["aten.no_such_operator.default", "aten.relu.default"]
    assert [row["operator"] for row in csv.DictReader(rows.open(newline=""))] == expected
    assert [row["operator"] for row in json.loads(data.read_text())["rows"]] == expected


def test_the_most_frequent_inputs_come_first_from_the_start_index_on(log, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "graph", eager_graph)
    path = tmp_path / "rows.json"
    arguments = ["--op", "aten.relu.default", "--configs", "graph", "--json", str(path)]
    assert run(log, *arguments, "--max-samples", "2") == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert [sample["count"] for sample in row["samples"]] == [5, 3]
    assert (row["occurrences"], row["occurrences_logged"]) == (8, 9)
    assert run(log, *arguments, "--start-index", "2") == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert [sample["count"] for sample in row["samples"]] == [1]
    assert run(log, *arguments, "--start-index", "3") == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["status"], row["samples"]) == ("skipped", [])


@pytest.mark.parametrize("samples", [1, 3])
def test_a_profile_is_a_trace_an_operator_with_labelled_repetitions(log, tmp_path, monkeypatch, samples):
    monkeypatch.setitem(CONFIGURATIONS, "graph", eager_graph)
    folder = tmp_path / "made" / "traces"
    arguments = ["--op", "all", "--configs", "graph", "--max-samples", str(samples)]
    assert run(log, *arguments, "--repeats", "2", "--profile", str(folder), "--csv", str(tmp_path / "x")) == 0
    # Nothing was run of a view, nor of what torch does not have.
    assert sorted(path.name for path in folder.iterdir()) == [
        "aten.relu.default.json",
        "aten.sigmoid.default.json",
    ]
    events = json.loads((folder / "aten.relu.default.json").read_text())["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    inputs = [event for event in ranges if event["name"].startswith("input ")]
    assert [event["name"] for event in inputs] == [
        "input 0: log.txt:5",
        "input 1: log.txt:6",
        "input 2: log.txt:4",
    ][:samples]
    for outer in inputs:
        assert [inner["name"] for inner in within(outer, ranges)] == [
            *("repetition 0", "eager", "graph"),
            *("repetition 1", "eager", "graph"),
        ]
    kernels = [event for event in events if event.get("name") == "aten::relu"]
    assert len(kernels) == samples * 2 * 2
    assert all(any(kernel in within(one, events) for one in inputs) for kernel in kernels)


def within(outer, events):
    """The events of a Chrome trace that lie in another one, by their beginning."""
    end = outer["ts"] + outer["dur"]
    timed = [event for event in events if "dur" in event and event is not outer]
    inner = [event for event in timed if outer["ts"] <= event["ts"] and event["ts"] + event["dur"] <= end]
    return sorted(inner, key=lambda event: event["ts"])


def test_a_profile_without_a_folder_goes_to_one_in_the_working_folder(log, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "graph", eager_graph)
    monkeypatch.chdir(tmp_path)
    assert run(log, "--op", "aten.relu.default", "--configs", "graph", "--profile") == 0
    assert (tmp_path / "operatorbench_traces" / "aten.relu.default.json").exists()


def test_an_operator_is_shown_before_the_next_one_is_begun(log, tmp_path, monkeypatch, capsys):
    shown = {}

    def looking(graph, inputs):
        (target,) = (node.target for node in graph.graph.nodes if node.op == "call_function")
        shown.setdefault(str(target), capsys.readouterr().out)
        return graph

    monkeypatch.setitem(CONFIGURATIONS, "looking", looking)
    assert run(log, "--op", "all", "--configs", "looking", "--csv", str(tmp_path / "rows.csv")) == 0
    assert re.fullmatch(
        r"aten.no_such_operator.default: skipped: torch .* has no operator .*\n", shown["aten.relu.default"]
    )
    assert re.fullmatch(
        r"aten.relu.default: looking/eager .*x \(.* to .*\); 3 inputs, .* s\n", shown["aten.sigmoid.default"]
    )
    assert capsys.readouterr().out.startswith("aten.sigmoid.default: looking/eager ")


@pytest.mark.full
def test_a_signal_ends_a_run_that_has_shown_and_saved_what_it_did(tmp_path):
    many = "".join(f"cnt: 1, ((T([{size}], f32),), {{}})\n" for size in range(1, 100))
    (tmp_path / "log.txt").write_text(
        f"Operator: aten.relu.default\ncnt: 1, ((T([4], f32),), {{}})\nOperator: aten.sigmoid.default\n{many}"
    )
    command = [sys.executable, "-m", "benchmarks.operatorbench", "--input-file", "log.txt", "--op", "all"]
    command += ["--configs", "aot_eager", "--threads", "1", "--repeats", "100000", "--max-samples", "100"]
    command += ["--json", "rows.json"]
    # Colours are for terminals: with them the progress bar is drawn, which must not take the lines along.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "FORCE_COLOR": "1"}
    environment.pop("PYTHONUNBUFFERED", None)
    with (tmp_path / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # In a shell's background job the signal is ignored, and so it would be here.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        with process:
            line = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
    errors = (tmp_path / "errors.txt").read_text()
    assert line.startswith("aten.relu.default: aot_eager/eager "), errors
    assert process.returncode == 130
    assert "operatorbench_log_float32.csv" in rest
    assert errors.endswith("Interrupted.\n")
    assert "Traceback" not in errors
    rows = list(csv.DictReader((tmp_path / "operatorbench_log_float32.csv").open(newline="")))
    assert [row["operator"] for row in rows] == ["aten.relu.default"]
    data = json.loads((tmp_path / "rows.json").read_text())
    assert [row["operator"] for row in data["rows"]] == ["aten.relu.default"]


def test_all_operators_are_written_unasked_and_a_single_one_is_not(log, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "graph", eager_graph)
    monkeypatch.setitem(CONFIGURATIONS, "other", eager_graph)
    monkeypatch.chdir(tmp_path)

    def written(*arguments):
        assert run(log, *arguments) == 0
        files = sorted(tmp_path.glob("*.csv"))
        return {file.name: len(list(csv.DictReader(file.open(newline="")))) for file in files}

    assert written("--op", "aten.relu.default", "--configs", "graph") == {}
    first = "operatorbench_log_float32.csv"
    assert written("--op", "all", "--configs", "graph") == {first: 4}
    assert written("--op", "all", "--configs", "graph") == {first: 8}
    second = "operatorbench_log_float32_2.csv"
    assert written("--op", "all", "--configs", "other") == {first: 8, second: 4}
    (row, *_) = csv.DictReader((tmp_path / first).open(newline=""))
    assert (row["input file"], row["dtype"], row["torch"]) == (str(log), "float32", torch.__version__)


def test_a_file_of_other_configurations_is_refused_before_anything_is_run(log, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CONFIGURATIONS, "graph", eager_graph)
    monkeypatch.setitem(CONFIGURATIONS, "broken", broken)
    path = tmp_path / "rows.csv"
    arguments = ["--op", "aten.relu.default", "--csv", str(path), "--configs"]
    assert run(log, *arguments, "graph") == 0
    before = path.read_text()
    capsys.readouterr()
    assert run(log, *arguments, "broken") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "name another file by --csv" in captured.err
    assert path.read_text() == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_products_holds_for_the_run_alone(log, monkeypatch, precision):
    seen = []

    def looking(graph, inputs):
        seen.append(torch.get_float32_matmul_precision())
        return graph

    monkeypatch.setitem(CONFIGURATIONS, "looking", looking)
    before = torch.get_float32_matmul_precision()
    arguments = ["--op", "aten.sigmoid.default", "--configs", "looking"]
    assert run(log, *arguments, "--float32-matmul-precision", precision) == 0
    assert seen == [precision]
    assert torch.get_float32_matmul_precision() == before


def test_the_options_of_pytorchs_script_are_taken_under_its_names(log, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "graph", eager_graph)
    monkeypatch.setitem(CONFIGURATIONS, "injected", wrong_by_a_factor)
    path = tmp_path / "rows.json"
    arguments = [
        "--inp-file",
        str(log),
        "--op",
        "aten.relu.default",
        "--start-idx",
        "1",
        "--max-samples",
        "1",
    ]
    arguments += ["--configs", "graph", "--inductor-config", "injected", "--threads", "1", "--repeats", "1"]
    arguments += ["--json", str(path)]
    assert operatorbench.main([*arguments, "--accuracy-checking", "False"]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert [sample["count"] for sample in row["samples"]] == [3]
    assert set(row["ratios"]) == {"graph/eager", "injected/eager", "injected/graph"}
    assert operatorbench.main([*arguments, "--accuracy-checking", "True"]) == 1
    assert operatorbench.main([*arguments, "--accuracy-checking"]) == 1


def test_a_suite_is_read_from_the_folder_of_its_logs(log, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CONFIGURATIONS, "graph", eager_graph)
    folder = tmp_path / "operator_inp_logs" / "hf_train"
    folder.mkdir(parents=True)
    log.rename(folder / "Bert_training.txt")
    arguments = ["--suite", "huggingface", "--op", "aten.relu.default", "--configs", "graph"]
    arguments += ["--threads", "1", "--repeats", "1"]
    assert operatorbench.main([*arguments, "--log-folder", str(folder.parent)]) == 0
    assert "aten.relu.default: graph/eager " in capsys.readouterr().out
    assert operatorbench.main(arguments) == 2
    assert "by --log-folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "inductr"], "Did you mean 'inductor'?"),
        (["--configs", "inductor,inductor"], "several different ones"),
        (["--configs", ","], "name one configuration"),
        (["--op", "aten.relu"], "Did you mean 'aten.relu.default'?"),
        (["--device", "xpu"], "write cpu or cuda"),
        (["--json", "missing/rows.json"], "no such folder"),
        (["--profile", __file__], "cannot hold traces"),
        (["--log-folder", "."], "exclude each other"),
    ],
)
def test_a_bad_option_is_refused_with_what_is_valid(log, capsys, arguments, message):
    operator = [] if "--op" in arguments else ["--op", "aten.relu.default"]
    assert run(log, *operator, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_hostile_log_is_refused_with_its_line(log, capsys):
    log.write_text("Operator: aten.relu.default\ncnt: 1, ((__import__('os').getpid(),), {})\n")
    assert run(log, "--op", "all") == 2
    assert "log.txt:2: __import__" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("suite", SUITES)
def test_all_operators_of_a_suite_have_a_row_and_none_is_wrong(suite, tmp_path):
    path = tmp_path / "rows.csv"
    arguments = ["--suite", suite, "--op", "all", "--max-samples", "1", "--repeats", "1", "--threads", "1"]
    assert operatorbench.main([*arguments, "--csv", str(path)]) == 0
    rows = {row["operator"]: row for row in csv.DictReader(path.open(newline=""))}
    assert list(rows) == load_suite(suite).names()
    for name, row in rows.items():
        assert resolve_operator(name)
        assert row["status"] == "ok" or (
            row["status"] == "skipped" and "inductor calls ATen" in row["reason"]
        )
