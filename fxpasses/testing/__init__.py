"""A kit to unit-test passes: how often a rule fires, and that eager's answers are kept.

with fxpasses.testing.expect(efficient_conv_bn_eval=3):
    compiled(x)

fxpasses.testing.assert_rewrites(model, (x,), {"efficient_conv_bn_eval": 3})
fxpasses.testing.assert_declines(model, (x,), "efficient_conv_bn_eval", code="multiple-users")
fxpasses.testing.fuzz(my_rule)                             # random models and near misses, at every level
fxpasses.testing.assert_op_counts(model, (x,), before={"batch_norm": 3}, after={"batch_norm": 0})
print(fxpasses.testing.matrix(my_rule, {"method": (model, (x,))}))

The pytest plugin (`fxpasses.pytest_plugin`) has fixtures.
"""

from __future__ import annotations

from fxpasses.comparison import assert_close_to_eager as assert_close_to_eager
from fxpasses.testing.bisecting import bisectable as bisectable
from fxpasses.testing.captures import LEVELS as LEVELS
from fxpasses.testing.captures import rewrite_at as rewrite_at
from fxpasses.testing.comparison import assert_declines as assert_declines
from fxpasses.testing.comparison import assert_rewrites as assert_rewrites
from fxpasses.testing.expectation import expect as expect
from fxpasses.testing.expectation import registered as registered
from fxpasses.testing.functions import TensorSpec as TensorSpec
from fxpasses.testing.functions import assert_same_function as assert_same_function
from fxpasses.testing.fuzzing import fuzz as fuzz
from fxpasses.testing.graphs import assert_graph as assert_graph
from fxpasses.testing.graphs import assert_op_counts as assert_op_counts
from fxpasses.testing.graphs import graph_text as graph_text
from fxpasses.testing.matrix import Matrix as Matrix
from fxpasses.testing.matrix import matrix as matrix
from fxpasses.testing.specimens import Specimen as Specimen
from fxpasses.testing.specimens import check_specimen as check_specimen

__all__ = [
    "LEVELS",
    "Matrix",
    "Specimen",
    "TensorSpec",
    "assert_close_to_eager",
    "assert_declines",
    "assert_graph",
    "assert_op_counts",
    "assert_rewrites",
    "assert_same_function",
    "bisectable",
    "check_specimen",
    "expect",
    "fuzz",
    "graph_text",
    "matrix",
    "registered",
    "rewrite_at",
]
