"""The plan on joint graphs of forward and backward: any labelling gives the values of the traced graph.

The joint graph is traced as AOTAutograd does it, decomposed, and run without a compiler.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fxpasses.passes.layout.assign import assign
from fxpasses.torch_internals.pytree import tree_leaves
from fxpasses.torch_internals.tracing import core_decompositions
from tests.passes.layout.test_graphs import (
    MODELS,
    Inplace,
    context_of,
    labelled_at_random,
    model_and_input,
)


def joint_graph(model: nn.Module, x: torch.Tensor) -> tuple[GraphModule, tuple[torch.Tensor, ...]]:
    """The graph that computes the outputs, and the gradients of their sum; and its inputs."""
    parameters = dict(model.named_parameters())

    def joint(x: torch.Tensor, *given: torch.Tensor) -> list[torch.Tensor]:
        outputs = tree_leaves(functional_call(model, dict(zip(parameters, given, strict=True)), (x,)))
        total = sum((output * output.detach().cos()).sum() for output in outputs)
        return [*outputs, *torch.autograd.grad(total, (x, *given))]

    inputs = tuple(leaf.detach().requires_grad_() for leaf in (x, *parameters.values()))
    return make_fx(joint, decomposition_table=core_decompositions())(*inputs), inputs


@pytest.mark.parametrize("training", [False, True], ids=["frozen_statistics", "training"])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind is not Inplace])
def test_any_labelling_of_a_joint_graph_gives_the_same_outputs_and_gradients(kind, training):
    model, x = model_and_input(kind)
    model.train(training)
    graph_module, inputs = joint_graph(model, x)
    with torch.no_grad():
        expected = graph_module(*inputs)
        for module in labelled_at_random(graph_module, inputs, "fused", 6):
            for ours, theirs in zip(module(*inputs), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
                kept = [d for d, size in enumerate(theirs.shape) if size != 1]
                assert [ours.stride(d) for d in kept] == [theirs.stride(d) for d in kept]


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind is not Inplace])
def test_the_plan_predicts_no_more_than_both_uniform_plans(kind):
    model, x = model_and_input(kind)
    graph_module, inputs = joint_graph(model.float().train(), x.float())
    plan = assign(context_of(graph_module, inputs, "fused")).plan
    assert plan.seconds <= plan.contiguous_seconds + 1e-12
    assert plan.seconds <= plan.channels_last_seconds + 1e-12
    assert plan.contiguous_seconds != plan.channels_last_seconds
