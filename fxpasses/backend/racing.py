"""Which programs race for a graph, and what is known of it from an earlier race.

ours      as the options say
onednn    the same without kernels of ours, where there are any (weights="cached")
stock     inductor's own, with what keeps it right: no rules, no plan, live weights
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fxpasses.backend.compilation import Compilation, Compiled
from fxpasses.backend.race import Race
from fxpasses.devices.own import OwnStore, own_store
from fxpasses.devices.profile import Verdict
from fxpasses.options import Options
from fxpasses.report import counters, sidecar
from fxpasses.report.data import Remark
from fxpasses.report.report import Report
from fxpasses.rewrite.registry import pipeline_key

OURS, ONEDNN, STOCK = "ours", "onednn", "stock"

_RACING = "max-autotune"
"""The modes of torch.compile that race begin with this."""

Compile = Callable[[Compilation], "tuple[Compiled, Compilation]"]


def races(options: Options, mode: str | None) -> bool:
    """Whether programs are to race."""
    return options.race or (mode is not None and mode.startswith(_RACING))


def compile_contenders(compilation: Compilation, compile_one: Compile) -> Compiled:
    """Compiles what races for a graph; or the winner alone, where an earlier race has found it.

    Args:
        compilation: as torch.compile asked for it.
        compile_one: compiles one contender.
    """
    store, key = own_store(_device(compilation.inputs)), _key(compilation)
    verdict = store.profile().verdicts.get(key)
    if verdict is not None:
        compiled, done = compile_one(_contender(compilation, verdict.winner))
        counters.record(
            replace(done.report, remarks=(*done.report.remarks, _remark(verdict, "found by an earlier race")))
        )
        return compiled
    compiled, done = compile_one(_contender(compilation, OURS))
    programs, report = {OURS: compiled}, done.report
    for name in _others(done):
        try:
            programs[name] = compile_one(_contender(compilation, name))[0]
        except Exception as error:  # what only races must not fail what was asked for
            failed = f"{name} does not race: it does not compile ({type(error).__name__}: {error})"
            remark = Remark("race", "failed", "not-compiled", failed, node="", stage="check")
            report = replace(report, remarks=(*report.remarks, remark))
    counters.record(report)
    return Race(programs, functools.partial(_decided, store, key, report)) if len(programs) > 1 else compiled


def _decided(store: OwnStore, key: str, report: Report, verdict: Verdict) -> None:
    if math.isfinite(verdict.high):
        store.merge(replace(store.empty, verdicts={key: verdict}))
    counters.amend(report, _remark(verdict, f"{verdict.pairs} pairs of calls"))


def _contender(compilation: Compilation, name: str) -> Compilation:
    """The compilation of one program, of the same graph."""
    options = compilation.options
    if name == STOCK:
        options = replace(options, passes=(), layout="off", weights="live")
    given = (compilation.graph_module, compilation.inputs, options, compilation.mode)
    return Compilation(*given, own_kernels="never" if name == ONEDNN else None)


def _others(done: Compilation) -> list[str]:
    """What races against ours: nothing where ours is stock's in all but name."""
    report = done.report
    if not (report.applied or report.kept_tensors):
        return []
    return [ONEDNN, STOCK] if "own_kernels" in report.applied else [STOCK]


def _key(compilation: Compilation) -> str:
    """What a verdict holds for, besides the device and its settings."""
    chosen = replace(compilation.options, race=False, tune_seconds=0)
    rules = pipeline_key(chosen)  # versions, options and every rule that runs
    return sidecar.digest(sidecar.sources(), compilation.graph_key, rules, str(compilation.mode))


def _remark(verdict: Verdict, how: str) -> Remark:
    interval = f" [{verdict.low:.3f}, {verdict.high:.3f}]" if math.isfinite(verdict.high) else ""
    ratio = f"ratio of times {verdict.ratio:.3f}{interval}"
    message = f"{verdict.loser} is dropped, {verdict.winner} stays: {ratio}, {how}"
    return Remark("race", "declined", "dropped", message, node="", stage="check")


def _device(inputs: Sequence[Any]) -> torch.device:
    return next((given.device for given in inputs if isinstance(given, torch.Tensor)), torch.device("cpu"))
