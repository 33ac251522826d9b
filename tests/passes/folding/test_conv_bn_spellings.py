"""However the two operators are spelled, the rewrite is the same; what cannot be read is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CAPTURES,
    EVERYWHERE,
    RULE,
    SAMPLED,
    Spelled,
    at_some_levels,
    callable_of,
    check,
    check_compiled,
    image,
    outputs_and_gradients,
    pair,
    randomised,
    require_equal,
)
from torch import nn

import fxpasses

sampled = pytest.mark.parametrize("capture", SAMPLED)


class Parameters(Spelled):
    """Parameters of a layer and of a batch norm."""

    def __init__(self, spell: Callable[[Any, torch.Tensor], Any], weight: tuple[int, ...]) -> None:
        super().__init__(spell)
        self.w, self.b = nn.Parameter(torch.randn(weight)), nn.Parameter(torch.randn(4))
        self.bn = nn.BatchNorm2d(4)


def spelled(spell: Callable[[Any, torch.Tensor], Any], *weight: int) -> nn.Module:
    return randomised(Parameters(spell, weight))


def norm(m: Any, y: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(y, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, False, 0.1, m.bn.eps)


# Convolutions

CONVOLUTIONS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "positional": lambda m, x: torch.conv2d(x, m.w, m.b, 2, 1, 1, 1),
    "stride alone": lambda m, x: torch.conv2d(x, m.w, None, 2),
    "no bias": lambda m, x: F.conv2d(x, m.w),
    "weight first": lambda m, x: F.conv2d(weight=m.w, bias=None, input=x),
    "stride and no bias by keyword": lambda m, x: F.conv2d(x, m.w, stride=2),
    "tuples": lambda m, x: F.conv2d(x, m.w, m.b, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "one-element list": lambda m, x: F.conv2d(x, m.w, m.b, [2], [1]),
    "same": lambda m, x: F.conv2d(x, m.w, m.b, padding="same"),
    "same with dilation": lambda m, x: F.conv2d(x, m.w, m.b, 1, "same", 2),
    "valid": lambda m, x: F.conv2d(x, m.w, padding="valid"),
    "convolution": lambda m, x: torch.convolution(x, m.w, m.b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    "aten": lambda m, x: torch.ops.aten.conv2d.default(x, m.w, m.b, [2, 2]),
    "aten padding": lambda m, x: torch.ops.aten.conv2d.padding(x, m.w, m.b, [1, 1], "same"),
    "aten convolution": lambda m, x: torch.ops.aten.convolution.default(
        x, m.w, m.b, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    ),
}


@pytest.mark.parametrize(("capture", "spelling"), at_some_levels(CONVOLUTIONS))
def test_spellings_of_a_convolution(capture: str, spelling: str) -> None:
    check(capture, spelled(lambda m, x: norm(m, CONVOLUTIONS[spelling](m, x)), 4, 3, 3, 3), (image(),), 1)


TRANSPOSED: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "positional": lambda m, x: torch.conv_transpose2d(x, m.w, m.b, 2, 1, 1, 1, 1),
    "keywords": lambda m, x: F.conv_transpose2d(x, weight=m.w, stride=2, output_padding=1),
    "dilation": lambda m, x: F.conv_transpose2d(x, m.w, dilation=2, padding=1),
    "convolution": lambda m, x: torch.convolution(x, m.w, m.b, [2, 2], [0, 0], [1, 1], True, [1, 1], 1),
}


@pytest.mark.parametrize(("capture", "spelling"), at_some_levels(TRANSPOSED))
def test_spellings_of_a_transposed_convolution(capture: str, spelling: str) -> None:
    """As many input as output channels, so that the wrong axis of the weight would fit as well."""
    model = spelled(lambda m, x: norm(m, TRANSPOSED[spelling](m, x)), 4, 4, 3, 3)
    check(capture, model, (image(2, 4, 5, 6),), 1)


@sampled
@pytest.mark.parametrize(
    ("conv", "bn", "size"),
    [
        (nn.Conv1d, nn.BatchNorm1d, (7,)),
        (nn.Conv3d, nn.BatchNorm3d, (4, 5, 6)),
        (nn.ConvTranspose1d, nn.BatchNorm1d, (7,)),
        (nn.ConvTranspose3d, nn.BatchNorm3d, (4, 5, 6)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_one_and_three_dimensions(
    capture: str, conv: Any, bn: Any, size: tuple[int, ...], bias: bool
) -> None:
    model = pair(conv(4, 4, 2, stride=2, bias=bias), bn(4))
    check(capture, model, (image(2, 4, *size),), 1)


# Linear

LINEARS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], int | str]] = {
    "linear": (lambda m, x: F.linear(x, m.w, m.b), 1),
    "linear without bias": (lambda m, x: F.linear(x, m.w), 1),
    "linear by keyword": (lambda m, x: F.linear(weight=m.w, bias=m.b, input=x), 1),
    "matmul": (lambda m, x: torch.matmul(x, m.w.t()), 1),
    "mm": (lambda m, x: torch.mm(x, m.w.t()), 1),
    "method mm": (lambda m, x: x.mm(m.w.t()), 1),
    "method matmul": (lambda m, x: x.matmul(m.w.T), 1),
    "operator and bias": (lambda m, x: x @ m.w.t() + m.b, 1),
    "bias first": (lambda m, x: m.b + x @ m.w.t(), 1),
    "torch.add": (lambda m, x: torch.add(x @ m.w.t(), m.b), 1),
    "method add": (lambda m, x: x.mm(m.w.t()).add(m.b), 1),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w.t()), 1),
    "method addmm": (lambda m, x: m.b.addmm(x, m.w.t()), 1),
    "addmm beta=1 alpha=1": (lambda m, x: torch.addmm(m.b, x, m.w.t(), beta=1, alpha=1), 1),
    "addmm with beta": (lambda m, x: torch.addmm(m.b, x, m.w.t(), beta=2), "unsupported-arguments"),
    "addmm with alpha": (lambda m, x: torch.addmm(m.b, x, m.w.t(), alpha=3), "unsupported-arguments"),
    "addmm of a matrix": (lambda m, x: torch.addmm(m.b[None].expand(4, 4), x, m.w.t()), "bias-shape"),
    "bias of one row": (lambda m, x: x @ m.w.t() + m.b[None], "no-producer"),
    "bias of a column": (lambda m, x: x @ m.w.t() + m.b[:, None], "no-producer"),
    "bias of one number": (lambda m, x: x @ m.w.t() + m.b[:1], 1),
    "scaled bias": (lambda m, x: torch.add(x @ m.w.t(), m.b, alpha=2), "no-producer"),
    "subtracted bias": (lambda m, x: x @ m.w.t() - m.b, "no-producer"),
    "a number": (lambda m, x: x @ m.w.t() + 2.0, "no-producer"),
    "bias in place": (lambda m, x: (x @ m.w.t()).add_(m.b), "no-producer"),
    "product of three matrices": (lambda m, x: x @ m.w.t() @ m.w[:, :1].repeat(1, 4), 1),
    "weight on the left": (lambda m, x: (m.w @ x.t())[:, :4], "no-producer"),
}


@pytest.mark.parametrize(("capture", "spelling"), at_some_levels(LINEARS))
def test_spellings_of_a_linear_layer(capture: str, spelling: str) -> None:
    """The batch is of four, as many as there are channels, so that the wrong axis would fit as well."""
    spell, outcome = LINEARS[spelling]
    if capture in ("aten", "export", "pre_dispatch") and isinstance(outcome, str):
        # Decomposition spells some of them in the one way that can be read, or reads a view in between.
        check_eager_answers(capture, spelled(lambda m, x: norm(m, spell(m, x)), 4, 3), image(4, 3))
        return
    check(capture, spelled(lambda m, x: norm(m, spell(m, x)), 4, 3), (image(4, 3),), outcome)


def check_eager_answers(capture: str, model: nn.Module, x: torch.Tensor) -> None:
    """Whatever is decided, eager's outputs and gradients are kept."""
    result = fxpasses.optimize(CAPTURES[capture](model, (x,)), (x,))
    call = callable_of(result)
    parameters = list(model.parameters())
    require_equal(
        outputs_and_gradients(call, parameters, (x,), True),
        outputs_and_gradients(model, parameters, (x,), True),
    )
    assert [each.status for each in result.report.remarks] != ["failed"]


