"""What must be right on every device: dtypes, layouts, autocast, streams, and kept weights under CUDA graphs.

The cases of CUDA are marked `gpu`; those of a CPU show that nothing in them breaks on the day of a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
from torch import nn

from fxpasses.backend.door import backend

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Net(nn.Module):
    """Convolutions with batch norms, grouped and not, of which one result is concatenated."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.grouped = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.few = nn.Conv2d(64, 8, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        return self.few(torch.cat([x, self.grouped(x)], 1))


def net(device, dtype=torch.float32):
    torch.manual_seed(0)
    model = Net().eval()
    for norm in (model.first[1], model.grouped[1]):
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 1.5)
    return model.to(device, dtype)


def compiled(model, device, **options):
    inner = "inductor" if device == "cuda" else "aot_eager"
    return torch.compile(model, backend="fxpasses", options={"inner": inner, **options})


def image(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 32, 32, generator=generator).to(device, dtype)


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@devices
@pytest.mark.parametrize("layout", ["auto", "channels_last", "contiguous", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_strides_and_gradients_are_those_of_eager_in_each_dtype_and_layout(device, dtype, layout):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = net(device, dtype)
        exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
        x = image(device, dtype).to(memory_format=memory_format)
        expected = exact(x.double())
        expected.square().mean().backward()
        plain = eager(x)
        plain.square().mean().backward()
        torch.compiler.reset()
        found = compiled(model, device, layout=layout)(x)
        found.square().mean().backward()
        assert found.stride() == plain.stride()
        assert found.dtype == plain.dtype
        least = max(2 * torch.finfo(dtype).eps, 1e-5)  # of small tensors one rounding is the largest error
        assert error(found, expected) <= max(2 * error(plain, expected), least)
        for name, parameter in model.named_parameters():
            goal, reached = exact.get_parameter(name).grad, eager.get_parameter(name).grad
            assert parameter.grad.stride() == reached.stride(), name
            assert error(parameter.grad, goal) <= max(2 * error(reached, goal), 10 * least), name


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["live", "cached"])
def test_autocast_gives_what_eager_gives_under_it(device, dtype, weights):
    model, x = net(device), image(device)
    exact = copy.deepcopy(model).double()(x.double())
    run = compiled(model, device, weights=weights)
    with torch.no_grad(), torch.autocast(device, dtype):
        plain, found = model(x), run(x)
    assert found.dtype == plain.dtype == dtype
    assert error(found, exact) <= 2 * error(plain, exact)


@devices
@pytest.mark.parametrize("weights", ["live", "cached"])
def test_a_call_on_another_stream_sees_what_was_written_on_this_one(device, weights):
    model, x = net(device), image(device)
    run = compiled(model, device, weights=weights)
    on_gpu = device == "cuda"
    with torch.no_grad():
        run(x)
        for factor in (0.5, 3.0, 0.25):
            model.first[0].weight.mul_(factor)
            stream = torch.cuda.Stream() if on_gpu else None
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream) if on_gpu else contextlib.nullcontext():
                found = run(x)
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)
            torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)


def update(model, draw):
    """One of the ways in which weights change; gives its name."""
    parameter = draw.choice(list(model.parameters()))
    factor = draw.choice((0.5, 0.9, 1.1, 1.5))
    ways = {
        "in place": lambda: parameter.mul_(factor),
        "past autograd": lambda: parameter.data.mul_(factor),
        "a state": lambda: model.load_state_dict(
            {
                name: value * factor if value.is_floating_point() else value
                for name, value in model.state_dict().items()
            }
        ),
        "another parameter": lambda: setattr(
            model.few, "weight", nn.Parameter(torch.randn_like(model.few.weight))
        ),
        "other data": lambda: setattr(parameter, "data", parameter.data * factor),
        "statistics": lambda: model.first[1].running_mean.add_(0.1),
        "nothing": lambda: None,
    }
    name = draw.choice(list(ways))
    ways[name]()
    return name


@devices
def test_no_kept_weight_is_stale_after_any_sequence_of_updates(device):
    """On a GPU 500 updates, replayed as CUDA graphs."""
    model, x, draw = net(device), image(device), random.Random(0)
    on_gpu = device == "cuda"
    options = {"weights": "cached", "sentinels": "all"}
    run = torch.compile(model, backend=with_graphs(options)) if on_gpu else compiled(model, device, **options)
    with torch.no_grad(), exact_products(device):
        for number in range(500 if on_gpu else 60):
            name = update(model, draw)
            found, expected = run(x).clone(), model(x)
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4), (number, name)


def with_graphs(options):
    """Our backend with the mode that replays CUDA graphs; torch.compile takes a mode or options, not both."""

    def call(graph_module, inputs):
        return backend(graph_module, inputs, options=options, mode="reduce-overhead")

    return call


@contextlib.contextmanager
def exact_products(device):
    """Without TensorFloat-32."""
    if device != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
