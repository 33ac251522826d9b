"""Reason codes by example: models of a few lines that a rule leaves alone, and what is to be changed.

    source           a model and its input; the rule declines there with the code
    old -> new       the edit after which the rule fires
    number           where rewriting would be wrong: an element of the result, eager's and the rewrite's

The tests run each: the source is declined, the edited source is rewritten, and a number is what comes out
when the refusal is overridden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxpasses.report.text import in_code

PRELUDE = "import math\nimport torch\nfrom torch import nn\nimport torch.nn.functional as F\n"
"""What every source may use."""


@dataclass(frozen=True)
class Number:
    """What would come out wrong.

    Attributes:
        expression: of the model and its input, as Python.
        eager: its value in eager mode.
        rewritten: its value if the rule were applied.
    """

    expression: str
    eager: float
    rewritten: float


@dataclass(frozen=True)
class Example:
    """A site that a rule leaves alone, and what changes that.

    Attributes:
        source: defines ``model`` and its input ``x``.
        old, new: what to replace in the source, so that the rule fires; empty where options do it.
        options: those under which it is declined.
        options_after: those under which the edited source is rewritten; None for the same.
        rule: the rule that is meant.
        grad: whether gradients are recorded.
        number: what would come out wrong, where that is known.
    """

    source: str
    old: str = ""
    new: str = ""
    options: Mapping[str, Any] = field(default_factory=lambda: {"profit": "always"})
    options_after: Mapping[str, Any] | None = None
    rule: str = "efficient_conv_bn_eval"
    grad: bool = False
    number: Number | None = None

    @property
    def edited(self) -> str:
        """The source after the edit."""
        return self.source.replace(self.old, self.new) if self.old else self.source

    def lines(self) -> list[str]:
        """The source with the edit marked as in a patch, then what would be wrong."""
        old, new = ([line for line in text.splitlines() if line] for text in (self.source, self.edited))
        found = []
        for line in old:
            found.append(f"  {line}" if line in new else f"- {line}")
            if line not in new:
                found += [f"+ {other}" for other in new if other not in old and f"+ {other}" not in found]
        if self.options_after is not None:
            before = {name: value for name, value in self.options.items() if name not in self.options_after}
            found += [f"- {in_code(before)}"] * bool(before) + [f"+ {in_code(self.options_after)}"]
        if self.number is not None:
            number = self.number
            found.append(
                f"rewritten as it stands, {number.expression} would be {number.rewritten:g}; eager gives "
                f"{number.eager:g}"
            )
        return found


_PAIR = "conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval()\nx = torch.randn(2, 3, 8, 8)\n"
_ONES = """\
conv, bn = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1, eps=1e-12).eval()
nn.init.ones_(conv.weight), nn.init.ones_(bn.bias)
x = torch.ones(1, 1, 3, 3)
"""


def _rule(parameters: str, pattern: str, replacement: str, more: str = "", examples: str = "") -> str:
    """A rule made of functions."""
    examples = examples or "torch.randn(2, 3), " * (parameters.count(",") + 1)
    return (
        "import fxpasses\n"
        f"@fxpasses.rewrite(name='example', examples=({examples}))\n"
        "class rule:\n"
        f"    def pattern({parameters}): return {pattern}\n"
        f"    def replacement({parameters}): return {replacement}\n{more}"
        "x = torch.randn(2, 3)\n"
    )


_CLAMPED = _rule("a", "torch.exp(torch.clamp(a, max=0.0))", "torch.clamp(torch.exp(a), max=1.0)")
_NEGATED = "torch.neg(torch.neg(a))"
_MINE: Mapping[str, Any] = {"rule": "example"}
_CACHED: Mapping[str, Any] = {"options": {"weights": "cached"}, "rule": "kept_weights"}

EXAMPLES: Mapping[str, Example] = {
    # The pattern is not there
    "training-mode": Example(
        _PAIR + "bn.train()\ndef model(x): return bn(conv(x))\n", "bn.train()", "bn.eval()"
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
    # The pattern of a rule made of functions is half there
    "other-operator": Example(
        _CLAMPED + "def model(x): return torch.exp(x.sin())\n", "x.sin()", "x.clamp(max=0.0)", **_MINE
    ),
    "other-constant": Example(
        _CLAMPED + "def model(x): return torch.exp(x.clamp(max=2.0))\n", "max=2.0", "max=0.0", **_MINE
    ),
    "other-operand": Example(
        _rule("a", "a * torch.sigmoid(a)", "F.silu(a)") + "def model(x): return x.cos() * torch.sigmoid(x)\n",
        "x.cos() * torch.sigmoid(x)",
        "x * torch.sigmoid(x)",
        **_MINE,
    ),
    "operand-kind": Example(
        _rule("a, b", "torch.exp(a + b)", "a.exp() * math.exp(b)", examples="torch.randn(2, 3), 0.5")
        + "def model(x): return torch.exp(x.cos() + x.sum())\n",
        "x.sum()",
        "2.0",
        **_MINE,
    ),
    # It would not give eager's answers
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
    "aliasing": Example(
        _rule("a", _NEGATED, "a") + "def model(x): return torch.neg(torch.neg(x))\n",
        "torch.neg(torch.neg(x))",
        "torch.neg(torch.neg(x.exp()))",
        number=Number("model(x).data_ptr() == x.data_ptr()", False, True),
        **_MINE,
    ),
    "mixed-dtypes": Example(
        _rule("a, b", "torch.exp(torch.add(torch.cos(a), b))", "torch.exp(torch.cos(a)) * torch.exp(b)")
        + "def model(x): return torch.exp(torch.cos(x) + x.double())\n",
        "x.double()",
        "x",
        **_MINE,
    ),
    "order": Example(
        _rule(
            "a, b",
            "(y := torch.sin(a)), torch.exp(y * b)",
            "torch.sin(a), torch.exp(torch.sin(a) * b)",
        )
        + "def model(x):\n"
        + "    y = x.sin()\n"
        + "    b = y.exp()\n"
        + "    return y, torch.exp(y * b)\n",
        "y.exp()",
        "x.sin().exp()",
        **_MINE,
    ),
    "functorch": Example(
        _PAIR + "def model(x): return torch.vmap(lambda y: bn(conv(y)))(x[None])\n",
        "torch.vmap(lambda y: bn(conv(y)))(x[None])",
        "bn(conv(x))[None]",
    ),
    "check": Example(
        _rule("a", _NEGATED, "a", "    def check(match): return match.tensor('a').ndim == 1\n")
        + "def model(x): return torch.neg(torch.neg(x.exp()))\n",
        "x.exp()",
        "x.exp().flatten()",
        **_MINE,
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
    "region": Example(
        _PAIR + "def model(x):\n    with torch.inference_mode():\n        y = conv(x)\n    return bn(y)\n",
        "    with torch.inference_mode():\n        y = conv(x)\n",
        "    y = conv(x)\n",
    ),
    # It would not pay
    "nothing-saved": Example(
        _PAIR + "bn.requires_grad_(False)\ndef model(x): return bn(conv(x))\n",
        "bn.requires_grad_(False)",
        "bn.requires_grad_(True)",
        options={},
        grad=True,
    ),
    "adds-weight-gradient": Example(
        _PAIR + "conv.requires_grad_(False)\ndef model(x): return bn(conv(x))\n",
        "conv.requires_grad_(False)",
        "conv.requires_grad_(True)",
        options={},
        grad=True,
    ),
    "small-result": Example(
        "a, b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)\nx = torch.randn(1, 16, 2, 2)\n"
        "def model(x): return a(x) + b(x)\n",
        "torch.randn(1, 16, 2, 2)",
        "torch.randn(8, 16, 64, 64)",
        options={},
        rule="parallel_conv_merge",
    ),
    "live-weights": Example(
        _PAIR + "def model(x): return bn(conv(x))\n", options={}, options_after={"weights": "cached"}
    ),
    "profit": Example(
        _rule("a", _NEGATED, "a", "    def profit(match): return False\n")
        + "def model(x): return torch.neg(torch.neg(x.exp()))\n",
        options={},
        options_after={"profit": "always"},
        **_MINE,
    ),
    "limit": Example(
        _PAIR + "def model(x): return bn(conv(x))\n",
        options={"profit": "always", "limit": 0},
        options_after={"profit": "always"},
    ),
    # weights="cached" keeps nothing
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
    # The rule failed, and the graph is as it was
    "check-error": Example(
        _rule("a", _NEGATED, "a", "    def check(match): return match.tensor('b').ndim == 2\n")
        + "def model(x): return torch.neg(torch.neg(x.exp()))\n",
        "match.tensor('b')",
        "match.tensor('a')",
        **_MINE,
    ),
    "rewrite-error": Example(
        _rule("a", _NEGATED, "a.sum()") + "def model(x): return torch.neg(torch.neg(x.exp()))\n",
        "return a.sum()",
        "return a",
        **_MINE,
    ),
    "verify-structure": Example(
        _rule("a", _NEGATED, "a.t().contiguous().t()")
        + "def model(x): return torch.neg(torch.neg(x.exp()))\n",
        "return a.t().contiguous().t()",
        "return a",
        options={"verify": "structure"},
        **_MINE,
    ),
    "verify-numerics": Example(
        _rule("a", _NEGATED, "torch.neg(a)") + "def model(x): return torch.neg(torch.neg(x.exp()))\n",
        "return torch.neg(a)",
        "return a",
        options={"verify": "numerics"},
        **_MINE,
    ),
}
"""An example of each code that has one."""
