"""Examples of rules that are made of functions, and of inductor's patterns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxpasses.report.examples.example import Example, Number


def _rule(parameters: str, pattern: str, replacement: str, more: str = "", examples: str = "") -> str:
    """A rule made of functions."""
    examples = examples or "torch.randn(2, 3), " * (parameters.count(",") + 1)
    return (
        f"@fxpasses.rewrite(name='example', examples=({examples}))\n"
        "class rule:\n"
        f"    def pattern({parameters}): return {pattern}\n"
        f"    def replacement({parameters}): return {replacement}\n{more}"
        "x = torch.randn(2, 3)\n"
    )


def _matcher(check: str, handler: str = "") -> str:
    """A pattern of inductor's, as a rule, and a graph that it is found in."""
    return (
        "from torch._inductor import pattern_matcher as pm\n"
        "from torch.fx.experimental.proxy_tensor import make_fx\n"
        "relu, patterns = torch.ops.aten.relu.default, pm.PatternMatcherPass()\n"
        "twice = pm.CallFunction(relu, pm.CallFunction(relu, pm.Arg()))\n"
        f"@pm.register_graph_pattern(twice, pass_dict=patterns, extra_check=lambda match: {check})\n"
        "def once(match, x):\n"
        f"{handler}"
        "    match.output_node().replace_all_uses_with(match.nodes[0])\n"
        "    match.graph.erase_node(match.output_node())\n"
        "rule, x = fxpasses.from_inductor('example', patterns), torch.randn(2, 3)\n"
        "model = make_fx(lambda x: torch.relu(x).relu())(x)\n"
    )


_CLAMPED = _rule("a", "torch.exp(torch.clamp(a, max=0.0))", "torch.clamp(torch.exp(a), max=1.0)")
_NEGATED = "torch.neg(torch.neg(a))"
_MINE: Mapping[str, Any] = {"rule": "example", "options": "{'profit': 'always', 'rules': rule}"}

FUNCTIONS: Mapping[str, Example] = {
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
    "other-arguments": Example(
        _rule("a", "torch.exp(torch.sum(a, -1))", "torch.exp(a).prod(-1)")
        + "def model(x): return torch.exp(torch.sum(x))\n",
        "torch.sum(x)",
        "torch.sum(x, -1)",
        **_MINE,
    ),
    "another-result": Example(
        _rule("a", "torch.sin(-a), torch.cos(-a)", "-torch.sin(a), torch.cos(a)")
        + "def model(x): return torch.cos(-x)\n",
        "torch.cos(-x)",
        "torch.cos(-x), torch.sin(-x)",
        **_MINE,
    ),
    "extra-check": Example(
        _matcher("match.nodes[0].meta['val'].ndim == 1"),
        "relu(x).relu()",
        "relu(x.flatten()).relu()",
        **_MINE,
    ),
    "handler": Example(
        _matcher("True", "    if x.meta['val'].ndim > 1: return\n"),
        "relu(x).relu()",
        "relu(x.flatten()).relu()",
        **_MINE,
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
    "check": Example(
        _rule("a", _NEGATED, "a", "    def check(match): return match.tensor('a').ndim == 1\n")
        + "def model(x): return torch.neg(torch.neg(x.exp()))\n",
        "x.exp()",
        "x.exp().flatten()",
        **_MINE,
    ),
    "sizes": Example(
        _rule(
            "a",
            _NEGATED,
            "a",
            "    def pays_for(match):\n"
            "        return fxpasses.SizeRange('batch', match.tensor('a').shape[0], least=4)\n",
        )
        + "def model(x): return torch.neg(torch.neg(x.exp()))\n",
        "x = torch.randn(2, 3)\n",
        "x = torch.randn(4, 3)\n",
        options="{'rules': rule}",
        rule="example",
    ),
    "profit": Example(
        _rule("a", _NEGATED, "a", "    def profit(match): return False\n")
        + "def model(x): return torch.neg(torch.neg(x.exp()))\n",
        options="{'rules': rule}",
        options_after="{'profit': 'always', 'rules': rule}",
        rule="example",
    ),
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
        options="{'profit': 'always', 'verify': 'structure', 'rules': rule}",
        rule="example",
    ),
    "verify-numerics": Example(
        _rule("a", _NEGATED, "torch.neg(a)") + "def model(x): return torch.neg(torch.neg(x.exp()))\n",
        "return torch.neg(a)",
        "return a",
        options="{'profit': 'always', 'verify': 'numerics', 'rules': rule}",
        rule="example",
    ),
}
