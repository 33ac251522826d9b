"""weights="cached": kept results are used as long as every parameter is what it was, and never longer."""

from __future__ import annotations

import contextlib
import copy
import random
import threading

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses.errors import UnknownOptionError
from fxpasses.passes.weights.kept import KeptWeights
from fxpasses.testing import expect

CACHED = {"weights": "cached", "inner": "eager"}


class Net(nn.Module):
    """Two folds, a weight that is normalised at every call, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.bn2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        self.register_buffer("offset", torch.randn(5))

    def forward(self, x):
        x = torch.relu(self.bn1(self.stem(x)))
        x = self.bn2(self.up(x)).mean((2, 3))
        return (
            torch.nn.functional.linear(x, self.head.weight / self.head.weight.norm(), self.head.bias)
            + self.offset
        )


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().double().eval()
    for bn in (model.bn1, model.bn2):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        nn.init.normal_(bn.weight)
    return model


X = torch.randn(2, 3, 5, 5, dtype=torch.float64)


def compiled(model, **options):
    return torch.compile(model, backend="fxpasses", options={**CACHED, **options})


def assert_fresh(run, model, x=X):
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(run(x), expected, rtol=1e-10, atol=1e-10)


def computations(monkeypatch) -> list[int]:
    """Counts how often kept tensors are computed."""
    calls: list[int] = []
    original = KeptWeights._compute

    def counting(self, sources):
        calls.append(len(sources))
        return original(self, sources)

    monkeypatch.setattr(KeptWeights, "_compute", counting)
    return calls


def test_parameter_work_is_done_once_for_many_calls(monkeypatch):
    calls = computations(monkeypatch)
    model = net()
    run = compiled(model)
    with expect(efficient_conv_bn_eval=2):
        for _ in range(4):
            assert_fresh(run, model)
    assert len(calls) == 1


def test_the_report_says_what_is_kept_and_how_large_it_is():
    model = net()
    assert_fresh(compiled(model), model)
    report = fxpasses.last_report()
    # Two folded weights, two folded biases, the normalised weight, the head's bias with the offset in it.
    assert report.kept_tensors == 6
    assert report.kept_bytes == 8 * (6 * 3 * 9 + 6 + 6 * 2 * 4 + 4 + 5 * 4 + 5)
    assert report.kept_bytes <= sum(tensor.numel() * 8 for tensor in model.state_dict().values())


def _load(model):
    other = net(seed=5).to(next(model.parameters()).dtype)
    model.load_state_dict(other.state_dict())


def _load_assigned(model):
    other = net(seed=6).to(next(model.parameters()).dtype)
    model.load_state_dict(other.state_dict(), assign=True)


def _step(model):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(X.to(model.stem.weight.dtype)).square().sum().backward()
    optimiser.step()
    optimiser.zero_grad()


def _add(model):
    with torch.no_grad():
        model.stem.weight.add_(0.25)


def _replace_parameter(model):
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight))


def _replace_data(model):
    model.head.weight.data = torch.randn_like(model.head.weight)


def _write_untold(model):
    model.head.weight.data.mul_(2)
    model.bn2.bias.data.clamp_(-0.1, 0.1)
    model.up.weight.detach().numpy()[:] += 0.25


def _average_untold(model):
    for ours, other in zip(model.parameters(), net(seed=7).parameters(), strict=True):
        ours.data.lerp_(other.data.to(ours.dtype), 0.25)


def _buffer(model):
    model.bn1.running_var.mul_(1.5)


def _train_and_back(model):
    model.train()
    with torch.no_grad():
        model(X.to(model.stem.weight.dtype))
    model.eval()


def _round_trip_dtype(model):
    dtype = model.stem.weight.dtype
    model.to(torch.bfloat16).to(dtype)


def _flip_dtype(model):
    model.to(torch.float32 if model.stem.weight.dtype == torch.float64 else torch.float64)


UPDATES = [
    _load,
    _load_assigned,
    _step,
    _add,
    _replace_parameter,
    _replace_data,
    _write_untold,
    _average_untold,
    _buffer,
    _train_and_back,
    _round_trip_dtype,
    _flip_dtype,
]


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__.strip("_"))
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_every_update_is_noticed_at_the_next_call(update, inner):
    model = net()
    run = compiled(model, inner=inner)
    assert_fresh(run, model)
    update(model)
    x = X.to(model.stem.weight.dtype)
    with torch.no_grad():
        expected, found = model(x), run(x)
    tolerance = 1e-10 if x.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def _functional(model, run):
    other = net(seed=9).to(model.stem.weight.dtype)
    state = dict(other.state_dict())
    x = X.to(model.stem.weight.dtype)
    with torch.no_grad():
        expected = other(x)
        found = torch.func.functional_call(
            run, {f"_orig_mod.{key}": value for key, value in state.items()}, (x,)
        )
    return found, expected


def _sequence(seed: int) -> None:
    """Random updates, with a call after each that must equal eager, of static or dynamic size."""
    chosen = random.Random(seed)
    dtype = chosen.choice((torch.float64, torch.float64, torch.bfloat16))
    model = net(seed).to(dtype)
    off = chosen.choice((torch.no_grad, torch.inference_mode, contextlib.nullcontext))
    dynamic = chosen.choice((False, True))
    inside = chosen.random() < 0.3 and off is not contextlib.nullcontext
    # numpy has no bfloat16
    updates = [update for update in UPDATES if dtype != torch.bfloat16 or update is not _write_untold]
    if off is contextlib.nullcontext:  # gradients are on, and nothing asks for one
        model.requires_grad_(False)
        updates = [update for update in updates if update is not _step]
    run = torch.compile(
        Inside(model, off) if inside else model, backend="fxpasses", options=CACHED, dynamic=dynamic
    )
    for _ in range(6):
        update = chosen.choice([*updates, None if inside else _functional, None])
        if update is _functional:
            found, expected = _functional(model, run)
        else:
            if update is not None:
                update(model)
            x = torch.randn(
                chosen.randint(2, 4) if dynamic else 2, *X.shape[1:], dtype=model.stem.weight.dtype
            )
            with torch.no_grad():
                expected = model(x)
            with contextlib.nullcontext() if inside else off():
                found = run(x)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.1}[expected.dtype]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 500), marks=pytest.mark.full)])
def test_no_sequence_of_updates_gives_a_stale_answer(seeds):
    with torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=100_000):
        for seed in seeds:
            _sequence(seed)


def test_the_guard_is_not_vacuous_an_untold_write_to_one_element_goes_unnoticed_until_refresh():
    model = net()
    run = compiled(model)
    assert_fresh(run, model)
    with torch.no_grad():
        before = run(X)
        model.stem.weight.data[2, 1, 1, 0] *= 1.01
        assert torch.equal(run(X), before)
    fxpasses.refresh(run)
    assert_fresh(run, model)


def test_refresh_of_another_module_keeps_what_is_kept(monkeypatch):
    calls = computations(monkeypatch)
    model, other = net(), net(seed=1)
    run = compiled(model)
    assert_fresh(run, model)
    fxpasses.refresh(other)
    assert_fresh(run, model)
    assert len(calls) == 1
    fxpasses.refresh()
    assert_fresh(run, model)
    assert len(calls) == 2


def test_parameters_are_not_changed_and_stay_usable():
    model = net()
    before = copy.deepcopy(model.state_dict())
    run = compiled(model)
    assert_fresh(run, model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_inference_mode_and_no_grad_may_alternate():
    model = net()
    run = compiled(model)
    for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(run(X), model(X), rtol=1e-10, atol=1e-10)
        _add(model)


def test_inference_tensors_have_no_version_and_are_computed_at_every_call(monkeypatch):
    calls = computations(monkeypatch)
    with torch.inference_mode():
        model = net()
        run = compiled(model)
        for _ in range(2):
            torch.testing.assert_close(run(X), model(X), rtol=1e-10, atol=1e-10)
            model.stem.weight.add_(0.5)
    assert len(calls) >= 2


def test_gradients_on_means_that_nothing_is_kept_and_says_so():
    model = net()
    run = compiled(model)
    run(X).sum().backward()
    assert model.stem.weight.grad is not None
    report = fxpasses.last_report()
    assert report.kept_tensors == 0
    assert [remark.code for remark in report.remarks if remark.rule == "kept_weights"] == ["grad-mode"]


class Inside(nn.Module):
    """A network that switches gradients off by itself."""

    def __init__(self, model, off):
        super().__init__()
        self.model, self.off = model, off

    def forward(self, x):
        with self.off():
            return self.model(x)


class Decorated(Net):
    """Its method does."""

    forward = torch.no_grad()(Net.forward)


class DecoratedForInference(Net):
    """The same with inference tensors as results."""

    forward = torch.inference_mode()(Net.forward)


def _around(off):
    def way(model):
        run = compiled(model)

        def call(x):
            with off():
                return run(x)

        return call

    return way


def _inside(off):
    return lambda model: compiled(Inside(model, off))


def _decorated(kind):
    def way(model):
        model.__class__ = kind
        return compiled(model)

    return way


def _nothing_requires(model):
    return compiled(model.requires_grad_(False))


GRADIENTS_OFF = {
    "no_grad around": _around(torch.no_grad),
    "inference_mode around": _around(torch.inference_mode),
    "no_grad inside": _inside(torch.no_grad),
    "inference_mode inside": _inside(torch.inference_mode),
    "no_grad as decorator": _decorated(Decorated),
    "inference_mode as decorator": _decorated(DecoratedForInference),
    "nothing requires any": _nothing_requires,
}


@pytest.mark.parametrize("way", GRADIENTS_OFF)
def test_weights_are_kept_whichever_way_gradients_are_off(way, monkeypatch):
    calls = computations(monkeypatch)
    model = net()
    run = GRADIENTS_OFF[way](model)
    torch._dynamo.utils.counters.clear()

    def check():
        with torch.no_grad():
            expected = Net.forward(model, X)
        found = run(X)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    for _ in range(3):
        check()
    assert len(calls) == 1
    assert fxpasses.last_report().kept_tensors > 0
    with torch.no_grad():
        model.stem.weight.add_(0.5)
    check()
    model.head.weight.data.mul_(-2)
    check()
    assert len(calls) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("recorded", ["result", "one of two results", "input that is written to"])
def test_a_gradient_that_is_recorded_is_never_cut(recorded):
    model = net()

    def call(model, x):
        if recorded == "result":
            return model(x)
        if recorded == "one of two results":
            with torch.no_grad():
                off = model(x)
            return off, model(x)
        x.mul_(model.offset.sum())
        with torch.no_grad():
            return model(x)

    run = torch.compile(call, backend="fxpasses", options=CACHED)
    if recorded == "input that is written to":
        model.requires_grad_(False)
        leaves = [torch.ones_like(X).requires_grad_() for _ in range(2)]
        for one, used in zip(leaves, (run, call), strict=True):
            written = one * X
            used(model, written)
            written.sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        assert leaves[0].grad.abs().max() > 0
        return
    last = (lambda out: out) if recorded == "result" else (lambda out: out[1])
    gradients = []
    for used in (run, call):
        model.zero_grad()
        last(used(model, X)).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert fxpasses.last_report().kept_tensors == 0


def test_random_work_on_parameters_is_done_at_every_call():
    class DropConnect(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, 64))

        def forward(self, x):
            return x @ torch.nn.functional.dropout(self.weight, 0.5, True)

    model = DropConnect()
    run = compiled(model)
    with torch.no_grad():
        first, second = run(torch.eye(64)), run(torch.eye(64))
    assert not torch.equal(first, second)
    assert fxpasses.last_report().kept_tensors == 0


def test_a_buffer_that_the_graph_writes_to_is_not_kept():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * (self.calls * 2)

    model = Counting()
    run = compiled(model)
    with torch.no_grad():
        assert [run(torch.ones(())).item() for _ in range(3)] == [2.0, 4.0, 6.0]


def test_what_grows_beyond_the_parameters_is_not_kept():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32))

        def forward(self, x):
            return x @ (self.weight[:, None] * self.weight)

    model = Outer()
    run = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(run(torch.eye(32)), model(torch.eye(32)))
    report = fxpasses.last_report()
    assert report.kept_tensors == 0
    assert [remark.code for remark in report.remarks] == ["cached-memory"]


class Biased(nn.Module):
    """Attention over a window: a table of biases, spread out for each pair of positions, beside weights."""

    def __init__(self, spread=300):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 16, 3), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("index", torch.arange(spread * spread).remainder(9))
        self.spread = spread

    def forward(self, x):
        y = self.linear(self.conv(x).mean((2, 3)))
        bias = self.table[self.index].reshape(self.spread, self.spread, 4)
        return y, bias * y.sum(), bias.exp() * y.mean()


def test_what_grows_beyond_the_parameters_does_not_keep_the_others_from_being_kept():
    model, x = Biased().eval(), torch.randn(2, 3, 8, 8)
    run = compiled(model, inner="inductor")
    with torch.no_grad():
        for factor in (1.0, 1.5):
            for parameter in model.parameters():
                parameter.mul_(factor)
            for found, expected in zip(run(x), model(x), strict=True):
                torch.testing.assert_close(found, expected)
                assert found.stride() == expected.stride()
    report = fxpasses.last_report()
    remarks = [remark for remark in report.remarks if remark.code == "cached-memory"]
    assert all("1440000 of them are left out" in remark.message for remark in remarks)
    assert len(remarks) == 1, "the table; what is made of it is left out with it"
    assert report.kept_tensors > 0
    assert report.kept_bytes <= sum(tensor.nbytes for tensor in model.state_dict().values())


def test_a_convolution_whose_weight_grows_has_eagers_strides():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.weight = nn.Conv2d(3, 16, 3), nn.Parameter(torch.randn(16))

        def forward(self, x):
            weight = (
                self.weight[:, None, None, None] * self.weight[None, :, None, None].repeat(2, 1, 3, 3)[:1]
            )
            return torch.conv2d(self.first(x), weight * 2)

    model, x = Spread().eval(), torch.randn(2, 3, 8, 8)
    run = compiled(model, inner="inductor")
    with torch.no_grad():
        found, expected = run(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.stride() == expected.stride()
    report = fxpasses.last_report()
    assert report.packed_tensors == 1, "that of the first convolution"
    assert "cached-memory" in {remark.code for remark in report.remarks}


def test_of_two_made_of_the_same_parameters_one_is_kept():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x):
            return x @ self.weight.exp() + x @ self.weight.sin()

    model = Twice().double()
    run = compiled(model)
    for _ in range(2):
        assert_fresh(run, model, torch.randn(3, 32, dtype=torch.float64))
        with torch.no_grad():
            model.weight.mul_(0.5)
    report = fxpasses.last_report()
    assert report.kept_tensors == 1
    assert [remark.code for remark in report.remarks] == ["cached-memory"]


def test_a_weight_and_what_is_made_of_it_are_not_both_kept():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, bias=False)

        def forward(self, x):
            return self.conv(x) + torch.conv2d(x.relu(), self.conv.weight.exp())

    model, x = Both().eval(), torch.randn(2, 8, 6, 6)
    run = compiled(model, inner="inductor")
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    report = fxpasses.last_report()
    assert report.kept_tensors == 1
    assert [remark.code for remark in report.remarks if remark.status == "declined"] == ["cached-memory"]


def test_what_fits_beside_the_parameters_is_kept_whatever_it_grows_to():
    model = Biased(spread=2).eval()
    run = compiled(model, inner="inductor")
    with torch.no_grad():
        run(torch.randn(2, 3, 8, 8))
    assert not [remark for remark in fxpasses.last_report().remarks if remark.code == "cached-memory"]


def test_several_threads_may_call_at_once():
    model = net()
    run = compiled(model)
    with torch.no_grad():
        expected = model(X)
        run(X)
    wrong: list[float] = []

    def call():
        with torch.no_grad():
            for _ in range(20):
                fxpasses.refresh(run)
                wrong.append((run(X) - expected).abs().max().item())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80
    assert max(wrong) < 1e-10


def test_a_deep_copy_of_the_module_has_weights_of_its_own():
    model = net()
    run = compiled(model)
    assert_fresh(run, model)
    other = copy.deepcopy(model)
    _add(other)
    assert_fresh(compiled(other), other)
    assert_fresh(run, model)


@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamic_batches_share_what_is_kept(dynamic):
    model = net()
    run = torch.compile(model, backend="fxpasses", dynamic=dynamic, options={**CACHED, "inner": "aot_eager"})
    for batch in (2, 3, 1):
        assert_fresh(run, model, torch.randn(batch, 3, 5, 5, dtype=torch.float64))


def test_autocast_inside_the_graph_keeps_its_results_right():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)

    model = Mixed().eval()
    run = compiled(model, inner="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = model(x)
        assert run(x).dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(run(x), expected, rtol=2e-2, atol=2e-2)


def test_a_plain_graph_module_cannot_keep_anything_and_says_so():
    with torch.no_grad(), pytest.raises(UnknownOptionError, match="something to keep them"):
        fxpasses.optimize(torch.fx.symbolic_trace(net()), (X,), options={"weights": "cached"})


class Identity(nn.Module):
    """A block whose identity branch becomes part of the weight, as in RepVGG; and a constant beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.identity = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.identity(x) + torch.ones(4, 1, 1, dtype=x.dtype)


def test_an_identity_that_is_folded_into_a_weight_is_folded_once():
    """The identity matrix reads no parameter, so the weight it became part of was made in every call."""
    torch.manual_seed(0)
    model = Identity().double().eval()
    model.identity.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    seen = []

    def inner(graph_module, inputs):
        seen.extend(node.target for node in graph_module.graph.nodes)
        return graph_module

    run = torch.compile(model, backend="fxpasses", options={"weights": "cached", "inner": inner})
    assert_fresh(run, model, x)
    assert fxpasses.last_report().applied["parallel_conv_merge"] == 1
    assert torch.eye not in seen
    assert torch.ones in seen
    model.identity.running_mean.add_(1)
    assert_fresh(run, model, x)
