"""A kit to unit-test passes: how often a rule fires, and that eager's answers are kept.

with fxpasses.testing.expect(efficient_conv_bn_eval=3):
    compiled(x)

fxpasses.testing.assert_rewrites(model, (x,), {"efficient_conv_bn_eval": 3})
"""

from __future__ import annotations

from fxpasses.testing.comparison import assert_close_to_eager as assert_close_to_eager
from fxpasses.testing.comparison import assert_rewrites as assert_rewrites
from fxpasses.testing.expectation import expect as expect
from fxpasses.testing.expectation import registered as registered
from fxpasses.testing.functions import TensorSpec as TensorSpec
from fxpasses.testing.functions import assert_same_function as assert_same_function

__all__ = [
    "TensorSpec",
    "assert_close_to_eager",
    "assert_rewrites",
    "assert_same_function",
    "expect",
    "registered",
]
