"""What a model runs is recorded as it will be read back: compute operators, their strides, the backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.operator_inputs import main
from benchmarks.operators.inputs.log import (
    read_log,
    write_log,
)
from benchmarks.operators.inputs.notation import (
    TensorSpec,
)
from benchmarks.operators.inputs.recorder import OperatorInputsMode
from benchmarks.operators.inputs.suites import (
    LOGS,
    MODES,
    Entry,
    SuiteError,
    entry,
    record,
)
from fxpasses.cli.model_specs import load_model


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 4, 3)
        self.batch_norm = torch.nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu_(self.batch_norm(self.convolution(x))).flatten(1)[:, ::2]


def test_what_is_recorded_is_what_is_read_back(tmp_path):
    model = Block()
    with OperatorInputsMode() as recorder:
        for _ in range(3):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
    write_log(tmp_path / "log.txt", recorder.counts)
    log = read_log(tmp_path / "log.txt")
    (sample,) = log.samples("aten.convolution.default")
    assert sample.count == 3
    assert sample.call.args[:3] == (
        TensorSpec((2, 3, 8, 8), torch.float32),
        TensorSpec((4, 3, 3, 3), torch.float32),
        TensorSpec((4,), torch.float32),
    )
    (backward,) = log.samples("aten.convolution_backward.default")
    assert backward.call.args[-1] == [False, True, True]
    for name in log.names():
        assert {each.text: each.count for each in log.samples(name)} == dict(recorder.counts[name])


def test_views_and_constructors_are_not_recorded():
    with OperatorInputsMode() as recorder:
        x = torch.zeros(2, 3).view(6).reshape(3, 2).t()
        torch.zeros_like(x).detach()
        x.new_empty(3)
        x.as_strided_((2,), (1,))
        assert not recorder.counts
        x.relu()
    assert list(recorder.counts) == ["aten.relu.default"]


def test_strides_are_recorded_where_a_tensor_is_not_contiguous():
    with OperatorInputsMode() as recorder:
        torch.randn(2, 3).t().exp()
        torch.randn(1, 3).expand(2, 3).exp()
        torch.randn(2, 3).exp()
    assert recorder.counts["aten.exp.default"] == {
        "((T([3, 2], f32, stride=(1, 3)),), {})": 1,
        "((T([2, 3], f32, stride=(0, 1)),), {})": 1,
        "((T([2, 3], f32),), {})": 1,
    }


def test_recording_a_suite_model_computes_nothing_and_sees_the_backward():
    small = Entry("torchvision:squeezenet1_1", 2, (3, 64, 64))
    inference, training = (record(small, mode).counts for mode in MODES)
    assert "aten.convolution_backward.default" not in inference
    assert sum(training["aten.convolution_backward.default"].values()) == sum(
        inference["aten.convolution.default"].values()
    )
    assert any("T([2, 3, 64, 64], f32)" in text for text in inference["aten.convolution.default"])


def test_a_fake_model_is_recorded_like_a_real_one():
    small = Entry("torchvision:shufflenet_v2_x0_5", 2, (3, 64, 64))
    model, x = load_model(small.spec), torch.randn(2, 3, 64, 64)
    for mode in MODES:
        model.train(mode == "training")
        with torch.set_grad_enabled(model.training), OperatorInputsMode() as real:
            logits = model(x)
            if model.training:
                F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
        assert dict(record(small, mode).counts) == dict(real.counts)


def test_the_command_records_anew_what_is_shipped(tmp_path, capsys):
    arguments = ["--suite", "torchvision", "--models", "squeezenet1_1", "--output", str(tmp_path)]
    assert main([*arguments, "--modes", "inference", "--record"]) == 0
    name = "squeezenet1_1_inference.txt"
    assert name in capsys.readouterr().out
    assert read_log(tmp_path / "torchvision" / name).names() == read_log(LOGS / "torchvision" / name).names()


def test_an_unknown_model_is_refused_with_the_closest(capsys):
    assert main(["--suite", "timm", "--models", "resnet51"]) == 2
    assert "Did you mean 'resnet50'" in capsys.readouterr().err
    with pytest.raises(SuiteError, match="unknown suite"):
        entry("torchbench", "resnet18")
