"""Strides that eager gives and torch's metadata does not tell.

A compiler lays results out as metadata says. On a CPU, eager's batch norm writes its result contiguous, or
channels-last where its input suggests that; the metadata (torch 2.11 to 2.15) have the strides of the input:

    norm(x.transpose(1, 2))    eager: contiguous    metadata: transposed

So a copy to eager's strides is written behind such a norm, and what follows gets its metadata from there. It
costs nothing where the norm runs as it is. Of 33 operators of torch.nn.functional, called with tensors in
every order of axes, with slices and with expanded tensors, batch norm is the one whose strides differ (and
max_pool1d in inference, for one order).

Of the gradient of a convolution's weight, metadata tell wrong strides in dimensions of size 1 where eager has
no kernel of a library, as for float64 on a CPU: eager's are then the weight's.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.levels import Level, called_by
from fxpasses.graph.metadata import set_value, tensor, value
from fxpasses.graph.names import base_name
from fxpasses.graph.schema import bind
from fxpasses.passes.layout.copies import strides_agree
from fxpasses.passes.layout.labels import Kind, kind_of
from fxpasses.rewrite.builder import Builder
from fxpasses.torch_internals.operators import convolution_kernel
from fxpasses.torch_internals.sizes import size_hint
from fxpasses.torch_internals.tensors import is_functorch_wrapped, suggest_memory_format

aten = torch.ops.aten

_NORMS = frozenset(
    {
        "batch_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_functional",
        "_native_batch_norm_legit_no_training",
        "BatchNorm1d",
        "SyncBatchNorm",
    }
)


def write_out_eagers_strides(context: GraphContext) -> None:
    """Has the batch norms of a graph say in which strides eager gives their results; changes it in place."""
    changed: set[Node] = set()
    covered: set[Node] = set()
    for node in list(context.graph.nodes):
        if not changed.isdisjoint(node.all_input_nodes) and node.op.startswith("call"):
            _recompute(context, node)
            changed.add(node)
        result = _result_of_norm(node)
        wanted = _format_in_eager(result) if result is not None and result not in covered else None
        if result is not None and wanted is not None:
            followers = _that_follow(result)
            covered.update(followers)
            changed.add(_lay_out(context, followers[-1], wanted))
    if changed:
        context.module.recompile()


def correct_weight_gradients(context: GraphContext) -> None:
    """Has a joint graph give the gradients of weights in eager's strides, and its metadata tell them.

    Where nothing follows, they are written out: what compiles the graph asks the same metadata again.
    """
    changed: set[Node] = set()
    for node in list(context.graph.nodes):
        if not changed.isdisjoint(node.all_input_nodes) and node.op.startswith("call"):
            _recompute(context, node)
            changed.add(node)
        right = _weight_gradient_in_eager(context, node)
        if right is None:
            continue
        of_input, _, of_bias = value(node)
        set_value(node, (of_input, right, of_bias), like=node)
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == 1:
                set_value(user, right, like=user)
                changed.add(user)
                _write_out(context, user, right)
    if changed:
        context.module.recompile()


def _write_out(context: GraphContext, gradient: Node, right: torch.Tensor) -> None:
    """Has the graph give a gradient with these strides, if it is a result."""
    results = [user for user in gradient.users if user.op == "output"]
    if results:
        arguments = (gradient, list(right.shape), list(right.stride()))
        written = Builder(context, gradient.next, gradient, rule="layout").call(
            aten.as_strided.default, arguments
        )
        for result in results:
            result.replace_input_with(gradient, written)


def _weight_gradient_in_eager(context: GraphContext, node: Node) -> torch.Tensor | None:
    """The gradient of a weight with eager's strides; None where metadata tell them."""
    bound = bind(node) if node.target is aten.convolution_backward.default else None
    if not isinstance(bound, dict):
        return None
    given, weight, gradient = tensor(bound["input"]), tensor(bound["weight"]), value(node)[1]
    if given is None or weight is None or gradient is None or given.device.type != "cpu":
        return None
    numbers = (*given.shape, *weight.shape, *weight.stride(), *gradient.stride())
    if not all(type(number) is int for number in numbers) or gradient.stride() == weight.stride():
        return None
    arguments = {name: bound[name] for name in _ARGUMENTS}
    evaluator = context.evaluator
    with evaluator.mode:
        kernel = convolution_kernel(
            evaluator.fake(given), evaluator.fake(weight), arguments, bound["bias_sizes"]
        )
    right = evaluator.with_strides(gradient, weight.stride())
    return right if kernel in _NATIVE and strides_agree(gradient, right) else None


