"""Hypothesis strategies of models around a pattern: what a rule must rewrite, and near misses.

`around(rule)` takes a declarative rule's pattern, puts operators before and after it, and bends it: a value
of its inside that is read elsewhere, an operand that is written on the way, other dtypes. `conv_bn()` builds
what efficient_conv_bn_eval is for, and what looks like it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    kinds = ["plain", "plain", "symbolic", "float32", "mixed-dtypes"]
    kind = draw(st.sampled_from([*kinds, *(["extra-user", "written"] if inside else [])]))
    levels: tuple[str, ...] = LEVELS
    code: str | Mapping[str, str] | None = None
    if kind == "extra-user":
        _return_too(graph, draw(st.sampled_from(inside)))
        code = "multiple-users"
    elif kind == "written":
        code = _write_after(graph, draw(st.sampled_from(inside)))
        levels = WRITES_SURVIVE if code else ()
    inputs = _random_inputs(example, seed, torch.float32 if kind == "float32" else torch.float64)
    if kind == "mixed-dtypes":
        if _with_mixed_dtypes(draw, graph, inputs):
            code = "mixed-dtypes"
        else:
            kind, graph = "plain", _pattern_graph(rule, example)
    _surround(graph, before, after)
    model, symbolic = GraphModule(nn.Module(), graph), kind == "symbolic"
    return Specimen(
        kind, model, inputs, int(code is None), code, levels, grads=kind != "written", dynamic=symbolic
    )


def _with_mixed_dtypes(draw: st.DrawFn, graph: torch.fx.Graph, inputs: Sequence[torch.Tensor]) -> bool:
    """Casts one operand of several to float32, and the results; whether eager takes it so.

    The results are cast because a float64 result of float32 operands has float32's rounding errors.
    """
    placeholders = graph.find_nodes(op="placeholder")
    floating = [node for node, each in zip(placeholders, inputs, strict=True) if each.is_floating_point()]
    if len(floating) < 2:
        return False
    operand = draw(st.sampled_from(floating))
    with graph.inserting_before(min(operand.users)):
        cast = graph.call_method("to", (operand, torch.float32))
    operand.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    output = graph.find_nodes(op="output")[0]
    with graph.inserting_before(output):
        results = [graph.call_method("to", (each, torch.float32)) for each in _returned(output)]
    output.args = (tuple(results),)
    try:
        torch.fx.Interpreter(GraphModule(nn.Module(), graph)).run(*inputs)
    except RuntimeError:
        return False
    return True


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
    with graph.inserting_before(output):
        output.args = (tuple(_chain(graph, each, after) for each in _returned(output)),)


def _returned(output: Node) -> Sequence[Any]:
    results = output.args[0]
    return results if isinstance(results, (tuple, list)) else (results,)


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
    output.args = ((*_returned(output), node),)


def _write_after(graph: torch.fx.Graph, node: Node) -> Mapping[str, str]:
    """Writes to a copy of an operand of the pattern after an inner node, if the operand is read before it.

    Returns:
        The reason code of each level; empty where nothing is written.
    """
    operand = next((each for each in node.all_input_nodes if each.op == "placeholder"), None)
    if operand is None:
        return {}
    with graph.inserting_before(min(user for user in operand.users)):
        copied = graph.call_method("clone", (operand,))
    operand.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)
    readers = list(copied.users)
    with graph.inserting_after(node):
        written = graph.call_method("add_", (copied, 0.5))
    codes = dict.fromkeys(WRITES_SURVIVE, "mutation")
    if any(written < each for each in readers):
        # Who traces operators gives the tensor another name after the write.
        codes.update(dict.fromkeys(("pre_dispatch", "export"), "other-operand"))
    return codes


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

    factor: torch.Tensor

    def __init__(self, producer: nn.Module, norm: Any, kind: str) -> None:
        super().__init__()
        self.producer, self.norm, self.kind = producer, norm, kind

    def forward(self, x: torch.Tensor) -> Any:
        # A new tensor, so that writing to it is nobody else's business.
        x = torch.tanh(x)
        produced = self.producer(x)
        if self.kind == "written":
            x.add_(0.5)
        elif self.kind == "spatial-broadcast":
            produced = produced * self.factor
        elif self.kind == "cast":
            produced = produced.to(torch.float64)
        elif self.kind == "written-result":
            produced.mul_(2.0)
        result = torch.tanh(self.norm(produced))
        return (result, produced.sin()) if self.kind == "extra-user" else result


class _Overwritten(_ConvBn):
    """What the convolution reads and what the norm reads are both written to after the convolution.

    So there is no place at which all operands have the values that eager reads.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, norm = torch.tanh(x), self.norm
        mean = norm.running_mean + torch.zeros_like(x.detach()).sum()
        produced = self.producer(x)
        x.add_(0.5)
        mean.add_(0.25)
        given = (mean, norm.running_var, norm.weight, norm.bias)
        return torch.tanh(nn.functional.batch_norm(produced, *given, eps=norm.eps))


