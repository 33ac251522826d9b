"""What a report says is kept for the backward pass is what autograd keeps, to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule

import fxpasses
from benchmarks.models.saved_tensors import saved_bytes
from fxpasses.cli.model_specs import load_model
from fxpasses.passes.training.saved_tensors import SavedTensors
from fxpasses.report.report import Report
from fxpasses.torch_internals.inductor import with_joint_pass

RULE = "efficient_conv_bn_eval"


class Net(nn.Module):
    """Convolutions and frozen norms, a pooling, views, and a product that keeps both of its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 4)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = torch.sigmoid(self.second(y)) * y[:, :, 1:-1, 1:-1]
        return self.head(self.pool(z).flatten(2).transpose(1, 2)).exp()


def trained(model: nn.Module, x: torch.Tensor, **options: object) -> tuple[Report, int]:
    """The report of a compilation, and the bytes that autograd keeps in one step of it."""
    torch.compiler.reset()
    run = torch.compile(model, backend="fxpasses", options=options)
    out = run(x)
    return fxpasses.last_report(), saved_bytes([out], [*model.parameters(), *model.buffers(), x])


@pytest.mark.parametrize("layout", ["channels_last", pytest.param("contiguous", marks=pytest.mark.full)])
def test_the_sum_is_what_autograd_keeps(layout):
    report, measured = trained(Net(), torch.randn(2, 3, 12, 12), layout=layout)
    assert report.saved_bytes == measured
    assert "at least" not in str(report)
    assert {one.name for one in report.saved if one.fate == "kept" and not one.readers} == set()


def test_where_inductor_lays_out_the_sum_is_said_to_be_the_least():
    """It keeps channels-last copies of the input and of weights."""
    report, measured = trained(Net(), torch.randn(2, 3, 12, 12), layout="off")
    assert 0 < report.saved_bytes < measured
    assert "kept for the backward pass: at least" in str(report)


@pytest.mark.full
def test_the_sum_is_what_autograd_keeps_with_symbolic_sizes():
    model, x = Net(), torch.randn(2, 3, 12, 12)
    torch._dynamo.mark_dynamic(x, 0)
    report, measured = trained(model, x, layout="channels_last")
    assert report.saved_bytes == measured
    assert any("s" in one.shape for one in report.saved)


@pytest.mark.full
@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2_100", "convnext_atto"])
def test_the_sum_is_what_autograd_keeps_of_a_network(name):
    model = load_model(f"timm:{name}")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    report, measured = trained(model, torch.randn(2, 3, 64, 64))
    assert report.saved_bytes == measured


@pytest.mark.usefixtures("no_code")
def test_what_folding_spares_is_the_difference_to_a_graph_without_it():
    x = torch.randn(2, 3, 12, 12)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    (folded, _), (stock, _) = trained(model, x), trained(model, x, disable=(RULE,))
    (remark,) = [remark for remark in folded.remarks if remark.figures.get("kept_bytes")]
    assert (remark.rule, remark.figures["kept_bytes"]) == (RULE, 4 * 2 * 8 * 10 * 10)
    assert stock.saved_bytes - folded.saved_bytes == remark.figures["kept_bytes"]


@pytest.mark.usefixtures("no_code")
def test_a_fold_that_spares_nothing_does_not_say_so():
    x = torch.randn(2, 3, 12, 12)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU()).eval()
    (folded, _), (stock, _) = trained(model, x, profit="always"), trained(model, x, disable=(RULE,))
    assert folded.applied[RULE] == 1
    assert not any(remark.figures.get("kept_bytes") for remark in folded.remarks)
    assert stock.saved_bytes <= folded.saved_bytes


@pytest.mark.usefixtures("no_code")
def test_a_folded_weight_is_computed_again_by_its_rule():
    report, _ = trained(Net(), torch.randn(2, 3, 12, 12))
    again = [one for one in report.saved if one.shape == "8x8x3x3" and "convolution_backward" in one.readers]
    assert [(one.rule, one.fate) for one in again] == [(RULE, "recomputed")]


def test_what_comes_from_the_cache_tells_the_same():
    """Of its own layout: each has a record of its own."""
    model, x = Net(), torch.randn(2, 3, 12, 12)
    first, _ = trained(model, x, layout="channels_last")
    other, _ = trained(model, x, layout="contiguous")
    assert other.saved != first.saved
    counters.clear()
    again, _ = trained(model, x, layout="channels_last")
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0
    assert again.saved == first.saved


def test_a_record_is_of_the_passes_that_ran():
    """A layout plan is one: what it keeps is not what another keeps of the same graph."""
    graph = Graph()
    kept = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
    kept.meta["val"] = torch.empty(2, 3)
    graph.output([kept])
    found = []
    for key in ("one", "two", "one"):
        seen = SavedTensors("a graph")
        seen.patches(with_joint_pass({}, lambda graph: None, lambda key=key: key))
        if not found:
            seen._see(GraphModule({}, graph), GraphModule({}, Graph()), 0)
        found.append([one.name for one in seen.completed(Report()).saved])
    assert found == [["relu_default"], [], ["relu_default"]]


@pytest.mark.usefixtures("no_code")
def test_inference_and_other_backends_tell_nothing():
    model, x = Net(), torch.randn(2, 3, 12, 12)
    assert trained(model, x, inner="aot_eager")[0].saved == ()
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend="fxpasses")(x)
    report = fxpasses.last_report()
    assert (report.saved, report.memory_table(), report.saved_bytes) == ((), "", 0)


@pytest.mark.usefixtures("no_code")
def test_text_table_json_and_page_have_it():
    report, _ = trained(Net(), torch.randn(2, 3, 12, 12), layout="channels_last")
    assert Report.from_json(report.to_json()).saved == report.saved
    assert f"kept for the backward pass: {sum(one.fate == 'kept' for one in report.saved)} tensors" in str(
        report
    )
    table = report.memory_table().splitlines()
    assert table[2].split()[0] == max(report.saved, key=lambda one: one.bytes * (one.fate == "kept")).name
    assert "spared" in table[-1] or "spared" in table[-2]


def test_the_partitioner_of_the_user_stays_in_use():
    from fxpasses.torch_internals.inductor import with_partition_seen

    used = []
    outer = with_partition_seen({}, lambda *given: used.append(given[2]), "theirs")
    report, measured = trained(Net(), torch.randn(2, 3, 12, 12), inductor=outer)
    assert used == [1]
    assert report.saved_bytes == measured
