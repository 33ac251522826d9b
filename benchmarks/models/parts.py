"""The parts of fxpasses that an ablation leaves out in turn, and the variants that measure them.

    full                 the default pipeline; in mode `inference-cached` with weights="cached"
    without X            the same less X:   worth of X beside the others = time without X / time of full
    none                 no passes, memory="system", inductor's own layouts, live weights
    only X               the same and X:    worth of X alone = time of none / time of only X

A worth above 1 says that X pays. A part that was applied nowhere in `full` has changed nothing, so that its
variants are the same programs and are not run. What the cost model is worth is told against profit="always";
it has no program to be alone in. Kernels of our own have no option of their own: they come and go with
weights="cached".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.models.cases import Mode
from benchmarks.models.variants import OptionValue, Variant
from fxpasses.errors import FxpassesError, unknown_name
from fxpasses.options import Options
from fxpasses.pipeline import register_all
from fxpasses.rewrite.registry import REGISTRY

FULL, NONE = "full", "none"
MODES: Mapping[str, Mode] = {
    "inference-live": "inference",
    "inference-cached": "inference",
    "frozen-training": "frozen-training",
    "training": "training",
}
"""The modes of an ablation, and those of a case."""

_Settings = dict[str, OptionValue]
_NOTHING: _Settings = {"passes": (), "memory": "system", "layout": "off"}
_LEFT_OUT: dict[str, _Settings] = {
    "layout": {"layout": "off"},
    "memory": {"memory": "system"},
    "weights": {"weights": "live"},
    "profit": {"profit": "always"},
}


class PartError(FxpassesError, ValueError):
    """A part or a mode that does not exist."""


@dataclass(frozen=True)
class Part:
    """Something that can be left out.

    Attributes:
        name: of the rule, the pass or the option.
        counter: the name under which its applications are counted; None for an option that always acts.
    """

    name: str
    counter: str | None

    @property
    def left_out(self) -> str:
        """The variant that has everything else."""
        return f"without {self.name}"

    @property
    def alone(self) -> str:
        """The variant that has nothing else."""
        return f"only {self.name}"

    def may_matter(self, rules: Mapping[str, int]) -> bool:
        """Whether leaving it out may change a model in which the full set made these rewrites."""
        return self.counter is None or bool(rules.get(self.counter))


def parts_of(mode: str, names: Sequence[str] = ()) -> tuple[Part, ...]:
    """The parts to be measured in a mode: those of the default pipeline and options, or those named.

    Raises:
        PartError: the mode or a name does not exist.
    """
    if mode not in MODES:
        raise PartError(unknown_name("mode", mode, MODES))
    known = {part.name: part for part in _known()}
    for name in names:
        if name not in known:
            raise PartError(unknown_name("rule, pass or option", name, known))
    chosen = [known[name] for name in names] or [part for part in known.values() if part.name != "profit"]
    return tuple(part for part in chosen if part.name != "weights" or mode == "inference-cached")


def _known() -> list[Part]:
    """Every rule and pass of graphs in the default pipeline, and the options."""
    register_all()
    names = (
        [rule.name for rule in selected.rules] or [selected.name] for selected in REGISTRY.pipeline(Options())
    )
    rules = [Part(name, name) for several in names for name in several if name not in _LEFT_OUT]
    return [*rules, Part("layout", "layout"), *(Part(name, None) for name in ("memory", "weights", "profit"))]


def variants_of(mode: str, parts: Sequence[Part], *, alone: bool = True) -> tuple[Variant, ...]:
    """The variants that measure the parts, `full` first.

    Args:
        mode: of the ablation.
        parts: what is left out in turn.
        alone: whether each part is also measured alone.
    """
    full: _Settings = {"weights": "cached"} if mode == "inference-cached" else {}
    found = {FULL: full}
    found |= {part.left_out: full | _LEFT_OUT.get(part.name, {"disable": (part.name,)}) for part in parts}
    if alone:
        found[NONE] = _NOTHING
        found |= {part.alone: _only(part) for part in parts if part.name != "profit"}
    return tuple(Variant(name, "fxpasses", settings) for name, settings in found.items())


def is_wanted(parts: Sequence[Part], variant: Variant, rules: Mapping[str, int]) -> bool:
    """Whether a variant may differ from `full`, or from `none`, on a model with these rewrites in `full`."""
    return all(part.may_matter(rules) for part in parts if variant.name in (part.left_out, part.alone))


def _only(part: Part) -> _Settings:
    """The options that have a part and nothing else."""
    if part.name == "memory":
        return {name: value for name, value in _NOTHING.items() if name != "memory"}
    if part.name == "weights":
        return _NOTHING | {"weights": "cached"}
    if part.name == "layout":
        return {"passes": ("layout",), "memory": "system"}
    return _NOTHING | {"passes": (part.name,)}
