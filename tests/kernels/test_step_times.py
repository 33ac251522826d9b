"""What the words of a step say, and the times of the steps of real calls."""

from __future__ import annotations

import pytest
import torch

from fxpasses.kernels import build, library
from fxpasses.kernels.convolution import Sizes, pack
from fxpasses.kernels.kernel import DEPTHWISE, Kernel, Kind
from fxpasses.kernels.sequence import (
    CHAIN,
    GATHER,
    MAX,
    MEAN,
    PRODUCT,
    SUM,
    Convolution,
    Reading,
    Step,
    program,
    shapes_argument,
)
from fxpasses.kernels.step_times import noted_steps, read_step
from fxpasses.torch_internals.cpp import cpp_compiler

ONE = Convolution([32, 1, 1, 1, 1, 1, 0, 0, 1, 1], Kernel(Kind.PRODUCT, 2), 0, None, 1, 0.0, 6.0)
DEEP = Convolution([32, 32, 3, 3, 2, 2, 1, 1, 1, 1], DEPTHWISE, 1, None, 0, 0.0, 0.0)
IMAGE = (1, 8, 8, 32)


@pytest.mark.parametrize(
    "step",
    [
        Step(PRODUCT, 1, Reading((0,), (32,)), IMAGE, (ONE,)),
        Step(
            PRODUCT, 3, Reading((0, 1), (16, 16), gate=2, scale=4, shift=5, limits=(0.0, 6.0)), IMAGE, (ONE,)
        ),
        Step(MEAN, 1, Reading((0,), (32,)), IMAGE),
        Step(GATHER, 2, Reading((0, 1), (16, 16)), IMAGE),
        Step(SUM, 2, Reading((0, 1), (32, 32), firsts=(0, 8)), IMAGE),
        Step(MAX, 1, Reading((0,), (32,)), IMAGE, window=(3, 3, 2, 2, 1, 1, 1, 1)),
        Step(CHAIN, 1, Reading((0,), (32,)), IMAGE, (ONE, DEEP, ONE)),
    ],
)
def test_the_words_of_a_step_say_what_it_is(step):
    read = read_step([*step.words(), 7, 7, 7])
    assert read.kind == step.kind
    assert read.sizes == tuple(tuple(one.sizes) for one in step.convolutions)
    assert read.kernels == tuple(one.kernel for one in step.convolutions)
    assert read.length == len(step.words())


def test_words_of_no_step_are_an_error():
    with pytest.raises(ValueError, match="no step 9"):
        read_step([9, 0, 1, 0, 8, 8])


def test_without_kernels_no_steps_are_noted(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda: "not here")
    with pytest.raises(RuntimeError, match="not here"), noted_steps():
        raise AssertionError("the block is not entered")


@pytest.mark.needs_kernels
def test_kernels_with_other_flags_are_another_library(tmp_path):
    compiler = cpp_compiler()
    plain = build.cached("AVX2", tmp_path, compiler)
    assert build.cached("AVX2", tmp_path, compiler, ("-DOTHER",)) != plain
    assert build.cached("AVX2", tmp_path, compiler, ()) == plain


@pytest.mark.full
@pytest.mark.vectors
@pytest.mark.needs_kernels
def test_every_step_of_every_call_is_noted_and_the_results_are_the_same():
    image = torch.randn(1, 32, 64, 64).contiguous(memory_format=torch.channels_last)
    one = Sizes(32, 64, 1, (1, 1), (1, 1), (0, 0), (1, 1))
    deep = Sizes(64, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1))
    product = Kernel(Kind.PRODUCT, 2)
    constants = [
        pack(one, product, torch.randn(64, 32, 1, 1), torch.randn(64)),
        pack(deep, DEPTHWISE, torch.randn(64, 1, 3, 3), torch.randn(64)),
    ]
    first = Convolution(one.argument(product), product, 0, None, 1, 0.0, 6.0)
    second = Convolution(deep.argument(DEPTHWISE), DEPTHWISE, 1, None, 0, 0.0, 0.0)
    steps = [
        Step(PRODUCT, 2, Reading((0,), (32,)), (1, 64, 64, 32), (first,)),
        Step(PRODUCT, 3, Reading((2,), (64,)), (1, 64, 64, 64), (second,)),
        Step(MEAN, 1, Reading((3,), (64,)), (1, 64, 64, 64)),
    ]
    words = torch.tensor(program(steps, 2, 2))
    shapes = shapes_argument([(1, 64, 1, 1)])

    def call():
        return torch.ops.fxpasses.sequence([image], constants, words, shapes)[0]

    expected = call()
    with noted_steps() as noted:
        found = [call() for _ in range(2)]
    assert [step.kind for step in noted] == [CHAIN, MEAN] * 2
    assert [step.is_first for step in noted] == [True, False] * 2
    chain = noted[0]
    assert chain.image == (1, 64, 64, 32)
    assert chain.sizes == (tuple(first.sizes), tuple(second.sizes))
    assert chain.kernels == (product, DEPTHWISE)
    assert chain.seconds > 0
    assert min(chain.stages) > 0
    assert all(torch.equal(each, expected) for each in found)
    with noted_steps() as again:
        pass
    assert again == []
    assert torch.equal(call(), expected)
