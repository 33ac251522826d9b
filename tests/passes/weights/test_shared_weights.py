"""What is kept for one module is in memory once, and calls and updates of many threads do not mix."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses.kernels.choice import KernelTiming
from fxpasses.kernels.convolution import kernels_for
from fxpasses.kernels.kernel import Kind
from fxpasses.passes.weights import kept as kept_weights
from fxpasses.passes.weights import own_kernels, packed
from fxpasses.torch_internals import constants

OPTIONS = {"weights": "cached"}


class Net(nn.Module):
    """Convolutions and a linear layer, one of whose weights is read in both forms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.body(self.stem(x)).mean((2, 3))
        return self.head(x) + self.body[0].weight.sum()


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def kept_tensors():
    """All that is kept by now: kept tensors, and packed ones."""
    for kept in list(kept_weights._alive):
        if kept._snapshot is not None:
            yield from kept._snapshot.values
            yield from kept._snapshot.packed.values()


def kept_bytes() -> int:
    """Of kept and packed tensors, each counted once."""
    sizes = {}
    for tensor in kept_tensors():
        if tensor.is_mkldnn:
            sizes[torch.ops.mkldnn.data_ptr(tensor)] = torch.ops.mkldnn._nbytes(tensor)
        else:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def prefers_winograd(sizes, image, **given):
    """Finds a kernel of Winograd's the fastest wherever there is one, else torch's."""
    pixels = image[0] * (image[2] - 2) * (image[3] - 2)
    kernels = [one for one in kernels_for(sizes, pixels) if one.kind is Kind.WINOGRAD]
    return KernelTiming(kernels[0] if kernels else None, 1e-6, 1e-3)


def assert_fresh(run, model, x):
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "profit",
    ["model", "winograd", pytest.param("always", marks=pytest.mark.full)],
)
def test_images_of_five_sizes_keep_no_more_than_one(profit, monkeypatch):
    options = {**OPTIONS, "profit": profit}
    images = [torch.randn(batch, 3, 12, 12) for batch in (2, 3, 5, 8, 13)]
    if profit == "winograd":  # a small image would have another kernel if its graph chose by itself
        images[4] = torch.randn(1, 3, 6, 6)
        monkeypatch.setattr(own_kernels, "choose", prefers_winograd)
        options = {**OPTIONS, "inductor": {"force_disable_caches": True}}
    monkeypatch.setattr(kept_weights, "_alive", weakref.WeakSet())
    model = net()
    run = torch.compile(model, backend="fxpasses", options=options, dynamic=False)
    assert_fresh(run, model, images[0])
    one = kept_bytes()
    assert one > 4 * model.body[0].weight.numel()
    for x in images[1:]:
        assert_fresh(run, model, x)
    assert len(kept_weights._alive) == 5
    assert kept_bytes() <= 1.05 * one
    for update in (lambda weight: weight.mul_(2), lambda weight: weight.data.mul_(0.25)):
        with torch.no_grad():
            update(model.body[0].weight)
        for x in images:
            assert_fresh(run, model, x)
        assert kept_bytes() <= 1.05 * one


def test_what_stands_for_packed_weights_while_code_is_generated_takes_no_memory_later(monkeypatch):
    made = []
    original = constants.declare
    monkeypatch.setattr(packed, "declare", lambda *given: made.append(original(*given)) or made[-1])
    model = net()
    options = {**OPTIONS, "profit": "always", "inductor": {"force_disable_caches": True}}
    assert_fresh(torch.compile(model, backend="fxpasses", options=options), model, torch.randn(2, 3, 12, 12))
    assert len(made) >= 2
    assert {declared.constant.untyped_storage().nbytes() for declared in made} == {0}


def test_modules_with_the_same_graph_share_nothing():
    first, second = net(1), net(2)
    runs = [torch.compile(model, backend="fxpasses", options=OPTIONS) for model in (first, second)]
    x = torch.randn(2, 3, 12, 12)
    for _ in range(2):
        for run, model in zip(runs, (first, second), strict=True):
            assert_fresh(run, model, x)
        with torch.no_grad():
            second.stem[0].weight.mul_(1.5)


