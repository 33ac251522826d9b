"""weights="cached" through inductor: weights in oneDNN's format, filled anew when they change."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from helpers import each_once, randomised, sampled_cases
from torch import nn

import fxpasses
from fxpasses.backend import inner as backend_module
from fxpasses.kernels import library
from fxpasses.kernels.choice import KernelTiming
from fxpasses.kernels.kernel import DEPTHWISE, Kernel, Kind
from fxpasses.passes.weights import kept as kept_weights
from fxpasses.passes.weights import own_kernels as own_kernels_module
from fxpasses.passes.weights import packed as packed_module

pytestmark = pytest.mark.vectors

CACHED = {"weights": "cached"}
ANEW = {"force_disable_caches": True}
"""What was measured is in no key of inductor's caches: a made-up choice needs an artifact of its own."""


class Net(nn.Module):
    """A plain, a depthwise, a grouped and a pointwise convolution, each followed by what oneDNN can fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.BatchNorm2d(8), nn.SiLU())
        self.group = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.point = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        x = self.depth(self.stem(x))
        return torch.relu(self.point(self.group(x)) + x)


OWN_IN_NET = 3 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4
"""How many of its convolutions have a kernel of ours: the depthwise one has none where vectors are longer."""


def net(seed: int = 0) -> Net:
    return seeded(Net, seed)


def seeded(kind, seed: int):
    torch.manual_seed(seed)
    return randomised(kind(), torch.float32)


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def compiled(model, **options):
    return torch.compile(model, backend="fxpasses", options={**CACHED, **options})


def assert_fresh(run, model, x=X):
    """Within twice of eager's own rounding error of a float64 reference."""
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        error = (run(x).double() - expected).abs().max()
        allowed = 2 * (model(x).double() - expected).abs().max() + 1e-6 * expected.abs().max()
    assert error <= allowed


def test_every_convolution_is_packed_and_the_outputs_are_eagers():
    model = net()
    run = compiled(model)
    assert_fresh(run, model)
    assert fxpasses.last_report().packed_tensors == 4
    assert "packed for 4 convolutions" in str(fxpasses.last_report())


def test_an_update_fills_the_constants_anew_and_compiles_nothing(monkeypatch):
    compilations = []
    compile_with_inductor = backend_module.compile_with_inductor
    monkeypatch.setattr(
        backend_module,
        "compile_with_inductor",
        lambda *given: compilations.append(1) or compile_with_inductor(*given),
    )
    model = net()
    run = compiled(model)
    assert_fresh(run, model)
    model.load_state_dict(net(seed=1).state_dict())
    assert_fresh(run, model)
    with torch.no_grad():
        model.group.weight.mul_(2)
    assert_fresh(run, model)
    assert len(compilations) == 1


def _load(model, seed):
    model.load_state_dict(net(seed).state_dict())


def _step(model, seed):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().mean().backward()
    optimizer.step()


def _add(model, seed):
    with torch.no_grad():
        model.stem[0].weight.add_(0.1)


def _replace(model, seed):
    model.point[0].weight = nn.Parameter(net(seed).point[0].weight.detach())


def _statistics(model, seed):
    model.train()
    with torch.no_grad():
        model(X)
    model.eval()


def _data(model, seed):
    model.depth[0].weight.data = net(seed).depth[0].weight.detach()


@pytest.mark.parametrize("seed", sampled_cases(range(4), range(2)))
def test_no_sequence_of_updates_gives_a_stale_answer(seed):
    chosen = random.Random(seed)
    model = net(seed)
    run = compiled(model)
    for step in range(8):
        chosen.choice((_load, _step, _add, _replace, _statistics, _data))(model, step)
        assert_fresh(run, model)


