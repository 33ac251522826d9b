"""Source locations: the user's line that a node came from."""

from __future__ import annotations

import functools
import os
import re

import torch
from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_INTERNAL = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)


def location_of(node: Node) -> str:
    """The user's line, as ``path:line``: the innermost outside torch and fxpasses; empty without one."""
    trace = node.meta.get("stack_trace") or ""
    return _location(trace) if isinstance(trace, str) else ""


@functools.lru_cache(maxsize=4096)
def _location(trace: str) -> str:
    start = len(trace)
    while (start := trace.rfind('File "', 0, start)) >= 0:
        found = _FRAME.match(trace, start)
        if found is not None and not found["file"].startswith(_INTERNAL):
            return f"{found['file']}:{found['line']}"
    return ""


def module_of(node: Node) -> str:
    """The qualified name of the module whose call made the node; empty where the tracer did not say."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return str(node.target) if node.op == "call_module" else ""
    innermost = list(stack.values())[-1]
    return _module_path(innermost[0] if isinstance(innermost, tuple) else str(innermost))


@functools.lru_cache(maxsize=4096)
def _module_path(path: str) -> str:
    """``"layer1.0.conv1"`` from ``"L['self']._modules['layer1']..."``."""
    cleaned = re.sub(r"^L\['[^']*'\]\.?", "", path)
    cleaned = re.sub(r"(?:_modules|_parameters|_buffers)\['([^']*)'\]", r"\1", cleaned)
    cleaned = re.sub(r"\['?([^'\]]*)'?\]", r".\1", cleaned)
    return cleaned.replace("_modules.", "").replace("__dict__.", "").strip(".")
