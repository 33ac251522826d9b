"""The only module of the benchmarks that imports private names of torch.

Each function says which names it rests on. They exist in torch 2.11 to 2.15 unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

import torch
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

if TYPE_CHECKING:
    from torch._inductor.pattern_matcher import PatternMatcherPass

Module = TypeVar("Module", bound=torch.nn.Module)


def fake_copy(module: Module) -> tuple[FakeTensorMode, Module]:
    """A copy of `module` whose parameters and buffers have shapes but no values, and the mode they need."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        return mode, copy.deepcopy(module)


def tree_leaves(tree: object) -> list[object]:
    """The leaves of nested containers, model outputs of transformers among them (`torch.utils._pytree`)."""
    from torch.utils._pytree import tree_leaves as leaves

    return list(leaves(tree))


def set_inductor_config(**values: bool) -> None:
    """Sets fields of `torch._inductor.config` for the rest of this process."""
    from torch._inductor import config

    for name, value in values.items():
        if not hasattr(config, name):
            raise AttributeError(f"torch {torch.__version__} has no torch._inductor.config.{name}")
        setattr(config, name, value)


def rewrite_counts() -> dict[str, dict[str, int]]:
    """How often each rewrite fired so far, of inductor and of fxpasses (`torch._dynamo.utils.counters`)."""
    from torch._dynamo.utils import counters

    return {kind: dict(counters[kind]) for kind in ("inductor", "fxpasses") if counters.get(kind)}


def captured_graphs() -> int:
    """How many graphs Dynamo captured in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def generated_graphs() -> int:
    """How many graphs inductor generated code for in this process, as no cache had them."""
    from torch._dynamo.utils import counters

    return sum(counters["inductor"][f"fxgraph_cache_{what}"] for what in ("miss", "bypass"))


def mark_dynamic(tensor: torch.Tensor, dimensions: tuple[int, ...]) -> None:
    """Makes Dynamo trace these dimensions with symbols (`torch._dynamo.mark_dynamic`)."""
    from torch._dynamo import mark_dynamic as mark

    for dimension in dimensions:
        mark(tensor, dimension)


def preload_compiler() -> None:
    """Imports inductor, so that its modules do not count as memory or compile time of a model."""
    import torch._dynamo.backends.inductor
    import torch._inductor.compile_fx  # noqa: F401


def tensors_saved_by(node: object) -> list[torch.Tensor]:
    """The tensors that a node of the autograd graph holds for its backward.

    C++ nodes show them as `_saved_*`; autograd Functions as `saved_tensors`; the Function of AOTAutograd
    holds those that need no version check in the attribute `_tensors_no_vc_check` (torch >= 2.11). What any
    Function keeps as a plain attribute counts as well: it is held just as long.
    """
    held: list[object] = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        held += [node.saved_tensors, *vars(node).values()]
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor)]


def inductor_compile(
    graph: torch.fx.GraphModule, inputs: list[torch.Tensor], patches: Mapping[str, object]
) -> Callable[..., Sequence[object]]:
    """Compiles a graph by inductor without Dynamo (`torch._inductor.compile_fx.compile_fx`)."""
    from torch._inductor.compile_fx import compile_fx

    compiled = cast(
        "Callable[..., Sequence[object]]", compile_fx(graph, inputs, config_patches=dict(patches))
    )
    if not patches.get("triton.cudagraphs") or not any(tensor.is_cuda for tensor in inputs):
        return compiled

    def begun_anew(*tensors: torch.Tensor) -> Sequence[object]:
        # Dynamo says so at each call. Without it, a call would be recorded as what follows the one before.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return compiled(*tensors)

    return begun_anew


def inductor_setting_types() -> dict[str, object]:
    """The names of inductor's settings, and the type of each (`torch._inductor.config.get_type`)."""
    from torch._inductor import config

    return {name: config.get_type(name) for name in config.get_config_copy()}  # type: ignore[attr-defined]  # made at run time


