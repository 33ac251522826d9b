"""The door that torch.compile knocks on: `torch.compile(model, backend="fxpasses")`.

Dynamo hands over a graph and example inputs. The passes run over a copy (Dynamo builds its calling
convention from the original afterwards), and the copy goes to the inner backend, which is inductor unless
the options say otherwise. `mode=` and inductor's own settings reach inductor as they would without us.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from fxpasses.backend.compilation import Compilation, Compiled
from fxpasses.backend.guards import compact_guards
from fxpasses.backend.inner import inner_backend
from fxpasses.backend.racing import compile_contenders, races
from fxpasses.backend.rewriting import rewrite
from fxpasses.backend.steps import take_steps
from fxpasses.options import Options
from fxpasses.report import counters
from fxpasses.report.data import Remark
from fxpasses.torch_internals.inductor import failed_on_symbols


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options | Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Optimises a graph from Dynamo and compiles it with the inner backend.

    Args:
        gm: the graph that Dynamo traced; it is not changed.
        example_inputs: one (fake) value per placeholder.
        options: fields of `fxpasses.Options`, or `Options`.
        mode: a mode of torch.compile, such as ``"max-autotune"``; it reaches inductor.

    Raises:
        UnknownOptionError: an option or mode that does not exist, or that the inner backend cannot take.
        MissingCompilerError: inductor needs a C++ compiler and found none.
    """
    compilation = Compilation(gm, example_inputs, Options.of(options), mode)
    inner_backend(compilation.options, mode)  # what does not exist is refused before any work
    if compilation.options.guards == "compact":
        compact_guards(compiles=compilation.keeps_weights)
    if races(compilation.options, mode):
        return compile_contenders(compilation, _compile_one)
    compiled, compilation = _compile_one(compilation)
    # Counted last: a graph that the inner backend refused was not optimised.
    counters.record(compilation.report)
    return compiled


def _compile_one(compilation: Compilation) -> tuple[Compiled, Compilation]:
    """Compiles a graph; by operator, where inductor fails on its strides."""
    by_operator = replace(compilation.options, inner="aot_eager", inductor={})
    again = replace(compilation, options=by_operator, mode=None) if compilation.for_inductor else None
    try:
        return _compile(compilation), compilation
    except Exception as error:
        if again is None or not failed_on_symbols(error):
            raise
        compiled = _compile(again)
        again.remark(_CANNOT_COMPARE)
        return compiled, again


def _compile(compilation: Compilation) -> Compiled:
    rewrite(compilation)
    take_steps(compilation)
    return compilation.compile()


_CANNOT_COMPARE = Remark(
    "inductor",
    "declined",
    "symbolic-strides",
    'inductor failed to compare strides that are symbols ("Invalid ranges"), so that the graph runs operator '
    "by operator, as under inner='aot_eager'. Inductor compiles it for static sizes (dynamic=False)",
    node="",
    stage="check",
)
