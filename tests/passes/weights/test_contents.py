"""Writes that torch does not tell of are noticed by values: of statistics all, of other tensors a few."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from fxpasses.passes.weights import contents
from fxpasses.passes.weights.contents import Contents, _offset
from fxpasses.torch_internals import comparison

LAYOUTS = {
    "contiguous": lambda made: made,
    "channels_last": lambda made: made.contiguous(memory_format=torch.channels_last),
    "transposed": lambda made: made.transpose(0, 1),
    "slice": lambda made: made[:, 1:, ::2],
}
WRITES = {
    "product": lambda data: data.mul_(2),
    "sum": lambda data: data.add_(0.5),
    "largest clamped": lambda data: data.clamp_(max=0.9 * float(data.max())),
    "smallest clamped": lambda data: data.clamp_(min=0.9 * float(data.min())),
    "zeros": lambda data: data.zero_(),
    "copy": lambda data: data.copy_(torch.rand(data.shape)),
    "pruned": lambda data: data.mul_(
        data.abs() > data.abs().quantile(0.02) if data.dtype.itemsize > 2 else data.abs() > data.abs().min()
    ),
    "average": lambda data: data.lerp_(torch.ones_like(data), 0.5),
    "numpy": lambda data: data.numpy().__imul__(3),
}


def parameter(layout="contiguous", dtype=torch.float32):
    return nn.Parameter(LAYOUTS[layout](torch.randn(8, 6, 5, 3)).to(dtype), requires_grad=False)


@pytest.mark.parametrize("compared", [True, False], ids=["in C", "by torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_whole_tensor_is_noticed(write, layout, dtype, compared, monkeypatch):
    if write == "numpy" and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    if not compared:
        monkeypatch.setattr(contents, "compares_in_cpp", lambda: False)
    sources = [parameter(), parameter(layout, dtype), parameter()]
    kept = Contents.of(sources, everywhere=not compared)
    assert bool(kept.groups) is not compared
    assert kept.hold(sources)
    version = sources[1]._version
    WRITES[write](sources[1].data)
    assert sources[1]._version == version
    assert not kept.hold(sources)


@pytest.mark.parametrize("compared", [True, False], ids=["in C", "by torch"])
def test_every_value_of_a_statistic_is_compared(compared, monkeypatch):
    if not compared:
        monkeypatch.setattr(contents, "compares_in_cpp", lambda: False)
    for at in range(50):
        statistics = [torch.rand(50), torch.rand(50)]
        kept = Contents.of(statistics)
        assert kept.hold(statistics)
        statistics[1].data[at] += 1
        assert not kept.hold(statistics)


def test_what_is_written_back_as_it_was_is_no_change():
    sources = [parameter(), parameter("channels_last")]
    kept = Contents.of(sources)
    for source in sources:
        source.data.copy_(source.data.clone())
        source.data.clamp_(-100, 100)
    assert kept.hold(sources)


def test_two_values_that_change_places_are_noticed():
    for first, second in ((0, 1), (0, 16), (3, 67), (0, 64), (10, 490), (480, 490)):
        statistic = torch.rand(500)
        kept = Contents.of([statistic])
        statistic.data[[first, second]] = statistic[[second, first]]
        assert not kept.hold([statistic])


def test_a_single_element_goes_unnoticed_unless_it_is_near_a_sentinel():
    """What `refresh` is for; and the other tests do not pass because anything is noticed."""
    noticed = 0
    source = parameter()
    for at in range(720):
        kept = Contents.of([source])
        source.data.view(-1)[at] += 1e-6
        noticed += not kept.hold([source])
    assert 16 <= noticed <= 3 * 16  # a line of memory holds 16 values


def test_what_lies_between_the_values_of_a_slice_is_not_compared():
    whole = torch.randn(64, 16)
    source = whole[:, 3]
    kept = Contents.of([nn.Parameter(source)])
    whole[:, 4:].data.zero_()
    whole[:, :3].data.zero_()
    assert kept.hold([source])
    source.data.zero_()
    assert not kept.hold([source])


@pytest.mark.parametrize(
    "source",
    [
        torch.zeros(0, 3),
        torch.tensor(2.0),
        torch.rand(2, 1),
        torch.tensor([[True, False] * 9]),
        torch.randn(3, 3, dtype=torch.complex64),
        torch.arange(9, dtype=torch.uint8).view(3, 3),
        torch.randn(3, 3).to(torch.float8_e4m3fn),
        torch.full((5, 5), torch.nan),
    ],
    ids=["empty", "number", "few", "bool", "complex", "bytes", "float8", "NaN"],
)
def test_small_and_unordered_tensors(source):
    kept = Contents.of([source])
    assert kept.hold([source])
    if source.numel():
        other = torch.logical_not(source) if source.dtype == torch.bool else torch.zeros(source.shape)
        source.data.copy_(other)
        assert not kept.hold([source])


def test_nothing_is_read_of_other_devices_unless_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(contents, "compares_in_cpp", lambda: False)  # as of tensors that C cannot read
    source = parameter()
    assert Contents.of([source]) == Contents((), None, ())
    (group,) = Contents.of([source], everywhere=True).groups
    assert group.values.numel() == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets(layout):
    source = parameter(layout)
    start = source.storage_offset()
    for position, value in enumerate(source.reshape(-1).tolist()):
        place = start + _offset(source, position)
        assert torch.as_strided(source, (1,), (1,), place).item() == value


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_calls_are_compared_in_c():
    """Or each would take a twentieth longer, and be right all the same."""
    assert comparison.compares_in_cpp()
