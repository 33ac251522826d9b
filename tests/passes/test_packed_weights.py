"""weights="cached" through inductor: weights in oneDNN's format, filled anew when they change."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses import backend as backend_module
from fxpasses import kept_weights

CACHED = {"weights": "cached"}


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


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.normal_()
            each.running_var.uniform_(0.5, 2)
            nn.init.normal_(each.weight)
    return model


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


@pytest.mark.parametrize("seed", range(4))
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
        expected = [torch.func.functional_call(model, each, (X,)) for each in sets]
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
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_calls_of_several_threads_overlap_and_a_renewal_waits_for_them():
    """The compiled code is a stand-in that reads the constant twice, with a renewal tried in between."""
    model = net()
    run = compiled(model)
    kept = _kept_by(run)
    constant = kept._packed[0].constant
    inside, go_on = threading.Event(), threading.Event()
    read = []

    def slow(*arguments):
        read.append(constant.to_dense().clone())
        inside.set()
        go_on.wait(10)
        read.append(constant.to_dense().clone())
        return (X,)

    kept._compiled = slow
    first = threading.Thread(target=lambda: _call(run))
    first.start()
    assert inside.wait(10)
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(3)
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


def test_what_was_packed_is_not_held_a_second_time():
    model = net()
    run = compiled(model)
    kept = _kept_by(run)
    husks = set(kept._husks)
    assert len(husks) == 4
    assert all(kept._snapshot.values[at].untyped_storage().nbytes() == 0 for at in husks)


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


@pytest.mark.parametrize(
    ("layer", "x", "reason"),
    [
        (nn.ConvTranspose2d(3, 4, 3), X, "plain"),
        (nn.Conv1d(3, 4, 3), X[..., 0], None),
        (nn.Conv2d(3, 4, 3).double(), X.double(), "oneDNN does not pack"),
    ],
    ids=["transposed", "1d", "float64"],
)
def test_what_onednn_does_not_pack_stays_as_it_was(layer, x, reason):
    run = compiled(nn.Sequential(layer.eval(), nn.ReLU()))
    with torch.no_grad():
        torch.testing.assert_close(run(x), torch.relu(layer(x)))
    report = fxpasses.last_report()
    assert report.packed_tensors == 0
    messages = [each.message for each in report.remarks if each.rule == "packed_weights"]
    assert any(reason in each for each in messages) if reason else not messages


def test_symbolic_sizes_are_not_packed_and_the_report_says_so():
    model = net()
    run = torch.compile(model, backend="fxpasses", options=CACHED, dynamic=True)
    assert_fresh(run, model)
    assert_fresh(run, model, torch.randn(3, 3, 14, 14))
    report = fxpasses.last_report()
    assert report.packed_tensors == 0
    assert any("symbolic" in each.message for each in report.remarks if each.rule == "packed_weights")


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


def test_a_second_process_does_not_get_constants_from_a_cache(tmp_path):
    """The first process fills inductor's caches; the second must fill its own constants."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import torch, fxpasses
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        x = torch.randn(1, 3, 9, 9)
        run = torch.compile(model, backend="fxpasses", options={"weights": "cached"})
        with torch.no_grad():
            print((run(x) - model(x)).abs().max().item() < 1e-5, fxpasses.last_report().packed_tensors)
        """)
    )
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(program)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            check=True,
        )
        assert done.stdout.split() == ["True", "1"]
