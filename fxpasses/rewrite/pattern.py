"""Patterns: a graph of canonical calls with holes, and the search for it in a graph.

A pattern is what a plain torch function computes, read as canonical calls (`fxpasses.graph.canonical`). Its
parameters are holes: one for a tensor takes any operand, one for a number takes any number, and a hole that
appears twice takes the same thing twice. Everything else, keyword arguments and defaults included, must be
equal. The search starts at the last result and goes from results to operands; operands of a commutative
operator are tried in both orders.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from fxpasses.errors import PatternError
from fxpasses.graph.canonical import COMMUTATIVE, Call, operator_of, read_call
from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor, value
from fxpasses.graph.operands import ModuleTensor, Operand


@dataclass(frozen=True)
class Hole:
    """A parameter of the pattern.

    Attributes:
        name: the parameter's name.
        number: whether it takes a number; otherwise it takes a tensor.
    """

    name: str
    number: bool = False


@dataclass(frozen=True, eq=False)
class Operation:
    """A call in a pattern; its arguments are operations, holes, constants and nests of them."""

    operator: object
    arguments: Mapping[str, Any]

    @functools.cached_property
    def order(self) -> tuple[str, ...]:
        """The arguments in the order of the goals' stack: constants on top, since they decide at once."""
        return tuple(sorted(self.arguments, key=lambda name: not isinstance(self.arguments[name], Operation)))


@dataclass(frozen=True)
class Pattern:
    """What to look for at one capture level.

    Attributes:
        results: the operations whose values are replaced, in the order in which the function returns them.
        size: how many operations there are.
        absent: parameters that were None when this variant was traced.
        key: equal for patterns that match the same.
    """

    results: tuple[Operation, ...]
    size: int
    absent: frozenset[str]
    key: str

    @property
    def anchor(self) -> object:
        """The operator at which a search starts: that of the last result."""
        return self.results[-1].operator


def pattern_of(graph: Graph, numbers: Mapping[float, str], absent: frozenset[str], rule: str) -> Pattern:
    """The pattern that a traced function is.

    Args:
        graph: the function's graph; its placeholders are the tensor parameters.
        numbers: the made-up values that stood for numbers, and the parameters that they stand for.
        absent: parameters that were None.
        rule: the rule's name, for messages.

    Raises:
        PatternError: the function cannot be a pattern.
    """
    reader = _Reader(rule, numbers)
    output = graph.find_nodes(op="output")[0].args[0]
    returned = output if isinstance(output, (tuple, list)) else (output,)
    results = tuple(reader.read(result) for result in returned)
    if not results or not all(isinstance(result, Operation) for result in results):
        raise PatternError(
            f"the pattern of {rule!r} returns something that it does not compute; return operators' results."
        )
    unused = {node.name for node in graph.find_nodes(op="placeholder")} - reader.holes
    if unused:
        raise PatternError(f"the pattern of {rule!r} does not use {', '.join(sorted(unused))}.")
    return Pattern(results, len(reader.known), absent, reader.key(results) + str(sorted(absent)))


class _Reader:
    """Reads a traced graph from its results back."""

    def __init__(self, rule: str, numbers: Mapping[float, str]) -> None:
        self.known: dict[Node, Operation] = {}
        self.holes: set[str] = set()
        self._rule = rule
        self._numbers = numbers

    def read(self, given: Any) -> Any:
        if isinstance(given, (list, tuple)):
            return tuple(self.read(part) for part in given)
        if isinstance(given, float) and given in self._numbers:
            return Hole(self._numbers[given], number=True)
        if not isinstance(given, Node):
            return given
        if given.op == "placeholder":
            self.holes.add(given.name)
            return Hole(given.name)
        if given not in self.known:
            self.known[given] = self._operation(given)
        return self.known[given]

    def _operation(self, node: Node) -> Operation:
        call = read_call(node)
        if isinstance(call, Decline):
            raise PatternError(f"the pattern of {self._rule!r} cannot be read: {call.message}.")
        name = call.operator
        if isinstance(name, str) and name.endswith("_") and not name.endswith("__"):
            raise PatternError(
                f"the pattern of {self._rule!r} writes in place ({name}); write it functionally."
            )
        if node.op == "get_attr":
            raise PatternError(f"the pattern of {self._rule!r} holds a tensor; make it a parameter.")
        return Operation(name, {key: self.read(argument) for key, argument in call.arguments.items()})

    def key(self, results: Sequence[Operation]) -> str:
        """Equal texts for equal patterns."""
        numbers = {operation: index for index, operation in enumerate(self.known.values())}

        def text(given: Any) -> str:
            if isinstance(given, Operation):
                return f"%{numbers[given]}"
            if isinstance(given, tuple):
                return f"({','.join(map(text, given))})"
            return repr(given)

        lines = []
        for operation, index in numbers.items():
            arguments = ",".join(f"{name}={text(part)}" for name, part in sorted(operation.arguments.items()))
            lines.append(f"%{index}={operation.operator}({arguments})")
        return ";".join([*lines, *map(text, results)])