def test_what_is_kept_goes_with_its_module():
    others = set(map(id, kept_tensors()))  # of earlier tests, which somebody may hold
    model = net()
    run = torch.compile(model, backend="fxpasses", options=OPTIONS, dynamic=False)
    for batch in (2, 3):
        assert_fresh(run, model, torch.randn(batch, 3, 12, 12))
    held = [weakref.ref(tensor) for tensor in kept_tensors() if id(tensor) not in others]
    assert any(found() is not None for found in held)
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert not [found() for found in held if found() is not None]


@pytest.mark.parametrize("way", ["updating", "swap"])
def test_calls_of_four_threads_give_the_answer_of_one_version(way):
    """And of one that was in force at some time between the call's beginning and its end."""
    model = net()
    versions = [net(seed).state_dict() for seed in range(5)]
    run = torch.compile(model, backend="fxpasses", options=OPTIONS)
    x = torch.randn(2, 3, 12, 12)
    answers = []
    for state in versions:
        model.load_state_dict(state)
        assert_fresh(run, model, x)
        with torch.no_grad():
            answers.append(run(x))
    begun, done, wrong, stop = [4], [4], [], threading.Event()

    def call():
        with torch.no_grad():
            while not stop.is_set():
                oldest = done[0]
                found = run(x)
                allowed = {version % 5 for version in range(oldest, begun[0] + 1)}
                if not any(torch.equal(found, answers[version]) for version in allowed):
                    wrong.append((oldest, begun[0]))

    def update(number):
        state = versions[number % 5]
        begun[0] = number
        if way == "updating":
            with fxpasses.updating(run):
                model.load_state_dict(state)
        else:  # one tensor alone needs no block
            model.load_state_dict(state)
        done[0] = number

    if way == "swap":
        for state in versions[1:]:
            for name in state:
                if name != "body.0.weight":
                    state[name] = versions[0][name]
        answers.clear()
        for state in versions:
            model.load_state_dict(state)
            with torch.no_grad():
                answers.append(run(x))

        def update(number):
            begun[0] = number
            model.body[0].weight.data = versions[number % 5]["body.0.weight"].clone()
            done[0] = number

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    number = 4
    while number < 200 and time.monotonic() - began < (2 if number > 30 else 30):
        number += 1
        update(number)
        time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert number > 30
    assert not wrong


def test_the_thread_that_updates_may_call():
    model = net()
    run = torch.compile(model, backend="fxpasses", options=OPTIONS)
    x = torch.randn(2, 3, 12, 12)
    assert_fresh(run, model, x)
    with fxpasses.updating(run), torch.no_grad():
        assert_fresh(run, model, x)
        model.head.bias.add_(1)
        assert_fresh(run, model, x)
    assert_fresh(run, model, x)


def test_callers_who_never_pause_do_not_keep_an_update_out():
    model = net()
    run = torch.compile(model, backend="fxpasses", options=OPTIONS)
    x = torch.randn(2, 3, 12, 12)
    assert_fresh(run, model, x)
    weight = model.stem[0].weight
    alive = [kept for kept in kept_weights._alive if kept._snapshot is not None]
    (kept,) = [kept for kept in alive if kept._snapshot.sources[0] is weight]
    compiled, calls, stop = kept._compiled, [0], threading.Event()

    def slow(*arguments):
        calls[0] += 1
        time.sleep(0.02)
        return compiled(*arguments)

    def call():
        with torch.no_grad():
            while not stop.is_set():
                run(x)

    def update():
        for _ in range(5):
            with fxpasses.updating(run):
                pass

    kept._compiled = slow
    callers = [threading.Thread(target=call) for _ in range(4)]
    for thread in callers:
        thread.start()
    while calls[0] < 8:
        time.sleep(0.01)
    updates = threading.Thread(target=update)
    updates.start()
    updates.join(30)  # with callers before writers it gets in by chance alone
    waits = updates.is_alive()
    seen = calls[0]
    while calls[0] == seen:  # the calls go on
        time.sleep(0.01)
    stop.set()
    for thread in callers:
        thread.join()
    assert not waits
