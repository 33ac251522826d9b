"""Options: what a user may choose, checked before anything happens."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, get_args

from fxpasses.errors import UnknownOptionError, unknown_name
from fxpasses.torch_internals.inductor import is_inductor_option

Layout = Literal["auto", "off", "channels_last", "contiguous"]
Io = Literal["eager", "any"]
Weights = Literal["live", "cached", "baked"]
Profit = Literal["model", "always"]
Verify = Literal["off", "structure", "numerics"]
Sentinels = Literal["cpu", "all"]
Memory = Literal["auto", "reuse", "keep", "system"]
Guards = Literal["compact", "dynamo"]
Precision = Literal["eager", "bfloat16"]


class AddedRule(Protocol):
    """What a rule or a pass has in common: `fxpasses.Rule`, `fxpasses.RulePass`, `fxpasses.GraphPass`."""

    @property
    def name(self) -> str:
        """Its name, in counters, remarks and options."""

    def uuid(self) -> str:
        """A key that changes with what it does."""


@dataclass(frozen=True)
class Options:
    """How a graph is optimised.

    Attributes:
        passes: names of the passes or rules to run; None for the default pipeline.
        disable: names of passes or rules not to run.
        rules: rules and passes (`fxpasses.Rule`, `RulePass`, `GraphPass`) of this compilation alone, or one
            of them. They run in this order, after the registered ones but before `layout`; `after` may move
            one further back. Each runs whatever its own `default` says, unless `disable` names it, or
            `passes` is given and does not. A name that is registered already is an `UnknownRuleError`.
        inner: what the rewritten graph is handed to: ``"inductor"``, ``"aot_eager"``, ``"eager"``, any name
            that Dynamo knows, or a callable that takes a graph module and example inputs.
        layout: how memory layouts are assigned.
        layout_profile: a file with what convolutions take on this device (`fxpasses tune --export` writes
            one); None for the device's own store, then those shipped. A file that cannot be used is named in
            a warning, and layouts are left to inductor.
        tune_seconds: how long one compilation may measure what the layout plan depends on and the device's
            store lacks, in seconds; 0 for never. The default is $FXPASSES_TUNE_SECONDS where that is set,
            else 5.
        io: strides of results: ``"eager"``, or ``"any"``, which leaves those of images (4-D and 5-D tensors)
            to the layout plan, or to packed convolutions, as far as a result has memory of its own. It may be
            channels-last then where eager's is contiguous, and its `view` an error. Inputs are read as they
            come either way.
        race: have the user's first calls go to the optimised program and to stock inductor's in turns, and
            keep the faster, for this process and later ones; implied by ``mode="max-autotune"`` and its kind.
        weights: ``"cached"`` does work that depends on parameters alone once per parameter version, in
            torch.compile; ``"baked"`` does it once and for all and stores the results in the program, in
            `optimize` and `fxpasses export`.
        sentinels: where writes that torch does not tell of (``param.data.mul_(2)``, a numpy view) are looked
            for in cached weights: ``"cpu"``, or ``"all"``, where each call waits for the device and reads a
            few values of each parameter.
        precision: in what inference computes convolutions, linear layers and matrix products of float32:
            ``"eager"``, in float32, or ``"bfloat16"``, with the images between them too. Inputs, results and
            parameters stay float32. The report says how far the first call's results are from float32's,
            for which that call is made in float32 too.
        profit: ``"always"`` applies what is legal, whether or not the cost model thinks that it pays.
        verify: what is checked at each application, beyond shape and dtype: ``"structure"`` (lint, metadata,
            strides, no new guards), or ``"numerics"`` (also values, on made-up inputs). What fails is
            rolled back and reported as failed.
        keep_repro: keep what each application replaced, for `Report.save_repro`; numerics keeps it too.
        memory: what becomes of CPU memory that is freed between calls, for the whole process: ``"reuse"``
            (glibc keeps blocks of up to 32 MiB, as it does by itself once one was freed), ``"keep"`` (it
            keeps all, so that the process stays at its peak and no pages are faulted in), ``"system"``,
            which changes nothing, or ``"auto"``: keep in training and where a graph's tensors are larger
            than 32 MiB, or more than 64 MiB at once; reuse otherwise.
        guards: how Dynamo learns before a call that modules are as they were: ``"compact"``, from the
            versions of their dictionaries and the metadata of their tensors, or ``"dynamo"``, attribute by
            attribute.
        limit: apply at most this many rewrites, for bisection.
        inductor: configuration patches for inductor, handed on unchanged, but for its own conv-BN pass: where
            that is on, the rule `efficient_conv_bn_eval` takes its place.

    Raises:
        UnknownOptionError: a value that the field does not take.
    """

    passes: tuple[str, ...] | None = None
    disable: tuple[str, ...] = ()
    rules: tuple[AddedRule, ...] = ()
    inner: str | Callable[..., Any] = "inductor"
    layout: Layout = "auto"
    layout_profile: str | os.PathLike[str] | None = None
    tune_seconds: float = field(default_factory=lambda: _default_tune_seconds())
    io: Io = "eager"
    race: bool = False
    weights: Weights = "live"
    sentinels: Sentinels = "cpu"
    precision: Precision = "eager"
    profit: Profit = "model"
    verify: Verify = "off"
    keep_repro: bool = False
    memory: Memory = "auto"
    guards: Guards = "compact"
    limit: int | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            given = getattr(self, name)
            if given not in choices:
                raise UnknownOptionError(unknown_name(f"value of option {name!r}:", str(given), choices))
        if not isinstance(self.race, bool):
            raise UnknownOptionError(f"option 'race' takes True or False; got {self.race!r}.")
        for name in ("passes", "disable"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        object.__setattr__(self, "rules", _rules(self.rules))
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 0):
            raise UnknownOptionError(f"option 'limit' takes a number from 0 up, or None; got {self.limit!r}.")
        if not isinstance(self.inner, str) and not callable(self.inner):
            raise UnknownOptionError(
                f"option 'inner' takes a backend's name or a callable; got {self.inner!r}."
            )
        if self.layout_profile is not None and not isinstance(self.layout_profile, (str, os.PathLike)):
            raise UnknownOptionError(
                f"option 'layout_profile' takes the path of a file; got {self.layout_profile!r}."
            )
        object.__setattr__(self, "tune_seconds", _seconds("option 'tune_seconds'", self.tune_seconds))
        if not isinstance(self.inductor, Mapping):
            raise UnknownOptionError(f"option 'inductor' takes a mapping of settings; got {self.inductor!r}.")
        object.__setattr__(self, "inductor", MappingProxyType(dict(self.inductor)))

    @staticmethod
    def of(given: Options | Mapping[str, Any] | None) -> Options:
        """Options from what a user passed: nothing, a mapping of fields, or `Options`.

        Raises:
            UnknownOptionError: a key that is no field; the message lists those that are and the closest.
        """
        if given is None:
            return Options()
        if isinstance(given, Options):
            return given
        if not isinstance(given, Mapping):
            raise UnknownOptionError(
                f"options must be a mapping or fxpasses.Options, not a {type(given).__name__}."
            )
        valid = [field.name for field in dataclasses.fields(Options)]
        for key in given:
            if key not in valid:
                raise UnknownOptionError(unknown_name("option", str(key), valid, _advice(str(key))))
        return Options(**given)


_CHOICES: dict[str, tuple[str, ...]] = {
    "layout": get_args(Layout),
    "io": get_args(Io),
    "weights": get_args(Weights),
    "sentinels": get_args(Sentinels),
    "precision": get_args(Precision),
    "profit": get_args(Profit),
    "verify": get_args(Verify),
    "memory": get_args(Memory),
    "guards": get_args(Guards),
}


def _default_tune_seconds() -> float:
    given = os.environ.get("FXPASSES_TUNE_SECONDS", "")
    try:
        return _seconds("$FXPASSES_TUNE_SECONDS", float(given)) if given else 5.0
    except ValueError as error:
        raise UnknownOptionError(f"$FXPASSES_TUNE_SECONDS takes seconds from 0 up; got {given!r}.") from error


def _seconds(what: str, given: object) -> float:
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not is_number or not 0 <= given < math.inf:  # type: ignore[operator]  # a number
        raise UnknownOptionError(f"{what} takes seconds from 0 up; got {given!r}.")
    return float(given)  # type: ignore[arg-type]  # a number


def _names(option: str, given: object) -> tuple[str, ...] | None:
    if given is None and option == "passes":
        return None
    if isinstance(given, str):
        return (given,)
    if isinstance(given, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in given):
        return tuple(given)
    raise UnknownOptionError(f"option {option!r} takes names of passes or rules; got {given!r}.")


def _rules(given: Any) -> tuple[AddedRule, ...]:
    rules = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for rule in rules:
        if isinstance(rule, type):
            raise UnknownOptionError(
                f"option 'rules' takes rules, not their classes: write {rule.__qualname__}(...)."
            )
        if not isinstance(getattr(rule, "name", None), str) or not callable(getattr(rule, "uuid", None)):
            raise UnknownOptionError(
                f"option 'rules' takes rules and passes (fxpasses.Rule, RulePass, GraphPass); got {rule!r}."
            )
    return rules


def _advice(key: str) -> str:
    if not is_inductor_option(key):
        return ""
    return f"It is a setting of inductor: write options={{'inductor': {{{key!r}: ...}}}}."
