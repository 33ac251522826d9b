"""Configurations: the names that `--configs` takes, and the compiler that each one stands for.

    NAME[:SETTING=VALUE[;SETTING=VALUE]...]

NAME is one of `CONFIGURATIONS`. Settings are those of `torch._inductor.config`, such as
`inductor:max_autotune=true`; for fxpasses they may be fields of `fxpasses.Options` as well. Where a NAME is
none of `CONFIGURATIONS`, it is what the results shall call inductor with these settings:
`two-threads:cpp.threads=2`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Union, get_args, get_origin

import torch

from benchmarks.operators.call import Compiled, Compiler
from benchmarks.shared.assignments import assignments
from benchmarks.torch_internals import (
    inductor_compile,
    inductor_setting_types,
    registered_backend,
)
from fxpasses.errors import FxpassesError, unknown_name
from fxpasses.options import Options
from fxpasses.torch_internals.inductor import inductor_mode_options


class ConfigurationError(FxpassesError, ValueError):
    """A configuration that does not parse, does not exist, or cannot run here."""


@dataclass(frozen=True)
class Inductor:
    """Inductor in a mode of torch.compile, with settings."""

    settings: Mapping[str, object] = field(default_factory=dict)
    mode: str = "default"

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Compiled:
        """Compiles a graph for its inputs."""
        return inductor_compile(graph, inputs, {**inductor_mode_options(self.mode), **self.settings})

    def with_settings(self, given: Mapping[str, str]) -> Inductor:
        """The same with further settings, as they were written."""
        read = {_name(name): _setting(name, text) for name, text in given.items()}
        return replace(self, settings={**self.settings, **read})


@dataclass(frozen=True)
class Backend:
    """A backend that torch.compile knows by name; `options` are for fxpasses."""

    name: str
    options: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Compiled:
        """Compiles a graph for its inputs."""
        given = {"options": self.options} if self.options else {}
        return registered_backend(self.name)(graph, inputs, **given)

    def with_settings(self, given: Mapping[str, str]) -> Backend:
        """The same with options: fields of `fxpasses.Options`, and settings of inductor."""
        if self.name != "fxpasses":
            raise ConfigurationError(f"configuration {self.name!r} takes no settings.")
        fields = {field.name for field in dataclasses.fields(Options)}
        options: dict[str, object] = {name: _option(name, given[name]) for name in fields & set(given)}
        settings = {_name(name): _setting(name, given[name]) for name in given if name not in fields}
        if settings:
            options["inductor"] = settings
        Options.of(options)
        return replace(self, options=options)


_AUTOTUNE = Inductor(
    {
        "max_autotune": True,
        "max_autotune_pointwise": True,
        "max_autotune_gemm": True,
        "coordinate_descent_tuning": True,
    }
)

CONFIGURATIONS: dict[str, Compiler] = {
    "inductor": Inductor(),
    "inductor-autotune": _AUTOTUNE,
    "autotune": _AUTOTUNE,
    "inductor-channels-last": Inductor({"force_layout_optimization": True}),
    "inductor-nolayout": Inductor({"layout_optimization": False}),
    "inductor-cppwrapper": Inductor({"cpp_wrapper": True}),
    "reduce-overhead": Inductor(mode="reduce-overhead"),
    "max-autotune": Inductor(mode="max-autotune"),
    "max-autotune-no-cudagraphs": Inductor(mode="max-autotune-no-cudagraphs"),
    "halide": Inductor({"cpu_backend": "halide", "cuda_backend": "halide"}),
    "fxpasses": Backend("fxpasses"),
    "aot_eager": Backend("aot_eager"),
}
"""What the command line offers: each compiles a graph for its inputs. Three are modes of torch.compile;
`autotune` and `halide` are named as in PyTorch's script."""


