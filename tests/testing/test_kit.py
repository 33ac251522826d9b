"""The testing kit: it passes what is right, and fails what is wrong."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import RULE, image, pair
from torch import nn

from fxpasses.errors import FxpassesError
from fxpasses.rewrite.declarative_rule import DeclarativeRule
from fxpasses.testing import (
    Specimen,
    assert_declines,
    check_specimen,
    fuzz,
    matrix,
    registered,
    strategies,
)
from fxpasses.testing.captures import capture, rewrite_at
from fxpasses.torch_internals.tracing import run_default_decompositions
from tests.rewrite.planted import SoftmaxRule, by_hand
from tests.rewrite.test_declarative import AFFINE, NEGATION, RMS, SCALED, rms


def sequence(rows):
    """Softmax that comes out right only for square inputs, by coincidence of the axes' sizes."""
    return DeclarativeRule(
        "tested",
        lambda x: torch.softmax(x, 1) * 2,
        lambda x: torch.softmax(x, rows) * 2,
        (torch.randn(3, 3),),
    )


@pytest.mark.parametrize("made", [NEGATION, RMS, AFFINE, SCALED])
def test_declarative_rules_are_fuzzed_by_one_line(made):
    assert fuzz(made, examples=8, levels=("torch", "symbolic_trace")) >= 2 * 6


def test_every_near_miss_of_a_declarative_rule_is_drawn():
    seen = set()
    specimens = strategies.around(RMS).map(lambda specimen: seen.add(specimen.label) or specimen)
    fuzz(RMS, specimens, examples=80, levels=["symbolic_trace"])
    assert seen == {"plain", "symbolic", "float32", "mixed-dtypes", "extra-user", "written"}


def test_fuzzing_finds_a_rule_that_ignores_promotion():
    class Careless(DeclarativeRule):
        def _promotion(self, match):
            return None

    example = tuple(AFFINE.examples[0].values())
    made = Careless("tested", AFFINE.pattern, AFFINE.replacement, example, check=AFFINE.check)
    with pytest.raises((AssertionError, RuntimeError), match=r"mixed-dtypes|same dtype"):
        fuzz(made, examples=80, levels=["symbolic_trace"])


def test_fuzzing_finds_a_wrong_axis():
    with pytest.raises(AssertionError, match="off, relative"):
        fuzz(sequence(0), examples=10, levels=["symbolic_trace"])
    assert fuzz(sequence(1), examples=10, levels=["symbolic_trace"]) > 0


def test_fuzzing_finds_a_rule_that_ignores_other_readers():
    class Careless(DeclarativeRule):
        def legality(self, match):
            return None

    made = Careless("tested", lambda x: (x * 2).exp(), lambda x: (x + x).exp(), (torch.randn(3, 3),))
    with pytest.raises(AssertionError, match="extra-user"):
        fuzz(made, examples=30, levels=["symbolic_trace"])


def test_a_rule_without_a_strategy_needs_specimens():
    with pytest.raises(FxpassesError, match="give `specimens`"):
        fuzz(SoftmaxRule(by_hand))


def test_a_specimen_s_expectations_are_held():
    model, inputs = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (image(),)
    check_specimen(RULE, Specimen("pair", model, inputs, count=1), "torch")
    with pytest.raises(AssertionError, match="1 applications, 0 expected"):
        check_specimen(RULE, Specimen("pair", model, inputs, count=0), "torch")
    with pytest.raises(AssertionError, match="no site declined with 'mutation'"):
        check_specimen(RULE, Specimen("pair", model, inputs, code="mutation"), "torch")


def test_symbolic_sizes_are_rewritten_too():
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    check_specimen(RULE, Specimen("pair", model, (image(),), count=1), "torch", dynamic=True)


@pytest.mark.parametrize("level", ["pre_dispatch", "export", "aten"])
def test_sizes_are_symbols_where_they_shall_be(level):
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for dynamic in (False, True):
        graph = capture(level, model, (image(),), dynamic=dynamic).graph
        sizes = [size for node in graph.find_nodes(op="placeholder") for size in node.meta["val"].shape]
        assert any(isinstance(size, torch.SymInt) for size in sizes) == dynamic


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_aten_level_is_what_run_decompositions_makes(dynamic):
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Upsample(scale_factor=2), nn.Hardswish())
    model = nn.Sequential(*layers, nn.Flatten(2), nn.Linear(144, 6), nn.RMSNorm(6), nn.Softmax(1)).eval()
    exported = capture("export", model, (image(dtype=torch.float32),), dynamic=dynamic)
    found, expected = run_default_decompositions(exported), exported.run_decompositions()
    written, wanted = (
        [(node.op, node.target, str(node.meta.get("val"))) for node in program.graph.nodes]
        for program in (found, expected)
    )
    assert written == wanted
    assert (found.graph_signature, found.range_constraints) == (
        expected.graph_signature,
        expected.range_constraints,
    )
    assert torch.ops.aten.linear.default not in {node.target for node in found.graph.nodes}


