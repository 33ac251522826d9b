"""One compilation: a graph on its way to the inner backend, and the steps that it goes through.

    Dynamo's graph ─ Compilation ─ rewriting ─ step ─ step ─ ... ─ inner backend ─ compiled function
                                               each may change the graph that is handed on, add to
                                               inductor's settings, wrap the result, add to the report

Which steps there are, in which order, and which exclude one another is the list in `fxpasses.backend.steps`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from fxpasses.backend.inner import inner_backend
from fxpasses.errors import UnknownOptionError
from fxpasses.graph.decline import Decline
from fxpasses.graph.gradients import records_gradients
from fxpasses.options import Options
from fxpasses.passes.layout.joint import results_share_memory
from fxpasses.passes.weights.own_kernels import OwnKernels
from fxpasses.report import sidecar
from fxpasses.report.data import Remark
from fxpasses.report.report import Report

Compiled = Callable[..., Any]

_Settings = Callable[[Mapping[str, Any]], dict[str, Any]]
"""From inductor's settings to the same with more."""


@dataclass(frozen=True)
class Handed:
    """What the inner backend is handed: a graph, and one (fake) value per placeholder."""

    graph_module: GraphModule
    inputs: Sequence[Any]


@dataclass
class Compilation:
    """A graph that is rewritten and compiled.

    Attributes:
        graph_module: the graph; Dynamo's own until it is rewritten.
        inputs: one (fake) value per placeholder.
        options: what the user chose.
        mode: a mode of torch.compile, for inductor.
        report: what has happened so far.
        trains: whether autograd records.
        own_kernels: when kernels of ours are taken; None for what the options say.
        captured: the graph as it was when this was made.
    """

    graph_module: GraphModule
    inputs: Sequence[Any]
    options: Options
    mode: str | None = None
    report: Report = field(default_factory=Report)
    trains: bool | None = None
    own_kernels: OwnKernels | None = None
    captured: GraphModule = field(init=False)
    _steps: dict[type[Step], Step] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.captured = self.graph_module
        if self.options.weights == "baked":
            raise UnknownOptionError(
                "weights='baked' is for fxpasses.optimize and `fxpasses export`; what torch.compile serves "
                "is a module whose weights may change. Use options={'weights': 'cached'}."
            )
        if self.trains is None:
            self.trains = records_gradients(self.graph_module)

    @property
    def keeps_weights(self) -> bool:
        """Whether parameter work is done once per version: on request, where no gradient is recorded."""
        return self.options.weights == "cached" and not self.trains

    @property
    def devices(self) -> frozenset[str]:
        """The types of the devices on which the inputs are."""
        return frozenset(given.device.type for given in self.inputs if isinstance(given, torch.Tensor))

    @property
    def for_inductor(self) -> bool:
        """Whether the inner backend is inductor."""
        return self.options.inner == "inductor"

    @property
    def for_inductor_on_cpu(self) -> bool:
        """Whether inductor compiles it, and for nothing but the CPU."""
        return self.for_inductor and self.devices <= {"cpu"}

    @functools.cached_property
    def graph_key(self) -> str:
        """What two compilations of the same graph have in common, in whichever process."""
        return sidecar.graph_key(self.graph_module, self.inputs)

    @functools.cached_property
    def shares_results(self) -> bool:
        """Whether results that take a gradient are views of one tensor, in the rewritten graph."""
        return bool(self.trains) and results_share_memory(self.graph_module)

    def takes(self, step: type[Step]) -> bool:
        """Whether a step was taken."""
        return step in self._steps

    def take(self, step: Step, unless: Sequence[type[Step]]) -> None:
        """Takes a step that applies, unless one of others was taken; a refusal goes into the report."""
        if any(map(self.takes, unless)):
            return
        applies = step.applies()
        if applies:
            self._steps[type(step)] = step
        elif isinstance(applies, Decline):
            self.refuse(step, applies)

    def refuse(self, step: Step, why: Decline, node: str = "") -> None:
        """Adds to the report's remarks why a step was not taken, or not at a node."""
        self.remark(Remark(step.name, "declined", why.code, why.message, node=node, stage="check"))

    def remark(self, *remarks: Remark) -> None:
        """Adds to the report's remarks."""
        self.report = replace(self.report, remarks=(*self.report.remarks, *remarks))

    def compile(self) -> Compiled:
        """Hands the graph on, with what the steps taken make of it, and completes the report."""
        steps = list(self._steps.values())
        handed = Handed(self.graph_module, self.inputs)
        for step in steps:
            handed = step.handed(handed)
        with contextlib.ExitStack() as blocks:
            for step in steps:
                blocks.enter_context(step.around())
            settings = functools.partial(_in_turn, [step.settings for step in steps])
            compiled: Compiled = inner_backend(self.options, self.mode, settings)(
                handed.graph_module, handed.inputs
            )
        for step in steps:
            compiled = step.compiled(compiled)
        for step in steps:
            self.report = step.reported(self.report)
        if "cpu" in self.devices:
            self.report = replace(self.report, threads=torch.get_num_threads())
        return compiled


def _in_turn(add: Sequence[_Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    return functools.reduce(lambda settings, more: more(settings), add, dict(given))


class Step:
    """What is done with a compilation between rewriting and the inner backend. Derive, and say what differs.

    Attributes:
        name: under which the report has its refusals.
    """

    name: ClassVar[str] = ""

    def __init__(self, compilation: Compilation) -> None:
        """Args:
        compilation: as the steps before this one have left it.
        """
        self.compilation = compilation

    def applies(self) -> bool | Decline:
        """Whether the step is to be taken; a `Decline` is a refusal that the user is told of."""
        raise NotImplementedError

    def handed(self, given: Handed) -> Handed:
        """What the inner backend is handed instead."""
        return given

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inductor's settings with those of this step."""
        return dict(given)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """The block in which the inner backend compiles."""
        yield

    def compiled(self, function: Compiled) -> Compiled:
        """The compiled function with what it needs around it."""
        return function

    def reported(self, report: Report) -> Report:
        """The report with what this step did."""
        return report
