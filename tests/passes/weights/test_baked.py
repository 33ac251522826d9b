"""weights="baked": what is computed ahead, what stays, and which programs are refused.

Expected values are eager's, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

import fxpasses
from fxpasses.errors import FxpassesError, UnknownOptionError
from fxpasses.graph.names import base_name
from fxpasses.passes.weights.baked_programs import name_of
from tests.helpers import Spelled, image, printed, randomised
from tests.passes.weights.baking import (
    Block,
    baked,
    block,
    export,
    left_over,
    norms,
    require_same,
    signed,
    training,
    weights_of,
)

aten = torch.ops.aten

# What is baked ---------------------------------------------------------------------------------------------


def test_constants_are_named_after_what_they_are_made_of_and_the_rest_is_dropped():
    program, report = baked(block(), image())
    assert list(program.state_dict) == ["stem.baked_0_weight_1", "stem.baked_1", "baked_weight"]
    assert not program.constants
    assert report.kept_tensors == 3
    assert report.kept_bytes == 8 * (6 * 3 * 9 + 6 + 30)
    assert left_over(program) == []
    signed(program)
    kinds = {spec.target: spec.kind for spec in program.graph_signature.input_specs}
    assert set(kinds.values()) == {InputKind.BUFFER, InputKind.USER_INPUT}
    assert not any(value.requires_grad for value in program.state_dict.values())


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (["a.0.conv1.weight", "a.0.bn1.weight", "a.0.bn1.running_var"], "a.0.baked_conv1_weight_bn1"),
        (["bn.weight", "bn.bias"], "baked_bn"),
        (["fc.weight"], "fc.baked_weight"),
        (["weight"], "baked_weight"),
        (["a.w", "b.w", "c.w", "d.w", "e.w"], "baked_a_w_b_w_c_w_and_2_more"),
    ],
)  # fmt: skip
def test_a_name_tells_the_modules_that_a_constant_comes_from(sources, name):
    assert name_of(sources) == name


@pytest.mark.parametrize("grad", [False, True])
def test_it_does_not_matter_whether_gradients_are_recorded(grad):
    model, x = block(), image(grad=False)
    with torch.set_grad_enabled(grad):
        program, report = baked(export(model, x))
        assert torch.is_grad_enabled() == grad
    assert report.applied == {"efficient_conv_bn_eval": 1}
    require_same(program.module()(x), model(x))
    assert not program.module()(x).requires_grad


def test_nothing_of_the_given_program_is_changed():
    model, x = block(), image(grad=False)
    program = export(model, x)
    before = printed(program), copy.deepcopy(program.graph_signature), copy.deepcopy(program.state_dict)
    pointers = {name: value.data_ptr() for name, value in program.state_dict.items()}
    result, _ = baked(program)
    assert printed(program) == before[0]
    assert program.graph_signature == before[1]
    assert program.state_dict.keys() == before[2].keys()
    assert all(torch.equal(value, before[2][name]) for name, value in program.state_dict.items())
    assert {name: value.data_ptr() for name, value in program.state_dict.items()} == pointers
    assert {value.data_ptr() for value in result.state_dict.values()}.isdisjoint(pointers.values())


def test_a_later_write_to_the_given_weights_does_not_reach_what_was_baked():
    model, x = block(), image(grad=False)
    expected = model(x).detach()
    program, _ = baked(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    require_same(program.module()(x), expected)


def test_a_fold_under_no_grad_is_baked_into_the_program_around_it():
    class Frozen(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                found = self.stem(x)
            return found.relu().mean((2, 3)) @ self.weight.t()

    model, x = randomised(Frozen()), image(grad=False)
    with torch.enable_grad():
        program = export(model, x)
    before = printed(program)
    assert any("set_grad_enabled" in str(node.target) for node in program.graph.nodes)
    result, report = baked(program)
    assert printed(program) == before
    assert report.kept_tensors == 3
    assert not norms(result)
    assert left_over(result) == []
    require_same(result.module()(x), model(x))
    signed(result)
    with pytest.raises(FxpassesError, match=r"batch_norm\w* writes to stem.1.running_mean"):
        baked(model.train(), x)


def test_half_types_are_folded_in_float32_and_rounded_once():
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), torch.bfloat16)
    with torch.no_grad():
        program, _ = baked(model, image(dtype=torch.bfloat16, grad=False))
    conv, norm = model
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = conv.weight.double() * scale.reshape(-1, 1, 1, 1)
    (found,) = [value for value in program.state_dict.values() if value.ndim == 4]
    assert found.dtype == torch.bfloat16
    # Rounding the exact product once is the best that can be done, but for ties that float32 decides.
    assert (found != exact.bfloat16()).sum() <= 1


def test_a_weight_that_is_read_twice_is_folded_for_each_norm():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(self.conv(x)) + self.two(self.conv(x + 1)) + self.conv(x * 2)

    model, x = randomised(Twice()), image(grad=False)
    program, report = baked(model, x)
    assert report.applied == {"efficient_conv_bn_eval": 2}
    assert "conv.weight" in program.state_dict
    require_same(program.module()(x), model(x))
    signed(program)


def test_tied_weights_stay_tied_and_their_transpose_a_view():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.embedding(x)
            return self.head(found) + found @ self.head.weight.t()

    model, x = Tied().double().eval(), torch.arange(6).reshape(2, 3)
    program, report = baked(model, x)
    assert report.kept_tensors == 0
    assert len(program.state_dict) == 1
    assert [node.target for node in left_over(program)] == [aten.t.default]
    require_same(program.module()(x), model(x))


CHAINS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], int]] = {
    "a cast and a product": (lambda self, x: x * (self.w.float() * 2).double()[:4], 1),
    "halves of a split": (lambda self, x: x @ self.w.split(4)[0] + x @ (self.w * 2).chunk(2)[1], 2),
    "rows": (lambda self, x: x @ self.w[:4], 1),
    "an in-place product of a copy": (lambda self, x: x @ (self.w + 1).mul_(2)[:4], 1),
    "a part that is zeroed": (lambda self, x: x @ zeroed(self.w * 2)[:4], 1),
    "a part of a copy that is read before and after": (lambda self, x: x @ read_around(self.w), 1),
    "numbers written out": (lambda self, x: x @ (self.w[:4] + numbers()), 1),
    "an identity that is added": (lambda self, x: x @ (self.w[:4] + torch.eye(4, dtype=x.dtype)), 1),
    "a gather that is little larger": (lambda self, x: x @ self.w[self.index][:4], 1),
    "a parameter that is not changed": (lambda self, x: x @ self.w.t().t()[:4], 1),
}


def zeroed(w: torch.Tensor) -> torch.Tensor:
    """What Swin V2 does to a bias."""
    w[2:4].zero_()
    return w


def read_around(w: torch.Tensor) -> torch.Tensor:
    copied = w.clone()
    before = copied[:4] * 3
    copied.mul_(2)
    return before + copied[:4]


def numbers() -> torch.Tensor:
    """Constants that export detaches in place, and whose metadata has the storage of the constants."""
    mask = torch.zeros(4, dtype=torch.float64)
    mask[2:] = torch.tensor([1.0, 2.0])[0]
    return mask * torch.tensor(3.0)


def written_behind_a_reader(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The input meets a value of the copy that is not its last."""
    copied = self.w.clone()
    found = x @ copied[:4]
    copied.mul_(2)
    return found @ copied[:4]


