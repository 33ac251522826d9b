"""Cache keys: a rule's key changes with whatever may change what it does, and with nothing else."""

from __future__ import annotations

import functools
import operator
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fxpasses.options import Options
from fxpasses.passes.folding.conv_bn import EfficientConvBnEval
from fxpasses.pipeline import register_all
from fxpasses.rewrite.declarative_rule import DeclarativeRule
from fxpasses.rewrite.identity import fingerprint
from fxpasses.rewrite.registry import RulePass, pipeline_key
from fxpasses.testing import registered

ONE = torch.randn(2, 3)

RULE = """
import fxpasses
LIMIT = 3
def helper(match):
    '''Says whether.'''
    return match.result is not None
class Tested(fxpasses.Rule):
    name = "tested"
    is_anchor = None
    def match(self, node, context):
        # a comment
        return None
    def legality(self, match):
        return None if helper(match) and LIMIT > 2 else False
    def insertion_point(self, match): ...
    def rewrite(self, match, build): ...
"""


def defined(source):
    names = {"__name__": "tested_module"}
    exec(compile(textwrap.dedent(source), "tested_module.py", "exec"), names)
    return names["Tested"]()


def test_the_same_source_has_the_same_key_wherever_it_stands():
    assert defined(RULE).uuid() == defined(RULE).uuid()
    assert defined(RULE).uuid() == defined("\n\n" + RULE.replace("# a comment", "# another")).uuid()
    assert defined(RULE).uuid() == defined(RULE.replace("Says whether.", "Tells.")).uuid()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return None\n    def legality", "return 1\n    def legality"),
        ("match.result is not None", "match.result is None"),
        ("LIMIT = 3", "LIMIT = 4"),
        ("LIMIT > 2", "LIMIT > 1"),
        ('name = "tested"', 'name = "other"'),
    ],
)
def test_a_change_of_the_source_changes_the_key(old, new):
    assert old in RULE
    assert defined(RULE).uuid() != defined(RULE.replace(old, new)).uuid()


def test_a_closure_s_value_is_part_of_the_key():
    def made(factor):
        return DeclarativeRule("tested", lambda x: x * 2 * 3, lambda x: x * factor, (ONE,))

    assert made(6).uuid() == made(6).uuid()
    assert made(6).uuid() != made(7).uuid()


@dataclass
class Threshold(EfficientConvBnEval):
    least: int = 1


def test_a_field_is_part_of_the_key():
    assert Threshold(1).uuid() == Threshold(1).uuid()
    assert Threshold(1).uuid() != Threshold(2).uuid()


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


@pytest.mark.parametrize(
    ("first", "same", "other"),
    [
        (np.arange(3), np.arange(3), np.arange(4)),
        (re.compile("a"), re.compile("a"), re.compile("b")),
        (Slotted(1), Slotted(1), Slotted(2)),
        (deque([1]), deque([1]), deque([2])),
        (range(3), range(3), range(4)),
        (operator.itemgetter(1), operator.itemgetter(1), operator.itemgetter(2)),
        (Path("a"), Path("a"), Path("b")),
        (torch.ops.aten.add.Tensor, torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor),
        (torch.ops.aten.add, torch.ops.aten.add, torch.ops.aten.mul),
        (functools.cache(lambda: 1), functools.cache(lambda: 1), functools.cache(lambda: 2)),
    ],
)
def test_objects_of_other_types_are_known_by_what_they_hold(first, same, other):
    assert fingerprint(first) == fingerprint(same)
    assert fingerprint(first) != fingerprint(other)


def test_what_cannot_be_known_has_another_key_each_time():
    """So that nothing that was kept under one is found again."""
    lock = threading.Lock()
    endless = []
    for _ in range(100_000):
        endless = [endless]
    for given in (lock, endless):
        assert fingerprint(given) != fingerprint(given)


def test_an_example_is_part_of_the_key_and_a_cache_is_not():
    def made(example):
        return DeclarativeRule("tested", lambda x: x * 2 * 3, lambda x: x * 6, (example,))

    rule = made(ONE)
    before = rule.uuid()
    assert rule.is_anchor is not None  # traces the other levels
    assert rule.uuid() == before
    assert made(ONE.clone()).uuid() == before
    assert made(ONE + 1).uuid() != before


def test_options_and_rules_are_part_of_a_pipeline_s_key():
    register_all()
    plain = pipeline_key(Options())
    assert pipeline_key(Options()) == plain
    changes = [
        {"profit": "always"},
        {"limit": 3},
        {"verify": "structure"},
        {"inductor": {"fallback_random": True}},
    ]
    keys = [pipeline_key(Options(**change)) for change in changes]
    with registered(DeclarativeRule("tested", lambda x: x * 2 * 3, lambda x: x * 6, (ONE,))):
        keys.append(pipeline_key(Options()))
    assert len({plain, *keys}) == len(changes) + 2
    assert pipeline_key(Options()) == plain


def test_the_order_of_rules_in_a_pass_is_part_of_its_key():
    rules = [DeclarativeRule(name, lambda x: x * 2 * 3, lambda x: x * 6, (ONE,)) for name in "ab"]
    assert RulePass("p", tuple(rules)).uuid() != RulePass("p", tuple(reversed(rules))).uuid()


def test_a_key_is_the_same_in_another_process():
    script = (
        "from fxpasses.passes.folding.conv_bn import EfficientConvBnEval as R; "
        "from fxpasses.rewrite.identity import fingerprint as f; "
        "print(R().uuid(), f({'b': {1, 'x', None}, 'a': 2.5}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [EfficientConvBnEval().uuid(), fingerprint({"a": 2.5, "b": {None, 1, "x"}})]


def test_logs_and_the_structured_trace_have_the_remarks(tmp_path):
    script = (
        "import torch, fxpasses; from torch import nn\n"
        "model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()\n"
        "torch.compile(model, backend='fxpasses', options={'inner': 'eager'})(torch.randn(1, 3, 8, 8))\n"
    )

    environment = {**os.environ, "TORCH_LOGS": "+fxpasses", "TORCH_TRACE": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "matched 2 of 2 nodes; applied" in done.stderr
    traced = "".join(path.read_text() for path in tmp_path.iterdir())
    assert '"name": "fxpasses_report"' in traced
    assert '"rule": "efficient_conv_bn_eval"' in traced
