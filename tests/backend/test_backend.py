"""The door: options, modes and inner backends reach where they should, and caches keep working."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import run_and_get_code

import fxpasses
from fxpasses.backend.door import backend
from fxpasses.errors import UnknownOptionError
from fxpasses.testing import expect

RULE = "efficient_conv_bn_eval"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


X = torch.randn(2, 3, 8, 8)


def test_the_entry_point_names_the_backend():
    (found,) = [each for each in entry_points(group="torch_dynamo_backends") if each.name == "fxpasses"]
    assert found.load() is backend


@pytest.mark.parametrize("given", ["fxpasses", backend, fxpasses.backend], ids=["name", "function", "module"])
def test_every_way_to_name_the_backend_runs_inductor_behind_it(given):
    model = net()
    with expect(efficient_conv_bn_eval=1):
        result = torch.compile(model, backend=given)(X)
    torch.testing.assert_close(result, model(X))


def test_counts_are_mirrored_where_users_of_inductor_look():
    from torch._dynamo.utils import counters

    torch.compile(net(), backend="fxpasses", options={"inner": "eager"})(X)
    assert counters["fxpasses"] == {RULE: 1}
    fxpasses.reset()
    assert counters["fxpasses"] == {}
    assert fxpasses.reports() == ()
    assert fxpasses.last_report() is None


def test_each_compilation_adds_a_report():
    for size in (8, 9):
        torch._dynamo.reset()
        torch.compile(net(), backend="fxpasses", options={"inner": "eager"})(torch.randn(2, 3, size, size))
    assert [dict(each.applied) for each in fxpasses.reports()] == [{RULE: 1}, {RULE: 1}]
    assert fxpasses.last_report() is fxpasses.reports()[-1]


def _handed_over(**arguments):
    """The configuration under which inductor's graph is compiled."""
    seen = {}

    def spy(graph):
        from torch._inductor import config

        seen["max_autotune"] = config.max_autotune
        seen["epilogue_fusion"] = config.epilogue_fusion

    settings = {"joint_custom_post_pass": spy, "force_disable_caches": True}
    options = arguments.setdefault("options", {})
    options["inductor"] = {**options.get("inductor", {}), **settings}
    backend(*_graph(), **arguments)(X)
    return seen


def _graph():
    captured = []

    def capture(gm, inputs):
        captured.append((gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(lambda x: torch.relu(x + 1) @ x.transpose(-1, -2), backend=capture)(X)
    return captured[0]


@pytest.mark.usefixtures("no_code")
def test_mode_reaches_inductor():
    with torch.no_grad():
        assert _handed_over()["max_autotune"] is False
        assert _handed_over(mode="max-autotune-no-cudagraphs")["max_autotune"] is True


@pytest.mark.usefixtures("no_code")
def test_settings_of_inductor_reach_it_unchanged_and_stay_local():
    from torch._inductor import config

    before = config.epilogue_fusion
    with torch.no_grad():
        seen = _handed_over(options={"inductor": {"epilogue_fusion": not before}})
    assert seen["epilogue_fusion"] is not before
    assert config.epilogue_fusion is before


def test_mode_of_torch_compile_is_accepted():
    model = net()
    with expect(efficient_conv_bn_eval=1):
        result = torch.compile(model, backend="fxpasses", mode="reduce-overhead")(X)
    torch.testing.assert_close(result, model(X))


def test_options_may_be_an_options_object():
    options = fxpasses.Options(inner="eager", disable=(RULE,))
    with expect(efficient_conv_bn_eval=0):
        torch.compile(net(), backend="fxpasses", options=options)(X)
    assert fxpasses.last_report().remarks == ()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_inner_backends_by_name(inner):
    model = net()
    with expect(efficient_conv_bn_eval=1):
        result = torch.compile(model, backend="fxpasses", options={"inner": inner})(X)
    torch.testing.assert_close(result, model(X))


def test_an_inner_backend_may_be_a_callable_and_sees_the_rewritten_graph():
    seen = []

    def inner(gm, inputs):
        seen.append([node.target for node in gm.graph.nodes])
        return gm.forward

    torch.compile(net(), backend="fxpasses", options={"inner": inner})(X)
    assert torch.conv2d in seen[0]
    assert torch.nn.functional.batch_norm not in seen[0]


def test_the_graph_that_dynamo_hands_over_is_not_changed():
    seen = []

    def watching(gm, inputs):
        before = gm.print_readable(print_output=False), [copy.copy(node.meta) for node in gm.graph.nodes]
        compiled = backend(gm, inputs, options={"inner": "eager"})
        after = gm.print_readable(print_output=False), [node.meta for node in gm.graph.nodes]
        seen.append(before == after)
        return compiled

    with expect(efficient_conv_bn_eval=1):
        torch.compile(net(), backend=watching)(X)
    assert seen == [True]


def test_an_unknown_option_is_an_error_that_names_the_closest():
    with pytest.raises(BackendCompilerFailed, match="Did you mean 'inner'"):
        torch.compile(net(), backend="fxpasses", options={"iner": "eager"})(X)
    with pytest.raises(ValueError, match="Valid: disable, guards, inductor, inner"):
        fxpasses.optimize(torch.fx.symbolic_trace(net()), (X,), options={"iner": "eager"})
    assert fxpasses.reports() == ()


def test_a_setting_of_inductor_among_the_options_says_where_it_belongs():
    with pytest.raises(UnknownOptionError, match=r"options=\{'inductor': \{'max_autotune'"):
        fxpasses.Options.of({"max_autotune": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "channels_lost"}, "channels_last"),
        ({"passes": ("efficient_conv_bn",)}, RULE),
        ({"disable": ("efficient_conv_bn",)}, RULE),
        ({"limit": -1}, "from 0 up"),
        ({"inner": "inducter"}, "inductor"),
        ({"inductor": 3}, "mapping"),
        ({"inner": 3}, "callable"),
        ({"passes": 3}, "names of passes"),
    ],
)
def test_bad_values_are_errors_that_name_what_is_valid(options, message):
    with pytest.raises((ValueError, BackendCompilerFailed), match=message):
        torch.compile(net(), backend="fxpasses", options=options)(X)
    assert fxpasses.reports() == ()


