"""Hypothesis strategies of models around a pattern: what a rule must rewrite, and near misses.

`around(rule)` takes a declarative rule's pattern, puts operators before and after it, and bends it: a value
of its inside that is read elsewhere, an operand that is written on the way, other dtypes. `conv_bn()` builds
what efficient_conv_bn_eval is for, and what looks like it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule, Node

from fxpasses.graph.levels import Level
from fxpasses.rewrite.declarative import DeclarativeRule
from fxpasses.rewrite.recording import fake_of, record
from fxpasses.testing.captures import LEVELS
from fxpasses.testing.fuzzing import Specimen
from fxpasses.torch_internals import new_fake_mode

_SHAPE_KEEPING: tuple[tuple[Callable[..., Any], tuple[float, ...]], ...] = (
    (torch.sin, ()),
    (torch.tanh, ()),
    (torch.mul, (1.5,)),
    (torch.add, (0.25,)),
    (torch.nn.functional.softplus, ()),
)
"""What stands before and after a pattern; smooth, since gradients are compared."""

WRITES_SURVIVE = ("torch", "symbolic_trace", "pre_dispatch", "export")
"""Levels whose graphs keep in-place operators; below, a write is a new tensor, and a rewrite is right."""


# Declarative rules -----------------------------------------------------------------------------------------


@st.composite
def around(draw: st.DrawFn, rule: DeclarativeRule) -> Specimen:
    """Models around a declarative rule's pattern.

    The rule's `check` must accept its own examples. A pattern of one operator has no inside to bend.
    """
    example = draw(st.sampled_from(rule.examples))
    steps = st.lists(st.integers(0, len(_SHAPE_KEEPING) - 1), min_size=1, max_size=3)
    before, after, seed = draw(steps), draw(steps), draw(st.integers(0, 2**16))
    graph = _pattern_graph(rule, example)
    inside = [node for node in graph.nodes if node.op.startswith("call") and not _is_returned(node)]
    kinds = ["plain", "plain", "float32", *(["extra-user", "written"] if inside else [])]
    kind = draw(st.sampled_from(kinds))
    levels: tuple[str, ...] = LEVELS
    if kind == "extra-user":
        _return_too(graph, draw(st.sampled_from(inside)))
    elif kind == "written":
        node = draw(st.sampled_from(inside))
        levels = WRITES_SURVIVE if _write_after(graph, node) else ()
    _surround(graph, before, after)
    inputs = _random_inputs(example, seed, torch.float32 if kind == "float32" else torch.float64)
    code = {"extra-user": "multiple-users", "written": "mutation"}.get(kind)
    count = 1 if code is None else 0
    return Specimen(kind, GraphModule(nn.Module(), graph), inputs, count, code, levels, kind != "written")


def _pattern_graph(rule: DeclarativeRule, example: dict[str, Any]) -> torch.fx.Graph:
    return record(rule.pattern, fake_of(example, mode := new_fake_mode()), Level.TORCH, mode)


def _surround(graph: torch.fx.Graph, before: list[int], after: list[int]) -> None:
    """Puts operators between the inputs and the pattern, and between the pattern and the outputs."""
    for node in graph.find_nodes(op="placeholder"):
        readers = list(node.users)
        with graph.inserting_before(min(readers)):
            through = _chain(graph, node, before)
        node.replace_all_uses_with(through, delete_user_cb=lambda user, readers=readers: user in readers)
    output = graph.find_nodes(op="output")[0]
    returned = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    with graph.inserting_before(output):
        output.args = (tuple(_chain(graph, each, after) for each in returned),)


def _chain(graph: torch.fx.Graph, node: Any, steps: list[int]) -> Node:
    for step in steps:
        function, constants = _SHAPE_KEEPING[step]
        node = graph.call_function(function, (node, *constants))
    assert isinstance(node, Node)
    return node


def _is_returned(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _return_too(graph: torch.fx.Graph, node: Node) -> None:
    """Makes an inner value one of the results."""
    output = graph.find_nodes(op="output")[0]
    returned = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    output.args = ((*returned, node),)


def _write_after(graph: torch.fx.Graph, node: Node) -> bool:
    """Writes to a copy of an operand of the pattern after an inner node, if the operand is read before it."""
    operand = next((each for each in node.all_input_nodes if each.op == "placeholder"), None)
    if operand is None:
        return False
    with graph.inserting_before(min(user for user in operand.users)):
        copied = graph.call_method("clone", (operand,))
    operand.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)
    with graph.inserting_after(node):
        graph.call_method("add_", (copied, 0.5))
    return True


def _random_inputs(example: dict[str, Any], seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [each for each in example.values() if isinstance(each, torch.Tensor)]
    made = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in tensors]
    return tuple(
        each.to(dtype).requires_grad_() if given.is_floating_point() else given
        for each, given in zip(made, tensors, strict=True)
    )


# efficient_conv_bn_eval ------------------------------------------------------------------------------------

_CONVOLUTIONS = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _ConvBn(nn.Module):
    """A convolution and a batch norm, bent in one way or not at all."""

    def __init__(self, producer: nn.Module, norm: nn.Module, kind: str) -> None:
        super().__init__()
        self.producer, self.norm, self.kind = producer, norm, kind

    def forward(self, x: torch.Tensor) -> Any:
        # A new tensor, so that writing to it is nobody else's business.
        x = torch.tanh(x)
        produced = self.producer(x)
        if self.kind == "written":
            x.add_(0.5)
        result = torch.tanh(self.norm(produced))
        return (result, produced.sin()) if self.kind == "extra-user" else result


@st.composite
def conv_bn(draw: st.DrawFn) -> Specimen:
    """Convolutions and linear layers of every kind before a batch norm, and near misses."""
    kind = draw(st.sampled_from(("plain", "plain", "plain", *_CONV_BN_CODES)))
    dimensions = draw(st.integers(0, 3))
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if dimensions == 0 or kind == "other-axis":
            producer, norm, shape = _linear_bn(draw, kind == "other-axis")
        else:
            producer, norm, shape = _convolution_bn(draw, dimensions)
        if kind == "no-statistics":
            norm = type(norm)(norm.num_features, track_running_stats=False)
        model = _randomised(_ConvBn(producer, norm, kind))
        norm.train(kind == "training-mode")
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float64
        inputs = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(),)
    code = _CONV_BN_CODES.get(kind)
    # After a write, the rewrite may stand where the convolution stands.
    count = None if kind == "written" else int(code is None)
    # Core ATen has other operators for batch statistics and for a linear layer on three axes.
    levels = LEVELS[:-1] if kind in ("training-mode", "no-statistics", "other-axis") else LEVELS
    # Autograd refuses to differentiate through what was written over, running statistics included.
    grads = kind not in ("written", "training-mode")
    return Specimen(kind, model.to(dtype), inputs, count, code, levels, grads)


_CONV_BN_CODES = {
    "extra-user": "multiple-users",
    "written": None,
    "training-mode": "training-mode",
    "no-statistics": "training-mode",
    "other-axis": "channel-axis",
    "bfloat16": None,
}
"""The bent kinds, and the codes with which they must be declined; None where none is."""


def _linear_bn(draw: st.DrawFn, other_axis: bool) -> tuple[nn.Module, Any, Sequence[int]]:
    inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    linear = nn.Linear(inputs, outputs, bias=draw(st.booleans()))
    # On [N, C, T] the batch norm's axis is not the linear layer's, even where the sizes are the same.
    shape = (2, outputs, inputs) if other_axis else (draw(st.integers(2, 4)), inputs)
    return linear, nn.BatchNorm1d(outputs, affine=draw(st.booleans())), shape


def _convolution_bn(draw: st.DrawFn, dimensions: int) -> tuple[nn.Module, Any, Sequence[int]]:
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    more: dict[str, Any] = {"padding": draw(st.integers(0, 1))}
    if transposed and stride > 1:
        more["output_padding"] = draw(st.integers(0, 1))
    layer = _CONVOLUTIONS[transposed][dimensions - 1](
        inputs,
        outputs,
        draw(st.integers(1, 3)),
        stride=stride,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        **more,
    )
    norm = _NORMS[dimensions - 1](outputs, affine=draw(st.booleans()), eps=draw(st.sampled_from((1e-5, 0.1))))
    # In training mode eager refuses a single value per channel.
    return layer, norm, (draw(st.integers(2, 3)), inputs, *[draw(st.integers(5, 6))] * dimensions)


def _randomised(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, with statistics and affine parameters that are no identity."""
    model = model.double().eval()
    with torch.no_grad():
        for name, each in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                each.uniform_(0.5, 2.0)
            elif each.is_floating_point():
                each.normal_()
    return model
