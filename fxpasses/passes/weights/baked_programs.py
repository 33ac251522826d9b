"""Baked weights in what a user holds: an exported program, or a graph module with parameters of its own.

    inputs of the graph    p_conv_weight, b_bn_running_var, x    ->    b_baked_conv_weight_bn, x
    state dict             conv.weight, bn.running_var           ->    baked_conv_weight_bn

Constants are buffers, so that they are saved, moved and exported as other weights are. Parameters and buffers
that nothing reads any more are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import GraphModule, Node

from fxpasses.errors import FxpassesError
from fxpasses.graph.context import GraphContext
from fxpasses.graph.copying import copy_graph_module
from fxpasses.graph.inlining import inline_grad_modes
from fxpasses.graph.levels import attribute
from fxpasses.graph.metadata import set_value
from fxpasses.graph.modes import Modes
from fxpasses.passes.weights.baked import Constant, constants_of, erase_unread, refuse_written
from fxpasses.passes.weights.idle_calls import drop_idle_calls
from fxpasses.torch_internals.fake_tensors import FakeTensor

_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Held:
    """What an exported program has beside its graph.

    Attributes:
        signature: what the graph's inputs and results are.
        state_dict: parameters and persistent buffers, by name.
        constants: other buffers and constants, by name.
    """

    signature: ExportGraphSignature
    state_dict: Mapping[str, Any]
    constants: Mapping[str, Any]

    @staticmethod
    def of(program: ExportedProgram) -> Held:
        """What a program has."""
        return Held(program.graph_signature, program.state_dict, program.constants)

    def at(self, spec: InputSpec) -> Any:
        """What the graph is given for an input that is none of the user's."""
        assert spec.target is not None
        return self.state_dict.get(spec.target, self.constants.get(spec.target))

    def tensors(self) -> dict[str, tuple[str, torch.Tensor]]:
        """Parameters, buffers and constants by the name of their placeholder: their own names and values."""
        found: dict[str, tuple[str, torch.Tensor]] = {}
        for spec in self.signature.input_specs:
            if spec.kind in _TENSORS and isinstance(spec.arg, TensorArgument):
                tensor = self.at(spec)
                if isinstance(tensor, torch.Tensor):
                    found[spec.arg.name] = (str(spec.target), tensor)
        return found

    def by_placeholder(self) -> dict[str, torch.Tensor]:
        """The tensors by the name of their placeholder."""
        return {name: tensor for name, (_, tensor) in self.tensors().items()}


def ready_to_bake(program: ExportedProgram | GraphModule) -> GraphModule:
    """The graph of a program whose weights can be baked, without grad modes; nothing is changed.

    Raises:
        FxpassesError: it writes to a parameter or buffer, or gives a loss or gradients.
    """
    if isinstance(program, GraphModule):
        refuse_written(GraphContext(program, Modes(grad=False)), _tensors_of(program))
        return inline_grad_modes(program)
    for spec in program.graph_signature.output_specs:
        if problem := _training_output(spec):
            raise FxpassesError(
                f"weights='baked' is for inference, and {problem}. Export the model in eval mode, for its "
                "forward pass alone."
            )
    held = Held.of(program)
    graph_module = inline_grad_modes(program.graph_module)
    context = GraphContext(graph_module, Modes(grad=False), held=held.by_placeholder())
    refuse_written(context, dict(held.tensors().values()))
    return graph_module


def _training_output(spec: OutputSpec) -> str:
    """What a result says of training; nothing where it is the user's."""
    name = getattr(spec.arg, "name", "a result")
    if spec.kind in (OutputKind.USER_OUTPUT, OutputKind.USER_INPUT_MUTATION, OutputKind.TOKEN):
        return ""
    if spec.kind is OutputKind.LOSS_OUTPUT:
        return f"{name} is the program's loss"
    if "MUTATION" in spec.kind.name:
        return f"{name} is written to {spec.target} at every call"
    return f"{name} is the gradient of {spec.target}"


def bake_program(graph_module: GraphModule, held: Held) -> tuple[Held, list[Constant]]:
    """Bakes the weights of an exported program.

    Args:
        graph_module: its graph, which is changed.
        held: what it has beside the graph.

    Returns:
        What it has then, and the constants that were stored.
    """
    tensors = held.tensors()
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    sources = {
        node: tensors[node.name][1]
        for node in placeholders
        if node.name in tensors and _is_plain(tensors[node.name][1])
    }
    drop_idle_calls(graph_module, sources)
    context = GraphContext(graph_module, Modes(grad=False), held=held.by_placeholder())
    constants, stable = constants_of(context, sources)
    inputs = list(held.signature.input_specs)
    position = _behind_buffers(inputs)
    first = next(node for node in graph_module.graph.nodes if node.op != "placeholder")
    before = [*placeholders, first][position]
    taken = {*held.state_dict, *held.constants}
    state, specs = dict(held.state_dict), []
    for constant in constants:
        target = _unused(name_of([tensors[source.name][0] for source in constant.made_of]), taken)
        with context.graph.inserting_before(before):
            node = context.graph.placeholder("b_" + target.replace(".", "_"))
        node.target = node.name
        _read_instead(context, constant, node)
        state[target] = constant.value
        specs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), target, persistent=True))
    inputs[position:position] = specs
    erase_unread(context, stable)
    signature = replace(held.signature, input_specs=inputs)
    return _without_unread(context, Held(signature, state, held.constants)), constants


