"""Rules that other packages bring by entry points: with wheels that are built and installed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "{version}"

[project.entry-points."fxpasses.rules"]
{entries}

[tool.setuptools]
py-modules = ["{module}"]
"""

ALGEBRA = '''
"""Two rules: one made of functions, one as a class."""

import torch

import fxpasses


@fxpasses.rewrite(name="double_negation", examples=(torch.randn(2, 3),))
class DoubleNegation:
    """Two negations are none."""

    def pattern(x):
        return torch.neg(torch.neg(x))

    def replacement(x):
        return x


class LogSoftmax(fxpasses.Rule):
    """log(softmax(x)) becomes log_softmax(x)."""

    name = "log_softmax"
    pattern_size = 2

    @property
    def is_anchor(self):
        return lambda node: node.target is torch.log

    def match(self, node, context):
        softmax = node.args[0]
        return fxpasses.Match(context, (softmax, node)) if softmax.target is torch.softmax else None

    def legality(self, match):
        softmax = match.nodes[0]
        return fxpasses.Decline("multiple-users", "it is read", softmax) if len(softmax.users) > 1 else None

    def insertion_point(self, match):
        return match.result

    def rewrite(self, match, build):
        return build.call(torch.log_softmax, match.nodes[0].args)

    def specimens(self):
        from hypothesis import strategies

        return strategies.booleans().map(specimen)


class Model(torch.nn.Module):
    def __init__(self, again):
        super().__init__()
        self.again = again

    def forward(self, x):
        shares = torch.softmax(x, 1)
        return torch.log(shares) + shares if self.again else torch.log(shares)


def specimen(again):
    from fxpasses.testing import Specimen

    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    code = "multiple-users" if again else None
    levels = ("torch", "symbolic_trace")
    return Specimen(str(again), Model(again), (x,), count=int(not again), code=code, levels=levels)


def rules():
    return [DoubleNegation]
'''

BROKEN = """
import fxpasses

def two_of_a_name():
    group = fxpasses.GraphPass("fine", lambda *_: fxpasses.Outcome())
    return [group, fxpasses.GraphPass("double_negation", lambda *_: fxpasses.Outcome())]

numbers = [1, 2]

def fails():
    raise OSError("no such weather")
"""

USE = """
import json, sys, warnings
import torch, fxpasses

def function(x):
    return torch.log(torch.softmax(-(-x.exp()), 1))

x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    compiled = torch.compile(function, backend="fxpasses", options={"inner": "eager"})
    torch.testing.assert_close(compiled(x), function(x))
    again = fxpasses.explain(function, x, options={"disable": "layout"})
report = fxpasses.last_report()
told = {"applied": dict(report.applied), "rules": report.rules}
told["warnings"] = [str(each.message) for each in caught if "fxpasses.rules" in str(each.message)]
if report.applied:
    with fxpasses.testing.expect(double_negation=0):
        options = {"inner": "eager", "disable": "double_negation"}
        torch.compile(function, backend="fxpasses", options=options)(x)
    rules = ("double_negation", "log_softmax")
    told["fuzzed"] = [fxpasses.testing.fuzz(rule, examples=2, levels=["torch", "export"]) for rule in rules]
print(json.dumps(told))
"""


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def pip(python: Path, *arguments: str) -> None:
    """Has pip work on another environment, which need not have it."""
    subprocess.run([*PIP, "--python", str(python), *arguments], check=True, capture_output=True)


def installed(python: Path, work: Path, name: str, version: str, source: str, *entries: str) -> None:
    """Builds a wheel of one module and installs it into an environment."""
    module = name.replace("-", "_")
    project = work / name
    project.mkdir()
    text = PYPROJECT.format(name=name, version=version, module=module, entries="\n".join(entries))
    (project / "pyproject.toml").write_text(text)
    (project / f"{module}.py").write_text(source)
    alone = ("--no-deps", "--no-index")
    build = ("wheel", "--no-build-isolation", *alone, "--wheel-dir", str(work), str(project))
    subprocess.run([*PIP, *build], check=True, capture_output=True)
    (wheel,) = work.glob(f"{module}-*.whl")
    pip(python, "install", *alone, str(wheel))


def run(python: Path, *arguments: str) -> str:
    """What a process of an environment prints, which finds our packages behind its own."""
    paths = (str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
    command = [str(python), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=python.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def used(python: Path) -> dict[str, object]:
    return json.loads(run(python, "-c", USE).splitlines()[-1])


@pytest.fixture
def python(tmp_path):
    """The Python of an environment with two rules of another package."""
    venv.create(tmp_path / "environment", with_pip=False, symlinks=True)
    python = tmp_path / "environment" / "bin" / "python"
    entries = ('functions = "fxpasses_algebra:rules"', 'classes = "fxpasses_algebra:LogSoftmax"')
    installed(python, tmp_path, "fxpasses-algebra", "1.2", ALGEBRA, *entries)
    return python


def test_an_installed_package_s_rules_fire_count_are_listed_and_fuzzed_and_vanish(python):
    told = used(python)
    assert told["applied"] == {"log_softmax": 1, "double_negation": 1}
    assert told["rules"][-3:] == ["log_softmax", "double_negation", "layout"]
    assert min(told["fuzzed"]) >= 4
    assert told["warnings"] == []
    listed = {line.split()[0]: line for line in run(python, "-m", "fxpasses", "rules").splitlines() if line}
    assert "fxpasses-algebra 1.2" in listed["double_negation"]
    assert "Two negations are none." in listed["double_negation"]
    assert "log(softmax(x)) becomes" in listed["log_softmax"]
    assert "fxpasses-algebra" not in listed["efficient_conv_bn_eval"]
    pip(python, "uninstall", "--yes", "fxpasses-algebra")
    told = used(python)
    assert told["applied"] == {}
    assert {"double_negation", "log_softmax"}.isdisjoint(told["rules"])
    assert "algebra" not in run(python, "-m", "fxpasses", "rules")


@pytest.mark.full
def test_a_broken_package_is_named_and_skipped_with_all_of_its_entry(python, tmp_path):
    entries = [f'{name} = "zzz_broken:{name}"' for name in ("two_of_a_name", "numbers", "fails", "missing")]
    installed(python, tmp_path, "zzz-broken", "0.1", BROKEN, *entries)
    told = used(python)
    assert told["applied"] == {"log_softmax": 1, "double_negation": 1}
    assert "fine" not in told["rules"]
    reasons = (
        "OSError: no such weather",
        "AttributeError",
        "TypeError: it should give rules",
        "registered already",
    )
    assert len(told["warnings"]) == len(reasons)
    for warning, name, reason in zip(
        told["warnings"], ("fails", "missing", "numbers", "two_of_a_name"), reasons, strict=True
    ):
        assert f"the entry point '{name}' of zzz-broken 0.1" in warning
        assert reason in warning