def test_two_threads_with_weights_of_their_own_do_not_mix():
    model = net()
    run = compiled(model)
    sets = [dict(net(seed).state_dict()) for seed in (1, 2)]
    with torch.no_grad():
        expected = [torch.func.functional_call(model, state, (X,)) for state in sets]
        torch.func.functional_call(run, {f"_orig_mod.{k}": v for k, v in sets[0].items()}, (X,))
    wrong = []

    def work(own):
        named = {f"_orig_mod.{k}": v for k, v in sets[own].items()}
        for _ in range(30):
            with torch.no_grad(), lock:
                call = torch.func.functional_call(run, named, (X,))
            if not torch.allclose(call, expected[own], atol=1e-4, rtol=1e-4):
                wrong.append(own)

    lock = threading.Lock()  # functional_call itself swaps parameters of one module
    threads = [threading.Thread(target=work, args=(own,)) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_calls_of_several_threads_overlap_and_a_renewal_waits_for_them():
    """The compiled code is a stand-in that reads the constant twice, with a renewal tried in between."""
    model = net()
    run = compiled(model)
    kept = _kept_by(run)
    (place,) = kept._packed[0].places
    inside, go_on = threading.Event(), threading.Event()
    read = []

    def slow(*arguments):
        read.append(place.names[place.name].to_dense())
        inside.set()
        go_on.wait(10)
        read.append(place.names[place.name].to_dense())
        return (X,)

    kept._compiled = slow
    first = threading.Thread(target=lambda: _call(run))
    first.start()
    assert inside.wait(10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    second = threading.Thread(target=lambda: _call(run))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go_on.set()
    first.join(10)
    second.join(10)
    assert torch.equal(read[0], read[1])
    assert not torch.equal(read[0], read[2])


def _call(run):
    with torch.no_grad():
        run(X)


def _kept_by(run):
    before = set(kept_weights._alive)
    _call(run)
    (kept,) = set(kept_weights._alive) - before
    return kept


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.needs_kernels)])
def test_what_was_packed_is_not_held_a_second_time(monkeypatch, own):
    """Four weights; and the biases that kernels of ours have packed with them."""
    monkeypatch.setattr(
        own_kernels_module,
        "choose",
        lambda sizes, image, **given: KernelTiming(Kernel(Kind.PRODUCT), 1.0, 2.0 * own),
    )
    model = net()
    run = compiled(model, inductor=ANEW)
    kept = _kept_by(run)
    unread = set(kept._storageless)
    assert len(unread) == 4 + (OWN_IN_NET if own else 0)
    assert all(kept._snapshot.values[at].untyped_storage().nbytes() == 0 for at in unread)


class Two(nn.Module):
    """One weight for two convolutions of different sizes; optionally read by something else as well."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.reads = reads

    def forward(self, x):
        y = torch.conv2d(torch.conv2d(x, self.weight), self.weight, stride=2)
        return y + self.weight.sum() if self.reads else y


def test_a_weight_of_two_convolutions_is_packed_for_each():
    torch.manual_seed(0)
    model = Two(reads=False)
    assert_fresh(compiled(model), model)
    assert fxpasses.last_report().packed_tensors == 2


def test_a_weight_that_is_read_elsewhere_too():
    torch.manual_seed(0)
    model = Two(reads=True)
    run = compiled(model)
    assert_fresh(run, model)
    with torch.no_grad():
        model.weight.mul_(2)
    assert_fresh(run, model)


def test_float64_which_onednn_does_not_pack_stays_as_it_was():
    layer, x = nn.Conv2d(3, 4, 3).double().eval(), X.double()
    run = compiled(nn.Sequential(layer, nn.ReLU()))
    with torch.no_grad():
        torch.testing.assert_close(run(x), torch.relu(layer(x)))
    report = fxpasses.last_report()
    assert report.packed_tensors == 0
    messages = [remark.message for remark in report.remarks if remark.rule == "packed_weights"]
    assert any("oneDNN does not pack" in message for message in messages)


def _calls_under_autocast(model):
    run = compiled(model)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return run(x)

    return call


class _Autocast(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


@pytest.mark.parametrize(
    "around", sampled_cases([True, False], [True]), ids=["around the call", "in the model"]
)
def test_autocast_rounds_kept_weights_once(around):
    """Folded in float32: no further from float64 than twice as far as eager under autocast."""
    model = net()
    run = _calls_under_autocast(model) if around else compiled(_Autocast(model))
    for _ in range(2):
        with torch.no_grad():
            found = run(X)
            with torch.autocast("cpu", torch.bfloat16):
                eager = model(X)
            exact = copy.deepcopy(model).double()(X.double())
        for ours, theirs, wanted in zip(found, eager, exact, strict=True):
            assert ours.dtype == theirs.dtype
            allowed = 2 * (theirs.double() - wanted).abs().max() + 1e-3
            assert (ours.double() - wanted).abs().max() <= allowed
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    report = fxpasses.last_report()
    if around and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert report.packed_tensors == 4


def test_bfloat16_is_packed_where_the_cpu_has_it():
    model = net().bfloat16()
    run = compiled(model)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(X.bfloat16().double())
        error = (run(X.bfloat16()).double() - expected).norm()
        assert error <= 2 * (model(X.bfloat16()).double() - expected).norm()


def test_a_layout_that_was_asked_for_is_not_packed_over():
    model = net()
    assert_fresh(compiled(model, layout="contiguous"), model)
    assert fxpasses.last_report().packed_tensors == 0


def test_a_pass_of_the_user_in_the_same_slot_runs_too():
    seen = []
    model = net()
    run = compiled(model, inductor={"joint_custom_post_pass": lambda graph: seen.append(len(graph.nodes))})
    assert_fresh(run, model)
    assert seen
    assert fxpasses.last_report().packed_tensors == 4


# Kernels of our own ----------------------------------------------------------------------------------------


class Varied(nn.Module):
    """Convolutions of every kind of kernel, each with an epilogue, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False), nn.BatchNorm2d(32), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(nn.Conv2d(32, 8, 1), nn.SiLU(), nn.Conv2d(8, 32, 1), nn.Hardsigmoid())
        self.group = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=8), nn.GELU())
        self.late = nn.BatchNorm2d(64)
        self.point = nn.Conv2d(64, 32, 1)
        self.head = nn.Sequential(nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 7, bias=False))

    def forward(self, x):
        x = self.stem(x)
        y = self.depth(x)
        y = y * self.squeeze(y.mean((2, 3), keepdim=True))
        y = torch.relu(self.late(torch.cat([self.group(y), x], 1)))
        y = torch.relu(self.point(y) + x)
        return y, self.head(y.mean((2, 3)))