@sampled
def test_a_batched_product_is_no_linear_layer(capture: str) -> None:
    """[4, 4, 3] @ [4, 3, 4] has a weight for every item of the batch."""
    model = spelled(lambda m, x: norm(m, torch.matmul(x, m.w)), 4, 3, 4)
    outcome = "no-producer" if capture == "aten" else "not-a-linear"
    check(capture, model, (image(4, 4, 3),), outcome)


@pytest.mark.parametrize("capture", ["compile", "pre_dispatch", "export", "symbolic_trace"])
def test_a_product_with_a_vector_is_no_linear_layer(capture: str) -> None:
    model = spelled(lambda m, x: norm(m, torch.matmul(x, m.b)), 4, 3)
    check(capture, model, (image(5, 4, 4),), "not-a-linear")


@sampled
def test_a_product_that_somebody_else_reads_is_left_alone(capture: str) -> None:
    def spell(m: Any, x: torch.Tensor) -> torch.Tensor:
        product = x @ m.w.t()
        return norm(m, product + m.b) + product

    outcome = "multiple-users" if capture == "aten" else "no-producer"
    report = check_any(capture, spelled(spell, 4, 3), image(4, 3), {outcome, "no-producer", "multiple-users"})
    assert not report.applied


def check_any(capture: str, model: nn.Module, x: torch.Tensor, codes: set[str]) -> fxpasses.Report:
    """`check` with any of several reasons."""
    for code in sorted(codes):
        try:
            return check(capture, model, (x,), code)
        except AssertionError as error:
            if code == max(codes):
                raise error
    raise AssertionError("unreachable")


