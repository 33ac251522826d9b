"""A kit to unit-test passes: how often a rule fires, and that eager's answers are kept.

with fxpasses.testing.expect(efficient_conv_bn_eval=3):
    compiled(x)

fxpasses.testing.assert_rewrites(model, (x,), {"efficient_conv_bn_eval": 3})
"""

from __future__ import annotations

from fxpasses.testing.comparison import assert_close_to_eager as assert_close_to_eager
from fxpasses.testing.comparison import assert_rewrites as assert_rewrites
from fxpasses.testing.expectation import expect as expect

__all__ = ["assert_close_to_eager", "assert_rewrites", "expect"]
