"""Examples of reason codes are true: declined as they stand, rewritten after the edit, wrong when forced."""

from __future__ import annotations

import itertools
import os
import secrets
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch._inductor.cpu_vec_isa import valid_vec_isa_list
from torch._inductor.runtime.cache_dir_utils import cache_dir

import fxpasses
from fxpasses.kernels import choice
from fxpasses.passes.precision import legality
from fxpasses.report.codes import CODES
from fxpasses.report.examples import EXAMPLES
from fxpasses.report.examples.example import PRELUDE, Example
from fxpasses.rewrite.registry import REGISTRY

_COUNT = itertools.count()
"""Dynamo remembers modules by name."""

NUMBERED = [code for code, example in EXAMPLES.items() if example.number is not None]


def test_every_code_has_an_example():
    assert set(EXAMPLES) == set(CODES)


@pytest.fixture(scope="module")
def width():
    """Of images that no cache knows yet."""
    return 9 + secrets.randbelow(2000)


@pytest.fixture(scope="module")
def told_elsewhere(width):
    """What a process for other vectors reports of the model that two examples share."""
    script = f"{PRELUDE}{of_width(EXAMPLES['no-kernels'].script(), width)}print(report.to_json())\n"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default", "TORCHINDUCTOR_CACHE_DIR": cache_dir()},
        check=True,
        capture_output=True,
        text=True,
    )
    return fxpasses.Report.from_json(done.stdout)


def of_width(script: str, width: int) -> str:
    return script.replace("8, 8)", f"8, {width})")


@pytest.fixture
def own_caches(tmp_path, monkeypatch):
    """Folders that the test may leave as it likes."""
    valid_vec_isa_list()  # takes half a minute where no cache has it
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path / "profiles"))


@pytest.fixture
def _onednn_is_faster(own_caches, monkeypatch):
    monkeypatch.setattr(choice, "_medians", lambda calls, copies: [1e-6, *[1.0] * (len(calls) - 1)])


@pytest.fixture
def _slow_in_bfloat16(monkeypatch):
    monkeypatch.setattr(legality, "multiplies_fast", lambda device: False)


SURROUNDINGS = {
    "no-record": "own_caches",
    "other-kernels": "own_caches",
    "not-faster": "_onednn_is_faster",
    "slow-precision": "_slow_in_bfloat16",
}
"""Fixtures that make it so on the machine as an example says."""


@pytest.fixture(autouse=True)
def _surroundings(request):
    code = request.node.callspec.params.get("code") if hasattr(request.node, "callspec") else None
    if code in SURROUNDINGS:
        request.getfixturevalue(SURROUNDINGS[code])


def in_module(script: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """What a script defines, as a module that Dynamo can import."""
    torch.compiler.reset()
    module = types.ModuleType(f"an_example_{next(_COUNT)}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(PRELUDE + script, vars(module))
    return module


def codes_of(report: fxpasses.Report, example: Example) -> set[str]:
    return {remark.code for remark in report.declined if remark.rule == example.rule}


def fired(example: Example, names: dict[str, Any]) -> bool:
    return bool(eval(example.fires or f"report.applied.get({example.rule!r})", names))


def marks(code: str) -> list[pytest.MarkDecorator]:
    found = []
    if EXAMPLES[code].rule == "own_kernels" or code == "other-kernels":
        found.append(pytest.mark.needs_kernels)
    if code in AT_LENGTH:
        found.append(pytest.mark.full)
    if code == "symbolic-strides" and torch.__version__ >= "2.15":
        found.append(pytest.mark.skip(reason=f"the example is one {EXAMPLES[code].where}"))
    return found


AT_LENGTH = ("symbolic-strides", "taken-over")
"""Examples for which code is generated."""

OF_TWO_PROCESSES = ("no-kernels", "other-kernels")
CASES = [pytest.param(code, marks=marks(code)) for code in EXAMPLES]


@pytest.mark.parametrize("code", [case for case in CASES if case.values[0] not in OF_TWO_PROCESSES])
def test_an_example_is_declined_with_its_code_as_it_stands(code, monkeypatch):
    example = EXAMPLES[code]
    names = vars(in_module(example.script(), monkeypatch))
    assert code in codes_of(names["report"], example), names["report"].remarks
    assert not fired(example, names)


@pytest.mark.full
@pytest.mark.needs_kernels
def test_the_examples_of_another_cpu_are_declined_with_their_codes(told_elsewhere, width, monkeypatch):
    assert "no-kernels" in codes_of(told_elsewhere, EXAMPLES["no-kernels"])
    assert not fired(EXAMPLES["no-kernels"], {"report": told_elsewhere})
    example = EXAMPLES["other-kernels"]
    names = vars(in_module(of_width(example.script(), width), monkeypatch))
    assert "other-kernels" in codes_of(names["report"], example)
    assert not fired(example, names)


@pytest.mark.parametrize("code", CASES)
def test_an_example_is_rewritten_after_the_edit(code, monkeypatch):
    example = EXAMPLES[code]
    names = vars(in_module(example.script(edited=True), monkeypatch))
    assert fired(example, names), names["report"].remarks
    assert code not in codes_of(names["report"], example)


@pytest.mark.parametrize("code", NUMBERED)
def test_an_example_with_a_number_is_wrong_by_it_when_the_refusal_is_overridden(code, monkeypatch):
    example = EXAMPLES[code]
    names, number = vars(in_module(example.source, monkeypatch)), example.number
    with torch.set_grad_enabled(example.grad):
        assert float(eval(number.expression, names)) == pytest.approx(float(number.eager), nan_ok=True)
        options = {**eval(example.options, names), "inner": "eager", "passes": example.rule}
        rules = [rule for group in REGISTRY.pipeline(fxpasses.Options.of(options)) for rule in group.rules]
        (rule,) = [rule for rule in rules if rule.name == example.rule]
        monkeypatch.setattr(type(rule), "legality", lambda self, match: None)
        monkeypatch.setattr(type(rule), "insertion_point", lambda self, match: match.result)
        forced = torch.compile(names["model"], backend="fxpasses", options=options)
        names["model"] = forced
        assert float(eval(number.expression, names)) == pytest.approx(float(number.rewritten), nan_ok=True)
    assert fxpasses.last_report().applied == {example.rule: 1}


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_is_printed_as_a_script_whose_edit_is_marked(code):
    lines = EXAMPLES[code].lines()
    edit = [line for line in lines if line[:2] in ("+ ", "- ")]
    assert edit
    assert len(lines) <= 26
    old = "\n".join(line[2:] for line in lines if line[:2] in ("  ", "- ") and line[2:3] != "#")
    compile(PRELUDE + old, code, "exec")