def test_a_capture_leaves_the_model_s_state_as_it_was():
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rewritten = rewrite_at("torch", model, (image(),))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    rewritten.call(image())
    assert model[1].num_batches_tracked == 1


def test_a_specimen_may_expect_another_code_at_each_level():
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    specimen = Specimen("pair", model, (image(),), 0, {"export": "training-mode"}, grads=False)
    check_specimen(RULE, specimen, "export")
    check_specimen(RULE, specimen, "aten")
    with pytest.raises(AssertionError, match="no site declined with 'mutation'"):
        check_specimen(RULE, replace(specimen, code={"export": "mutation"}), "export")


def test_a_specimen_may_expect_another_count_at_each_level():
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    specimen = Specimen("pair", model, (image(),), count={"torch": 1, "symbolic_trace": 0})
    check_specimen(RULE, specimen, "torch")
    check_specimen(RULE, specimen, "pre_dispatch")
    with pytest.raises(AssertionError, match="1 applications, 0 expected"):
        check_specimen(RULE, specimen, "symbolic_trace")


def test_assert_declines_wants_the_code():
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    options = {"inner": "eager"}
    assert_declines(model, (image(),), RULE, code="training-mode", options=options)
    with pytest.raises(AssertionError, match="no site was declined with 'mutation'"):
        assert_declines(model, (image(),), RULE, code="mutation", options=options)
    with pytest.raises(AssertionError, match="expected 0 applications, found 1"):
        assert_declines(model.eval(), (image(),), RULE, code="mutation", options=options)


class Model(nn.Module):
    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.held = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x):
        return self.function(x.sin(), *self.held).cos()


def test_the_tutorial_s_rules_fire_at_every_level():
    x = (torch.randn(3, 8),)
    spellings = {
        NEGATION: {
            "operator": (Model(lambda x: -(x.neg())), x),
            "method": (Model(lambda x: x.neg().neg()), x),
        },
        RMS: {
            "operator": (Model(lambda x, w: rms(x, w, 1e-5), 8), x),
            "swapped": (Model(lambda x, w: w * (torch.rsqrt((x**2).mean(1, True) + 1e-5) * x), 8), x),
        },
        AFFINE: {
            "operator": (Model(lambda x, w, b: x @ w + b, (8, 8), 8), x),
            "function": (Model(lambda x, w, b: torch.add(b, torch.matmul(x, w)), (8, 8), 8), x),
        },
    }
    for rule, models in spellings.items():
        found = matrix(rule, models)
        print(found)
        assert found.complete, f"\n{found}"
    other = matrix(SCALED, {"without alpha": (Model(lambda x, y: x.add(y), (3, 8)), x)}, ["torch", "aten"])
    assert not other.complete
    assert str(other).splitlines()[1].split() == ["without", "alpha", "other-constant", "other-constant"]


def test_registered_takes_rules_out_again():
    from fxpasses.rewrite.registry import REGISTRY

    inside = []
    with contextlib.suppress(ZeroDivisionError), registered(NEGATION):
        inside = REGISTRY.names()
        raise ZeroDivisionError
    assert "tested" in inside
    assert "tested" not in REGISTRY.names()


PLUGIN_TEST = """
import sys

def test_torch_is_not_imported_by_the_plugin():
    assert "fxpasses.pytest_plugin" in sys.modules
    assert "torch" not in sys.modules

def test_the_fixtures_count(fxpasses_expect, fxpasses_registered):
    import torch
    from tests.rewrite.planted import SoftmaxRule, by_hand
    fxpasses_registered(SoftmaxRule(by_hand))
    with fxpasses_expect(softmax_rule=1):
        options = {"inner": "eager", "passes": "softmax_rule"}
        torch.compile(lambda x: torch.softmax(x, 1), backend="fxpasses", options=options)(torch.randn(2, 2))

def test_the_rule_is_gone_afterwards():
    from fxpasses.rewrite.registry import REGISTRY
    assert "softmax_rule" not in REGISTRY.names()
"""


def test_the_plugin_s_fixtures_work_and_import_torch_late(tmp_path, request, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_it.py").write_text(PLUGIN_TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fxpasses.pytest_plugin", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "3 passed" in done.stdout, done.stdout


@pytest.mark.full
def test_the_kit_works_without_hypothesis_which_only_fuzz_needs():
    script = """
import sys
sys.modules["hypothesis"] = None  # as if it were not installed
import torch, fxpasses.testing
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
counts, options = {"efficient_conv_bn_eval": 1}, {"inner": "eager", "profit": "always"}
fxpasses.testing.assert_rewrites(model, (torch.randn(1, 3, 4, 4),), counts, grads=False, options=options)
try:
    fxpasses.testing.fuzz("efficient_conv_bn_eval")
except ImportError as error:
    print(error.name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["hypothesis"], done.stderr
