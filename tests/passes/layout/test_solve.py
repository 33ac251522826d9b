"""The minimum cut against brute force over all labellings, on seeded random problems."""

from __future__ import annotations

import itertools
import random

import pytest

from fxpasses.graph.layouts import C, L
from fxpasses.passes.layout.problem import FIXED_C, FIXED_L, Problem, Value
from fxpasses.passes.layout.solve import contract, solve


def random_problem(seed: int) -> Problem:
    """Up to 7 variables; integral costs in milliseconds, so that sums are compared exactly."""
    draw = random.Random(seed)
    free = draw.randint(1, 5)
    problem = Problem()
    for _ in range(free):
        is_free = draw.random() < 0.5
        problem.contiguous.append(0.0 if is_free else draw.randint(0, 20) * 1e-3)
        problem.channels_last.append(0.0 if is_free else draw.randint(0, 20) * 1e-3)
    for _ in range(draw.randint(1, 2 * free)):
        producer = draw.randrange(problem.size)
        others = [variable for variable in range(problem.size) if variable != producer]
        users = tuple(sorted(draw.sample(others, draw.randint(1, min(4, len(others))))))
        problem.values.append(Value(producer, users, draw.randint(0, 9) * 1e-3, draw.randint(0, 9) * 1e-3))
    return problem


def with_chains(problem: Problem, seed: int) -> Problem:
    """The problem with elementwise operators put in the way of some of its values."""
    draw = random.Random(seed)
    for index, value in enumerate(list(problem.values[:3])):
        middle = problem.size
        problem.contiguous.append(0.0)
        problem.channels_last.append(0.0)
        problem.values[index] = Value(value.producer, (middle,), value.to_contiguous, value.to_channels_last)
        # Half of the operators keep the size of what they read; the others make something of another.
        keeps = draw.random() < 0.5
        costs = [draw.randint(0, 9) * 1e-3 for _ in range(2)]
        after = (value.to_contiguous, value.to_channels_last) if keeps else costs
        problem.values.append(Value(middle, value.users, *after))
    return problem


def brute_force(problem: Problem) -> float:
    """The least energy over all labellings, from the definition and without the code under test."""
    best = float("inf")
    for rest in itertools.product((C, L), repeat=problem.size - 2):
        labels = (C, L, *rest)
        energy = 0.0
        for i, label in enumerate(labels):
            energy += problem.contiguous[i] if label == C else problem.channels_last[i]
        for value in problem.values:
            wanted = {labels[user] for user in value.users}
            if labels[value.producer] == C and L in wanted:
                energy += value.to_channels_last
            if labels[value.producer] == L and C in wanted:
                energy += value.to_contiguous
        best = min(best, energy)
    return best


def test_the_cut_costs_what_brute_force_finds_on_a_thousand_random_problems():
    for seed in range(1000):
        problem = random_problem(seed)
        if seed % 2:
            problem = with_chains(problem, seed)
        labels = solve(problem)
        assert (labels[FIXED_C], labels[FIXED_L]) == (C, L)
        assert problem.energy(labels) == pytest.approx(brute_force(problem), abs=1e-9), f"seed {seed}"


def test_the_cut_is_never_worse_than_a_uniform_labelling():
    for seed in range(1000, 1200):
        problem = random_problem(seed)
        energy = problem.energy(solve(problem))
        for label in (C, L):
            assert energy <= problem.energy(problem.uniform(label)) + 1e-12


def test_contraction_loses_no_optimum():
    shrunk = 0
    for seed in range(300):
        problem = with_chains(random_problem(seed), seed)
        merged, representative = contract(problem)
        shrunk += len(set(representative)) < problem.size
        assert brute_force(merged) == pytest.approx(brute_force(problem), abs=1e-9), f"seed {seed}"
    assert shrunk > 100


def test_a_copy_that_three_users_share_is_paid_once():
    # One producer under C by force; three users gain 4 ms each under L; a copy costs 10 ms.
    problem = Problem()
    for _ in range(3):
        problem.contiguous.append(4e-3)
        problem.channels_last.append(0.0)
    problem.values.append(Value(FIXED_C, (2, 3, 4), 10e-3, 10e-3))
    labels = solve(problem)
    assert labels[2:] == [L, L, L]
    assert problem.energy(labels) == pytest.approx(10e-3)


def test_a_change_that_gains_nothing_is_not_made():
    problem = Problem([0.0, 0.0, 5e-3], [0.0, 0.0, 0.0], [Value(FIXED_C, (2,), 5e-3, 5e-3)])
    assert solve(problem)[2] == C


def test_a_problem_without_values_takes_the_cheaper_label_of_each_variable():
    problem = Problem([0.0, 0.0, 1e-3, 2e-3], [0.0, 0.0, 2e-3, 1e-3], [])
    assert solve(problem)[2:] == [C, L]
