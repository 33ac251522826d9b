"""Copies of a layout plan, counted by what is copied."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import layout_copies
from benchmarks.layout_copies import count_copies, main
from benchmarks.models.cases import Case
from tests.benchmarks.refusals import refusal

HERE = "tests.benchmarks.test_layout_copies:"


class Plain(nn.Module):
    """Two convolutions: the input is copied, both weights are, and so is the result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Interrupted(Plain):
    """A Fourier transform lies between them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.fft.fft(self.first(x), dim=3).real)


class Broken(Plain):
    """Two graphs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


class OfOneDimension(nn.Module):
    """Between two convolutions a transform; the weight of the second is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.fft.fft(self.first(x.flatten(2)), dim=2).real
        return nn.functional.conv1d(y, self.second.weight * self.scale)


class Failing(Plain):
    """It takes no images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.no_such_method()


def test_what_is_copied_as_it_comes_for_the_user_and_inside_is_told_apart():
    copies = count_copies(Case(HERE + "Plain", size=16))
    assert (copies.graphs, copies.inputs, copies.weights, copies.outputs, copies.inside) == (1, 1, 2, 1, 0)
    interrupted = count_copies(Case(HERE + "Interrupted", size=16))
    assert (interrupted.inputs, interrupted.weights, interrupted.outputs, interrupted.inside) == (1, 2, 1, 2)
    inside = [copy for copy in interrupted.each if copy.startswith("inside")]
    assert len(inside) == 2
    assert any("(convolution," in copy and "for _fft_r2c" in copy for copy in inside)


def test_convolutions_of_one_dimension_are_counted_as_those_of_images():
    copies = count_copies(Case(HERE + "OfOneDimension", size=16))
    assert copies.graphs == 1
    assert copies.weights == 2
    assert [copy.split(":")[0] for copy in copies.each].count("inside") == copies.inside > 0
    contiguous = count_copies(Case(HERE + "OfOneDimension", size=16), "contiguous")
    assert (contiguous.graphs, contiguous.weights, contiguous.inside) == (0, 0, 0)


def test_a_uniform_contiguous_plan_copies_nothing():
    copies = count_copies(Case(HERE + "Interrupted", size=16), "contiguous")
    assert (copies.inputs, copies.weights, copies.outputs, copies.inside) == (0, 0, 0, 0)


def test_the_sizes_of_a_model_are_not_symbols_because_another_had_others(monkeypatch):
    sizes = []
    plan = layout_copies.plan_and_carry_out

    def planned(context, *arguments, **keywords):
        for node in context.graph.find_nodes(op="placeholder"):
            sizes.extend(getattr(node.meta["val"], "shape", ["a size"]))
        return plan(context, *arguments, **keywords)

    monkeypatch.setattr(layout_copies, "plan_and_carry_out", planned)
    for size in (16, 24, 32):
        count_copies(Case(HERE + "Plain", size=size))
    assert sizes
    assert all(type(size) is int for size in sizes)


def test_graphs_of_one_model_are_added_up():
    assert count_copies(Case(HERE + "Broken", size=16)).graphs == 2


def test_the_backward_is_planned_with_the_forward():
    forward = count_copies(Case(HERE + "Plain", size=16))
    both = count_copies(Case(HERE + "Plain", mode="training", batch=2, size=16))
    assert both.labelled > forward.labelled


def test_the_command_prints_and_writes_a_row_for_each_model_and_tells_of_one_that_fails(capsys, tmp_path):
    path = tmp_path / "copies.json"
    names = f"{HERE}Plain,{HERE}Failing,{HERE}Interrupted"
    assert main(["--models", names, "--size", "16", "--each", "--json", str(path)]) == 1
    printed = capsys.readouterr()
    assert f"{HERE}Interrupted: inside: " in printed.out
    assert "no_such_method" in printed.err.replace("\n", "")
    content = json.loads(path.read_text())
    assert [row["inside"] for row in content["models"]] == [0, 2]
    assert content["settings"]["layout"] == "channels_last"


@pytest.mark.parametrize(
    ("arguments", "reason"), [(["--models", ","], "names no model"), (["--size", "0"], "at least 1")]
)
def test_bad_arguments_are_refused(arguments, reason, capsys):
    assert reason in refusal(main, arguments, capsys)