def parse_configurations(text: str, further: Sequence[str] = ()) -> dict[str, Compiler]:
    """The compilers that a comma-separated list names, in its order, and those of `further` names.

    A piece that names no configuration and has no settings belongs to the value before it:
    `inductor:max_autotune_gemm_backends=ATEN,CPP` is one configuration.

    Raises:
        ConfigurationError: an unknown configuration or setting, a value that a setting does not take, a
            configuration that stands twice, none at all, or one that needs what is not installed.
        UnknownOptionError: a value that an option of fxpasses does not take.
    """
    pieces: list[str] = []
    for piece in text.split(","):
        if pieces and ":" in pieces[-1] and ":" not in piece and piece.strip() not in CONFIGURATIONS:
            pieces[-1] += f",{piece.strip()}"
        else:
            pieces.append(piece.strip())
    named = [_parse(piece) for piece in [*filter(None, pieces), *further]]
    configurations = dict(named)
    if not named or len(configurations) != len(named):
        given = ",".join([text, *further])
        raise ConfigurationError(f"--configs {given!r}: name one configuration or several different ones.")
    return configurations


def _parse(text: str) -> tuple[str, Compiler]:
    """What the results call a configuration, and its compiler."""
    name, colon, rest = text.partition(":")
    if name not in CONFIGURATIONS and not colon:
        advice = "Or write NAME:SETTING=VALUE with settings of inductor."
        raise ConfigurationError(unknown_name("configuration", name, CONFIGURATIONS, advice))
    compiler = CONFIGURATIONS.get(name, Inductor())
    if colon:
        if not isinstance(compiler, (Inductor, Backend)):
            raise ConfigurationError(f"configuration {name!r} takes no settings.")
        compiler = compiler.with_settings(_written(rest, text))
    if isinstance(compiler, Inductor) and "halide" in compiler.settings.values():
        _need_halide(text)
    return text if name in CONFIGURATIONS else name, compiler


def _written(text: str, configuration: str) -> dict[str, str]:
    """Settings and their values as they stand, by name."""
    try:
        return assignments(text, "SETTING")
    except ValueError as error:
        raise ConfigurationError(f"configuration {configuration!r}: {error}") from error


def _need_halide(configuration: str) -> None:
    if importlib.util.find_spec("halide") is None:
        raise ConfigurationError(
            f"configuration {configuration!r} needs Halide's Python bindings, which are not installed here: "
            "pip install halide, or leave it out."
        )


def _name(setting: str) -> str:
    return setting.replace("-", "_")  # as torch.compile reads its options


def _setting(name: str, text: str) -> object:
    """The value of a setting of inductor that stands as `text`: a Python literal, or the text itself."""
    known = inductor_setting_types()
    if _name(name) not in known:
        # They are some hundreds: only the closest are shown.
        closest = difflib.get_close_matches(_name(name), known, cutoff=0.5)
        hint = (
            f"Did you mean {' or '.join(map(repr, closest))}?" if closest else "See torch._inductor.config."
        )
        raise ConfigurationError(f"unknown setting of inductor {name!r}. {hint}")
    wanted = known[_name(name)]
    for value in (_literal(text), text):
        if wanted is type(None) or _fits(value, wanted):  # one that torch left untyped takes anything
            return value
    shown = wanted.__name__ if isinstance(wanted, type) else str(wanted)
    raise ConfigurationError(f"setting {name!r} of inductor takes {shown}; got {text!r}.")


def _option(name: str, text: str) -> object:
    """The value of a field of `fxpasses.Options` that stands as `text`."""
    if name in ("passes", "disable"):
        return tuple(piece.strip() for piece in text.split(","))
    if name == "inductor":
        raise ConfigurationError("write settings of inductor one by one: fxpasses:SETTING=VALUE.")
    return _literal(text)


def _literal(text: str) -> object:
    lowered = {"true": True, "false": False, "none": None}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fits(value: object, wanted: object) -> bool:
    """Whether a setting of type `wanted` takes a value."""
    origin = get_origin(wanted)
    if origin is Literal:
        return value in get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(wanted))
    if wanted in (int, float) and isinstance(value, bool):
        return False
    kind = (int, float) if wanted is float else origin or wanted
    return isinstance(kind, (type, tuple)) and isinstance(value, kind)