def written_by_the_input(self: Any, x: torch.Tensor) -> torch.Tensor:
    copied = self.w * 2
    copied[:1].add_(x.sum())
    return x @ copied[:4]


class Weighted(Spelled):
    """A forward over a matrix `w` of [8, 4]; something large stands beside it."""

    def __init__(self, spell: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__(spell)
        self.w = nn.Parameter(torch.randn(8, 4, dtype=torch.float64))
        self.large = nn.Parameter(torch.randn(64, 64, dtype=torch.float64))
        self.register_buffer("index", torch.arange(8))

    def forward(self, x: torch.Tensor) -> Any:
        return self.spell(self, x), x.sum() * self.large


@pytest.mark.parametrize("name", CHAINS)
def test_work_on_weights_is_done(name):
    spell, count = CHAINS[name]
    model, x = Weighted(spell), torch.randn(4, 4, dtype=torch.float64)
    program, report = baked(model, x)
    assert report.kept_tensors == count
    assert left_over(program) == []
    require_same(program.module()(x), model(x))
    signed(program)


# What is not -----------------------------------------------------------------------------------------------

STAYS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], set[str]]] = {
    "an expanded weight": (lambda self, x: x @ self.w[:1].t().expand(4, 64), {"expand"}),
    "much larger": (lambda self, x: x @ self.w[:4].repeat(1, 4096), {"repeat"}),
    "a view of what is read too": (lambda self, x: x @ self.w.t() @ self.w, {"t"}),
    "a column, which has gaps": (lambda self, x: x * self.w[:4, 1], {"select"}),
    "a returned product": (lambda self, x: (x.sum(), self.w * 2), {"mul"}),
    "a returned view": (lambda self, x: (x.sum(), self.w.t()), {"t"}),
    "a view of a product, returned": (lambda self, x: (x.sum(), (self.w * 2).t()), {"mul", "t"}),
    "a copy that is read before it is written to": (written_behind_a_reader, {"clone", "mul"}),
    "a copy that the input is written to": (written_by_the_input, {"mul"}),
    "random numbers": (lambda self, x: x @ (self.w[:4] * torch.rand_like(self.w[:4])), {"mul", "rand_like"}),
    "an active dropout": (lambda self, x: x @ nn.functional.dropout(self.w[:4], 0.5, True), {"dropout"}),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_stays_in_the_program(name):
    spell, names = STAYS[name]
    model, x = Weighted(spell), torch.randn(4, 4, dtype=torch.float64)
    program, _ = baked(model, x)
    assert names <= {base_name(node) for node in left_over(program)}
    assert weights_of(program) <= weights_of(export(model, x)) * 1.05
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    require_same(program.module()(x), expected)
    signed(program)


def test_what_depends_on_the_input_is_not_baked():
    model, x = Weighted(lambda self, x: x @ (self.w[:4] * x.mean())), torch.randn(4, 4, dtype=torch.float64)
    program, report = baked(model, x)
    assert report.kept_tensors == 1  # the rows of the weight
    for given in (x, x + 1):
        require_same(program.module()(given), model(given))


def test_a_returned_result_may_be_written_to():
    model, x = Weighted(lambda self, x: (x.sum(), self.w * 2)), torch.randn(4, 4, dtype=torch.float64)
    run = baked(model, x)[0].module()
    with torch.no_grad():
        run(x)[0][1].zero_()
        require_same(run(x), model(x))


# Refusals, and what stands beside them ---------------------------------------------------------------------


class Counting(Spelled):
    """A forward over a buffer of calls and a parameter."""

    def __init__(self, spell: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__(spell)
        self.register_buffer("calls", torch.zeros(4, dtype=torch.float64))
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))


