"""A write between convolution and batch norm: which place is left for the fused convolution, if any.

y = conv(x); x.mul_(3); bn(y)                        the fused convolution stands where conv stood
y = conv(x); x.mul_(3); gamma.mul_(2); bn(y, gamma)  no place reads both right: declined, `mutation`
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check, check_compiled, image
from torch import nn
from wiring import statistics, wired

import fxpasses
from fxpasses.testing import expect

# Writes between the two. (A leaf that requires grad cannot be written to, hence `x + 1`; autograd refuses the
# backward of a convolution whose input was written to, hence no gradients.)


def _write(m: Any, x: torch.Tensor, write: Callable[[Any, torch.Tensor], Any]) -> torch.Tensor:
    x = x + 1
    y = m.conv(x)
    with torch.no_grad():
        write(m, x)
    return m.bn(y) + x.mean()


WRITES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "method": lambda m, x: x.mul_(3),
    "operator": lambda m, x: x.__imul__(3),
    "out=": lambda m, x: torch.mul(x, 3, out=x),
    "foreach": lambda m, x: torch._foreach_mul_([m.vector.detach().clone(), x], 3),
    "flag": lambda m, x: F.relu(x, inplace=True),
    "positional flag": lambda m, x: F.relu(x, True),
    "chunk": lambda m, x: x.chunk(3, 1)[1].mul_(3),
    "chunk and unpack": lambda m, x: next(channel.mul_(2) for channel in x.unbind(1)),
    "detach": lambda m, x: x.detach().mul_(3),
    "data": lambda m, x: x.data.mul_(3),
    "reshape": lambda m, x: x.reshape(-1).mul_(3),
    "contiguous": lambda m, x: x.contiguous().mul_(3),
    "type_as": lambda m, x: x.type_as(x).mul_(3),
    "to the same dtype": lambda m, x: x.to(torch.float64).mul_(3),
    "dropout in eval": lambda m, x: F.dropout(x, 0.5, training=False).mul_(3),
    "einsum": lambda m, x: torch.einsum("nchw->nhwc", x).mul_(3),
    "broadcast_tensors": lambda m, x: torch.broadcast_tensors(x, x)[0].mul_(3),
    "atleast_1d": lambda m, x: torch.atleast_1d(x).mul_(3),
    "as_strided": lambda m, x: x.as_strided((4,), (1,)).mul_(3),
    "transposed property": lambda m, x: x.mT.mul_(3),
}


UNTRACEABLE = {("symbolic_trace", "chunk and unpack"), ("pre_dispatch", "data")}
"""symbolic_trace cannot iterate over a tensor; make_fx makes a constant of the value of `data`."""

WRITTEN = [
    case
    for case in itertools.product(("compile", "pre_dispatch", "symbolic_trace"), WRITES)
    if case not in UNTRACEABLE
]


@pytest.mark.parametrize(("capture", "write"), WRITTEN)
def test_input_written_through_any_alias_is_read_first(capture: str, write: str) -> None:
    """The fused convolution stands where the convolution stood."""
    model = wired(lambda m, x: _write(m, x, WRITES[write]))
    check(capture, model, (image(),), 1, grads=False, profit="always")


def _write_both(m: Any, x: torch.Tensor, write: Callable[[Any, torch.Tensor], Any]) -> torch.Tensor:
    """Input and gamma are both written to, so there is no place for the fused convolution."""
    x, gamma = x + 1, m.vector.detach().clone()
    y = m.conv(x)
    with torch.no_grad():
        write(m, x)
        gamma.mul_(2)
    return F.batch_norm(y, *statistics(m), gamma, m.bn.bias) + x.mean()


@pytest.mark.parametrize(("capture", "write"), WRITTEN)
def test_input_and_gamma_both_written_through_any_alias_leave_no_place(capture: str, write: str) -> None:
    model = wired(lambda m, x: _write_both(m, x, WRITES[write]))
    check(capture, model, (image(),), "mutation", grads=False, profit="always")


HARMLESS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "a copy": lambda m, x: x.clone().mul_(3),
    "another dtype": lambda m, x: x.to(torch.float32).mul_(3),
    "a new tensor": lambda m, x: torch.zeros(4).add_(1),
    "out= of a new tensor": lambda m, x: torch.mul(x, 3, out=torch.empty_like(x)),
    "another parameter": lambda m, x: m.conv2.weight.mul_(2),
}


@pytest.mark.parametrize("write", HARMLESS)
@pytest.mark.parametrize("late_gamma", [True, False])
def test_a_write_to_something_else_is_no_hazard(write: str, late_gamma: bool) -> None:
    """With a gamma that is computed after the convolution, only the batch norm's place is right."""

    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        y = m.conv(x)
        with torch.no_grad():
            HARMLESS[write](m, x)
        gamma = m.vector * 2 if late_gamma else m.vector
        return F.batch_norm(y, *statistics(m), gamma, m.bn.bias)

    check_compiled(wired(wire), (image(),), 1, grads=False, profit="always")


def test_a_write_before_or_after_both_is_no_hazard() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        x.mul_(2)
        y = F.batch_norm(m.conv(x), *statistics(m), m.vector * 2, m.bn.bias)
        x.mul_(3)
        return y + x.mean()

    check_compiled(wired(wire), (image(),), 1, grads=False, profit="always")