# Search ----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """A pattern found in a graph, or as much of it as was.

    Attributes:
        nodes: the node of each operation.
        operands: what each hole took.
    """

    nodes: dict[Operation, Node] = field(default_factory=dict)
    operands: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Found:
        """A copy to try an alternative on."""
        return Found(dict(self.nodes), dict(self.operands))


Goal = tuple[Any, Any, Node]
"""A part of the pattern, what stands in the graph, and the node that reads it."""


class Search:
    """One search for a pattern that ends at a node."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._missed = 0
        self._miss: Decline | None = None

    def at(self, node: Node) -> Found | Decline:
        """The pattern whose last result is `node`, or the nearest that the graph comes to it."""
        *others, last = self._pattern.results
        found = self._solve([(last, node, node)], Found(), others)
        if found is not None:
            return found
        assert self._miss is not None
        return self._miss

    def _solve(self, goals: list[Goal], found: Found, others: list[Operation]) -> Found | None:
        while goals:
            part, given, reader = goals.pop()
            if isinstance(part, Operation):
                alternatives = self._enter(part, given, reader, found)
                if alternatives is None:
                    return None
                *rest, first = alternatives
                for alternative in rest:
                    result = self._solve([*goals, *alternative], found.copy(), others)
                    if result is not None:
                        return result
                goals.extend(first)
            elif not self._same(part, given, reader, found, goals):
                return None
        pending = [operation for operation in others if operation not in found.nodes]
        if not pending:
            return found
        for candidate in _candidates(pending[0].operator, found, self._pattern.size):
            result = self._solve([(pending[0], candidate, candidate)], found.copy(), pending[1:])
            if result is not None:
                return result
        self._note(found, "another-result", "no {} reads the same operands", None, (pending[0].operator,))
        return None

    def _enter(self, part: Operation, given: Any, reader: Node, found: Found) -> list[list[Goal]] | None:
        """Takes an operation's node; the goals of each order in which its operands may come."""
        if part in found.nodes:
            same = found.nodes[part] is given
            if not same:
                self._note(found, "other-operand", "{} reads another operand", reader, (reader.name,))
            return [[]] if same else None
        # Only a subtraction may turn out to be another operator than its target says.
        likely = isinstance(given, Node) and operator_of(given) in (part.operator, "aten::sub")
        call = _call_of(given) if likely else None
        if call is None or call.operator != part.operator:
            self._note_operator(found, part, given, reader)
            return None
        if call.arguments.keys() != part.arguments.keys():
            self._note(found, "other-arguments", "{} has other arguments", reader, (reader.name,))
            return None
        found.nodes[part] = given
        straight = [(part.arguments[name], call.arguments[name], given) for name in part.order]
        if part.operator not in COMMUTATIVE or part.arguments.get("alpha", 1) != 1:
            return [straight]
        swapped = {**call.arguments, "self": call.arguments["other"], "other": call.arguments["self"]}
        crossed = [(part.arguments[name], swapped[name], given) for name in part.order]
        return [straight, crossed]

    def _same(self, part: Any, given: Any, reader: Node, found: Found, goals: list[Goal]) -> bool:
        """Whether a hole or a constant takes what stands in the graph."""
        if isinstance(part, Hole):
            return self._fill(part, given, reader, found)
        if isinstance(part, tuple):
            if not isinstance(given, (list, tuple)) or len(given) != len(part):
                self._note_constant(found, part, given, reader)
                return False
            goals.extend((one, other, reader) for one, other in zip(part, given, strict=True))
            return True
        if _equal(part, given, reader):
            return True
        self._note_constant(found, part, given, reader)
        return False

    def _fill(self, hole: Hole, given: Any, reader: Node, found: Found) -> bool:
        fits = _is_number(given) if hole.number else _is_tensor(given)
        if not fits:
            kind = "number" if hole.number else "tensor"
            self._note(found, "operand-kind", "{} takes no {} as {}", reader, (reader.name, kind, hole.name))
            return False
        if hole.name not in found.operands:
            found.operands[hole.name] = given
            return True
        if same_operand(found.operands[hole.name], given):
            return True
        self._note(found, "other-operand", "{} reads another {}", reader, (reader.name, hole.name))
        return False

    # The nearest miss.

    def _note_operator(self, found: Found, part: Operation, given: Any, reader: Node) -> None:
        name = operator_of(given) or given.op if isinstance(given, Node) else type(given).__name__
        message = "{} reads {} ({}) where the pattern has {}"
        details = (reader.name, getattr(given, "name", given), name, part.operator)
        self._note(found, "other-operator", message, reader, details)

    def _note_constant(self, found: Found, part: Any, given: Any, reader: Node) -> None:
        message = "{} has {} where the pattern has {}"
        self._note(found, "other-constant", message, reader, (reader.name, given, part))

    def _note(
        self, found: Found, code: str, template: str, node: Node | None, details: tuple[object, ...]
    ) -> None:
        # The node whose own arguments differ does not count as found.
        matched = len(found.nodes) - (code in _OWN_ARGUMENTS)
        if self._miss is None or matched > self._missed:
            self._missed = matched
            self._miss = Decline(code, template, node, details, matched=self._missed)


