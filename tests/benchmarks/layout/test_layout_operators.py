"""Operators whose cost depends on the layout are measured in both; others are left out."""

from __future__ import annotations

import pytest
import torch
from layout_settings import SETTING

from benchmarks.layout.operators import layout_sensitive, measure_operator
from benchmarks.operators.inputs.notation import Call, TensorSpec
from fxpasses.devices.profile import (
    CHANNEL_AFFINE,
    LAYOUTS,
)

X = TensorSpec((2, 6, 8, 8), torch.float32)


@pytest.mark.parametrize(
    ("overload", "call"),
    [
        ("aten.max_pool2d_with_indices.default", Call((X, [3, 3], [2, 2], [1, 1]), {})),
        ("aten.avg_pool2d.default", Call((X, [2, 2], [2, 2]), {})),
        ("aten._adaptive_avg_pool2d.default", Call((X, [3, 3]), {})),
        ("aten.cat.default", Call(([X, X], 1), {})),
        ("aten.upsample_nearest2d.vec", Call((X, None, [2.0, 2.0]), {})),
        ("aten.upsample_bilinear2d.vec", Call((X, [11, 13], False, None), {})),
        ("aten.mean.dim", Call((X, [-1, -2], True), {})),
        ("aten.sum.dim_IntList", Call((X, [0, 2, 3]), {})),
        ("aten.var_mean.correction", Call((X, [0, 2, 3]), {"correction": 0})),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_operators_whose_cost_depends_on_the_layout_are_measured_in_both(overload: str, call: Call) -> None:
    (case,) = layout_sensitive(overload, call, training=False)
    variants = measure_operator(case, SETTING)
    assert [(each.layout, each.status) for each in variants] == [(each, "measured") for each in LAYOUTS]


def test_the_backward_of_a_maximum_is_replayed_at_the_maxima() -> None:
    indices = TensorSpec((2, 6, 4, 4), torch.int64)
    grad = TensorSpec((2, 6, 4, 4), torch.float32)
    call = Call((grad, X, [2, 2], [2, 2], [0, 0], [1, 1], False, indices), {})
    (case,) = layout_sensitive("aten.max_pool2d_with_indices_backward.default", call, training=True)
    assert {each.status for each in measure_operator(case, SETTING)} == {"measured"}


@pytest.mark.parametrize(
    ("overload", "call"),
    [
        ("aten.relu.default", Call((X,), {})),
        ("aten.cat.default", Call(([X, X],), {})),
        ("aten.mean.dim", Call((X, [1]), {})),
        ("aten.mean.dim", Call((TensorSpec((6, 8), torch.float32), [0]), {})),
    ],
    ids=["pointwise", "cat on the batch", "mean over channels", "2-D"],
)
def test_operators_whose_cost_does_not_depend_on_the_layout_are_left_out(overload: str, call: Call) -> None:
    assert layout_sensitive(overload, call, training=True) == []


def test_a_batch_norm_stands_for_its_arithmetic() -> None:
    def operators(training: bool) -> list[str]:
        call = Call((X, *[TensorSpec((6,), torch.float32)] * 4, training, 0.1, 1e-5), {})
        cases = layout_sensitive("aten.native_batch_norm.default", call, training=training)
        assert {each.status for case in cases for each in measure_operator(case, SETTING)} == {"measured"}
        return [case.operator for case in cases]

    assert operators(False) == [CHANNEL_AFFINE]
    assert operators(True) == [CHANNEL_AFFINE, "aten.var_mean.correction", "aten.sum.dim_IntList"]
