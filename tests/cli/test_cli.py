"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import fxpasses
from fxpasses import cli

RULE = "efficient_conv_bn_eval"

FACTORIES = """
import torch
from torch import nn

def conv_bn():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

def embedding():
    return nn.Embedding(2, 4)

class Two(nn.Module):
    def forward(self, x, y):
        return x + y[:, None]

def relu():
    return nn.ReLU()

def broken():
    raise ValueError("no such luck")

def needs_an_argument(width):
    return nn.ReLU()

def no_module():
    return 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory, which is not on the path."""
    (tmp_path / "cli_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_factories", raising=False)
    return "cli_factories"


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> fxpasses.Report:
    assert cli.main(["explain", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return fxpasses.Report.from_json(captured.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that a wrong command gets."""
    assert cli.main([*arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("fxpasses: error: ")
    return captured.err


def misused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What argparse says to a command that does not parse."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


# Modes of explain ------------------------------------------------------------------------------------------


def test_explain_is_inference_by_default(factories, capsys):
    report = explained(capsys, f"{factories}:conv_bn", "--input", "1,3,8,8")
    assert [remark.code for remark in report.remarks] == ["live-weights"]
    assert report.dry_run


def test_train_means_gradients_with_frozen_statistics(factories, capsys):
    report = explained(capsys, f"{factories}:conv_bn", "--input", "1,3,8,8", "--train")
    assert report.applied == {RULE: 1}


def test_full_train_means_batch_statistics(factories, capsys):
    report = explained(capsys, f"{factories}:conv_bn", "--input", "1,3,8,8", "--full-train")
    assert [remark.code for remark in report.remarks] == ["training-mode"]


def test_grad_mode_and_path_are_as_before(factories, capsys):
    before = list(sys.path)
    explained(capsys, f"{factories}:conv_bn", "--input", "1,3,8,8")
    assert torch.is_grad_enabled()
    assert sys.path == before


def test_options_reach_the_passes(factories, capsys):
    spec = f"{factories}:conv_bn"
    always = explained(capsys, spec, "--input", "1,3,8,8", "--options", "profit=always")
    assert always.applied == {RULE: 1}
    limited = explained(capsys, spec, "--input", "1,3,8,8", "--options", "profit=always", "limit=0")
    assert [remark.code for remark in limited.remarks] == ["limit"]
    disabled = explained(capsys, spec, "--input", "1,3,8,8", "--train", "--options", f"disable={RULE}")
    assert disabled.remarks == ()


def test_several_inputs_are_several_arguments(factories, capsys):
    report = explained(capsys, f"{factories}:Two", "--input", "2,3", "--input", "2")
    assert report.nodes_before > 0


def test_integer_inputs_index_into_anything(factories, capsys):
    report = explained(capsys, f"{factories}:embedding", "--input", "1,128:int64")
    assert report.nodes_before > 0


def test_dtype_is_that_of_model_and_inputs(factories, capsys):
    report = explained(capsys, f"{factories}:conv_bn", "--input", "1,3,8,8", "--train", "--dtype", "float64")
    assert report.applied == {RULE: 1}


# Output ----------------------------------------------------------------------------------------------------


def test_text_has_every_site_then_the_summary(factories, capsys):
    assert cli.main(["explain", f"{factories}:conv_bn", "--input", "1,3,8,8", "--train", "--all"]) == 0
    out = capsys.readouterr().out
    table, summary = out.split(f"{factories}:conv_bn, training with frozen statistics")
    assert "cli_factories" not in table
    assert "replaced" in table
    assert "explained in" in summary
    assert "fxpasses report: dry run, torch level" in summary


def test_text_has_no_site_s_own_line_unless_all_is_asked_for(factories, capsys):
    assert cli.main(["explain", f"{factories}:conv_bn", "--input", "1,3,8,8", "--train"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{factories}:conv_bn, training")
    assert "replaced" not in out


def test_a_model_without_sites_is_said_to_have_none(factories, capsys):
    assert cli.main(["explain", f"{factories}:relu", "--input", "3"]) == 0
    assert "nothing to do: no rule found a site" in capsys.readouterr().out


def test_html_goes_to_the_file_that_is_named(factories, capsys, tmp_path):
    page = tmp_path / "report.html"
    arguments = ["explain", f"{factories}:conv_bn", "--input", "1,3,8,8", "--train", "--html", str(page)]
    assert cli.main(arguments) == 0
    assert f"the page is in {page}" in capsys.readouterr().out
    assert RULE in page.read_text()


def test_a_page_that_cannot_be_written_is_one_line(factories, capsys, tmp_path):
    page = str(tmp_path / "missing" / "report.html")
    error = refused(capsys, "explain", f"{factories}:relu", "--input", "3", "--html", page)
    assert f"cannot write the page to {page}: No such file or directory" in error


def test_rules_lists_the_registry(capsys):
    assert cli.main(["rules"]) == 0
    assert RULE in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fxpasses {version('fxpasses')} (torch {version('torch')})\n"


def test_the_module_runs_as_the_command_does_and_help_does_not_import_torch():
    code = "import sys; sys.argv[1:] = ['--help']\n" + (
        "import runpy\n"
        "try: runpy.run_module('fxpasses', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "explain" in result.stdout


def test_a_reader_that_stops_reading_causes_no_traceback():
    command = [sys.executable, "-m", "fxpasses", "rules"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# Bad input -------------------------------------------------------------------------------------------------


def test_an_unknown_option_names_the_closest(factories, capsys):
    error = refused(capsys, "explain", f"{factories}:relu", "--input", "3", "--options", "proft=always")
    assert "Did you mean 'profit'?" in error


def test_an_option_without_a_value_is_refused(factories, capsys):
    error = refused(capsys, "explain", f"{factories}:relu", "--input", "3", "--options", "profit")
    assert "KEY=VALUE" in error


def test_an_unknown_pass_is_refused(factories, capsys):
    error = refused(capsys, "explain", f"{factories}:relu", "--input", "3", "--options", "passes=conv_bn")
    assert RULE in error


@pytest.mark.parametrize("spec", ["resnet50", "no_such_package.module:f", ":", "cli_factories:no_module"])
def test_a_bad_spec_is_one_line(factories, capsys, spec):
    assert "model spec" in refused(capsys, "explain", spec, "--input", "3")


@pytest.mark.parametrize(("name", "words"), [("broken", "no such luck"), ("needs_an_argument", "argument")])
def test_a_factory_that_raises_is_one_line_with_its_reason(factories, capsys, name, words):
    assert words in refused(capsys, "explain", f"{factories}:{name}", "--input", "3")


def test_a_name_that_the_module_lacks_names_the_closest(factories, capsys):
    assert "Did you mean 'conv_bn'?" in refused(capsys, "explain", f"{factories}:conv_nb", "--input", "3")


def test_inputs_that_the_model_does_not_take_are_blamed(factories, capsys):
    error = refused(capsys, "explain", f"{factories}:conv_bn", "--input", "1,4,8,8")
    assert "the model does not run on (1, 4, 8, 8) torch.float32" in error
    assert "3 channels" in error


def test_a_failure_of_ours_keeps_its_traceback(factories, monkeypatch):
    def fails(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr("fxpasses.api.explain", fails)
    with pytest.raises(ZeroDivisionError):
        cli.main(["explain", f"{factories}:relu", "--input", "3"])


@pytest.mark.parametrize("given", ["", "1,", "1x3", "-1,3", "1,3:", "1,3:float33", "1.5"])
def test_an_input_that_is_no_shape_is_refused(capsys, given):
    assert "--input" in misused(capsys, "explain", "timm:resnet18", f"--input={given}")


def test_explain_without_input_is_refused(capsys):
    assert "--input" in misused(capsys, "explain", "timm:resnet18")


def test_an_integer_dtype_for_weights_is_refused(factories, capsys):
    error = refused(capsys, "explain", f"{factories}:relu", "--input", "3", "--dtype", "int64")
    assert "floating" in error


def test_two_modes_or_two_outputs_at_once_are_refused(capsys):
    misused(capsys, "explain", "timm:resnet18", "--input", "3", "--train", "--full-train")
    misused(capsys, "explain", "timm:resnet18", "--input", "3", "--json", "--html", "page.html")


@pytest.mark.parametrize("given", ["0", "-1", "two"])
def test_threads_and_rounds_are_positive_numbers(capsys, given):
    assert "from 1 up" in misused(capsys, "demo", f"--threads={given}")
    assert "from 1 up" in misused(capsys, "demo", f"--rounds={given}")


@pytest.mark.full
def test_a_missing_compiler_is_one_line_that_says_what_to_install(tmp_path):
    environment = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "fxpasses", "demo", "--rounds", "2", "--threads", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "apt-get install g++" in result.stderr


# The demo's status and words -------------------------------------------------------------------------------


def test_the_demo_prints_its_result_as_json(capsys, monkeypatch):
    monkeypatch.setattr("fxpasses.cli.demonstration.run_demo", lambda *_: _result(error=1e-12))
    assert cli.main(["demo", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["applied"] == {"r": 2}
    assert data["right"] is True
    assert data["ratio_to_inductor"] == {"lower": 2.0, "median": 2.0, "upper": 2.0, "verdict": "faster"}


@pytest.mark.parametrize(("error", "status", "word"), [(1e-12, 0, "right"), (1e-6, 1, "WRONG")])
def test_a_wrong_result_is_exit_status_one(capsys, monkeypatch, error, status, word):
    monkeypatch.setattr("fxpasses.cli.demonstration.run_demo", lambda *_: _result(error))
    assert cli.main(["demo"]) == status
    assert word in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ((1.0, 1.0, 1.0), "stock inductor: 2.00x, faster"),
        ((4.0, 4.0, 4.0), "stock inductor: 0.50x, slower"),
        ((1.0, 2.0, 4.0), "stock inductor: 1.00x, inconclusive"),
    ],
)
def test_the_demo_claims_only_what_the_pairs_show(capsys, monkeypatch, ours, words):
    monkeypatch.setattr("fxpasses.cli.demonstration.run_demo", lambda *_: _result(1e-12, ours))
    cli.main(["demo"])
    out = capsys.readouterr().out
    assert words in out
    assert "memory kept for the backward pass: 0.50x" in out


def _result(error: float, ours: tuple[float, ...] = (1.0, 1.0, 1.0)):
    from fxpasses.cli.demonstration import Check, DemoResult, Timing

    report = fxpasses.Report(tuple(fxpasses.Remark("r", "applied", "applied", "m", f"n{i}") for i in (0, 1)))
    timings = {
        "eager": Timing((3.0, 3.0, 3.0), 300),
        "inductor": Timing((2.0, 2.0, 2.0), 200),
        "fxpasses": Timing(ours, 100),
    }
    return DemoResult(report, (Check("c", error, 1e-9),), timings, 1)
