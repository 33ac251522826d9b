"""One guard in place of those on submodules: it fires for what the code depends on, and for nothing else."""

import copy
import gc
import random
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxpasses
from fxpasses.backend import guards
from fxpasses.backend.guards import watch
from fxpasses.backend.guards.expected import DiffersError, Expected, is_constant, is_same
from fxpasses.errors import UnknownOptionError
from fxpasses.torch_internals.guards import kind_of

needs_versions = pytest.mark.skipif(watch.compiled() is None, reason="no version tags to read")


class Scaled(nn.Module):
    """A module of the user's own, with a buffer, attributes, a tuple and a parameter that may be absent."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("scale", torch.rand(channels, 1, 1) + 0.5)
        self.register_parameter("shift", None)
        self.power = 2
        self.window = (1, 1)
        self.calls = 0

    def forward(self, x):
        x = functional.avg_pool2d(x, self.window) * self.scale**self.power
        return x if self.shift is None else x + self.shift


def block(channels):
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), Scaled(channels)
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(block(8) for _ in range(3))
        self.drop = nn.Dropout(0.0)
        self.factor = 1.5

    def forward(self, x):
        x = self.first(x)
        for each in self.blocks:
            x = self.drop(each(x)) * self.factor
        return x


def make():
    torch.manual_seed(0)
    return Net().eval()


class Compiled:
    """A compiled model, and how many graphs were compiled for it."""

    def __init__(self, model, **options):
        self.count = 0
        self.run = torch.compile(
            model, backend="fxpasses", options={"inner": self._inner, "passes": (), **options}
        )

    def _inner(self, graph_module, inputs):
        self.count += 1
        return graph_module

    def __call__(self, *inputs):
        with torch.no_grad():
            return self.run(*inputs)


def expect_eager(run, model, x):
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)


class OtherNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def replace_value(model, name, value):
    setattr(model.blocks[1][2], name, value)


def double_tensor(model):
    """Another dtype of all tensors, whose objects stay the same."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.double()


MATTERS = {
    "train one module": lambda model: model.blocks[0][1].train(),
    "train the model": lambda model: model.train(),
    "an attribute": lambda model: replace_value(model, "power", 3),
    "a tuple": lambda model: replace_value(model, "window", (3, 3)),
    "an equal value of another type": lambda model: replace_value(model, "power", 2.0),
    "past the module": lambda model: object.__setattr__(model.blocks[1][2], "power", 4),
    "in the dictionary": lambda model: model.blocks[1][2].__dict__.update(power=5),
    "another dictionary": lambda model: replace_dictionary(model.blocks[1][2], power=6),
    "a parameter that was absent": lambda model: replace_value(
        model, "shift", nn.Parameter(torch.ones(8, 1, 1))
    ),
    "a module of another type": lambda model: model.blocks[2].__setitem__(1, OtherNorm(8).eval()),
    "another type of a module": lambda model: setattr(model.blocks[2][1], "__class__", OtherNorm),
    "one module more": lambda model: model.blocks.append(block(8).eval()),
    "one module less": lambda model: model.blocks.__delitem__(1),
    "a module in a dictionary": lambda model: model.blocks[0]._modules.update({"1": nn.Identity()}),
    "a method on an instance": lambda model: setattr(model.blocks[0][2], "forward", lambda x: x + 1),
    "padding": lambda model: setattr(model.blocks[0][0], "padding", (0, 0)),
    "requires_grad": lambda model: model.first.weight.requires_grad_(False),
    "a buffer of another size": lambda model: replace_value(model, "scale", torch.ones(1)),
    "a buffer's strides": lambda model: replace_value(
        model, "scale", torch.rand(8, 1, 1).expand(8, 2, 2)[:, :1, :1]
    ),
    "strides of a weight": lambda model: setattr(
        model.first.weight, "data", model.first.weight.data.to(memory_format=torch.channels_last)
    ),
    "a subclass of parameter": lambda model: setattr(model.first, "bias", Marked(torch.zeros(8))),
}

MATTERS_NOT = {
    "values": lambda model: model.first.weight.data.mul_(2),
    "a state": lambda model: model.load_state_dict(make().state_dict()),
    "a state of other objects": lambda model: model.load_state_dict(make().state_dict(), assign=True),
    "another parameter": lambda model: setattr(model.first, "weight", nn.Parameter(torch.randn(8, 3, 3, 3))),
    "another buffer": lambda model: replace_value(model, "scale", torch.rand(8, 1, 1)),
    "an attribute that is not read": lambda model: replace_value(model, "calls", 7),
    "a new attribute": lambda model: replace_value(model, "note", "new"),
    "eval again": lambda model: model.eval(),
    "a module of the same kind": lambda model: model.blocks[1].__setitem__(1, nn.BatchNorm2d(8).eval()),
    "equal and other": lambda model: replace_value(model, "window", tuple(map(int, "11"))),
    "a dictionary with the same": lambda model: replace_dictionary(model.blocks[1][2]),
}


