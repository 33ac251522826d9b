"""Configurations of the operator benchmark: what a name stands for, and the settings that may follow it."""

from __future__ import annotations

import importlib.machinery
import importlib.util

import pytest
import torch
from operator_compilers import eager_graph

from benchmarks.operators.call import RepeatableCall
from benchmarks.operators.configurations import (
    CONFIGURATIONS,
    Backend,
    ConfigurationError,
    Inductor,
    parse_configurations,
)
from benchmarks.torch_internals import inductor_setting_types
from fxpasses.errors import FxpassesError

aten = torch.ops.aten


def settings_of(text: str) -> dict[str, object]:
    """The settings of the only configuration that is named."""
    (configuration,) = parse_configurations(text).values()
    return dict(configuration.settings)


@pytest.mark.full
def test_every_configuration_compiles_a_graph():
    x = torch.randn(2, 3)
    for name, compiler in CONFIGURATIONS.items():
        call = RepeatableCall(aten.t.default, (x,), {})
        assert torch.equal(call.compiled(compiler, x.t()).results()[0], x.t()), name


@pytest.mark.parametrize(
    "text", ["reduce-overhead", "autotune", "one:cpp.threads=1", "fxpasses:cpp.threads=1"]
)
def test_a_configuration_computes_what_eager_does(text):
    x = torch.randn(33, 5)
    (compiler,) = parse_configurations(text).values()
    (result,) = RepeatableCall(aten.sigmoid.default, (x,), {}).compiled(compiler, x).results()
    torch.testing.assert_close(result, x.sigmoid())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_replayed_call_after_call(name):
    x = torch.randn(33, 5, device="cuda")
    call = RepeatableCall(aten.sigmoid.default, (x,), {}).compiled(CONFIGURATIONS[name], x)
    for _ in range(5):
        torch.testing.assert_close(call.results()[0], x.sigmoid())


def test_every_setting_of_a_configuration_is_one_of_inductor():
    for name, configuration in CONFIGURATIONS.items():
        if isinstance(configuration, Inductor):
            assert set(configuration.settings) <= set(inductor_setting_types()), name


def test_autotuning_is_everything_that_inductor_tunes():
    tuned = settings_of("autotune")
    assert tuned == settings_of("inductor-autotune")
    assert set(tuned) == {
        *("max_autotune", "max_autotune_pointwise", "max_autotune_gemm"),
        "coordinate_descent_tuning",
    }
    assert all(value is True for value in tuned.values())


# Settings.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("max_autotune=true", True),
        ("max_autotune=False", False),
        ("max-autotune=True", True),
        ("cpp.threads=2", 2),
        ("cpp.simdlen=none", None),
        ("cpp.simdlen=256", 256),
        ("max_autotune_gemm_backends=ATEN,CPP", "ATEN,CPP"),
        ("cpp.cxx=(None, 'g++')", (None, "g++")),
        ("cpu_backend=triton", "triton"),
        ("cpp.march=1", "1"),
    ],
)
def test_a_value_is_read_as_the_type_that_the_setting_has(text, value):
    (read,) = settings_of(f"inductor:{text}").values()
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["inductor", "mine", "fxpasses"])
def test_a_setting_reaches_inductor(text):
    x = torch.tensor([-1.0, 2.0])
    (compiler,) = parse_configurations(f"{text}:cpp.inject_relu_bug_TESTING_ONLY=accuracy").values()
    (result,) = RepeatableCall(aten.relu.default, (x,), {}).compiled(compiler, x).results()
    assert not torch.equal(result, x.relu())


def test_settings_are_added_to_those_that_a_configuration_has():
    settings = settings_of("inductor-nolayout:cpp.threads=2;max_autotune=true")
    assert settings == {"layout_optimization": False, "cpp.threads": 2, "max_autotune": True}
    assert settings_of("autotune:max_autotune_gemm=false")["max_autotune_gemm"] is False
    (configuration,) = parse_configurations("max-autotune:cpp.threads=2").values()
    assert configuration == Inductor({"cpp.threads": 2}, mode="max-autotune")


def test_results_name_a_configuration_as_it_was_written_or_by_the_name_it_was_given():
    text = "inductor,inductor:cpp.threads=2;max_autotune=true,mine:cpp.threads=1"
    assert list(parse_configurations(text, ["halved:cpp.simdlen=256"])) == [
        "inductor",
        "inductor:cpp.threads=2;max_autotune=true",
        "mine",
        "halved",
    ]


def test_fxpasses_takes_its_options_and_settings_of_inductor():
    (configuration,) = parse_configurations(
        "fxpasses:layout=off;disable=layout,conv_affine;limit=2;cpp.threads=2"
    ).values()
    assert configuration == Backend(
        "fxpasses",
        {
            "layout": "off",
            "disable": ("layout", "conv_affine"),
            "limit": 2,
            "inductor": {"cpp.threads": 2},
        },
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inductr", "Did you mean 'inductor'"),
        ("inductor:max_autotun=true", "Did you mean 'max_autotune'"),
        ("inductor:max_autotune=5", "takes bool; got '5'"),
        ("inductor:cpp.threads=true", "takes int; got 'true'"),
        ("inductor:cpu_backend=cuda", "got 'cuda'"),
        ("inductor:cpp.threads=2,aot_eagr", "takes int; got '2,aot_eagr'"),
        ("inductor:cpp.threads", "is not SETTING=VALUE"),
        ("inductor:", "is not SETTING=VALUE"),
        ("inductor:=2", "is not SETTING=VALUE"),
        ("inductor:cpp.threads=2;cpp.threads=1", "given twice"),
        ("inductor:cpp.threads=2,inductor:cpp.threads=2", "several different ones"),
        ("mine:cpp.threads=2,mine:cpp.threads=1", "several different ones"),
        ("aot_eager:cpp.threads=2", "takes no settings"),
        ("graph:cpp.threads=2", "takes no settings"),
        ("fxpasses:layout=of", "Did you mean 'off'"),
        ("fxpasses:layuot=off", "unknown setting"),
        ("fxpasses:inductor={}", "one by one"),
        ("", "name one configuration"),
    ],
)
def test_what_is_no_configuration_is_refused(monkeypatch, text, message):
    monkeypatch.setitem(CONFIGURATIONS, "graph", eager_graph)
    with pytest.raises(FxpassesError, match=message):
        parse_configurations(text)


# Halide.


@pytest.mark.parametrize("text", ["halide", "inductor:cpu_backend=halide", "mine:cuda_backend=halide"])
def test_without_its_bindings_halide_is_refused_with_what_to_do(monkeypatch, text):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="not installed here: pip install halide"):
        parse_configurations(text)
    assert list(parse_configurations("inductor")) == ["inductor"]


def test_with_its_bindings_halide_generates_the_code(monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, loader=None)
    )
    assert settings_of("halide") == {"cpu_backend": "halide", "cuda_backend": "halide"}


@pytest.mark.skipif(importlib.util.find_spec("halide") is None, reason="needs Halide's Python bindings")
def test_halide_computes_what_eager_does():
    x = torch.randn(8, 8)
    (compiler,) = parse_configurations("halide").values()
    (result,) = RepeatableCall(aten.sigmoid.default, (x,), {}).compiled(compiler, x).results()
    torch.testing.assert_close(result, x.sigmoid())
