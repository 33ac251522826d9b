"""The first call of a program in a lower precision is compared with float32 (`fxpasses.passes.precision`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from fxpasses.backend.compilation import Compiled, Step
from fxpasses.passes.precision.comparing import errors_of, why_not_twice
from fxpasses.report import counters
from fxpasses.report.report import Report


class ComparedPrecision(Step):
    """Where something computes in a lower precision."""

    comparison: FirstCall | None = None

    def applies(self) -> bool:
        return self.compilation.report.precision is not None

    def compiled(self, function: Compiled) -> Compiled:
        reason = why_not_twice(self.compilation.captured)
        if reason:
            self._unmeasured = reason
            return function
        self.comparison = FirstCall(function, self.compilation.captured)
        return self.comparison

    def reported(self, report: Report) -> Report:
        if self.comparison is not None:
            self.comparison.report = report
            return report
        assert report.precision is not None
        return replace(report, precision=replace(report.precision, unmeasured=self._unmeasured))


class FirstCall:
    """A compiled function, the results of whose first call are compared with those of a graph.

    Attributes:
        report: of the compilation, to which the errors are added.
    """

    def __init__(self, function: Compiled, graph_module: GraphModule) -> None:
        """Args:
        function: takes the graph's inputs.
        graph_module: the graph in float32; it is let go of after the first call.
        """
        self.report: Report | None = None
        self._function = function
        self._graph: GraphModule | None = graph_module

    def __call__(self, *args: Any) -> Any:
        """The function's results."""
        results = self._function(*args)
        graph, self._graph = self._graph, None
        if graph is not None and self.report is not None and self.report.precision is not None:
            found = errors_of(graph, args, results)
            measured = {"unmeasured": found} if isinstance(found, str) else {"errors": found}
            precision = replace(self.report.precision, **measured)
            counters.amend(self.report, precision=precision)
        return results
