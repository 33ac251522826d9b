"""Metadata: the fake tensor that every node carries, and how new nodes get theirs.

Dynamo writes `meta["example_value"]`, make_fx and export write `meta["val"]`; both hold a fake tensor (or a
nest of them), with static or symbolic sizes. fxpasses reads either and leaves `meta["val"]` on every node.
Under make_fx with real inputs every value has a fake mode of its own, which torch refuses to mix:
`FakeEvaluator` carries them into one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxpasses.errors import MissingMetadataError
from fxpasses.graph.levels import attribute, nested_graphs
from fxpasses.graph.strides import are_dense
from fxpasses.torch_internals.fake_tensors import (
    FakeTensor,
    FakeTensorMode,
    guard_count,
    new_fake_mode,
    without_fake_tensors,
)
from fxpasses.torch_internals.operators import is_elementwise
from fxpasses.torch_internals.pytree import tree_leaves, tree_map_only
from fxpasses.torch_internals.tensors import is_functorch_wrapped, storage_key, unwrap_functorch
from fxpasses.torch_internals.tracing import enable_python_dispatcher


def has_value(node: Node) -> bool:
    """Whether the node carries metadata (which may be None, for a node that returns nothing)."""
    return "val" in node.meta or "example_value" in node.meta


def value(node: Node) -> Any:
    """The node's metadata: a fake tensor, a nest of them, a number, or None."""
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def tensor(node: object) -> torch.Tensor | None:
    """The node's metadata if it is one tensor."""
    found = value(node) if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def set_value(node: Node, new: Any, *, like: Node | None = None) -> None:
    """Gives a node its metadata, under both names where the graph is Dynamo's (as `like` tells)."""
    node.meta["val"] = new
    if like is not None and "example_value" in like.meta:
        node.meta["example_value"] = new


class FakeEvaluator:
    """Runs operators on the metadata of their arguments, in one fake mode for the whole graph.

    A fake tensor's dispatch costs about as much as a small kernel, and a network repeats itself: the same
    function on arguments of the same metadata gives the same metadata, so it is computed once.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._mode = _fake_mode_of(graph_module)
        self._converted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._known: dict[object, _Result] = {}
        self._interned: dict[_Spec, int] = {}
        self._specs: dict[int, tuple[torch.Tensor, int]] = {}

    @property
    def mode(self) -> FakeTensorMode:
        """The fake mode that it computes in."""
        return self._mode

    @property
    def guard_count(self) -> int:
        """How many guards and run-time assertions the graph's sizes have gathered."""
        return guard_count(self._mode)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The metadata of `function(*args, **kwargs)`, where nodes among the arguments stand for theirs."""
        operands: list[torch.Tensor] = []

        def faked(node: Node) -> Any:
            held = value(node)
            if not isinstance(held, torch.Tensor):
                return tree_map_only(torch.Tensor, self.fake, held)
            operands.append(self.fake(held))
            return operands[-1]

        args, kwargs = map_arg((args, kwargs), faked)
        key = self._key(function, args, kwargs)
        known = self._known.get(key) if key is not None else None
        if known is not None:
            return self._built(known)
        with self._mode, _keeping_symbols(operands):
            result = _run(function, args, kwargs, operands)
        if key is not None and _is_new(result, operands):
            with contextlib.suppress(TypeError):
                self._known[key] = (
                    _Spec.of(result)
                    if isinstance(result, torch.Tensor)
                    else tuple(None if part is None else _Spec.of(part) for part in result)
                )
        return result

    def laid_out_anew(
        self, function: object, args: Sequence[Any], kwargs: Mapping[str, Any], before: object
    ) -> torch.Tensor | None:
        """What `call` gives where only the operands' strides are others than when it gave `before`.

        Element-wise operators follow a rule, which is cheaper than a fake tensor's dispatch: where the
        operands of the result's shape all have the same dense strides, so has the result, if the others vary
        along one dimension at most. (Dimensions are ordered by the strides of one operand after the other,
        and strides of 0 and dimensions of size 1 decide nothing.) None where the rule does not say.
        """
        if not isinstance(before, FakeTensor) or not is_elementwise(function) or torch.is_grad_enabled():
            return None
        operands = (*args, *kwargs.values())
        if "memory_format" in kwargs or any(isinstance(operand, (tuple, list)) for operand in operands):
            return None
        found: torch.Tensor | None = None
        for operand in [given for given in map(tensor, operands) if given is not None]:
            shape = operand.shape
            if not all(type(number) is int for number in (*shape, *operand.stride())):
                return None
            if shape == before.shape:
                if found is not None and operand.stride() != found.stride():
                    return None
                found = operand
            elif sum(size != 1 for size in shape) > 1:
                return None
        # The strides of dimensions of size 1 say nothing, and may be others in the result.
        if found is None or min(found.shape, default=0) <= 1:
            return None
        sizes, strides = tuple(before.shape), found.stride()
        if not are_dense(sizes, strides):
            return None
        spec = _Spec(sizes, strides, before.dtype, before.device, False)
        return cast(torch.Tensor, self._built(spec))

    def with_strides(self, given: torch.Tensor, strides: Sequence[int | torch.SymInt]) -> torch.Tensor:
        """A tensor like `given` with other strides."""
        with self._mode:
            return torch.empty_strided(given.shape, strides, dtype=given.dtype, device=given.device)

    def _built(self, known: _Result) -> Any:
        """A result of a known description."""
        if known is None or isinstance(known, tuple):
            return None if known is None else tuple(map(self._built, known))
        result = known.build(self._mode)
        self._describe(result, known)
        return result

    def _key(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> object:
        """What the metadata of a call depends on; None where it is not known to depend on that alone."""
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return None
        try:
            operands = self._hashable(args), self._hashable(tuple(sorted(kwargs.items())))
            key = (function, operands, torch.is_grad_enabled())
            hash(key)
        except TypeError:
            return None
        return key

    def _hashable(self, given: Any) -> object:
        if isinstance(given, FakeTensor):
            known = self._specs.get(id(given))
            return known[1] if known is not None else self._describe(given, _Spec.of(given))
        if isinstance(given, (tuple, list)):
            return tuple([self._hashable(part) for part in given])
        # 1, 1.0 and True are equal keys and different arguments; a tensor's number is neither.
        return (type(given), given)

    def _describe(self, given: torch.Tensor, spec: _Spec) -> int:
        """A number that equals those of tensors of the same description."""
        number = self._interned.setdefault(spec, len(self._interned))
        # The tensor is kept beside its number, since its id is the key.
        self._specs[id(given)] = (given, number)
        return number

    def fake(self, given: torch.Tensor) -> torch.Tensor:
        """`given` as a fake tensor of this evaluator's mode."""
        plain = unwrap_functorch(given) if is_functorch_wrapped(given) else given
        if isinstance(plain, FakeTensor) and plain.fake_mode is self._mode:
            return plain
        if id(plain) not in self._converted:
            # The original is kept beside its copy, since its id is the key.
            self._converted[id(plain)] = (plain, self._convert(plain))
        return self._converted[id(plain)][1]

    def _convert(self, plain: torch.Tensor) -> torch.Tensor:
        if not isinstance(plain, FakeTensor):
            return self._mode.from_tensor(plain, static_shapes=True)
        with self._mode:
            return torch.empty_strided(
                plain.size(),
                plain.stride(),
                dtype=plain.dtype,
                device=plain.device,
                requires_grad=plain.requires_grad,
            )


