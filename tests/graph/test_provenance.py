"""Written nodes tell which rule wrote them, at every level and as far as inductor's kernels."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import Graph
from torch.fx.traceback import annotate, preserve_node_meta

import fxpasses
from fxpasses.graph.provenance import Origin, Provenance, inherit, provenance_of
from fxpasses.testing import LEVELS, rewrite_at

X = torch.ones(1, 3, 6, 6)
RULE = "efficient_conv_bn_eval"


class Net(nn.Module):
    """A convolution, a norm in eval mode and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "torch"])
def test_what_a_rule_writes_tells_so_and_what_it_leaves_does_not(level):
    rewritten = rewrite_at(level, Net(), (X,), {"layout": "off", "profit": "always"})
    (remark,) = rewritten.report.remarks
    nodes = [node for node in rewritten.graph_module.graph.nodes if node.op != "placeholder"]
    told = {node.name: provenance_of(node) for node in nodes}
    (written,) = {found for found in told.values() if found}
    assert (written[0].rule, written[0].site) == (RULE, remark.node)
    assert ", ".join(written[0].replaced) == remark.message.split(":")[0].removeprefix("replaced ")
    (relu,) = [node.name for node in nodes if "relu" in str(node.target)]
    assert told[relu] == ()


def test_a_user_annotation_stays_and_a_node_without_a_rule_has_none():
    class Annotated(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with annotate({"stage": "stem"}):
                return super().forward(x)

    with preserve_node_meta():
        program = torch.export.export(Annotated(), (X,))
    result = fxpasses.optimize(program, (X,), options={"layout": "off", "profit": "always"})
    annotated = result.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    annotated += [node for node in result.graph_module.graph.nodes if provenance_of(node)]
    assert all(node.meta["custom"]["stage"] == "stem" for node in annotated)
    assert len({bool(provenance_of(node)) for node in annotated}) == 2


def test_a_node_that_two_rules_wrote_names_both_the_oldest_first():
    graph = Graph()
    first = graph.placeholder("x")
    second, third = (graph.call_function(torch.relu, (first,)) for _ in range(2))
    Origin("one", first, (first,)).tell(second)
    inherit(third, (second,), "two")
    assert provenance_of(third) == (
        Provenance("one", "x", ("x",)),
        Provenance("two", second.name, (second.name,)),
    )
    assert [source.pass_name for source in third.meta["from_node"]] == ["fxpasses.one", "fxpasses.two"]


def test_a_stored_program_still_tells():
    result = fxpasses.optimize(
        torch.export.export(Net(), (X,)), (X,), options={"layout": "off", "profit": "always"}
    )
    file = io.BytesIO()
    torch.export.save(result.exported_program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    found = {provenance_of(node) for node in loaded.graph.nodes} - {()}
    assert found == {provenance_of(node) for node in result.graph_module.graph.nodes} - {()}
    assert found


PROGRAM = """
import torch, fxpasses
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
run = torch.compile(model, backend="fxpasses", options={"layout": "channels_last"})
run(torch.randn(2, 3, 9, 9)).sum().backward()
"""


@pytest.mark.full
def test_a_generated_kernel_leads_back_to_the_rewrite_in_what_torch_logs(tmp_path):
    """In training: the log that tlparse draws has rules in its graphs and maps kernels to nodes."""
    environment = {
        "TORCH_TRACE": str(tmp_path),
        "INDUCTOR_PROVENANCE": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | environment, check=True)
    logged = _artifacts(tmp_path)
    mapping = json.loads(logged["inductor_provenance_tracking_node_mappings"][0])
    kernels = {kernel for kernel, nodes in mapping["cppCodeToPost"].items() if "convolution" in nodes}
    assert kernels
    # What was traced from the rewritten convolution leads to it, and to what it stands for.
    (graph,) = logged["before_pre_grad_graph"]
    (rewritten,) = set(re.findall(r"(\w+): [^\n]* = torch\.conv2d\([^\n]*mul", graph))
    assert rewritten in mapping["postToPre"]["convolution"]
    assert f"'rule': '{RULE}'" in graph
    forward = logged["before_post_grad_graph"][0]
    assert f"'rule': '{RULE}'" in forward
    assert "'rule': 'layout'" in forward


def _artifacts(folder: Path) -> dict[str, list[str]]:
    """What torch logged for tlparse: payloads by name."""
    (file,) = folder.iterdir()
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = re.match(r"V\d+ .*?\] (\{.*\})$", line)
        if record is not None:
            name = json.loads(record[1]).get("artifact", {}).get("name", "")
            current = found.setdefault(name, [])
            current.append("")
        elif current:
            current[-1] += line.removeprefix("\t") + "\n"
    return found