def test_weight_tied_to_something_that_is_written_to() -> None:
    """Gamma comes late and the weight is written to through another module's view of its memory."""

    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        with torch.no_grad():
            m.conv2.weight.mul_(2)
        return F.batch_norm(y, *statistics(m), m.vector * 2, m.bn.bias)

    for tie in (True, False):
        model = wired(wire)
        if tie:
            model.conv2.weight.data = model.conv.weight.data  # two parameters, one storage
        else:
            model.conv2.weight.data.copy_(model.conv.weight.data)
        torch.compiler.reset()
        fxpasses.reset()
        expected = _copy_sharing_storage(model)(image_of_ones())
        compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager", "profit": "always"})
        with expect(efficient_conv_bn_eval=0 if tie else 1), torch.no_grad():
            found = compiled(image_of_ones())
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)


def image_of_ones() -> torch.Tensor:
    return torch.linspace(-1, 1, 384, dtype=torch.float64).view(2, 3, 8, 8)


def _copy_sharing_storage(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)  # deepcopy keeps storages shared that were


def test_a_shared_weight_written_directly_is_a_hazard() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        with torch.no_grad():
            m.conv2.weight.mul_(2)
        return F.batch_norm(y, *statistics(m), m.vector * 2, m.bn.bias)

    model = wired(wire)
    model.conv2.weight = model.conv.weight
    check_compiled(model, (image(),), "mutation", grads=False, profit="always")


def test_two_inputs_that_share_memory_are_one_for_a_write() -> None:
    def call(x: torch.Tensor, view: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, weight)
        view.mul_(2)
        return F.batch_norm(y, mean.sin(), mean.exp())

    weight, mean = image(4, 3, 3, 3, grad=False), image(4, grad=False)
    for shared in (True, False):
        torch.compiler.reset()
        x = image(grad=False)
        view = x[:, :2] if shared else x[:, :2].clone()
        expected = call(x.clone(), view.clone(), weight, mean)
        compiled = torch.compile(call, backend="fxpasses", options={"inner": "eager", "profit": "always"})
        with expect(efficient_conv_bn_eval=0 if shared else 1), torch.no_grad():
            found = compiled(x, view, weight, mean)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("what", ["weight", "bias", "input"])
@pytest.mark.parametrize(
    "name", ["scale_in_place", "scale_copy", "scale_in_place packet", "scale_copy packet"]
)
def test_custom_operators_write_what_they_declare(what: str, name: str) -> None:
    """An operator of the user's, with and without a declared write, between the two; gamma comes late."""

    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        y = m.conv(x)
        with torch.no_grad():
            victim = {"weight": m.conv.weight, "bias": m.conv.bias, "input": x}[what]
            OPERATORS[name](victim)
        return F.batch_norm(y, *statistics(m), m.vector * 2, m.bn.bias)

    outcome: int | str = "mutation" if "in_place" in name else 1
    check_compiled(wired(wire), (image(),), outcome, grads=False, profit="always")


@torch.library.custom_op("fxpasses_tests::scale_in_place", mutates_args=("x",))
def scale_in_place(x: torch.Tensor) -> None:
    x.mul_(2)


@torch.library.custom_op("fxpasses_tests::scale_copy", mutates_args=())
def scale_copy(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@scale_copy.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


OPERATORS = {
    "scale_in_place": scale_in_place,
    "scale_copy": scale_copy,
    "scale_in_place packet": torch.ops.fxpasses_tests.scale_in_place,
    "scale_copy packet": torch.ops.fxpasses_tests.scale_copy,
}


# A product and a later addition of the bias: two nodes, read at two times


def _late_bias(m: Any, x: torch.Tensor, write: str) -> torch.Tensor:
    x, bias = x + 1, m.vector.detach().clone()
    y = x @ m.linear.weight.t()
    if write == "bias before the addition":
        bias.mul_(2)
    if write == "bias computed after the product":
        bias = bias.exp()
    if write == "input before the addition":
        x.mul_(2)
    y = y + bias
    if write == "input after the addition" or write == "bias computed after the product":
        x.mul_(2)
    return m.bn1d(y) + x.mean()


@pytest.mark.parametrize("capture", ["compile", "pre_dispatch", "symbolic_trace"])
@pytest.mark.parametrize(
    ("write", "outcome"),
    [
        ("bias before the addition", None),
        ("bias computed after the product", None),
        ("input before the addition", "mutation"),
        ("input after the addition", 1),
        ("nothing", 1),
    ],
)
def test_a_bias_is_read_at_the_addition(capture: str, write: str, outcome: int | str | None) -> None:
    """Where several answers are right, none is demanded; eager's numbers are, always."""
    model = wired(lambda m, x: _late_bias(m, x, write))
    outcomes = [1, "mutation"] if outcome is None else [outcome]
    for possible in outcomes:
        try:
            check(capture, model, (image(5, 3),), possible, grads=False, profit="always")
            return
        except AssertionError as error:
            if possible == outcomes[-1] or "declined [mutation]" not in str(error):
                raise
