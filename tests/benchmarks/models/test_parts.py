"""What an ablation leaves out: the options of each variant, and which variants are not worth running."""

from __future__ import annotations

import pytest

from benchmarks.models.cases import Case
from benchmarks.models.parts import MODES, Part, PartError, is_wanted, parts_of, variants_of
from fxpasses.options import Options
from fxpasses.rewrite.registry import REGISTRY


def settings(mode: str, *names: str) -> dict[str, Options]:
    variants = variants_of(mode, parts_of(mode, names))
    return {variant.name: Options.of(dict(variant.options)) for variant in variants}


def selected(options: Options) -> list[str]:
    return [chosen.name for chosen in REGISTRY.pipeline(options)]


@pytest.mark.parametrize("mode", MODES)
def test_every_rule_and_pass_of_the_default_pipeline_is_left_out_once(mode):
    found = settings(mode)
    default = selected(Options())
    for name in set(default) - {"layout"}:
        assert selected(found[f"without {name}"]) == [other for other in default if other != name]
        assert selected(found[f"only {name}"]) == [name]
    assert found["without layout"].layout == "off"
    assert selected(found["only layout"]) == ["layout"]
    assert found["only layout"].layout == "auto"


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_nothing_and_the_full_set_is_the_default(mode):
    found = settings(mode)
    weights = "cached" if mode == "inference-cached" else "live"
    assert found["full"] == Options(weights=weights)
    assert next(iter(found)) == "full"
    assert found["none"] == Options(passes=(), memory="system", layout="off")
    alone = {name: options for name, options in found.items() if name.startswith("only ")}
    assert {name for name, options in alone.items() if options.memory != "system"} == {"only memory"}


def test_options_are_left_out_and_are_alone():
    found = settings("inference-cached", "memory", "weights")
    assert found["without memory"] == Options(weights="cached", memory="system")
    assert found["only memory"] == Options(passes=(), layout="off")
    assert found["without weights"] == Options()
    assert found["only weights"] == Options(passes=(), layout="off", memory="system", weights="cached")


def test_kept_weights_are_a_part_where_the_full_set_has_them():
    assert "weights" in {part.name for part in parts_of("inference-cached")}
    assert parts_of("training", ("weights",)) == ()


def test_the_cost_model_is_left_out_by_request_and_has_nothing_to_be_alone_in():
    assert "profit" not in {part.name for part in parts_of("inference-live")}
    found = settings("inference-live", "profit")
    assert found["without profit"] == Options(profit="always")
    assert set(found) == {"full", "without profit", "none"}


def test_without_alone_every_variant_is_compared_with_the_full_set():
    parts = parts_of("training")
    names = {variant.name for variant in variants_of("training", parts, alone=False)}
    assert names == {"full", *(f"without {part.name}" for part in parts)}


def test_a_variant_is_run_where_its_part_was_applied():
    parts = (Part("a", "a"), Part("memory", None))
    variants = {variant.name: variant for variant in variants_of("training", parts)}
    wanted = {name for name, variant in variants.items() if is_wanted(parts, variant, {"a": 0})}
    assert wanted == {"full", "none", "without memory", "only memory"}
    assert all(is_wanted(parts, variant, {"a": 1}) for variant in variants.values())


@pytest.mark.parametrize(("mode", "name"), [("trainign", ""), ("training", "activation_mask")])
def test_an_unknown_mode_or_part_is_told_with_the_closest(mode, name):
    with pytest.raises(PartError, match=r"training|activation_masks"):
        parts_of(mode, (name,) if name else ())


def test_every_mode_is_one_of_a_case():
    assert all(Case("m", mode=mode).mode == mode for mode in MODES.values())
