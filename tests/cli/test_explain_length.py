"""What `fxpasses explain` prints of models of the field fits on a screen; its advice does what it says."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest
import torch

import fxpasses
from fxpasses import cli
from fxpasses.cli.model_specs import load_model

MODELS = {
    "timm:mobilenetv2_100": ("timm", ["--input", "1,3,224,224"]),
    "timm:resnet50": ("timm", ["--input", "1,3,224,224"]),
    "benchmarks.models.field:unet2d": ("diffusers", ["--input", "1,3,64,64", "--input", "1:int64"]),
}


@pytest.mark.parametrize(
    "mode",
    [[], ["--train"], pytest.param(["--full-train"], marks=pytest.mark.full)],
    ids=["inference", "train", "full"],
)
@pytest.mark.parametrize(
    "spec",
    [spec if spec.endswith("v2_100") else pytest.param(spec, marks=pytest.mark.full) for spec in MODELS],
)
def test_explain_of_a_model_of_the_field_fits_on_a_screen(spec, mode, capsys):
    package, inputs = MODELS[spec]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    assert cli.main(["explain", spec, *inputs, *mode]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 25, out
    assert "__dict__" not in out


def test_all_has_every_site(capsys):
    assert cli.main(["explain", "timm:mobilenetv2_100", "--input", "1,3,64,64", "--all"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^efficient_conv_bn_eval +declined +live-weights", out, re.MULTILINE)) == 52


def test_the_option_that_explain_says_would_fold_52_norms_folds_them(capsys):
    cli.main(["explain", "timm:mobilenetv2_100", "--input", "1,3,64,64"])
    out = capsys.readouterr().out
    tried = re.search(r"^tried: (\w+)=(\S+) applies at (\d+) sites more \((\w+) (\d+)\)", out, re.MULTILINE)
    assert tried is not None, out
    option, value, count, rule, _ = tried.groups()
    assert (rule, count) == ("efficient_conv_bn_eval", "52")
    assert out.splitlines().index(tried.string[tried.start() :].splitlines()[0]) <= 3
    model, x = load_model("timm:mobilenetv2_100").eval(), torch.randn(1, 3, 64, 64)
    options = {option: ast.literal_eval(value), "inner": "aot_eager"}
    with torch.no_grad():
        found = torch.compile(model, backend="fxpasses", options=options)(x)
        torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)
    assert fxpasses.last_report().applied == {rule: int(count)}
    assert (fxpasses.last_report().norms, fxpasses.last_report().norms_left) == (52, 0)
