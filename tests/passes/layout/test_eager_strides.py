"""Batch norms whose results eager lays out otherwise than torch's metadata say."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import CAPTURES, randomised
from torch import nn

import fxpasses
from fxpasses.torch_internals.tensors import suggest_memory_format


class Norm(nn.Module):
    """A convolution whose weight may lie channels-last, and a batch norm."""

    def __init__(self, *, laid_out: bool, tail=None):
        super().__init__()
        self.conv, self.norm, self.tail = nn.Conv1d(16, 33, 1), nn.BatchNorm1d(33), tail or nn.Identity()
        if laid_out:
            strided = torch.empty_strided((33, 16, 1), (16, 1, 16)).copy_(self.conv.weight.detach())
            self.conv.weight = nn.Parameter(strided)

    def forward(self, x):
        return self.tail(self.norm(self.conv(x)))


MODES = {
    "fused": ({}, False),
    "gradients": ({}, True),
    "cached": ({"weights": "cached"}, False),
    "channels-last": ({"layout": "channels_last"}, False),
    "off": ({"layout": "off"}, True),
    "eager": ({"inner": "eager", "profit": "always"}, True),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_norm_behind_a_weight_that_lies_otherwise_gives_eagers_strides(mode):
    """As a result, before an activation and before a convolution."""
    options, grad = MODES[mode]
    tails = (None, nn.ReLU(), nn.Conv1d(33, 4, 1))
    model = randomised(nn.ModuleList(Norm(laid_out=True, tail=tail) for tail in tails))
    x = torch.randn(2, 16, 50, dtype=torch.float64)

    def run(x):
        return [norm(x) for norm in model]

    with torch.set_grad_enabled(grad):
        pairs = zip(torch.compile(run, backend="fxpasses", options=options)(x), run(x), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("sizes", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6)], ids=str)
def test_eager_gives_a_norms_result_in_the_format_that_its_input_suggests(sizes):
    """What this pass takes for granted, for every order of the axes."""
    for order in itertools.permutations(range(len(sizes))):
        back = [order.index(axis) for axis in range(len(sizes))]
        x = torch.randn([sizes[axis] for axis in order]).permute(back)
        wanted = torch.empty_like(x, memory_format=suggest_memory_format(x)).stride()
        assert F.batch_norm(x, torch.zeros(3), torch.ones(3)).stride() == wanted


def nodes_of(program):
    return [str(node.target) for node in program.graph.nodes]


@pytest.mark.parametrize("level", ["symbolic_trace", "pre_dispatch", "export"])
@pytest.mark.parametrize("laid_out", [False, True])
def test_a_norm_that_metadata_tell_right_gets_nothing_written(level, laid_out):
    program = CAPTURES[level](randomised(Norm(laid_out=laid_out)), (torch.randn(2, 16, 50).double(),))
    result = fxpasses.optimize(program, (torch.randn(2, 16, 50).double(),), {"passes": ()})
    copies = [
        target for target in nodes_of(result.graph_module) if "contiguous" in target or "clone" in target
    ]
    assert len(copies) == int(laid_out)


def test_no_rule_finds_the_copy_between_what_it_folds():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.layer(x).transpose(1, 2)) * 2

    model, x = randomised(Scaled()), torch.randn(2, 5, 3, dtype=torch.float64)
    result = fxpasses.optimize(torch.fx.symbolic_trace(model), (x,), {"profit": "always"})
    assert result.report.applied == {"affine_across_views": 1}
    found, expected = result.graph_module(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("laid_out", [False, True])
def test_symbolic_sizes_are_not_specialised(laid_out):
    model = randomised(Norm(laid_out=laid_out))
    run = torch.compile(model, backend="fxpasses", dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 50), (3, 40), (5, 33)):
            x = torch.randn(batch, 16, length, dtype=torch.float64)
            torch.testing.assert_close(run(x), model(x), rtol=1e-9, atol=1e-9)
            assert run(x).stride() == model(x).stride()
    assert len(fxpasses.reports()) == 1