def varied(seed: int = 0) -> Varied:
    return seeded(Varied, seed)


def assert_all_fresh(run, model, x):
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        eager, found = model(x), run(x)
    for want, plain, got in zip(expected, eager, found, strict=True):
        allowed = 2 * (plain.double() - want).abs().max() + 1e-6 * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed
        assert got.stride() == plain.stride()


@pytest.mark.needs_kernels
@pytest.mark.parametrize(
    "shape",
    sampled_cases([(1, 3, 16, 16), (2, 3, 15, 9), (1, 3, 1, 1), (3, 3, 1, 6)], [(2, 3, 15, 9), (1, 3, 1, 1)]),
    ids=str,
)
def test_own_kernels_give_eagers_outputs_and_strides(shape):
    model = varied()
    run = compiled(model, profit="always")
    assert_all_fresh(run, model, torch.randn(shape))
    report = fxpasses.last_report()
    # On an image of one pixel the last sum is a bias, which is not kept, so oneDNN takes that one.
    left = ["live-bias"] if shape == (1, 3, 1, 1) else []
    assert (report.packed_tensors, report.applied["own_kernels"]) == (8, 8 - len(left))
    assert [remark.code for remark in report.declined if remark.rule == "own_kernels"] == left
    applied = [
        remark for remark in report.remarks if remark.rule == "own_kernels" and remark.status == "applied"
    ]
    assert all("test_packed_weights.py" in remark.location for remark in applied)
    assert {remark.message.split()[-1] for remark in applied} >= {"clamp", "silu", "hardswish", "gelu"}


@pytest.mark.needs_kernels
@pytest.mark.parametrize("change", [_load, _step, _data], ids=["load", "step", "data"])
def test_own_kernels_read_no_stale_weights(change):
    model = net()
    run = compiled(model, profit="always")
    assert_fresh(run, model)
    assert fxpasses.last_report().applied["own_kernels"] > 0
    change(model, 3)
    assert_fresh(run, model)


@pytest.mark.needs_kernels
def test_a_linear_layer_and_a_bias_are_noticed_when_they_change():
    model = varied()
    x = torch.randn(2, 3, 12, 12)
    run = compiled(model, profit="always")
    assert_all_fresh(run, model, x)
    with torch.no_grad():
        model.head[0].bias.add_(1)
    assert_all_fresh(run, model, x)
    model.head[2].weight = nn.Parameter(torch.randn(7, 20))
    assert_all_fresh(run, model, x)
    with torch.no_grad():
        model.squeeze[2].bias.mul_(-2)
        model.late.running_var.mul_(3)
    assert_all_fresh(run, model, x)
    model.load_state_dict(varied(5).state_dict())
    assert_all_fresh(run, model, x)