_ARGUMENTS = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")

_NATIVE = ("Slow2d", "SlowTranspose2d")
"""The kernels that give a weight's gradient in the strides of the weight, whatever the input's are."""


def _result_of_norm(node: Node) -> Node | None:
    """A batch norm's result, given the norm, or what takes it out of the tuple that the norm gives."""
    if node.target is operator.getitem and node.args[1] == 0:
        parent = node.args[0]
        return node if isinstance(parent, Node) and base_name(parent) in _NORMS else None
    is_norm = node.op.startswith("call") and base_name(node) in _NORMS
    return node if is_norm and tensor(node) is not None else None


def _format_in_eager(result: Node) -> torch.memory_format | None:
    """The format in which eager gives a batch norm's result; None where that is what metadata say."""
    norm = result.args[0] if result.target is operator.getitem else result
    assert isinstance(norm, Node)
    given, found = tensor(norm.args[0] if norm.args else norm.kwargs.get("input")), tensor(result)
    if given is None or found is None or given.device.type != "cpu" or given.layout is not torch.strided:
        return None
    if is_functorch_wrapped(given):
        return None  # under vmap the tensor that the kernel sees has other axes
    hints = [[size_hint(number) for number in lengths] for lengths in (given.shape, given.stride())]
    example = torch.empty_strided(*hints, device="meta")
    wanted = suggest_memory_format(example)
    return None if example.is_contiguous(memory_format=wanted) else wanted


def _that_follow(node: Node) -> list[Node]:
    """A node and the norms and element-wise operators behind it, which are laid out as it is.

    The copy goes behind them, so that no rule finds it in the middle of what it folds.
    """
    followers = [node]
    while len(node.users) == 1:
        (user,) = node.users
        found, before = tensor(user), tensor(node)
        follows = kind_of(user) is Kind.AGNOSTIC or base_name(user) in _NORMS
        if not follows or found is None or before is None:
            break
        others = [tensor(operand) for operand in user.all_input_nodes if operand is not node]
        spread = [other for other in others if other is None or sum(size != 1 for size in other.shape) > 1]
        if spread or found.shape != before.shape or found.stride() != before.stride():
            break
        node = user
        followers.append(node)
    return followers


def _lay_out(context: GraphContext, node: Node, wanted: torch.memory_format) -> Node:
    """Has whoever reads a node read it in a format; gives the copy."""
    found = tensor(node)
    assert found is not None
    # Whether symbolic strides are contiguous is not asked, since the answer would be guarded.
    is_static = all(type(number) is int for number in (*found.shape, *found.stride()))
    build, options = Builder(context, node.next, node, rule="layout"), {"memory_format": wanted}
    if context.level is Level.TORCH:
        laid_out = build.call("contiguous" if is_static else "clone", (node,), options)
    else:
        copies = context.level is Level.ATEN or not is_static
        laid_out = build.call(aten.clone.default if copies else aten.contiguous.default, (node,), options)
    node.replace_all_uses_with(laid_out, lambda user: user is not laid_out)
    return laid_out


def _recompute(context: GraphContext, node: Node) -> None:
    """Gives a node the metadata that its operands' new strides lead to."""
    function = called_by(context.module, node)
    if not callable(function) or tensor(node) is None:
        return
    with context.modes(node).entered():
        set_value(node, context.evaluator.call(function, node.args, dict(node.kwargs)), like=node)
