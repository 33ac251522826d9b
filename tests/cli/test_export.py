"""`fxpasses export`: a file that runs without fxpasses, and errors that cost no minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxpasses.cli import main
from tests.helpers import randomised


class Small(nn.Sequential):
    """A convolution, a norm that is no identity, and a pooling; whoever builds it seeds its weights."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        randomised(self, torch.float32)


class Branching(nn.Module):
    """A model that runs and that torch.export cannot capture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


SPEC = ("tests.cli.test_export:Small", "--input", "2,3,16,16")
X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)

WITHOUT_US = """
import sys, torch
read, file, x, result = sys.argv[1:]
model = torch._inductor.aoti_load_package(file) if read == "aoti" else torch.export.load(file).module()
torch.save(model(torch.load(x)), result)
assert not any(name.split(".")[0] == "fxpasses" for name in sys.modules)
"""


def expected(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the model gives that the command builds: its weights are drawn after seed 0."""
    torch.manual_seed(0)
    model = Small().to(dtype).eval()
    with torch.no_grad():
        return model(X.to(dtype))


@pytest.mark.parametrize("way", ["save", pytest.param("aoti", marks=pytest.mark.full)])
def test_the_file_runs_in_a_process_without_fxpasses(way, tmp_path, capsys):
    file = tmp_path / "small.pt2"
    assert main(["export", *SPEC, "-o", str(file), *(["--aoti"] if way == "aoti" else [])]) == 0
    out = capsys.readouterr().out
    assert "efficient_conv_bn_eval" in out
    assert "2 constants baked" in out
    assert str(file) in out
    torch.save(X, tmp_path / "x.pt")
    script = tmp_path / "run.py"
    script.write_text(WITHOUT_US)
    paths = [str(tmp_path / name) for name in ("small.pt2", "x.pt", "result.pt")]
    subprocess.run([sys.executable, str(script), way, *paths], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "result.pt"), expected(), rtol=1e-4, atol=1e-5)


def test_options_and_dtype_reach_the_program(tmp_path, capsys):
    file = tmp_path / "small.pt2"
    options = ["--dtype", "float64", "--options", "weights=live", "disable=efficient_conv_bn_eval"]
    assert main(["export", *SPEC, "-o", str(file), *options]) == 0
    assert "nothing was baked" in capsys.readouterr().out
    program = torch.export.load(file)
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X.double()), expected(torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*SPEC, "-o", "small.onnx"), ".pt2"),
        ((*SPEC, "-o", "nowhere/small.pt2"), "no directory"),
        ((*SPEC[:2], "2,4,16,16", "-o", "small.pt2"), "does not run on (2, 4, 16, 16)"),
        (("tests.cli.test_export:Branching", "--input", "2", "-o", "small.pt2"), "cannot capture"),
        ((*SPEC, "-o", "small.pt2", "--options", "weights=cached"), "torch.compile"),
        ((*SPEC, "-o", "small.pt2", "--dtype", "int64"), "floating"),
    ],
)
def test_an_error_is_one_line_and_no_file_is_written(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    *_, found = capsys.readouterr().err.splitlines()  # torch.export may print before
    assert found.startswith("fxpasses: error: ")
    assert said in found
    assert not list(tmp_path.iterdir())


def test_a_model_in_training_cannot_be_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["export", *SPEC, "-o", "small.pt2", "--full-train"])
    assert "--full-train" in capsys.readouterr().err