class Marked(nn.Parameter):
    """A parameter of another type."""


def replace_dictionary(module, **values):
    module.__dict__ = {**module.__dict__, **values}


@needs_versions
@pytest.mark.parametrize("change", MATTERS)
def test_what_matters_is_compiled_anew(change):
    model, x = make(), torch.randn(2, 3, 9, 9)
    run = Compiled(model)
    expect_eager(run, model, x)
    before = run.count
    MATTERS[change](model)
    twin = copy.deepcopy(model)  # in training mode, a call changes statistics
    with torch.no_grad():
        torch.testing.assert_close(run(x), twin(x), rtol=0, atol=0)
    assert run.count == before + 1


@needs_versions
@pytest.mark.parametrize("change", MATTERS_NOT)
def test_what_does_not_matter_is_not_compiled_anew(change):
    model, x = make(), torch.randn(2, 3, 9, 9)
    run = Compiled(model)
    expect_eager(run, model, x)
    MATTERS_NOT[change](model)
    expect_eager(run, model, x)
    expect_eager(run, model, x)
    assert run.count == 1


@needs_versions
def test_tensors_whose_dtype_was_exchanged_in_place_are_compiled_anew():
    """Of which no version of a dictionary tells."""
    model, x = make(), torch.randn(2, 3, 9, 9)
    run = Compiled(model)
    expect_eager(run, model, x)
    double_tensor(model)
    expect_eager(run, model, x.double())
    assert run.count == 2


@needs_versions
def test_a_change_and_its_reverse_find_what_was_compiled_before():
    model, x = make(), torch.randn(2, 3, 9, 9)
    run = Compiled(model)
    for power in (2, 3, 2, 3, 2):
        replace_value(model, "power", power)
        expect_eager(run, model, x)
    assert run.count == 2


@needs_versions
@torch._dynamo.config.patch(recompile_limit=1000)
def test_random_changes_one_after_another_give_what_eager_gives():
    draw = random.Random(3)
    for _ in range(4):
        model, x = make(), torch.randn(2, 3, 9, 9)
        run = Compiled(model)
        for _ in range(12):
            changes = MATTERS if draw.random() < 0.5 else MATTERS_NOT
            change = draw.choice(
                [name for name in changes if "state" not in name and "one module" not in name]
            )
            changes[change](model)
            if draw.random() < 0.5:
                model.eval()
            twin = copy.deepcopy(model)
            with torch.no_grad():
                torch.testing.assert_close(run(x), twin(x), rtol=0, atol=0, msg=change)


@needs_versions
def test_models_of_one_kind_share_their_code_and_differ_in_what_they_hold():
    first, second, x = make(), Net().eval(), torch.randn(2, 3, 9, 9)
    code = Compiled(lambda model, x: model(x))
    with torch.no_grad():
        for model in (first, second, first, second):
            torch.testing.assert_close(code(model, x), model(x), rtol=0, atol=0)
        assert code.count == 1
        replace_value(second, "power", 3)
        for model in (first, second, first, second):
            torch.testing.assert_close(code(model, x), model(x), rtol=0, atol=0)
    assert code.count == 2


@needs_versions
def test_a_model_that_is_gone_is_not_kept():
    model, x = make(), torch.randn(2, 3, 9, 9)
    code = Compiled(lambda model, x: model(x))
    code(model, x)
    parts = [weakref.ref(module) for module in model.modules()] + [
        weakref.ref(each) for each in model.parameters()
    ]
    del model
    gc.collect()
    assert not [part for part in parts if part() is not None]