def registered_backend(name: str) -> Callable[..., Callable[..., Sequence[object]]]:
    """The backend that torch.compile knows by this name (`torch._dynamo.lookup_backend`)."""
    from torch._dynamo import lookup_backend

    return cast("Callable[..., Callable[..., Sequence[object]]]", lookup_backend(name))


class _Lowered(Exception):  # noqa: N818  # it carries a result out of the compiler; nothing went wrong
    def __init__(self, operators: list[object]) -> None:
        self.operators = operators


def operators_for_inductor(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> list[object]:
    """What is left of a graph when inductor begins to lower it: its operators after decomposition.

    Rests on `compile_fx`'s `inner_compile`; the cache of AOTAutograd would pass it by.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    def stop(lowered: torch.fx.GraphModule, *_: object, **__: object) -> NoReturn:
        raise _Lowered([node.target for node in lowered.graph.nodes if node.op == "call_function"])

    with config.patch(enable_autograd_cache=False):
        try:
            compile_fx(graph, inputs, inner_compile=stop)
        except _Lowered as lowered:
            return lowered.operators
    raise RuntimeError(f"torch {torch.__version__} compiled a graph without its inner compiler")


def has_inductor_lowering(operator: object) -> bool:
    """Whether inductor generates code for an operator, or chooses its kernel, rather than call ATen's own.

    Rests on `torch._inductor.lowering.lowerings` and the mark `_is_fallback_handler` of those that fall back.
    """
    from torch._inductor.lowering import lowerings

    table = cast("Mapping[object, object]", lowerings)
    lowering = table.get(operator) or table.get(getattr(operator, "overloadpacket", None))
    return lowering is not None and not getattr(lowering, "_is_fallback_handler", False)


def operator_arguments(name: str, count: int) -> list[str] | None:
    """The names of the arguments of the one overload of an operator that has so many, if it is one.

    Rests on `OpOverload._schema`.
    """
    namespace, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), operator)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    found = [[argument.name for argument in schema.arguments] for schema in schemas]
    fitting = [names for names in found if len(names) == count and "out" not in names]
    return fitting[0] if len(fitting) == 1 else None


def tree_map_only(kind: type, function: Callable[..., object], tree: object) -> object:
    """Nested containers with every leaf of one type replaced (`torch.utils._pytree`)."""
    from torch.utils._pytree import tree_map_only as map_only

    return cast(object, map_only(kind, function, tree))


def tree_map_leaves(function: Callable[[object], object], tree: object) -> object:
    """Nested containers with every leaf replaced (`torch.utils._pytree`)."""
    from torch.utils._pytree import tree_map

    return cast(object, tree_map(function, tree))


@contextlib.contextmanager
def visible_cpu_kernels() -> Iterator[None]:
    """Kernels that inductor generates for CPUs while this is active appear in profiles by their names.

    Rests on `torch._inductor.config.cpp.enable_kernel_profile`.
    """
    from torch._inductor import config

    with config.patch({"cpp.enable_kernel_profile": True}):
        yield


def pattern_matcher_pass(check: Callable[[object], bool]) -> PatternMatcherPass:
    """Inductor's matcher for relu(neg(x) * sigmoid(x)); a match that `check` refuses is left alone.

    The pattern is spelled out instead of traced (`register_replacement`), since inductor traces a traced one
    again at every match, which would be most of what a benchmark of matching measures.
    """
    from torch._inductor import pattern_matcher as inductor

    aten = torch.ops.aten
    given = inductor.KeywordArg("x")
    negative = inductor.CallFunction(aten.neg.default, given)
    gate = inductor.CallFunction(aten.sigmoid.default, given)
    product = inductor.CallFunction(aten.mul.Tensor, negative, gate)
    matcher = inductor.PatternMatcherPass()

    @inductor.register_graph_pattern(
        inductor.CallFunction(aten.relu.default, product), extra_check=check, pass_dict=matcher
    )
    def refused(match: object, x: object) -> NoReturn:
        raise AssertionError("every match is refused")

    return matcher