def test_a_mode_for_an_inner_backend_that_has_none_is_an_error():
    with pytest.raises(BackendCompilerFailed, match="mode='max-autotune' is for inductor"):
        torch.compile(
            net(), backend=lambda g, i: backend(g, i, options={"inner": "eager"}, mode="max-autotune")
        )(X)


def test_an_unknown_mode_is_an_error():
    gm, inputs = _graph()
    with pytest.raises(UnknownOptionError, match="max-autotune"):
        backend(gm, inputs, mode="max-autotone")


def test_the_limit_stops_after_so_many_rewrites():
    model = nn.Sequential(net(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    torch.compile(model, backend="fxpasses", options={"inner": "eager", "limit": 1})(X)
    assert [each.code for each in fxpasses.last_report().remarks] == ["applied", "limit"]


def test_where_nothing_is_rewritten_the_code_is_stock_inductors():
    """So it is as fast. A rewrite shows in the code, or the comparison would see nothing."""

    def code_of(**given: object) -> str:
        torch.compiler.reset()
        with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
            _, code = run_and_get_code(torch.compile(net(), **given), X)
        lines = "\n".join(code).splitlines()
        return "\n".join(line for line in lines if not line.startswith("# AOT ID"))  # counts compilations

    stock = code_of()
    assert "cpp_fused" in stock
    with expect(efficient_conv_bn_eval=0):
        assert code_of(backend="fxpasses") == stock
    with expect(efficient_conv_bn_eval=1):
        assert code_of(backend="fxpasses", options={"profit": "always"}) != stock


@pytest.mark.parametrize("dynamic", [True, False])
def test_other_batch_sizes_are_right(dynamic):
    model = net().double()
    compiled = torch.compile(model, backend="fxpasses", dynamic=dynamic, options={"inner": "aot_eager"})
    for batch in (2, 5, 1):
        x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", ["live", pytest.param("cached", marks=pytest.mark.full)])
def test_other_sizes_are_right_where_inductor_writes_its_wrapper_in_cpp(weights):
    """Inductor took our graph for an exported one, whose symbolic sizes are no inputs."""
    model, settings = net(), {"cpp_wrapper": True, "cpp_cache_precompile_headers": False}
    options = {"weights": weights, "inductor": settings}
    compiled = torch.compile(model, backend="fxpasses", dynamic=True, options=options)
    for batch, size in ((2, 8), (5, 10)):
        x = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_importing_the_package_imports_neither_dynamo_nor_inductor():
    code = (
        "import sys, torch; before = set(sys.modules); import fxpasses; "
        "new = set(sys.modules) - before; "
        "heavy = ('torch._dynamo', 'torch._inductor', 'networkx', 'sympy', 'rich'); "
        "print(sorted(each for each in new if each.startswith(heavy)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