class Counting(nn.Module):
    """Whose buffer is of a module of the user's own, and written to."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4)))
        self.scaled = Scaled(3)

    def forward(self, x):
        self.scaled.scale.mul_(2)
        return self.convolutions(x * self.scaled.scale + x)


@needs_versions
def test_an_input_that_is_a_buffer_is_compiled_anew():
    torch.manual_seed(0)
    model = Counting()
    twin = copy.deepcopy(model)
    run = Compiled(model)
    with torch.no_grad():
        x = torch.rand(3, 1, 1)
        torch.testing.assert_close(run(x), twin(x))
        torch.testing.assert_close(run(model.scaled.scale), twin(twin.scaled.scale))
        assert run.count == 2
        fresh = torch.rand(3, 1, 1)  # which was never a buffer that a guard has seen
        model.scaled.scale, twin.scaled.scale = fresh, fresh.clone()
        torch.testing.assert_close(run(fresh), twin(twin.scaled.scale))
        assert run.count == 2
        was_buffer = model.scaled.scale
        for each in (model, twin):
            each.scaled.scale = torch.full((3, 1, 1), 0.5)
        torch.testing.assert_close(run(was_buffer), twin(was_buffer))  # which it is no longer
    assert run.count == 2


class Keeping(nn.Module):
    """Which keeps its last input in an attribute of a submodule."""

    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        self.net.blocks[0][2].last = x + 1
        return self.net(x)


@needs_versions
def test_an_attribute_that_each_call_sets_and_none_reads_is_compiled_for_once():
    model = Keeping()
    run = Compiled(model)
    for _ in range(5):
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(run(x), make()(x))
        torch.testing.assert_close(model.net.blocks[0][2].last, x + 1)
    assert run.count == 1


@needs_versions
def test_a_compiled_training_step_trains_as_eager_does():
    model, x = make(), torch.randn(4, 3, 9, 9)
    twin = copy.deepcopy(model)
    run = torch.compile(model, backend="fxpasses", options={"inner": "aot_eager", "passes": ()})
    optimisers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in (model, twin)]
    for step in range(4):
        for each in (model, twin):
            each.train(step % 2 == 0)
        for each, optimiser in zip((run, twin), optimisers, strict=True):
            optimiser.zero_grad()
            each(x).square().mean().backward()
            optimiser.step()
        for found, expected in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(found, expected)


@needs_versions
def test_one_guard_stands_for_all_but_those_of_hooks_which_dynamo_skips(monkeypatch):
    found = []

    def expect(root, name, many, ask):
        expected, left = guards_expect(root, name, many, ask)
        found.append((many, left))
        return expected, left

    guards_expect = guards.expect
    monkeypatch.setattr(guards, "expect", expect)
    Compiled(make(), guards="dynamo")(torch.randn(2, 3, 9, 9))
    assert not found
    torch.compiler.reset()
    Compiled(make())(torch.randn(2, 3, 9, 9))
    ((many, left),) = found
    assert {kind_of(guard)[0] for guard in left} <= {"EMPTY_NN_MODULE_HOOKS_DICT", "HASATTR"}  # that of 2.11
    kinds = {kind_of(guard)[0] for guard in many}
    assert {"TYPE_MATCH", "CONSTANT_MATCH", "TENSOR_MATCH", "NOT_PRESENT_IN_GENERIC_DICT"} <= kinds


def test_where_versions_do_not_tell_the_guards_stay_dynamo_s(monkeypatch):
    watch.compiled.cache_clear()
    monkeypatch.setattr(watch, "_tag", lambda names: 0)
    try:
        assert watch.compiled() is None
        model, x = make(), torch.randn(2, 3, 9, 9)
        run = Compiled(model)
        expect_eager(run, model, x)
        replace_value(model, "power", 3)
        expect_eager(run, model, x)
        assert run.count == 2
    finally:
        watch.compiled.cache_clear()


@needs_versions
def test_where_one_guard_cannot_be_made_the_guards_stay_dynamo_s(monkeypatch):
    def expect(*_):
        raise AttributeError("what a module's own code may raise")

    monkeypatch.setattr(guards, "expect", expect)
    model, x = make(), torch.randn(2, 3, 9, 9)
    run = Compiled(model)
    expect_eager(run, model, x)
    for count in (2, 2):
        replace_value(model, "power", 3)
        expect_eager(run, model, x)
        assert run.count == count


def test_a_value_of_options_that_is_none_is_an_error():
    with pytest.raises(UnknownOptionError, match="guards"):
        fxpasses.Options(guards="none")


def test_constants_are_the_same_by_type_and_value():
    assert is_same((1, (2.0, "a")), (1, (2.0, "a")))
    for found, expected in (
        (True, 1),
        (1.0, 1),
        ((1,), (1, 1)),
        ((1,), torch.Size((1,))),
        (-0.0, 0.0),
        (None, 0),
    ):
        assert not is_same(found, expected)
    assert is_constant((None, torch.float32, (1, "a"), torch.Size((2,))))
    for value in (float("nan"), [1], ([1],), {}, torch.ones(1), lambda: 0):
        assert not is_constant(value)


def test_a_difference_is_told_by_name():
    expected = Expected(nn.Linear, values={"in_features": 3})
    with pytest.raises(DiffersError, match=r"model, 'in_features' is 4, and was 3"):
        expected.visit(nn.Linear(4, 2), "model", lambda module, names: None)
    with pytest.raises(DiffersError, match="model is a Conv2d, and was a Linear"):
        expected.visit(nn.Conv2d(3, 3, 1), "model", lambda module, names: None)


def test_outside_a_compilation_there_are_no_guards_to_replace(monkeypatch):
    monkeypatch.setattr(guards, "_replacements", pytest.fail)
    guards.compact_guards()
