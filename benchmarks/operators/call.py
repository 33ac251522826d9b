"""A call of one operator that can be repeated, compiled, and repeated in float64.

Tensors that the operator writes to are copied for everyone who runs the call, so that nobody sees what
another one wrote; the others are shared. An operator that works in place goes on, when it is repeated, from
where its last call left its copy.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx.node import Argument

from benchmarks.operators.inputs.argument_rules import base_name
from benchmarks.torch_internals import OpOverload, tree_leaves, tree_map_leaves

Compiled = Callable[..., Sequence[object]]
Compiler = Callable[[torch.fx.GraphModule, list[torch.Tensor]], Compiled]

_WRITTEN_UNDECLARED = {
    "native_batch_norm": {"running_mean", "running_var"},
    "cudnn_batch_norm": {"running_mean", "running_var"},
}
"""Arguments that an operator writes to although its schema does not say so."""


@dataclass(frozen=True)
class Prepared:
    """A function that runs the call, and the tensors that it writes to."""

    function: Callable[[], object]
    written: tuple[torch.Tensor, ...]

    def results(self) -> list[torch.Tensor]:
        """Runs the call once: the tensors that it returns, and after them those that it wrote to."""
        return [*tensors_in(self.function()), *self.written]


class RepeatableCall:
    """An operator and its arguments, positional and by keyword."""

    def __init__(self, operator: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        self._operator = operator
        self._arguments = (args, dict(kwargs))
        self._tensors = tensors_in(self._arguments)
        self._written = {id(tensor) for tensor in tensors_in(self._values_written())}

    def eager(self) -> Prepared:
        """The operator itself."""
        tensors, written = self._copies()
        args, kwargs = self._with(tensors)
        operator = self._operator
        return Prepared(lambda: operator(*args, **kwargs), written)

    def compiled(self, compiler: Compiler, result: object) -> Prepared:
        """A graph with nothing but the operator, compiled.

        Args:
            compiler: given the graph and its inputs, gives a function of the inputs.
            result: what the operator returns on these arguments, for the structure of the graph's output.
        """
        tensors, written = self._copies()
        function = compiler(self.graph(result), tensors)
        return Prepared(lambda: function(*tensors), written)

    def graph(self, result: object) -> torch.fx.GraphModule:
        """The graph: a placeholder for each tensor, one call, and an output for each tensor returned."""
        graph = torch.fx.Graph()
        placeholders = [graph.placeholder(f"tensor_{index}") for index in range(len(self._tensors))]
        args, kwargs = cast("tuple[tuple[Argument, ...], dict[str, Argument]]", self._with(placeholders))
        node = graph.call_function(self._operator, args, kwargs)
        if isinstance(result, torch.Tensor):
            graph.output((node,))
        else:
            entries = result if isinstance(result, (list, tuple)) else ()
            kept = [index for index, entry in enumerate(entries) if isinstance(entry, torch.Tensor)]
            graph.output(tuple(graph.call_function(python_operator.getitem, (node, index)) for index in kept))
        return torch.fx.GraphModule({}, graph)

    def inputs(self) -> list[torch.Tensor]:
        """The inputs of `graph`, those written to copied."""
        return self._copies()[0]

    def exact(self) -> list[torch.Tensor]:
        """The results in float64: every floating tensor and dtype among the arguments widened.

        Raises:
            RuntimeError: the operator has no float64 kernel, or its arguments do not go together in float64.
        """
        args, kwargs = cast("tuple[tuple[object, ...], dict[str, object]]", _widened(self._arguments))
        return RepeatableCall(self._operator, args, kwargs).eager().results()

    def _values_written(self) -> list[object]:
        args, kwargs = self._arguments
        schema = self._operator._schema.arguments
        undeclared = _WRITTEN_UNDECLARED.get(base_name(self._operator), set())
        given: dict[str, object] = {
            argument.name: value for argument, value in zip(schema, args, strict=False)
        }
        given |= kwargs
        return [
            given.get(argument.name)
            for argument in schema
            if argument.name in undeclared or (argument.alias_info and argument.alias_info.is_write)
        ]

    def _copies(self) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """The tensors, with copies in place of those written to; and those copies."""
        tensors = [_copy(tensor) if id(tensor) in self._written else tensor for tensor in self._tensors]
        written = [
            tensor for tensor, mine in zip(tensors, self._tensors, strict=True) if id(mine) in self._written
        ]
        return tensors, tuple(written)

    def _with(self, leaves: Sequence[object]) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments with other things in place of the tensors."""
        remaining = iter(leaves)
        replaced = tree_map_leaves(
            lambda leaf: next(remaining) if isinstance(leaf, torch.Tensor) else leaf, self._arguments
        )
        return cast("tuple[tuple[object, ...], dict[str, object]]", replaced)


def tensors_in(tree: object) -> list[torch.Tensor]:
    """The tensors among the leaves of nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, which `clone` does not keep where there are gaps."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _widened(tree: object) -> object:
    def widen(leaf: object) -> object:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.double()
        return torch.float64 if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf

    return tree_map_leaves(widen, tree)