@pytest.mark.needs_kernels
def test_what_is_slower_is_left_to_onednn_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr(
        own_kernels_module,
        "choose",
        lambda sizes, image, **given: KernelTiming(Kernel(Kind.PRODUCT), 2e-3, 1e-3),
    )
    monkeypatch.setattr(
        own_kernels_module, "choose_linear", lambda *sizes: KernelTiming(Kernel(Kind.PRODUCT), 2e-3, 1e-3)
    )
    model = varied()
    x = torch.randn(2, 3, 12, 12)
    assert_all_fresh(compiled(model, inductor=ANEW), model, x)
    report = fxpasses.last_report()
    assert "own_kernels" not in report.applied
    assert report.packed_tensors == 6
    remarks = [remark for remark in report.remarks if remark.rule == "own_kernels"]
    assert {remark.code for remark in remarks} == {"not-faster"}
    assert len(remarks) == 6
    assert "torch's kernel took 1000.0 µs and ours 2000.0 µs" in remarks[0].message


@pytest.mark.needs_kernels
def test_what_is_faster_is_taken(monkeypatch):
    """All but a depthwise convolution that has fewer channels than a vector."""

    def faster(sizes, image, **given):
        return KernelTiming(DEPTHWISE if sizes.is_depthwise else Kernel(Kind.PRODUCT, 2), 1e-3, 2e-3)

    monkeypatch.setattr(own_kernels_module, "choose", faster)
    model = net()
    assert_fresh(compiled(model, inductor=ANEW), model)
    assert fxpasses.last_report().applied["own_kernels"] == OWN_IN_NET


@pytest.mark.needs_kernels
@pytest.mark.parametrize(("cache", "far"), [(2**30, False), (2**9, True)])
def test_filters_are_measured_as_far_where_all_are_more_than_a_cache_holds(monkeypatch, cache, far):
    seen = []

    def slower(sizes, image, **given):
        seen.append(given["far"])
        return KernelTiming(None, 1e-3, 1e-3)

    monkeypatch.setattr(own_kernels_module, "choose", slower)
    monkeypatch.setattr(packed_module, "far", lambda device: 2 * cache)
    model = net()
    assert_fresh(compiled(model, inductor=ANEW), model)
    assert set(seen) == {far}


@pytest.mark.parametrize("capability", sampled_cases(["DEFAULT", "AVX2"], ["AVX2"]))
def test_without_kernels_all_is_left_to_onednn_with_one_remark(monkeypatch, capability):
    monkeypatch.setattr(library, "vector_length", lambda: 0)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = varied()
    x = torch.randn(2, 3, 12, 12)
    assert_all_fresh(compiled(model, profit="always"), model, x)
    report = fxpasses.last_report()
    assert report.packed_tensors == 6
    (remark,) = [remark for remark in report.remarks if remark.rule == "own_kernels"]
    assert (remark.status, remark.code) == ("declined", "no-kernels")
    assert ("do not compile" if capability == "AVX2" else "the vectors of DEFAULT") in remark.message


class Shared(nn.Module):
    """One weight for two convolutions with biases of their own, and one for two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.biases = nn.Parameter(torch.randn(2, 4))
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = torch.conv2d(x, self.weight, self.biases[0], padding=1)
        x = torch.conv2d(x, self.weight, self.biases[1], stride=2)
        y = nn.functional.linear(x.mean((2, 3)), self.matrix)
        return (x, nn.functional.linear(torch.relu(y), self.matrix))


@pytest.mark.needs_kernels
def test_shared_weights_are_packed_for_each_reader():
    torch.manual_seed(0)
    model = Shared()
    x = torch.randn(1, 4, 7, 7)
    run = compiled(model, profit="always")
    assert_all_fresh(run, model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert_all_fresh(run, model, x)


@pytest.mark.needs_kernels
@pytest.mark.parametrize(
    "flags",
    sampled_cases([{"bias": False}, {"affine": False}, {"train_gamma": False}], [{"bias": False}]),
    ids=str,
)
def test_norms_that_nothing_folds_are_kept_as_scale_and_shift(flags):
    """A norm in front of a convolution that pads cannot be folded into it."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3, affine=flags.get("affine", True))
            self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=flags.get("bias", True))

        def forward(self, x):
            return (self.conv(torch.relu(self.norm(x))),)

    torch.manual_seed(0)
    model = Late().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    if not flags.get("train_gamma", True):
        model.norm.weight.requires_grad_(False)
    run = compiled(model)
    assert_all_fresh(run, model, X)
    model.norm.running_mean.add_(1)
    assert_all_fresh(run, model, X)
    model.train()  # the statistics of the batch are not kept
    with torch.no_grad():
        torch.testing.assert_close(run(X)[0], copy.deepcopy(model)(X)[0], rtol=1e-4, atol=1e-5)