def counts(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.calls.add_(1)
    return x * self.calls


def counts_on_a_copy(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * self.calls.clone().add_(1)


def writes_through_a_view(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.w.detach()[0].zero_()
    return x @ self.w


def writes_to_its_input(self: Any, x: torch.Tensor) -> torch.Tensor:
    x.mul_(2)
    return x @ (self.w * 2)


WRITES = {"calls": counts, "w": writes_through_a_view}
VECTOR = torch.randn(4, dtype=torch.float64)


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_model_in_training_is_refused_and_the_one_in_eval_mode_is_not(decomposed):
    def captured(model: nn.Module) -> ExportedProgram:
        program = export(model, image())
        return program.run_decompositions() if decomposed else program

    program = captured(training())
    before = printed(program)
    with pytest.raises(FxpassesError, match=r"eval"):
        baked(program)
    assert printed(program) == before
    result, report = baked(captured(training().eval()))
    assert report.kept_tensors == 2
    assert not norms(result)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_a_program_that_writes_to_what_it_holds_is_refused_by_name(name, decomposed):
    with torch.no_grad():
        program = export(Counting(WRITES[name]), VECTOR)
    program = program.run_decompositions() if decomposed else program
    with pytest.raises(FxpassesError, match=rf"\b{name}\b"):
        baked(program)


@pytest.mark.parametrize("spell", [counts_on_a_copy, writes_to_its_input])
def test_other_writes_are_not_refused(spell):
    model = Counting(spell)
    with torch.no_grad():
        program, report = baked(model, VECTOR.clone())
        assert report.kept_tensors == 1
        require_same(program.module()(VECTOR.clone()), model(VECTOR.clone()))


def test_a_program_that_gives_a_loss_or_gradients_is_refused():
    from torch.export.graph_signature import OutputKind

    program = export(block(), image())
    for kind, word in ((OutputKind.LOSS_OUTPUT, "loss"), (OutputKind.GRADIENT_TO_PARAMETER, "gradient")):
        trained = copy.copy(program)
        trained._graph_signature = copy.deepcopy(program.graph_signature)
        trained.graph_signature.output_specs[0].kind = kind
        with pytest.raises(FxpassesError, match=word):
            baked(trained)
    assert baked(program)[1].kept_tensors


def test_weights_without_values_are_refused():
    from fxpasses.torch_internals.fake_tensors import FakeTensorMode

    with FakeTensorMode():
        program = torch.export.export(Block().eval(), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(FxpassesError, match="has no values"):
        baked(program)


def test_torch_compile_refuses_baked_weights_and_names_cached():
    run = torch.compile(block(), backend="fxpasses", options={"weights": "baked"})
    with pytest.raises(Exception, match="'cached'") as caught:
        run(image())
    error: Any = caught.value
    assert isinstance(getattr(error, "inner_exception", error), UnknownOptionError)
    with pytest.raises(UnknownOptionError, match="optimize"):
        fxpasses.explain(block(), image(), options={"weights": "baked"})
    report = fxpasses.explain(export(block(), image()), options={"weights": "baked"})
    assert report.applied == {"efficient_conv_bn_eval": 1}
