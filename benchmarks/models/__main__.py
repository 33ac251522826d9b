"""Models against peers: `python -m benchmarks.models --help`.

Exit status: 0; 1 where a gate fails; 2 where the arguments are wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.models.arguments import add_models, models_of, say_what_is_left_out
from benchmarks.models.cases import DTYPES, DYNAMICS, MODES, Case
from benchmarks.models.gates import Gate, parse_gate
from benchmarks.models.progress import shown_progress
from benchmarks.models.reporting import plot_report, print_gates, print_report, write_csv
from benchmarks.models.results import ModelResult, Report, save_report
from benchmarks.models.suite import Suite, check_models, names_of, run_suite
from benchmarks.models.variants import Variant, VariantError, parse_variants
from benchmarks.shared.commands import refuse
from benchmarks.shared.environment import check_device, environment_block, physical_cores
from fxpasses.errors import FxpassesError, unknown_name

_DESCRIPTION = """\
Times models under several compilers. Each variant lives in a process of its own; in every round each takes
one turn, in random order. A variant whose results are wrong has no time reported. A ratio is the baseline's
time over the variant's: above 1 the variant is faster; inconclusive where its interval straddles 1. The
rounds are shared by several launches of the processes, because two processes of one program differ; the
second launch also tells how long compilation takes with warm caches; --compilations repeats both.
"""
_EPILOG = """\
variants, separated by commas:
  eager, inductor, inductor-convbn, inductor-nolayout, inductor-frozen, onnxruntime, openvino, fxpasses
  fxpasses:weights=cached;layout=auto   fields of fxpasses.Options
  a=inductor,b=inductor                 one variant under two names
  slowed(1.1):inductor                  a self-test of the method: waits after each call until it took 1.1
                                        times as long. Its times are no claim about anything.

models, separated by commas: timm's names, or torchvision:NAME, transformers:CLASS, package.module:factory

gates: geomean(A/B), min(A/B) or max(A/B) over the models, or A/B for each, then >=, <=, > or < and a number.
  A/B is B's time over A's; A/B|C compares with the faster of B and C; saved_bytes(A/B) is A's bytes over B's;
  " for resnet18,resnet50" limits models.
  --require "geomean(fxpasses:weights=cached/inductor) >= 1.7"
  --require "geomean(fxpasses:weights=cached/onnxruntime|openvino) >= 0.85"
  --require "max(saved_bytes(fxpasses/eager)) <= 0.47"

Training modes run forward, the mean square of the outputs as loss, and backward, without an optimiser. In
--mode training dropout and stochastic depth are set to zero, because compiled code draws other random numbers
than eager does.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=160)  # a file or a pipe has no width of its own
    try:
        suite, gates, baseline = _plan(given)
        say_what_is_left_out(given, errors)
        environment = environment_block(given.device)
        for path in (given.json, given.csv, given.plot):
            _check_writable(path)
        check_models(suite)
    except FxpassesError as error:
        refuse(parser, str(error))
    with shown_progress(errors, suite.units_of_work) as progress:
        models = run_suite(suite, progress)
    report = _report(suite, environment, baseline, models, gates)
    print_report(report, console)
    print_gates(report.gates, console)
    if given.json:
        save_report(report, given.json)
    if given.csv:
        write_csv(report, given.csv)
    if given.plot:
        plot_report(report, given.plot)
    return 0 if all(gate.passed for gate in report.gates) else 1