class Outputs(nn.Module):
    """Outputs in several memory orders, one of them a view of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return y, y.permute(0, 2, 3, 1), torch.relu(y).transpose(1, 3), y[:, 1:3], x.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("shape", "layout"),
    each_once(
        {"(2, 3, 6, 7)": (2, 3, 6, 7), "(1, 3, 1, 4)": (1, 3, 1, 4)},
        {str(layout): layout for layout in (torch.contiguous_format, torch.channels_last)},
    ),
)
def test_outputs_have_eagers_strides_and_views_stay_views(shape, layout):
    """A convolution's result follows the layout of its weight, and the kept one is channels-last."""
    torch.manual_seed(0)
    model = Outputs().eval()
    x = torch.randn(shape).contiguous(memory_format=layout)
    run = compiled(model)
    with torch.no_grad():
        found, expected = run(x), model(x)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()
    assert found[4].data_ptr() == x.data_ptr()


TAILS = {
    "row": lambda y: y[:, :, 0],
    "halves": lambda y: y.chunk(2, 1),
    "every other": lambda y: y[:, ::2, :, 1:],
    "tokens": lambda y: y.flatten(2).transpose(1, 2),
    "flattened": lambda y: y.flatten(2),
    "cloned": lambda y: (y.flatten(2).clone(), y + 1),
    "one image": lambda y: y[0],
    "images": lambda y: y.unbind(0),
    "with an axis more": lambda y: y[:, None],
    "matrix": lambda y: y[0, 0],
}


class Tailed(nn.Module):
    def __init__(self, kernel, tail):
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 32, kernel, padding=kernel // 2), nn.Conv2d(32, 32, 1)
        self.tail = tail

    def forward(self, x):
        return self.tail(self.second(torch.relu(self.first(x))))


@pytest.mark.needs_kernels
@pytest.mark.parametrize(
    ("tail", "layout", "kernel", "profit"),
    each_once(
        {tail: tail for tail in TAILS},
        {str(layout): layout for layout in (torch.contiguous_format, torch.channels_last)},
        {"1": 1, "3": 3},
        {"always": "always", "model": "model"},
    ),
)
def test_results_that_are_no_images_have_eagers_strides(tail, layout, kernel, profit):
    torch.manual_seed(0)
    model = Tailed(kernel, TAILS[tail]).eval()
    x = torch.randn(2, 16, 6, 7).contiguous(memory_format=layout)
    with torch.no_grad():
        found, expected = compiled(model, profit=profit)(x), model(x)
    both = ((found,), (expected,)) if isinstance(found, torch.Tensor) else (found, expected)
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


def test_flattened_results_can_be_viewed_as_in_eager_mode_whatever_the_size():
    model = Tailed(3, TAILS["flattened"]).eval()
    run = torch.compile(model, backend="fxpasses", options=CACHED, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 16, 6, 7), (3, 16, 8, 5)):
            x = torch.randn(shape)
            torch.testing.assert_close(run(x).view(-1), model(x).view(-1))


def test_outputs_of_symbolic_sizes_have_eagers_strides():
    model = nn.Sequential(net().stem, net().depth).eval()
    run = torch.compile(model, backend="fxpasses", options=CACHED, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3, 12, 12), (3, 3, 14, 16)):
            x = torch.randn(shape)
            assert run(x).stride() == model(x).stride()


# One wrapper of C++ takes less time than the header that would be compiled ahead for it.
SETTINGS = [{"cpp_wrapper": True, "cpp_cache_precompile_headers": False}, {"freezing": True}]


@pytest.mark.needs_kernels
@pytest.mark.parametrize("inductor", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_own_kernels_under_settings_of_inductor(inductor):
    model = net()
    run = compiled(model, profit="always", inductor=inductor)
    assert_fresh(run, model)
    assert fxpasses.last_report().applied["own_kernels"] == OWN_IN_NET
    model.load_state_dict(net(seed=1).state_dict())
    assert_fresh(run, model)