def _keeping_symbols(operands: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
    """A block in which an operator that decomposes keeps the symbols of its operands' sizes.

    In C++ some, such as `pad`, take the numbers that stood for the symbols when the graph was traced.
    """
    numbers = (number for operand in operands for number in (*operand.shape, *operand.stride()))
    is_symbolic = any(type(number) is not int for number in numbers)
    return enable_python_dispatcher() if is_symbolic else contextlib.nullcontext()


def _run(
    function: Callable[..., Any], args: Any, kwargs: dict[str, Any], operands: Sequence[torch.Tensor]
) -> Any:
    """Calls the function, which may write to a result that was made from its description.

    Such a result is a leaf that requires grad, as the computed one is not, and autograd refuses to write to
    leaves. What is written to is returned, so that its metadata is right without autograd too.
    """
    try:
        return function(*args, **kwargs)
    except RuntimeError:
        if not any(operand.is_leaf and operand.requires_grad for operand in operands):
            raise
        with torch.no_grad():
            result = function(*args, **kwargs)
        if not any(result is operand for operand in operands):
            raise
        return result


@dataclass(frozen=True)
class _Spec:
    """All that a fake tensor of static sizes is."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(given: torch.Tensor) -> _Spec:
        size, stride = tuple(given.size()), tuple(given.stride())
        if given.layout != torch.strided or not all(type(length) is int for length in size):
            raise TypeError("a tensor whose sizes are symbols, or that has no strides")
        return _Spec(size, stride, given.dtype, given.device, given.requires_grad)

    def build(self, mode: FakeTensorMode) -> torch.Tensor:
        """A fake tensor of this description."""
        with without_fake_tensors():  # else a mode that is active would make a fake one of it first
            meta = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")
        result = FakeTensor(mode, meta, self.device)
        return result.requires_grad_() if self.requires_grad else result


_Result: TypeAlias = "_Spec | tuple[_Spec | None, ...] | None"


def _is_new(result: Any, operands: Sequence[torch.Tensor]) -> bool:
    """Whether a result is a fake tensor of a storage of its own, or a tuple of such."""
    found = [part for part in result if part is not None] if type(result) is tuple else [result]
    if not all(isinstance(part, FakeTensor) and part.storage_offset() == 0 for part in found):
        return False
    own = {storage_key(part) for part in found}
    return len(own) == len(found) and own.isdisjoint(map(storage_key, operands))


def _fake_mode_of(graph_module: GraphModule) -> FakeTensorMode:
    """The mode of the graph's values; one with a shape environment wins, since its sizes may be symbols."""
    found: FakeTensorMode | None = None
    for node in graph_module.graph.nodes:
        held = tensor(node)
        plain = held if held is None or isinstance(held, FakeTensor) else unwrap_functorch(held)
        if isinstance(plain, FakeTensor):
            found = found or plain.fake_mode
            if plain.fake_mode.shape_env is not None:
                return plain.fake_mode
    return found or new_fake_mode()


def ensure_metadata(graph_module: GraphModule, example_inputs: Sequence[Any] | None) -> None:
    """Fills in `meta["val"]` of every node, from what is there or by running the graph on fake tensors.

    Args:
        graph_module: the graph; its nodes' metadata is written.
        example_inputs: one value per placeholder, real or fake; needed when values are missing.

    Raises:
        MissingMetadataError: values are missing and no example inputs were given, or they do not fit.
    """
    _adopt_example_values(graph_module)
    _fill_attributes(graph_module)
    missing = [node for node in graph_module.graph.nodes if _lacks_value(node)]
    if not missing:
        return
    if example_inputs is None:
        raise MissingMetadataError(
            f"{len(missing)} of {len(graph_module.graph.nodes)} nodes carry no metadata (the first: "
            f"{missing[0].format_node()}) and no example inputs were given. Pass example_inputs, one per "
            "placeholder, or trace with make_fx or torch.export, which record metadata."
        )
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    required = [node for node in placeholders if not node.args]
    if not len(required) <= len(example_inputs) <= len(placeholders):
        names = ", ".join(node.name for node in placeholders)
        raise MissingMetadataError(
            f"the graph has {len(placeholders)} placeholders ({names}) and {len(example_inputs)} example "
            "inputs were given; give one per placeholder, in that order."
        )
    _FakeInterpreter(graph_module, new_fake_mode()).propagate(example_inputs)


def _adopt_example_values(graph_module: GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if "val" not in node.meta and "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    for _, child, _ in nested_graphs(graph_module):
        _adopt_example_values(child)


def _fill_attributes(graph_module: GraphModule) -> None:
    """A parameter or constant that a tracer left without metadata has it by itself."""
    mode: FakeTensorMode | None = None
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if has_value(node):
            continue
        found = attribute(graph_module, str(node.target))
        if isinstance(found, torch.Tensor) and any(map(has_value, graph_module.graph.nodes)):
            mode = mode or _fake_mode_of(graph_module)
            is_own = isinstance(found, FakeTensor)
            node.meta["val"] = found if is_own else mode.from_tensor(found, static_shapes=True)


def _lacks_value(node: Node) -> bool:
    """Whether a tensor may hide behind a node without metadata."""
    if has_value(node) or node.op == "output" or not node.users:
        return False
    if node.op == "get_attr":
        owner = node.graph.owning_module
        return not isinstance(attribute(owner, str(node.target)) if owner else None, torch.nn.Module)
    # A mode switch returns a handle, not a tensor, and its users are the switches back.
    return not all("autocast" in str(user.target) or "_exit" in str(user.target) for user in node.users)


class _FakeInterpreter(Interpreter):
    """Runs a graph on fake tensors and writes every node's metadata."""

    def __init__(self, graph_module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module)
        self._mode = mode

    def propagate(self, example_inputs: Sequence[Any]) -> None:
        shared = next(
            (leaf for leaf in tree_leaves(list(example_inputs)) if isinstance(leaf, FakeTensor)), None
        )
        if shared is not None:
            self._mode = shared.fake_mode
        inputs = tree_map_only(torch.Tensor, self._fake, list(example_inputs))
        with torch.random.fork_rng(devices=()), self._mode:
            self.run(*inputs)

    def _fake(self, given: torch.Tensor) -> torch.Tensor:
        return given if isinstance(given, FakeTensor) else self._mode.from_tensor(given, static_shapes=True)

    def run_node(self, n: Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise MissingMetadataError(
                f"the example inputs do not run: {n.format_node()} raised {type(error).__name__}: {error}"
            ) from error
        n.meta["val"] = result
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        return self._fake(found) if isinstance(found, torch.Tensor) else found

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A leaf module runs with fake parameters, so that its buffers stay as they are."""
        module = self.fetch_attr(str(target))
        state = {
            name: self._fake(held) for name, held in [*module.named_parameters(), *module.named_buffers()]
        }
        return torch.func.functional_call(cast(torch.nn.Module, module), state, args, kwargs)
