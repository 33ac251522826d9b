"""Recorded arguments are made anew: strides and dtypes as recorded, indices that the operator accepts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.operators.inputs.argument_rules import UnmaterialisableError
from benchmarks.operators.inputs.materialise import Target, materialise
from benchmarks.operators.inputs.notation import (
    parse_call,
)
from benchmarks.torch_internals import OpOverload

aten = torch.ops.aten
CPU = Target(torch.device("cpu"))


def made(operator: OpOverload, text: str, target: Target = CPU):
    return materialise(operator, parse_call(text), target)


def test_strides_are_honoured_gaps_and_overlaps_included():
    text = (
        "((T([2, 3], f32, stride=(1, 2)), T([2, 3], f32, stride=(0, 0)), T([2, 3], f32, stride=(8, 2)), "
        "T([3, 2], f32, stride=(1, 1))), {})"
    )
    tensors, _ = materialise(aten.addcmul.default, _three_tensors(text), CPU)
    assert [each.stride() for each in tensors] == [(1, 2), (0, 0), (8, 2)]
    (overlapping,), _ = made(aten.relu.default, "((T([3, 2], f32, stride=(1, 1)),), {})")
    assert overlapping.stride() == (1, 1)
    assert overlapping[1, 0] == overlapping[0, 1]
    assert overlapping.untyped_storage().nbytes() == 4 * 4


def _three_tensors(text: str):
    call = parse_call(text)
    return type(call)(call.args[:3], {})


IN_RANGE = [
    (aten.embedding.default, "((T([5, 4], f32), T([100], i64), 1), {})"),
    (aten.embedding_dense_backward.default, "((T([100, 4], f32), T([100], i64), 5, -1, False), {})"),
    (aten._embedding_bag.default, "((T([5, 4], f32), T([100], i64), T([9], i64), False, 0, False), {})"),
    (aten.gather.default, "((T([5, 4], f32), -1, T([5, 100], i64)), {})"),
    (aten.gather.default, "((T([], f32), 0, T([], i64)), {})"),
    (aten.index.Tensor, "((T([3, 5, 4], f32), [None, T([100], i64), T([100], i64)]), {})"),
    (aten.index_add.default, "((T([5, 4], f32), 0, T([100], i64), T([100, 4], f32)), {})"),
    (aten.index_put_.default, "((T([5, 4], f32), [T([100], i64)], T([100, 4], f32), True), {})"),
    (aten.index_put.default, "((T([5, 4], f32), [T([3, 1], i64), T([1, 2], i64)], T([3, 2], f32)), {})"),
    (aten.index_select.default, "((T([5, 4], f32), 1, T([100], i32)), {})"),
    (aten.max_pool2d_with_indices_backward.default, None),
    (aten.nll_loss_forward.default, "((T([100, 5], f32), T([100], i64), None, 1, -100), {})"),
    (aten.nll_loss_forward.default, "((T([5], f32), T([], i64), None, 1, -100), {})"),
    (
        aten.nll_loss_backward.default,
        "((T([], f32), T([100, 5], f32), T([100], i64), None, 1, -100, T([], f32)), {})",
    ),
    (aten.nll_loss2d_forward.default, "((T([2, 5, 6, 6], f32), T([2, 6, 6], i64), None, 1, -100), {})"),
    (aten.scatter.src, "((T([5, 4], f32), 0, T([3, 4], i64), T([3, 4], f32)), {})"),
    (aten.scatter_add.default, "((T([5, 4], f32), 0, T([100, 4], i64), T([100, 4], f32)), {})"),
    (aten.take.default, "((T([5, 4], f32), T([100], i64)), {})"),
]
POOLING = (
    "((T([2, 3, 4, 4], f32), T([2, 3, 8, 8], f32), [2, 2], [2, 2], [0, 0], [1, 1], False, "
    "T([2, 3, 4, 4], i64)), {})"
)


@pytest.mark.parametrize(("operator", "text"), IN_RANGE, ids=lambda value: str(value)[:40])
def test_indices_are_made_so_that_the_operator_accepts_them(operator, text):
    args, kwargs = made(operator, text or POOLING)
    result = operator(*args, **kwargs)
    first = result[0] if isinstance(result, tuple) else result
    assert first.isfinite().all()


def test_the_indices_of_a_pooling_are_those_of_that_pooling():
    args, _ = made(aten.max_pool2d_with_indices_backward.default, POOLING)
    x = args[1].clone().requires_grad_()
    F.max_pool2d(x, 2).backward(args[0])
    assert torch.equal(aten.max_pool2d_with_indices_backward.default(*args), x.grad)


def test_writing_without_accumulation_never_writes_twice_to_a_place():
    args, _ = made(
        aten.index_put.default, "((T([5, 4], f32), [T([20], i64), T([20], i64)], T([20], f32)), {})"
    )
    assert len(set(zip(*(index.tolist() for index in args[1]), strict=True))) == 20
    args, _ = made(aten.scatter.src, "((T([5, 4], f32), 0, T([5, 4], i64), T([5, 4], f32)), {})")
    assert all(len(set(column.tolist())) == 5 for column in args[2].unbind(1))


def test_variances_are_positive_and_free_arguments_are_not_confined():
    text = "((T([2, 3, 4], f32), T([3], f32), T([3], f32), T([3], f32), T([3], f32), False, 0.1, 1e-05), {})"
    args, _ = made(aten.native_batch_norm.default, text)
    assert (args[4] > 0).all()
    assert (args[0] < 0).any()


def test_floating_dtypes_are_converted_and_others_kept():
    target = Target(torch.device("cpu"), torch.float32)
    args, kwargs = made(
        aten._to_copy.default,
        "((T([2], i64),), {'dtype': f16, 'device': 'cuda', 'layout': torch.strided})",
        target,
    )
    assert args[0].dtype is torch.int64
    assert kwargs == {
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "layout": torch.strided,
    }
    args, _ = made(aten.add.Tensor, "((T([2], f16), T([2], b8)), {})", target)
    assert [each.dtype for each in args] == [torch.float32, torch.bool]
    args, _ = made(aten.add.Tensor, "((T([2], f16), T([2], f64)), {})")
    assert [each.dtype for each in args] == [torch.float16, torch.float64]
    args, kwargs = made(aten._to_copy.default, "((T([2], c32),), {'dtype': c32})", target)
    assert (args[0].dtype, kwargs["dtype"]) == (torch.complex64, torch.complex64)


def test_a_mask_value_is_cut_to_the_range_of_a_narrower_dtype():
    text = "((T([2], f32), T([2], b8), -3.4028234663852886e+38), {})"
    half = Target(torch.device("cpu"), torch.float16)
    assert made(aten.masked_fill.Scalar, text, half)[0][2] == -65504.0
    assert made(aten.masked_fill.Scalar, text)[0][2] == -3.4028234663852886e38
    infinite = "((T([2], f32), T([2], b8), -inf), {})"
    assert made(aten.masked_fill.Scalar, infinite, half)[0][2] == -math.inf


def test_channels_last_is_given_to_images_and_volumes_only():
    target = Target(torch.device("cpu"), channels_last=True)
    args, _ = made(
        aten.cat.default, "(([T([2, 3, 4, 5], f32), T([2, 3, 4, 5, 6], f32), T([2, 3], f32)],), {})", target
    )
    image, volume, matrix = args[0]
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)
    assert matrix.is_contiguous()


@pytest.mark.parametrize(
    ("operator", "text", "reason"),
    [
        (aten.relu.default, "((T([9223372036854775807, 9223372036854775807], f32),), {})", "needs .* bytes"),
        (aten.relu.default, "((T([2, 2], f32, stride=(9223372036854775807, 1)),), {})", "needs .* bytes"),
        (aten.relu.default, "((), {})", "'self' is missing"),
        (aten.relu.default, "((T([2], f32), 1, 2), {})", "3 positional"),
        (aten.relu.default, "((T([2], f32),), {'alpha': 1})", "'alpha'"),
        (aten.index.Tensor, "((T([4], f32), [T([4], b8)]), {})", "mask"),
        (aten.index.Tensor, "((T([4], f32), [T([4], i64), T([4], i64)]), {})", "2 indices for 1"),
        (aten.embedding.default, "((T([0, 4], f32), T([4], i64)), {})", "no index is valid"),
        (aten.embedding.default, "((3, T([4], i64)), {})", "should be a tensor"),
        (aten.gather.default, "((T([4], f32), None, T([4], i64)), {})", "should be an integer"),
    ],
)
def test_arguments_that_cannot_be_made_have_a_reason(operator, text, reason):
    with pytest.raises(UnmaterialisableError, match=reason):
        made(operator, text)


def test_a_broadcast_tensor_needs_only_the_memory_of_its_storage():
    target = Target(torch.device("cpu"), limit=4)
    (x,), _ = made(aten.relu.default, "((T([1000000, 1000000], f32, stride=(0, 0)),), {})", target)
    assert x.shape == (1_000_000, 1_000_000)


def test_the_same_seed_makes_the_same_values():
    text = "((T([5], f32),), {})"
    first, second, other = (
        made(aten.relu.default, text, Target(CPU.device, seed=seed))[0][0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
