"""Reproducers: an application of a rule as a pytest file that needs neither the model nor the rule.

The file holds both graphs as Python functions and describes their inputs by shape, strides and dtype. It
passes when the two compute the same (`fxpasses.testing.assert_same_function`), so a miscompile's file fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxpasses.errors import ReproError
from fxpasses.report.application import Application
from fxpasses.report.data import ReportData

_TEMPLATE = '''\
"""What {rule} replaced at {node}{place}, and what it wrote instead.

Run with pytest: it passes when both compute the same.
"""

import torch
from torch import device, inf, nan  # noqa: F401  what printed graphs refer to
from torch.fx.immutable_collections import immutable_dict, immutable_list  # noqa: F401

from fxpasses.testing import TensorSpec, assert_same_function
{imports}
NoneType = type(None)


class Before(torch.nn.Module):
{before}

class After(torch.nn.Module):
{after}

INPUTS = [
{inputs}
]


def test_{name}_computes_the_same():
    {context}assert_same_function(Before(), After(), INPUTS)
'''


def save_repro(report: ReportData, directory: Path) -> list[Path]:
    """Writes the applications of a report; see `Report.save_repro`."""
    if not report.applications and report.applied:
        raise ReproError(
            f"{sum(report.applied.values())} rewrites were applied, and what they replaced was not kept. "
            "Compile with options={'keep_repro': True} or {'verify': 'numerics'} and save again."
        )
    return [
        save_application(application, directory, number)
        for number, application in enumerate(report.applications, start=1)
    ]


def save_application(application: Application, directory: Path, number: int) -> Path:
    """Writes one application as ``test_0001_rule_node.py`` and returns the path."""
    directory.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", f"{application.rule}_{application.node}")
    path = directory / f"test_{number:04d}_{name}.py"
    path.write_text(render(application), encoding="utf-8")
    return path


def render(application: Application) -> str:
    """The text of an application's test file."""
    sides = [_class_body(side) for side in (application.before, application.after)]
    imports = sorted({line for _, lines in sides for line in lines})
    return _TEMPLATE.format(
        rule=application.rule,
        node=application.node,
        place=f" ({application.location})" if application.location else "",
        imports="\n".join(imports),
        before=sides[0][0],
        after=sides[1][0],
        inputs="\n".join(f"    {_literal(spec)},  # {name}" for name, spec in application.inputs),
        name=re.sub(r"\W+", "_", application.rule),
        context=_context(application),
    )


def _class_body(module: GraphModule) -> tuple[str, list[str]]:
    """The class's methods, indented, and the imports that they need."""
    code = module.graph.python_code("self")
    lines = [line for line in code.src.splitlines() if line.strip()]
    init = ["def __init__(self):", "    super().__init__()"]
    init += [f"    self.{name} = {_constructor(child)}" for name, child in module.named_children()]
    text = "\n".join(f"    {line}" for line in [*init, "", *lines]) + "\n"
    return text, list(_imports(code.globals))


def _constructor(module: nn.Module) -> str:
    kind = type(module)
    if not kind.__module__.startswith("torch.nn.modules") or list(module.children()):
        raise ReproError(f"a {kind.__qualname__} cannot be written down as source; save the graph instead.")
    mode = "" if module.training else ".eval()"
    return f"torch.nn.{module!r}{mode}"


_KNOWN = frozenset({"torch", "device", "inf", "nan", "NoneType", "immutable_dict", "immutable_list"})


def _imports(names: dict[str, Any]) -> Iterable[str]:
    """Import lines for the functions that printed code refers to by name."""
    for name, found in names.items():
        if name in _KNOWN:
            continue
        module, qualified = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
        if isinstance(found, type(torch)):
            yield f"import {found.__name__} as {name}"
        elif module and qualified and "<" not in qualified:
            # A builtin of Python's `_operator` prints under that module.
            yield f"import {module}\n{name} = {module}.{qualified}"
        else:
            raise ReproError(f"{name} in the graph is {found!r}, which cannot be imported by name.")


def _literal(spec: Any) -> str:
    if isinstance(spec, (list, tuple)):
        return f"[{', '.join(map(_literal, spec))}]"
    return repr(spec)


def _context(application: Application) -> str:
    """The line of the `with` statement that brings back the modes of the rewrite, if it takes any."""
    modes = application.modes
    regions = [] if modes.grad else ["torch.no_grad()"]
    regions += [
        f"torch.autocast({kind!r}, {dtype}, {enabled}, {cache})"
        for kind, dtype, enabled, cache in modes.autocast
    ]
    return f"with {', '.join(regions)}:\n        " if regions else ""