def bake_module(graph_module: GraphModule) -> tuple[GraphModule, list[Constant]]:
    """Bakes the weights that a graph module has itself.

    Args:
        graph_module: a copy, which is changed; its parameters are the user's.

    Returns:
        A module that has what its graph reads, and the constants that were stored.
    """
    sources: dict[str, Node] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        first = sources.setdefault(str(node.target), node)
        if node is not first:
            node.replace_all_uses_with(first)
            graph_module.graph.erase_node(node)
    own = {name: tensor for name, tensor in _tensors_of(graph_module).items() if _is_plain(tensor)}
    values = {node: own[path] for path, node in sources.items() if path in own}
    drop_idle_calls(graph_module, values)
    context = GraphContext(graph_module, Modes(grad=False))
    constants, stable = constants_of(context, values)
    taken = {name for name, _ in graph_module.named_children()} | set(own)
    for constant in constants:
        wanted = name_of([str(source.target) for source in constant.made_of]).replace(".", "_")
        name = _unused(wanted, taken)
        graph_module.register_buffer(name, constant.value)
        with context.graph.inserting_before(constant.node):
            node = context.graph.get_attr(name)
        _read_instead(context, constant, node)
    erase_unread(context, stable)
    return copy_graph_module(graph_module), constants


def _tensors_of(graph_module: GraphModule) -> dict[str, torch.Tensor]:
    """The parameters, buffers and plain tensors that a graph module and its modules have, by path."""
    found: dict[str, torch.Tensor] = dict(graph_module.named_parameters(remove_duplicate=False))
    found.update(graph_module.named_buffers(remove_duplicate=False))
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = attribute(graph_module, str(node.target))
        if isinstance(value, torch.Tensor):
            found[str(node.target)] = value
    return found


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is stored as numbers; of one that has only metadata, whether it stands for such."""
    is_known = type(tensor) in _PLAIN or isinstance(tensor, FakeTensor)
    return is_known and tensor.layout is torch.strided


def _behind_buffers(inputs: Sequence[InputSpec]) -> int:
    """The position behind parameters and buffers; what follows are constants and the user's inputs."""
    kinds = [spec.kind for spec in inputs]
    first = (InputKind.TOKEN, InputKind.PARAMETER, InputKind.BUFFER)
    return max((position + 1 for position, kind in enumerate(kinds) if kind in first), default=0)


def _read_instead(context: GraphContext, constant: Constant, node: Node) -> None:
    """Has whoever reads the node of a constant read another one, which gives the constant."""
    set_value(node, context.evaluator.fake(constant.value), like=constant.node)
    constant.node.replace_all_uses_with(node)


def _without_unread(context: GraphContext, held: Held) -> Held:
    """Drops the parameters, buffers and constants that nobody reads, from the graph too."""
    inputs = []
    placeholders = context.graph.find_nodes(op="placeholder")
    for spec, node in zip(held.signature.input_specs, placeholders, strict=True):
        if spec.kind in _TENSORS and not node.users:
            context.graph.erase_node(node)
        else:
            inputs.append(spec)
    context.module.recompile()
    read = {spec.target for spec in inputs}
    state, constants = (
        {name: value for name, value in given.items() if name in read}
        for given in (held.state_dict, held.constants)
    )
    return Held(replace(held.signature, input_specs=inputs), state, constants)


_MOST = 3
"""How many modules the name of a constant has at most."""


def name_of(sources: Sequence[str]) -> str:
    """A name that says what a constant was made of, in the module that holds all of that.

    ``layer1.0.conv1.weight`` and two or more of ``layer1.0.bn1`` give ``layer1.0.baked_conv1_weight_bn1``.
    """
    modules: dict[str, list[str]] = {}
    for source in sources:
        module, _, name = source.rpartition(".")
        modules.setdefault(module, []).append(name)
    parts: list[list[str]] = []
    for module, names in modules.items():
        whole = module and len(names) > 1
        parts += [module.split(".")] if whole else [[*module.split("."), name] for name in names]
    parts = [[word for word in part if word] for part in parts]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    labels = ["_".join(part[shared:]) for part in parts]
    more = [f"and_{len(labels) - _MOST}_more"] if len(labels) > _MOST else []
    baked = re.sub(r"\W", "_", "_".join(["baked", *labels[:_MOST], *more]))
    return ".".join([*parts[0][:shared], baked])


def _unused(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where it is taken; it is taken then."""
    found, number = name, 1
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    taken.add(found)
    return found
