"""Fake tensors and the modes that make them.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode


def new_fake_mode() -> FakeTensorMode:
    """A fake tensor mode with static shapes that accepts real parameters beside fake inputs."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def guard_count(mode: FakeTensorMode) -> int:
    """How many guards and run-time assertions the sizes of a fake mode have gathered."""
    environment = mode.shape_env
    if environment is None:
        return 0
    deferred = sum(map(len, environment.deferred_runtime_asserts.values()))
    return len(environment.guards) + deferred


def without_fake_tensors() -> contextlib.AbstractContextManager[Any]:
    """A block in which tensors are real, inside a compilation whose tensors are fake."""
    from torch import _ops
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
    from torch.utils._python_dispatch import _disable_current_modes

    before_dispatch: Callable[[], int] = _ops._len_torch_dispatch_stack_pre_dispatch
    if not torch._C._len_torch_dispatch_stack() and not before_dispatch():
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(disable_proxy_modes_tracing())
    stack.enter_context(_disable_current_modes())
    return stack


def outputs_anew(graph_module: torch.fx.GraphModule) -> list[object]:
    """What a graph of ATen operators gives for its inputs, computed again; its metadata stays as it is.

    Views are taken as reshapes, as inductor does when it computes strides anew.

    Args:
        graph_module: its inputs and constants have fake tensors in their metadata.
    """
    from torch.utils._pytree import tree_leaves

    view, reshape = torch.ops.aten.view.default, torch.ops.aten.reshape.default

    class Anew(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            known = n.op in ("placeholder", "get_attr") and "val" in n.meta
            return n.meta["val"] if known else super().run_node(n)

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return super().call_function(reshape if target is view else target, args, kwargs)

    placeholders = graph_module.graph.find_nodes(op="placeholder")
    given = [node.meta["val"] for node in placeholders]
    mode = next((value.fake_mode for value in given if isinstance(value, FakeTensor)), None)
    with contextlib.ExitStack() as blocks:
        blocks.enter_context(torch.no_grad())
        if mode is not None:
            blocks.enter_context(mode)
            if mode.shape_env is not None:
                blocks.enter_context(mode.shape_env.suppress_guards())
        outputs: list[object] = tree_leaves(Anew(graph_module).run(*given))
    return outputs


class RealConstantsAllowed:
    """Lets fake modes meet real tensors until the end of a block, as inductor does where it freezes."""

    def __init__(self) -> None:
        self._modes: list[tuple[FakeTensorMode, bool]] = []

    def allow(self, value: object) -> None:
        """Admits real constants to the fake mode of a value."""
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            self._modes.append((mode, mode.allow_non_fake_inputs))
            mode.allow_non_fake_inputs = True

    def __enter__(self) -> RealConstantsAllowed:
        return self

    def __exit__(self, *_: object) -> None:
        while self._modes:
            mode, before = self._modes.pop()
            mode.allow_non_fake_inputs = before