# Batch norms

NORMS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], int | str]] = {
    "functional": (norm, 1),
    "torch.batch_norm": (
        lambda m, y: torch.batch_norm(
            y, m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var, False, 0.1, 1e-3, False
        ),
        1,
    ),
    "torch.batch_norm without affine": (
        lambda m, y: torch.batch_norm(
            y, None, None, m.bn.running_mean, m.bn.running_var, False, 0.1, 1e-3, True
        ),
        1,
    ),
    "gamma alone": (lambda m, y: F.batch_norm(y, m.bn.running_mean, m.bn.running_var, m.bn.weight), 1),
    "beta alone": (lambda m, y: F.batch_norm(y, m.bn.running_mean, m.bn.running_var, bias=m.bn.bias), 1),
    "integer eps": (lambda m, y: F.batch_norm(y, m.bn.running_mean, m.bn.running_var, eps=1), 1),
    "native": (
        lambda m, y: torch.native_batch_norm(
            y, m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var, False, 0.1, 1e-3
        )[0],
        1,
    ),
    "native, saved statistics unpacked": (lambda m, y: _unpacked(m, y), 1),
    "no training": (
        lambda m, y: torch.ops.aten._native_batch_norm_legit_no_training.default(
            y, m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var, 0.1, 1e-3
        )[0],
        1,
    ),
    "instance norm": (
        lambda m, y: F.instance_norm(
            y, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, use_input_stats=False
        ),
        1,
    ),
}


def _unpacked(m: Any, y: torch.Tensor) -> torch.Tensor:
    result, _mean, _inverse = torch.native_batch_norm(
        y, m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var, False, 0.1, 1e-3
    )
    return result


@pytest.mark.parametrize(("capture", "spelling"), at_some_levels(NORMS))
def test_spellings_of_a_batch_norm(capture: str, spelling: str) -> None:
    spell, outcome = NORMS[spelling]
    if (capture, spelling) == ("symbolic_trace", "native, saved statistics unpacked"):
        pytest.skip("symbolic_trace cannot unpack a result")
    if capture == "aten" and spelling == "instance norm":
        outcome = "no-producer"  # decomposed into a batch norm of a reshaped input
    check(capture, spelled(lambda m, x: spell(m, F.conv2d(x, m.w, m.b)), 4, 3, 3, 3), (image(),), outcome)


REFUSED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "training": (
        lambda m, y: F.batch_norm(y, m.bn.running_mean.clone(), m.bn.running_var.clone(), training=True),
        "training-mode",
    ),
    "no statistics": (lambda m, y: F.batch_norm(y, None, None, training=True), "training-mode"),
    "instance statistics": (
        lambda m, y: F.instance_norm(y, weight=m.bn.weight, bias=m.bn.bias),
        "training-mode",
    ),
}


@pytest.mark.parametrize("capture", ["compile", "symbolic_trace"])
@pytest.mark.parametrize("spelling", REFUSED)
def test_batch_norms_that_use_the_batch_are_refused(capture: str, spelling: str) -> None:
    spell, code = REFUSED[spelling]
    check(capture, spelled(lambda m, x: spell(m, F.conv2d(x, m.w, m.b)), 4, 3, 3, 3), (image(),), code)


