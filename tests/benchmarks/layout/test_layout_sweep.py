"""A sweep finds a model's distinct convolutions and operators, and measures what its budget allows."""

from __future__ import annotations

import time

import pytest
import torch
from layout_settings import CASES, CPU, SETTING

from benchmarks.layout.sweep import SweepError, Workload, collect, sweep, tasks
from benchmarks.operators.inputs.notation import Call, TensorSpec, parse_call
from fxpasses.devices.convolutions import (
    DIRECTIONS,
    Convolution,
)
from fxpasses.devices.profile import (
    Roofline,
)


def test_the_sweep_finds_a_models_distinct_convolutions_with_their_occurrences() -> None:
    workload = collect(["resnet18"], batch=2, size=(64, 64), modes=("inference",), dtype="float32")
    # 20 convolutions: the stem, 2 a block in 8 blocks, 3 projections; each stage repeats its 3x3 shape.
    assert sum(workload.convolutions.values()) == 20
    assert {direction for _, direction in workload.convolutions} == {"forward"}
    stem = Convolution.of((2, 3, 64, 64), (64, 3, 7, 7), (2,), (3,))
    assert workload.convolutions[stem, "forward"] == 1
    assert workload.convolutions[Convolution.of((2, 64, 16, 16), (64, 64, 3, 3), (1,), (1,)), "forward"] == 4


def test_training_adds_the_gradients_that_are_needed_and_no_other() -> None:
    workload = collect(["resnet18"], batch=2, size=(64, 64), modes=("training",), dtype="float32")
    stem = Convolution.of((2, 3, 64, 64), (64, 3, 7, 7), (2,), (3,))
    total = dict.fromkeys(DIRECTIONS, 0)
    for (_, direction), count in workload.convolutions.items():
        total[direction] += count
    # Nobody asks for the gradient of the images.
    assert total == {"forward": 20, "input_grad": 19, "weight_grad": 20}
    assert workload.convolutions[stem, "input_grad"] == 0


def test_a_depthwise_model_keeps_its_groups() -> None:
    workload = collect(["mobilenetv2_100"], batch=1, size=(64, 64), modes=("inference",), dtype="float32")
    assert any(case.groups == case.input_size[1] > 1 for case, _ in workload.convolutions)


def test_one_dimensional_convolutions_are_counted_and_left_out() -> None:
    workload = Workload()
    x, w = TensorSpec((1, 4, 9), torch.float32), TensorSpec((4, 4, 3), torch.float32)
    call = Call((x, w, None, [1], [0], [1], False, [0], 1), {})
    workload.add("aten.convolution.default", call, 3, training=False)
    assert workload.one_dimensional == 3
    assert not workload.convolutions


def test_a_model_that_cannot_run_at_a_size_is_named() -> None:
    with pytest.raises(SweepError, match=r"timm:vit_tiny_patch16_224 does not run .*\[1, 3, 40, 40\]"):
        collect(["vit_tiny_patch16_224"], batch=1, size=(40, 40), modes=("inference",), dtype="float32")


def test_a_convolution_with_a_bias_is_recorded_as_what_it_is() -> None:
    workload = Workload()
    tensors = "T([2, 8, 6, 6], f32), T([4, 8, 1, 1], f32), T([4], f32)"
    text = f"(({tensors}, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {{}})"
    workload.add("aten.convolution.default", parse_call(text), 3, training=False)
    assert workload.convolutions == {(Convolution.of((2, 8, 6, 6), (4, 8, 1, 1)), "forward"): 3}


def test_workloads_of_several_batch_sizes_add_up() -> None:
    workload = Workload()
    for batch in (1, 8, 8):
        workload += collect(["resnet18"], batch=batch, size=(64, 64), modes=("inference",), dtype="float32")
    stem = {
        case.input_size[0]: count
        for (case, _), count in workload.convolutions.items()
        if case.weight_size[2] == 7
    }
    assert stem == {1: 1, 8: 2}


def test_an_ended_budget_stops_gracefully_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "benchmarks.layout.sweep._measure_roofline", lambda _: Roofline("float32", 1, 1, 1, 1)
    )
    workload = Workload()
    for case in (CASES["pointwise"], CASES["plain"]):
        workload.convolutions[case, "forward"] = 1
    todo = tasks(workload, CPU, "float32")
    result = sweep(todo, SETTING, deadline=time.monotonic())
    assert result.variants == ()
    assert result.not_measured == tuple(task.label for task in todo)
    # The heavier convolution stands first among the convolutions.
    convolutions = [label for label in result.not_measured if label.startswith("convolution")]
    heavy, light = sorted((CASES["pointwise"], CASES["plain"]), key=lambda case: -case.flops)
    assert [heavy.key in convolutions[0], light.key in convolutions[1]] == [True, True]
