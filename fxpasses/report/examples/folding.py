"""Examples of the rules that fold into convolutions and linear layers, and of what is kept between calls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fxpasses.report.examples.example import Example, Number

_PAIR = "conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval()\nx = torch.randn(2, 3, 8, 8)\n"
_ONES = """\
conv, bn = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1, eps=1e-12).eval()
nn.init.ones_(conv.weight), nn.init.ones_(bn.bias)
x = torch.ones(1, 1, 3, 3)
"""
_CACHED: Mapping[str, Any] = {
    "options": "{'weights': 'cached'}",
    "rule": "kept_weights",
    "fires": "report.kept_tensors",
}

FOLDING: Mapping[str, Example] = {
    "training-mode": Example(
        _PAIR + "bn.train()\ndef model(x): return bn(conv(x))\n", "bn.train()", "bn.eval()"
    ),
    "no-statistics": Example(
        "graph = torch.fx.Graph()\n"
        "x, w, mean, var = (graph.placeholder(name) for name in ('x', 'w', 'mean', 'var'))\n"
        "conv = graph.call_function(F.conv2d, (x, w))\n"
        "graph.output(graph.call_function(F.batch_norm, (conv, None, None)))\n"
        "sizes = (2, 3, 8, 8), (8, 3, 3, 3), (8,), (8,), (2, 8, 6, 6), (2, 8, 6, 6)\n"
        "for node, size in zip(graph.nodes, sizes): node.meta['val'] = torch.empty(size, device='meta')\n"
        "model = torch.fx.GraphModule({}, graph)\n",
        "None, None",
        "mean, var",
        run="report = fxpasses.explain(model, options=OPTIONS)",
    ),
    "no-producer": Example(
        _PAIR + "def model(x): return bn(torch.cat([conv(x), conv(-x)]))\n",
        "bn(torch.cat([conv(x), conv(-x)]))",
        "torch.cat([bn(conv(x)), bn(conv(-x))])",
    ),
    "saved-statistics": Example(
        _PAIR
        + "def model(x):\n"
        + "    y, mean, scale = torch.native_batch_norm(\n"
        + "        conv(x), bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.1, 1e-5)\n"
        + "    return y, mean\n",
        "return y, mean",
        "return y",
    ),
    "not-a-linear": Example(
        "w, bn = torch.randn(4, 3, 8), nn.BatchNorm1d(4).eval()\nx = torch.randn(4, 4, 3)\n"
        "def model(x): return bn(x @ w)\n",
        "bn(x @ w)",
        "bn(x[0] @ w[0, :, :4])",
    ),
    "bias-shape": Example(
        "w, b, bn = torch.randn(4, 6), torch.randn(5, 6), nn.BatchNorm1d(6).eval()\n"
        "x = torch.randn(5, 4)\n"
        "def model(x): return bn(torch.addmm(b, x, w))\n",
        "torch.addmm(b, x, w)",
        "torch.addmm(b[0], x, w)",
    ),
    "unsupported-arguments": Example(
        "w, b, bn = torch.randn(4, 6), torch.randn(6), nn.BatchNorm1d(6).eval()\nx = torch.randn(5, 4)\n"
        "def model(x): return bn(torch.addmm(b, x, w, beta=2))\n",
        "torch.addmm(b, x, w, beta=2)",
        "torch.addmm(2 * b, x, w)",
    ),
    "non-constant": Example(
        "w, bn = torch.randn(4, 1, 3, 3), nn.BatchNorm2d(4).eval()\n"
        "x = torch.randn(2, 2, 8, 8)\n"
        "torch._dynamo.mark_dynamic(x, 1)\n"
        "def model(x): return bn(F.conv2d(x, w, groups=x.shape[1]))\n",
        "torch._dynamo.mark_dynamic(x, 1)\n",
        "",
    ),
    "unknown-module": Example(
        "conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)\n"
        "conv.forward = lambda x: F.conv2d(x, 2 * conv.weight, conv.bias)\n"
        "model, x = nn.Sequential(conv, bn).eval(), torch.randn(2, 3, 8, 8)\n"
        "model = torch.fx.symbolic_trace(model)\n",
        "model = torch.fx.symbolic_trace(model)\n",
        "",
    ),
    "parametrized": Example(
        "conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))\n"
        "model, x = nn.Sequential(conv, nn.BatchNorm2d(8)).eval(), torch.randn(2, 3, 8, 8)\n"
        "model = torch.fx.symbolic_trace(model)\n",
        "model = torch.fx",
        "nn.utils.parametrize.remove_parametrizations(conv, 'weight')\nmodel = torch.fx",
    ),
    "hooks": Example(
        "model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), torch.randn(2, 3, 8, 8)\n"
        "hook = model[0].register_forward_hook(lambda *_: None)\n"
        "model = torch.fx.symbolic_trace(model)\n",
        "model = torch.fx",
        "hook.remove()\nmodel = torch.fx",
    ),
    "padding-mode": Example(
        "conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode='reflect')\n"
        "model, x = nn.Sequential(conv, nn.BatchNorm2d(8)).eval(), torch.randn(2, 3, 8, 8)\n"
        "model = torch.fx.symbolic_trace(model)\n",
        "'reflect'",
        "'zeros'",
    ),
    "output-size": Example(
        "class Up(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up, self.bn = nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)\n"
        "    def forward(self, x): return self.bn(self.up(x, output_size=[18, 18]))\n"
        "model, x = torch.fx.symbolic_trace(Up().eval()), torch.randn(2, 3, 8, 8)\n",
        "self.up(x, output_size=[18, 18])",
        "self.up(x)",
    ),
    "multiple-users": Example(
        _PAIR + "def model(x):\n    y = conv(x)\n    return bn(y) + y\n", "bn(y) + y", "bn(y) + conv(x)"
    ),
    "channel-axis": Example(
        "linear, bn = nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2, eps=1e-12).eval()\n"
        "nn.init.ones_(linear.weight), bn.weight.data.copy_(torch.tensor([1.0, 3.0]))\n"
        "x = torch.ones(1, 2, 1)\n"
        "def model(x): return bn(linear(x))\n",
        "bn(linear(x))",
        "bn(linear(x.flatten(0, 1)))",
        number=Number("model(x)[0, 0, 1]", 1.0, 3.0),
    ),
    "operand-shape": Example(
        "conv = nn.Conv2d(1, 2, 1, bias=False)\nnn.init.ones_(conv.weight)\nrow = torch.tensor([1.0, 3.0])\n"
        "x = torch.ones(1, 1, 2, 2)\n"
        "def model(x): return conv(x) * row\n",
        "* row",
        "* row[:, None, None]",
        rule="conv_affine",
    ),
    "geometry": Example(
        "a, b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)\n"
        "x = torch.randn(2, 4, 8, 8)\n"
        "def model(x): return a(x) + b(x)\n",
        "padding=1, groups=2)",
        "padding=1)",
        rule="parallel_conv_merge",
    ),
    "border": Example(
        _ONES + "def model(x): return conv(bn(x))\n",
        "3, padding=1,",
        "3,",
        rule="bn_before_conv",
        number=Number("model(x)[0, 0, 0, 0]", 8.0, 13.0),
    ),
    "zero-divisor": Example(
        "conv, scale = nn.Conv2d(1, 1, (1, 2), bias=False), torch.zeros(1, 1, 1)\n"
        "nn.init.ones_(conv.weight)\n"
        "x = torch.tensor([[[[1.0, 0.0]]]])\n"
        "def model(x): return conv(x) / scale\n",
        "/ scale",
        "* scale.reciprocal()",
        rule="conv_affine",
        number=Number("model(x)[0, 0, 0, 0]", math.inf, math.nan),
    ),
    "statistics-require-grad": Example(
        _PAIR
        + "mean = torch.zeros(8, requires_grad=True)\n"
        + "def model(x): return F.batch_norm(conv(x), mean, bn.running_var)\n",
        "torch.zeros(8, requires_grad=True)",
        "torch.zeros(8)",
    ),
    "symbolic-channels": Example(
        "bn, x = nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 8, 8)\n"
        "torch._dynamo.mark_dynamic(x, 1)\n"
        "def model(x): return bn(F.conv_transpose2d(x, x.new_ones(x.shape[1], 2, 3, 3), groups=2))\n",
        "torch._dynamo.mark_dynamic(x, 1)\n",
        "",
    ),
    "dtype": Example(
        "conv, scale = nn.Conv2d(3, 8, 3), torch.rand(8, 1, 1, dtype=torch.float64)\n"
        "x = torch.randn(2, 3, 8, 8)\n"
        "def model(x): return conv(x) * scale\n",
        "* scale",
        "* scale.float()",
        rule="conv_affine",
    ),
    "quantised": Example(
        _PAIR
        + "def model(x):\n"
        + "    x = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)\n"
        + "    return bn(conv(x))\n",
        "    x = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)\n",
        "",
    ),
    "no-metadata": Example(
        "from fxpasses.passes.folding.conv_bn import EfficientConvBnEval\n"
        + _PAIR
        + "def model(x): return bn(conv(x))\n"
        + "def double(context, options):\n"
        + "    (conv,) = context.graph.find_nodes(op='call_function', target=torch.conv2d)\n"
        + "    with context.graph.inserting_before(conv):\n"
        + "        weight = context.graph.call_function(torch.mul, (conv.args[1], 2))\n"
        + "    conv.update_arg(1, weight)\n"
        + "    return fxpasses.Outcome(changed=True)\n"
        + "class Later(EfficientConvBnEval):\n"
        + "    name, after = 'later', ('double',)\n",
        "    conv.update_arg(1, weight)\n",
        "    weight.meta.update(conv.args[1].meta)\n    conv.update_arg(1, weight)\n",
        options="{'profit': 'always', 'disable': ('efficient_conv_bn_eval',), "
        "'rules': (fxpasses.GraphPass('double', double), Later())}",
        rule="later",
    ),
    "mutation": Example(
        "conv, bn = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=1e-12).eval()\n"
        "nn.init.ones_(conv.weight)\n"
        "x, gamma = torch.ones(1, 1, 2, 2), torch.ones(1)\n"
        "def model(x):\n"
        "    x, scale = x.clone(), gamma.clone()\n"
        "    y = conv(x)\n"
        "    x.mul_(3), scale.mul_(5)\n"
        "    return F.batch_norm(y, bn.running_mean, bn.running_var, scale, eps=1e-12), x\n",
        "x.mul_(3), scale",
        "scale",
        number=Number("model(x)[0].max()", 5.0, 15.0),
    ),
    "functorch": Example(
        _PAIR + "def model(x): return torch.vmap(lambda y: bn(conv(y)))(x[None])\n",
        "torch.vmap(lambda y: bn(conv(y)))(x[None])",
        "bn(conv(x))[None]",
    ),
    "grad-mode": Example(
        _PAIR + "def model(x):\n    with torch.no_grad():\n        y = conv(x)\n    return bn(y)\n",
        "    with torch.no_grad():\n        y = conv(x)\n",
        "    y = conv(x)\n",
        grad=True,
        number=Number(
            "any(map(torch.is_tensor, torch.autograd.grad(model(x).sum(), conv.weight, allow_unused=True)))",
            0,
            1,
        ),
    ),
    "autocast": Example(
        _PAIR
        + "def model(x):\n"
        + "    with torch.autocast('cpu', torch.bfloat16):\n"
        + "        y = conv(x)\n"
        + "    return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight * 2, bn.bias)\n",
        "    with torch.autocast('cpu', torch.bfloat16):\n        y = conv(x)\n",
        "    y = conv(x)\n",
    ),
    "stream": Example(
        _PAIR
        + "def model(x):\n"
        + "    with torch.fx.traceback.annotate({'stream': 1}):\n"
        + "        y = conv(x)\n"
        + "    return bn(y)\n",
        "    with torch.fx.traceback.annotate({'stream': 1}):\n        y = conv(x)\n",
        "    y = conv(x)\n",
    ),
    "region": Example(
        _PAIR + "def model(x):\n    with torch.inference_mode():\n        y = conv(x)\n    return bn(y)\n",
        "    with torch.inference_mode():\n        y = conv(x)\n",
        "    y = conv(x)\n",
    ),
    "nothing-saved": Example(
        _PAIR + "bn.requires_grad_(False)\ndef model(x): return bn(conv(x))\n",
        "bn.requires_grad_(False)",
        "bn.requires_grad_(True)",
        options="{}",
        grad=True,
    ),
    "adds-weight-gradient": Example(
        _PAIR + "conv.requires_grad_(False)\ndef model(x): return bn(conv(x))\n",
        "conv.requires_grad_(False)",
        "conv.requires_grad_(True)",
        options="{}",
        grad=True,
    ),
    "small-result": Example(
        "a, b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)\nx = torch.randn(1, 16, 2, 2)\n"
        "def model(x): return a(x) + b(x)\n",
        "torch.randn(1, 16, 2, 2)",
        "torch.randn(8, 16, 64, 64)",
        options="{}",
        rule="parallel_conv_merge",
    ),
    "live-weights": Example(
        _PAIR + "def model(x): return bn(conv(x))\n", options="{}", options_after="{'weights': 'cached'}"
    ),
    "limit": Example(
        _PAIR + "def model(x): return bn(conv(x))\n",
        options="{'profit': 'always', 'limit': 0}",
        options_after="{'profit': 'always'}",
    ),
    "no-parameter-work": Example(
        "conv, x = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)\ndef model(x): return F.conv2d(x, x)\n",
        "F.conv2d(x, x)",
        "conv(x)",
        **_CACHED,
    ),
    "cached-memory": Example(
        "w, x = nn.Parameter(torch.randn(32)), torch.randn(2, 32)\n"
        "def model(x): return x @ (w[:, None] * w)\n",
        "(w[:, None] * w)",
        "(2 * w)",
        **_CACHED,
    ),
}