def test_saved_statistics_that_somebody_reads_are_kept() -> None:
    def spell(m: Any, x: torch.Tensor) -> Any:
        return torch.native_batch_norm(
            F.conv2d(x, m.w), m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var, False, 0.1, 1e-3
        )

    model = spelled(lambda m, x: spell(m, x)[0] + spell(m, x)[1].sum(), 4, 3, 3, 3)
    x = image(grad=False)
    report = check("symbolic_trace", model, (x,), 1, grads=False, profit="always")
    # The two calls are separate operators: one gives its result, the other its (empty) saved mean.
    codes = sorted(each.code for each in report.remarks if each.rule == RULE)
    assert codes == ["applied", "saved-statistics"]


@sampled
@pytest.mark.parametrize(
    "build",
    [
        lambda: pair(nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
        lambda: pair(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)),
    ],
    ids=["affine", "plain"],
)
def test_instance_norm_with_running_statistics_is_a_batch_norm(
    capture: str, build: Callable[[], nn.Module]
) -> None:
    model = build()
    x = image(2, 3, 8) if isinstance(model[0], nn.Conv1d) else image()  # type: ignore[index]
    check(capture, model, (x,), "no-producer" if capture == "aten" else 1)


@pytest.mark.parametrize("capture", ["compile", "symbolic_trace"])
def test_instance_norm_without_running_statistics_is_left_alone(capture: str) -> None:
    check(capture, pair(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)), (image(),), "training-mode")


def test_unbatched_instance_norm_normalises_the_first_axis() -> None:
    """Convolution and instance norm both take [C, ...] unbatched, and agree on the axis."""
    model = pair(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    check("symbolic_trace", model, (image(3, 8, 8),), 1)


def test_unbatched_instance_norm_of_a_batched_convolution_is_refused() -> None:
    """[4, 4, 6] is a batch of four for conv1d, and one item of four channels for instance_norm2d."""
    model = pair(nn.Conv1d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    check("symbolic_trace", model, (image(4, 3, 8),), "channel-axis")


def test_an_eval_batch_norm_without_statistics_is_refused_before_it_could_fail() -> None:
    """No such call runs in eager mode, so the graph is written by hand."""
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    conv = graph.call_function(torch.conv2d, (x, w))
    bn = graph.call_function(F.batch_norm, (conv, None, None))
    graph.output(bn)
    values = {x: torch.empty(2, 3, 8, 8), w: torch.empty(4, 3, 3, 3)}
    values |= {conv: torch.empty(2, 4, 6, 6), bn: torch.empty(2, 4, 6, 6)}
    for node, value in values.items():
        node.meta["val"] = value.to("meta")
    report = fxpasses.optimize(torch.fx.GraphModule({}, graph), options={"profit": "always"}).report
    assert [each.code for each in report.remarks] == ["no-statistics"]


# Arguments that no schema knows


def test_an_unknown_argument_is_refused() -> None:
    """A graph from elsewhere may hold what torch does not have (yet); guessing would drop it."""
    for where in ("conv", "bn"):
        model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        program = torch.export.export(model, (image(),))
        graph = program.graph_module.graph
        for node in graph.nodes:
            if (where == "conv") == ("conv2d" in str(node.target)) and node.op == "call_function":
                node.kwargs = {"accumulate": "float32"}
        report = fxpasses.optimize(program.graph_module, options={"profit": "always"}).report
        assert [each.code for each in report.remarks] == ["unsupported-arguments"]
        assert "accumulate" in report.remarks[0].message


def test_operators_of_two_levels_in_one_graph() -> None:
    """A user may call ATen operators himself; each replacement is written as its original was."""

    def spell(m: Any, x: torch.Tensor) -> torch.Tensor:
        first = norm(m, torch.ops.aten.conv2d.default(x, m.w, m.b))
        return torch.ops.aten.batch_norm.default(
            torch.conv2d(first.repeat(1, 3, 1, 1)[:, :3], m.w, m.b),
            m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var, False, 0.1, 1e-3, False,
        )  # fmt: skip

    check_compiled(spelled(spell, 4, 3, 3, 3), (image(),), 2)
    check("symbolic_trace", spelled(spell, 4, 3, 3, 3), (image(),), 2)


def test_a_batch_norm_of_a_users_class_is_inlined() -> None:
    class Mine(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = pair(nn.Conv2d(3, 4, 3), Mine(4))
    report = check_compiled(model, (image(),), 1)
    assert report.applied == {RULE: 1}


def test_module_called_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(input=self.conv(input=x))

    for capture in EVERYWHERE:
        check(capture, randomised(Keyword()), (image(),), 1)
