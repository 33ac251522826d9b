"""Private names of torch are used in `torch_internals` alone, exist in this torch, and load nothing early.

A name is private if a part of it begins with an underscore: `torch._dynamo.reset`, `torch.utils._pytree`.
Names are followed from imports through attributes, `getattr` with a constant and `import_module`; `ruff` does
so for the names that it is given. What is read of an object, such as `node._erased`, has no type here and
stays unseen. Operators (`torch.ops.aten._to_copy`) are named as in graphs, and are not private.
"""

from __future__ import annotations

import ast
import functools
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TESTS_MAY_USE = (
    "torch._dynamo",  # what users of torch.compile reset, configure and count by
    "torch._inductor",  # the backend that ours is compared with, and handed passes of
    "torch._functorch.benchmark_utils",  # what benchmarks.utilization is compared with
    "torch._foreach_",  # functions of graphs under test
    "torch.nn.modules",  # base classes of layers
    "torch.utils._sympy.value_ranges.ValueRangeError",  # what inductor fails with, planted
)


# How they are found ----------------------------------------------------------------------------------------


def private_names(source: str) -> list[tuple[int, str]]:
    """The line and the whole of each private name of torch, in the order of lines."""
    tree = ast.parse(source)
    known = dict(_imported(tree))
    found = {(line, name) for line, name in _mentioned(tree, known) if _is_private(name)}
    # `torch._C._nn.linear` is mentioned as `torch._C` and as `torch._C._nn` too.
    return sorted(
        (line, name)
        for line, name in found
        if not any(at == line and other.startswith(f"{name}.") for at, other in found)
    )


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names that imports anywhere in a file bind to torch, or to something of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name.split(".")[0] == "torch":
                    yield (each.asname, each.name) if each.asname else ("torch", "torch")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for each in node.names:
                yield each.asname or each.name, f"{node.module}.{each.name}"


