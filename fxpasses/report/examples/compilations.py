"""Examples of what layouts, kept weights, inductor and races leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxpasses.report.examples.example import COMPILED, Example

_CONVOLUTION = """\
conv, x = nn.Conv2d(3, 16, 3), torch.randn(2, 3, 8, 8)
conv, x = (each.to(memory_format=torch.channels_last) for each in (conv, x))
def model(x): return conv(x)
"""
"""Inductor generates no code for it, which would take long to compile."""
_PAIR = """\
conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval()
x = torch.randn(2, 3, 8, 8)
def model(x): return bn(conv(x))
"""
_LAYER = "conv, x = nn.Conv2d(3, 3, 3, padding=1), torch.randn(2, 3, 8, 8)\n"
_LOWER: Mapping[str, Any] = {
    "options": "{'precision': 'bfloat16', 'profit': 'always'}",
    "rule": "precision",
}
_PACKED: Mapping[str, Any] = {
    "options": "{'weights': 'cached'}",
    "rule": "packed_weights",
    "run": COMPILED,
    "fires": "report.packed_tensors",
}
_OWN: Mapping[str, Any] = {**_PACKED, "rule": "own_kernels", "fires": "report.applied.get('own_kernels')"}
_TWICE = f"""\
torch.compile(model, backend='fxpasses', options=OPTIONS)(x)
torch.compiler.reset()
records = os.path.join(os.environ['TORCHINDUCTOR_CACHE_DIR'], 'fxpasses')
shutil.rmtree(records, ignore_errors=True)
{COMPILED}"""

COMPILATIONS: Mapping[str, Example] = {
    "symbolic-strides": Example(
        "conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)\n"
        "x = torch.randn(2, 3, 7, 6)\n"
        "def model(x):\n"
        "    y = conv(x).sigmoid()\n"
        "    return torch.view_as_complex(torch.view_as_real(torch.complex(y, y)) * 2).real\n",
        "dynamic=True",
        "dynamic=False",
        options="{'layout': 'channels_last'}",
        rule="inductor",
        run=COMPILED.replace("options", "dynamic=True, options"),
        fires="not any(remark.rule == 'inductor' for remark in report.remarks)",
        where="with torch before 2.15",
    ),
    # Precision
    "records-gradients": Example(
        f"{_LAYER}def model(x): return conv(x)\n",
        "def model(x): return conv(x)\n",
        "@torch.no_grad()\ndef model(x): return conv(x)\n",
        grad=True,
        **_LOWER,
    ),
    "slow-precision": Example(
        f"{_LAYER}def model(x): return conv(x)\n",
        where="on a CPU without AVX512-BF16 and AMX",
        options_after="{'precision': 'bfloat16', 'profit': 'always'}",
        **{**_LOWER, "options": "{'precision': 'bfloat16'}"},
    ),
    "nested-graph": Example(
        f"{_LAYER}def model(x): return torch.cond(x.sum() > 0, conv, torch.sin, (x,))\n",
        "torch.cond(x.sum() > 0, conv, torch.sin, (x,))",
        "torch.where(x.sum() > 0, conv(x), torch.sin(x))",
        **_LOWER,
    ),
    "whole-layer": Example(
        f"{_LAYER}model = torch.fx.symbolic_trace(nn.Sequential(conv))\n",
        "torch.fx.symbolic_trace(nn.Sequential(conv))",
        "torch.export.export(nn.Sequential(conv), (x,))",
        **_LOWER,
    ),
    # Layouts
    "shared-results": Example(
        "conv, x = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)\n"
        "def model(x):\n    y = conv(x)\n    return y[:, 1:], y.flatten(2)\n",
        options="{'layout': 'off'}",
        options_after="{'layout': 'channels_last'}",
        rule="layout",
        grad=True,
    ),
    "unrestorable-strides": Example(
        "conv, x = nn.Conv2d(2, 6, 3, padding=1), torch.randn(2, 2, 6, 5)\n"
        "def model(x):\n"
        "    y = conv(conv(x)[:, :2])\n"
        "    return torch.ops.aten.alias.default(y[:, 1:3]), y.relu()\n",
        "torch.ops.aten.alias.default(y[:, 1:3])",
        "y[:, 1:3].clone()",
        options="{'layout': 'channels_last', 'inner': 'aot_eager'}",
        rule="layout",
        run=COMPILED.replace("options", "dynamic=True, options"),
        fires="all(remark.code == 'applied' for remark in report.remarks)",
    ),
    "unsafe-kernel": Example(
        "channels = 3\n"
        "layers = nn.Sequential(nn.Conv2d(channels, 24, 1, stride=2), nn.Conv2d(24, 32, 3))\n"
        "model, x = torch.fx.symbolic_trace(layers), torch.randn(2, channels, 32, 32)\n",
        "channels = 3",
        "channels = 16",
        options="{'layout': 'channels_last'}",
        rule="layout",
        grad=True,
        fires="report.layout.labels['_0'] == 'channels_last'",
    ),
    "not-certain": Example(
        "layers = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1)).double()\n"
        "x = torch.randn(2, 64, 32, 32).double().to(memory_format=torch.channels_last)\n"
        "model = torch.fx.symbolic_trace(layers.to(memory_format=torch.channels_last))\n",
        options="{'tune_seconds': 1e-9}",
        options_after="{'layout': 'contiguous'}",
        rule="layout",
        run="report = fxpasses.optimize(model, (x,), options=OPTIONS).report",
    ),
    "shared-storage": Example(
        "class Doubled(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 24, 1, stride=2).to(memory_format=torch.channels_last)\n"
        "    def forward(self, x):\n"
        "        y = self.conv(x)\n"
        "        y.mul_(2)\n"
        "        return y\n"
        "x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)\n"
        "model = torch.fx.symbolic_trace(Doubled())\n",
        "self.conv(x)",
        "self.conv(x).clone()",
        options="{'layout': 'channels_last'}",
        rule="layout",
        grad=True,
    ),
    "no-plan": Example(
        _CONVOLUTION,
        options="{'io': 'any', 'layout': 'off'}",
        options_after="{'io': 'any', 'layout': 'channels_last'}",
        rule="io",
        run=COMPILED,
        fires="report.layout",
    ),
    "no-record": Example(
        "import os, shutil\n" + _CONVOLUTION,
        options="{'layout': 'channels_last'}",
        options_after="{'layout': 'channels_last', 'inductor': {'force_disable_caches': True}}",
        rule="layout",
        run=_TWICE,
        fires="report.layout",
    ),
    # Kept weights
    "unpackable": Example(
        "conv = nn.ConvTranspose2d(3, 16, 3, dilation=2, output_padding=1)\n"
        "x = torch.randn(2, 3, 8, 8)\n"
        "def model(x): return conv(x)\n",
        ", output_padding=1",
        "",
        **_PACKED,
    ),
    "other-reader": Example(
        "conv, x = nn.Conv3d(3, 3, 3, padding=1), torch.randn(3, 3, 3, 3, 3)\n"
        "def model(x):\n"
        "    w = 2 * conv.weight\n"
        "    return F.conv3d(x, w), F.conv3d(w, x)\n",
        "F.conv3d(w, x)",
        "F.conv3d(x.cos(), w)",
        **_PACKED,
    ),
    "inputs-changed": Example(
        "conv, image = nn.Conv2d(3, 16, 3), torch.randn(2, 3, 8, 8)\n"
        "x = image, image.view(-1)\n"
        "def model(x):\n"
        "    x[1].add_(1)\n"
        "    return conv(x[0])\n",
        "    x[1].add_(1)\n",
        "",
        **_PACKED,
    ),
    "other-kernels": Example(
        "import os\n" + _CONVOLUTION,
        "import os\n",
        "import os\nos.environ['TORCHINDUCTOR_CACHE_DIR'] += '_of_this_cpu'\n",
        options="{'weights': 'cached'}",
        rule="packed_weights",
        run=COMPILED,
        fires="not any(remark.code == 'other-kernels' for remark in report.remarks)",
        where="after a process with ATEN_CPU_CAPABILITY=default has compiled the same, on a CPU with more",
    ),
    "no-kernels": Example(
        "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'\n" + _CONVOLUTION,
        "==",
        "!=",
        where="in a process that was started with ATEN_CPU_CAPABILITY=default; without it after the edit",
        **_OWN,
    ),
    "live-bias": Example(
        "conv, x = nn.Conv2d(3, 16, 3), torch.randn(2, 3, 8, 8)\n"
        "def model(x): return F.conv2d(x, conv.weight, x[0].flatten()[:16])\n",
        "x[0].flatten()[:16]",
        "conv.bias",
        **{**_OWN, "options": "{'weights': 'cached', 'profit': 'always'}"},
    ),
    "not-faster": Example(
        _CONVOLUTION,
        options_after="{'weights': 'cached', 'profit': 'always'}",
        where="where oneDNN was measured to be the faster one",
        **_OWN,
    ),
    # Programs that are not run any more
    "dropped": Example(
        _PAIR,
        options="{'race': True, 'profit': 'always', 'inner': 'eager'}",
        options_after="{'profit': 'always', 'inner': 'eager'}",
        rule="race",
        run="compiled = torch.compile(model, backend='fxpasses', options=OPTIONS)\n"
        "for _ in range(40): compiled(x)\n"
        "report = fxpasses.last_report()",
        fires="not any(remark.rule == 'race' for remark in report.remarks)",
    ),
    "not-compiled": Example(
        "def inner(graph, inputs):\n"
        "    if any(node.target is F.batch_norm for node in graph.graph.nodes):\n"
        "        raise NotImplementedError('it knows no batch norms')\n"
        "    return graph.forward\n" + _PAIR,
        options="{'race': True, 'profit': 'always', 'inner': inner}",
        options_after="{'race': True, 'profit': 'always', 'inner': 'eager'}",
        rule="race",
        run=COMPILED,
        fires="not any(remark.status == 'failed' for remark in report.remarks)",
    ),
    "taken-over": Example(
        _PAIR,
        options="{'inductor': {'efficient_conv_bn_eval_fx_passes': True}}",
        options_after="{'inductor': {'efficient_conv_bn_eval_fx_passes': True}, "
        "'disable': ('efficient_conv_bn_eval',)}",
        rule="efficient_conv_bn_eval_fx_passes",
        run=COMPILED,
        fires="torch._dynamo.utils.counters['inductor']['efficient_conv_bn_eval']",
    ),
}
