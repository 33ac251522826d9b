"""The pytest plugin: fixtures for tests of passes. It imports torch only when a fixture is used.

def test_my_rule(fxpasses_fresh): ...          counters at zero, nothing compiled before
def test_my_rule(fxpasses_expect):
    with fxpasses_expect(my_rule=2): ...       the block applies the rule exactly twice
def test_my_rule(fxpasses_registered):
    fxpasses_registered(my_rule)               until the end of the test
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fxpasses.rewrite.registry import AnyRule, RulePass


@pytest.fixture
def fxpasses_fresh() -> Iterator[None]:
    """Counters at zero, and nothing compiled before or left behind."""
    from fxpasses import reset
    from fxpasses.torch_internals.dynamo import reset_dynamo

    reset_dynamo()
    reset()
    yield
    reset_dynamo()
    reset()


@pytest.fixture
def fxpasses_expect(fxpasses_fresh: None) -> Callable[..., AbstractContextManager[None]]:
    """`fxpasses.testing.expect`, in a fresh state."""
    from fxpasses.testing import expect

    return expect


@pytest.fixture
def fxpasses_registered() -> Iterator[Callable[[AnyRule | RulePass], None]]:
    """A function that registers a rule or pass until the end of the test."""
    from fxpasses.rewrite.registry import REGISTRY

    names: list[str] = []

    def register(given: AnyRule | RulePass) -> None:
        REGISTRY.register(given)
        names.append(given.name)

    yield register
    for name in names:
        REGISTRY.unregister(name)