def _mentioned(tree: ast.AST, known: dict[str, str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, each.name) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{each.name}") for each in node.names)
        elif isinstance(node, (ast.Attribute, ast.Call)):
            name = _qualified(node, known)
            if name is not None:
                yield node.lineno, name


def _qualified(node: ast.expr, known: dict[str, str]) -> str | None:
    """What an expression stands for, such as ``"torch._C._nn"``; None where it is nothing of torch."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _qualified(node.value, known)
        return None if owner is None else f"{owner}.{node.attr}"
    if not isinstance(node, ast.Call):
        return None
    match node.func, node.args:
        case ast.Name("getattr"), [owned, ast.Constant(str(attribute)), *_]:
            owner = _qualified(owned, known)
            return None if owner is None else f"{owner}.{attribute}"
        case ast.Name("import_module" | "__import__") | ast.Attribute(attr="import_module"), [
            ast.Constant(str(name)),
            *_,
        ]:
            return name
    return None


def _is_private(name: str) -> bool:
    first, *parts = name.split(".")
    if first != "torch" or parts[:1] == ["ops"]:
        return False
    return any(part.startswith("_") and not part.endswith("__") for part in parts)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch._dynamo.utils as utils", "torch._dynamo.utils"),
        ("from torch import _C", "torch._C"),
        ("from torch._C import _nn as functions", "torch._C._nn"),
        ("from torch.utils import _pytree", "torch.utils._pytree"),
        ("from torch.fx.graph import _something_new", "torch.fx.graph._something_new"),
        ("import torch; torch._C._foo(1)", "torch._C._foo"),
        ("import torch as t; t._dynamo.reset()", "torch._dynamo.reset"),
        ("import torch.fx; torch.utils._pytree.tree_map", "torch.utils._pytree.tree_map"),
        ("from torch import nn; nn.modules.conv._ConvNd", "torch.nn.modules.conv._ConvNd"),
        ("def f():\n    import torch\n    return torch._tensor", "torch._tensor"),
        ("import torch\ndef f(x: torch._ops.OpOverload): ...", "torch._ops.OpOverload"),
        ("import torch; getattr(torch, '_C')", "torch._C"),
        ("import torch; getattr(torch._C, '_nn').linear", "torch._C._nn.linear"),
        ("import importlib; importlib.import_module('torch._inductor.config')", "torch._inductor.config"),
        ("from importlib import import_module; import_module('torch._ops')", "torch._ops"),
    ],
)
def test_a_private_name_is_found(source, name):
    assert [found for _, found in private_names(source)] == [name]


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.compile(torch.nn.Linear(1, 1)); torch.__version__",
        "import torch; torch.ops.aten._to_copy.default",
        "import torch; name = 'torch._dynamo.utils'",
        "import torch; getattr(torch, name); getattr(torch, 'relu')",
        "from fxpasses.graph.views import _read; _read._dynamo",
        "self._C._nn; torch._C",  # no import binds this torch
        "import torchvision._internally_replaced_utils",
    ],
)
def test_a_public_name_or_one_of_somebody_else_is_not(source):
    assert private_names(source) == []


# Where they are --------------------------------------------------------------------------------------------


@functools.cache
def used_in(folder: str) -> dict[str, list[tuple[int, str]]]:
    """The private names in each file under a folder."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): private_names(path.read_text("utf-8")) for path in paths}


def is_their_place(path: str) -> bool:
    return path.startswith("fxpasses/torch_internals/") or path == "benchmarks/torch_internals.py"


def internals() -> set[str]:
    """Every private name that the two places use."""
    found = {**used_in("fxpasses"), **used_in("benchmarks")}
    return {name for path, names in found.items() if is_their_place(path) for _, name in names}


@pytest.mark.parametrize("folder", ["fxpasses", "benchmarks"])
def test_no_private_name_is_used_elsewhere(folder):
    found = used_in(folder)
    places = [path for path in found if is_their_place(path)]
    assert any(found[path] for path in places), "nothing was looked at"
    assert {path: names for path, names in found.items() if names and path not in places} == {}


def test_tests_use_few():
    found = {(path, name) for path, names in used_in("tests").items() for _, name in names}
    assert {each for each in found if not each[1].startswith(TESTS_MAY_USE)} == set()


# What ruff says of them ------------------------------------------------------------------------------------


def complaints(source: str, path: str) -> list[str]:
    """Ruff's lines about banned names in source that would stand at a path."""
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "concise"]
    told = subprocess.run(
        [*command, "--stdin-filename", path, "-"], input=source, cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode in (0, 1), told.stderr
    return [line for line in told.stdout.splitlines() if "TID251" in line]


def test_ruff_refuses_every_name_in_use_outside_its_place():
    names = sorted(internals())
    source = "import torch\n" + "".join(f"print({name})\n" for name in names)
    refused = {int(line.split(":")[1]) for line in complaints(source, "fxpasses/graph/planted.py")}
    assert [name for line, name in enumerate(names, start=2) if line not in refused] == []


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("fxpasses/planted.py", 2),
        ("fxpasses/passes/layout/planted.py", 2),
        ("benchmarks/planted.py", 2),
        ("fxpasses/torch_internals/planted.py", 0),
        ("benchmarks/torch_internals.py", 0),
    ],
)
def test_ruff_refuses_imports_and_attributes_but_in_their_place(path, number):
    source = "import torch\nfrom torch.utils._pytree import tree_map\nprint(torch._C._nn, tree_map)\n"
    assert len(complaints(source, path)) == number


# What they load --------------------------------------------------------------------------------------------


def test_every_name_exists_in_this_torch():
    missing = []
    for name in sorted(internals()):
        try:
            functools.reduce(_step, name.split(".")[1:], importlib.import_module("torch"))
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    assert missing == []


def _step(owner: object, name: str) -> object:
    """An attribute, or a module that nobody has imported yet."""
    if not hasattr(owner, name):
        importlib.import_module(f"{owner.__name__}.{name}")
    return getattr(owner, name)


def test_importing_every_topic_loads_neither_dynamo_nor_inductor():
    topics = sorted(path.stem for path in (ROOT / "fxpasses" / "torch_internals").glob("[a-z]*.py"))
    imports = "; ".join(f"import fxpasses.torch_internals.{topic}" for topic in topics)
    code = f"import sys; {imports}; print({{'torch._dynamo', 'torch._inductor'}} & {{*sys.modules}})"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert topics
    assert told.stdout.strip() == "set()"