def _plan(given: argparse.Namespace) -> tuple[Suite, tuple[Gate, ...], str]:
    """What the arguments ask for, checked as far as it can be without running anything."""
    check_device(given.device)
    case = Case(
        "",
        mode=given.mode,
        batch=given.batch,
        size=given.size,
        dtype=given.dtype,
        device=given.device,
        dynamic=given.dynamic,
        threads=given.threads or physical_cores(),
        seed=given.seed,
    )
    variants = parse_variants(given.variants)
    for variant in variants:
        variant.check(case)
    models = models_of(given)
    if given.rounds < 1:
        raise VariantError(f"--rounds {given.rounds} measures nothing; write 1 or more.")
    if given.only_saved_bytes and not case.trains:
        raise VariantError(
            "--only-saved-bytes needs --mode frozen-training or training: inference saves nothing."
        )
    if given.launches < 1:
        raise VariantError(f"--launches {given.launches} starts nothing; write 1 or more.")
    launches = 1 if given.no_warm else given.launches
    gates = tuple(parse_gate(gate) for gate in given.require)
    if given.at_once < 1:
        raise VariantError(f"--at-once {given.at_once} prepares nothing; write 1 or more.")
    if given.compilations < 1:
        raise VariantError(f"--compilations {given.compilations} compiles nothing; write 1 or more.")
    suite = Suite(
        case,
        models,
        variants,
        given.rounds,
        launches,
        given.only_saved_bytes,
        given.at_once,
        compilations=given.compilations,
    )
    return suite, gates, _baseline(given.baseline, variants)


def _baseline(given: str | None, variants: Sequence[Variant]) -> str:
    names = names_of(variants)
    if given is None:
        return "inductor" if "inductor" in names else names[0]
    if given not in names:
        raise VariantError(unknown_name("baseline", given, names, "It must be one of --variants."))
    return given


def _check_writable(path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise VariantError(f"{path}: the folder {path.resolve().parent} does not exist; create it first.")


def _report(
    suite: Suite,
    environment: dict[str, object],
    baseline: str,
    models: tuple[ModelResult, ...],
    gates: tuple[Gate, ...],
) -> Report:
    settings = suite.case.to_json() | {
        "rounds": suite.rounds,
        "launches": suite.launches,
        "models": list(suite.models),
        "variants": list(names_of(suite.variants)),
        "only_saved_bytes": suite.only_saved_bytes,
        "at_once": suite.at_once,
    }
    del settings["model"]
    report = Report(settings, environment, baseline, models)
    return replace(report, gates=tuple(gate.evaluate(report) for gate in gates))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--mode", choices=MODES, default="inference", help="default: inference")
    add_models(parser)
    add("--batch", type=int, default=1, help="default: 1")
    add("--size", type=int, default=224, help="height and width, or tokens; default: 224")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="default: float32")
    add("--device", default="cpu", help="default: cpu")
    add("--dynamic", choices=DYNAMICS, default="none", help="sizes that are dynamic; default: none")
    _add_measurement(parser)
    add("--json", type=Path, metavar="FILE", help="write the results, with the seconds of every round")
    add("--csv", type=Path, metavar="FILE", help="write one row for each model and variant")
    add("--plot", type=Path, metavar="FILE", help="write a PNG of the ratios")
    return parser


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    """What is compared with what, how often, and what must come of it."""
    add = parser.add_argument
    add("--variants", default="eager,inductor,fxpasses", help="default: eager,inductor,fxpasses")
    add("--baseline", help="the variant that ratios are taken to; default: inductor, or else the first")
    add(
        "--rounds",
        type=int,
        default=20,
        help="turns of each variant; fewer than 6 claim nothing; default: 20",
    )
    add("--threads", type=int, help="default: the physical cores")
    add("--seed", type=int, default=0, help="of parameters and inputs; default: 0")
    add(
        "--launches",
        type=int,
        default=2,
        help="processes of each variant, which share the rounds; default: 2",
    )
    add(
        "--compilations",
        type=int,
        default=1,
        metavar="N",
        help="compile each variant N times with empty caches and N times with full ones, in processes of"
        " their own, and report the medians; default: 1",
    )
    add("--no-warm", action="store_true", help="one launch: faster, and blind to what processes differ by")
    add(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="how many variants, of all models, compile at the same time before the turns begin: for a GPU"
        " whose memory holds them all, beside enough cores; default: 1",
    )
    add(
        "--only-saved-bytes",
        action="store_true",
        help="one unchecked forward, bytes saved for backward, no time",
    )
    add(
        "--require",
        action="append",
        default=[],
        metavar="GATE",
        help="exit with 1 unless it holds; repeatable",
    )


if __name__ == "__main__":
    sys.exit(main())