class _Free(nn.Module):
    """A grouped transposed convolution whose weight is an input, so that its channels may be symbols."""

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        produced = nn.functional.conv_transpose2d(torch.tanh(x), weight, groups=2)
        return torch.tanh(nn.functional.batch_norm(produced, mean, var, gamma, beta))


@st.composite
def conv_bn(draw: st.DrawFn) -> Specimen:
    """Convolutions and linear layers of every kind before a batch norm, and near misses."""
    kind = draw(st.sampled_from(("plain", "plain", "plain", "symbolic", "bfloat16", *_NEAR_MISSES)))
    dimensions, seed = draw(st.integers(0, 3)), draw(st.integers(0, 2**16))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if kind == "symbolic-channels":
            return _free_conv_bn(draw)
        if dimensions == 0 or kind == "other-axis":
            producer, norm, shape = _linear_bn(draw, kind == "other-axis")
        else:
            producer, norm, shape = _convolution_bn(draw, dimensions)
        if kind == "no-statistics":
            norm = type(norm)(norm.num_features, track_running_stats=False)
        bent = _Overwritten if kind == "overwritten" else _ConvBn
        model = _randomised(bent(producer, norm, kind))
        norm.train(kind == "training-mode")
        dtype = _bent_dtype(model, kind)
        x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
        if kind == "spatial-broadcast":
            # Along the last axis, or along the batch: also where that has as many entries as channels.
            last = producer(torch.zeros(shape, dtype=dtype)).shape
            factor = torch.randn((last[0], 1) if len(last) == 2 else last[-1:], dtype=dtype)
            model.register_buffer("factor", factor)
    code = _NEAR_MISSES.get(kind)
    count = None if kind in _PERHAPS_REWRITTEN else int(code is None)
    levels = WRITES_SURVIVE if kind == "overwritten" else LEVELS
    # Autograd refuses to differentiate through what was written over, running statistics included.
    grads = kind not in ("written", "overwritten", "training-mode")
    return Specimen(kind, model, (x,), count, code, levels, grads, dynamic=kind == "symbolic")


_CORE_ATEN_HAS_OTHERS = {each: "training-mode" for each in LEVELS if each != "aten"}
"""Of batch statistics; no site is looked at there."""

_NEAR_MISSES: dict[str, str | Mapping[str, str] | None] = {
    "extra-user": "multiple-users",
    "written": None,
    "written-result": {
        **dict.fromkeys(("torch", "symbolic_trace"), "multiple-users"),
        **dict.fromkeys(("pre_dispatch", "export", "aten"), "no-producer"),
    },
    "overwritten": "mutation",
    "training-mode": _CORE_ATEN_HAS_OTHERS,
    "no-statistics": _CORE_ATEN_HAS_OTHERS,
    "other-axis": {**dict.fromkeys(LEVELS, "channel-axis"), "aten": "no-producer"},
    "spatial-broadcast": "no-producer",
    "cast": "no-producer",
    "symbolic-channels": "symbolic-channels",
}
"""The bent kinds, and the codes with which they must be declined, at each level if levels differ."""

_PERHAPS_REWRITTEN = ("written",)
"""Kinds that a rewrite in the convolution's place gets right; only their values are compared."""


def _bent_dtype(model: nn.Module, kind: str) -> torch.dtype:
    """Gives the model another dtype, or its convolution alone; the dtype of its input."""
    if kind == "bfloat16":
        model.to(torch.bfloat16)
        return torch.bfloat16
    if kind == "cast":
        model.get_submodule("producer").to(torch.float32)
        return torch.float32
    return torch.float64


def _free_conv_bn(draw: st.DrawFn) -> Specimen:
    inputs, outputs = 2 * draw(st.integers(2, 4)), 2 * draw(st.integers(5, 7))
    shapes = ((3, inputs, 5, 7), (inputs, outputs // 2, 3, 3), (outputs,), (outputs,), (outputs,), (outputs,))
    made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    made[3] = made[3].abs() + 0.5
    for each in (*made[:2], *made[4:]):
        each.requires_grad_()
    kind = "symbolic-channels"
    # What `torch.fx.symbolic_trace` records has no sizes, so they are those of the inputs.
    levels = tuple(each for each in LEVELS if each != "symbolic_trace")
    return Specimen(kind, _Free(), tuple(made), 0, kind, levels, dynamic=True)


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