_OWN_ARGUMENTS = ("other-constant", "operand-kind", "other-operand")


def _call_of(given: Any) -> Call | None:
    if not isinstance(given, Node) or not given.op.startswith("call"):
        return None
    call = read_call(given)
    return call if isinstance(call, Call) else None


def _candidates(operator: object, found: Found, depth: int) -> Iterator[Node]:
    """Nodes of an operator that read, directly or not, what has been found, nearest first."""
    taken = set(found.nodes.values())
    frontier = [*taken, *(operand for operand in found.operands.values() if isinstance(operand, Node))]
    seen = set(frontier)
    for _ in range(depth):
        users = [user for node in frontier for user in node.users if user not in seen]
        frontier = list(dict.fromkeys(users))
        seen.update(frontier)
        yield from (
            candidate
            for candidate in frontier
            if operator_of(candidate) == operator and candidate not in taken
        )


def same_operand(first: Any, second: Any) -> bool:
    """Whether two operands are the same; a parameter is, whichever node reads it."""
    if isinstance(first, ModuleTensor) and isinstance(second, ModuleTensor):
        return first.tensor is second.tensor
    if isinstance(first, Node) and isinstance(second, Node):
        return first is second or (first.op == second.op == "get_attr" and first.target == second.target)
    return type(first) is type(second) and bool(first == second)


def _equal(part: Any, given: Any, reader: Node) -> bool:
    """Whether two constants mean the same: 2 and 2.0 do, 1 and True do not; axis -1 is the last one."""
    if isinstance(given, Node):
        return False
    if isinstance(part, bool) or isinstance(given, bool) or part is None or given is None:
        return part is given
    if isinstance(part, int) and isinstance(given, int) and (part < 0) != (given < 0):
        return _same_axis(part, given, reader)
    return bool(part == given)


def _same_axis(part: int, given: int, reader: Node) -> bool:
    """Whether a negative and a positive number are the same axis of what the node reads."""
    axes = {"dim", "dims", "dim0", "dim1"}
    call = _call_of(reader)
    read = tensor(call.arguments.get("self")) if call is not None else None
    if call is None or read is None or not axes & call.arguments.keys():
        return False
    mentioned = [call.arguments[name] for name in axes & call.arguments.keys()]
    flat = [axis for one in mentioned for axis in (one if isinstance(one, (list, tuple)) else (one,))]
    return given in flat and part % read.ndim == given % read.ndim if read.ndim else False


def _is_tensor(given: Any) -> bool:
    return isinstance(given, ModuleTensor) or (
        isinstance(given, Node) and isinstance(value(given), torch.Tensor)
    )


def _is_number(given: Any) -> bool:
    held = value(given) if isinstance(given, Node) else given
    return isinstance(held, (int, float, torch.SymFloat, torch.SymInt)) and not isinstance(held, bool)


def operand_nodes(operands: Iterable[Any]) -> list[Operand]:
    """The tensors among what holes took."""
    return [operand for operand in operands if isinstance(operand, ModuleTensor) or _is_tensor(operand)]
