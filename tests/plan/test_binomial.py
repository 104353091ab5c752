"""The closed forms against brute force: nothing here shares a formula with what it tests."""

from functools import cache
from heapq import heappop, heappush
from math import comb, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtape.plan.binomial import advances, capacity, repetitions, split, splits

SLOTS = (1, 2, 3, 4, 5, 6, 8, 10, 16)
TABLE = {
    4: (6, 4, 3, 3, 3, 3, 3, 3, 3),
    5: (10, 6, 5, 4, 4, 4, 4, 4, 4),
    8: (28, 14, 11, 10, 9, 8, 7, 7, 7),
    10: (45, 20, 15, 14, 13, 12, 10, 9, 9),
    20: (190, 65, 45, 39, 33, 32, 30, 28, 22),
    50: (1225, 285, 180, 144, 122, 114, 95, 88, 82),
    100: (4950, 845, 490, 374, 316, 280, 245, 222, 182),
    1000: (499500, 28820, 12155, 7998, 6284, 5284, 4285, 3636, 2860),
}
"""Fewest advances for chains of so many steps, one column for each of SLOTS."""


@cache
def fewest(steps, slots):
    """Fewest advances by dynamic programming: store nothing more in this sweep, or store at the best position."""
    if steps == 1:
        return 0
    best = steps - 1 + fewest(steps - 1, slots)
    if slots >= 2:
        best = min(best, *(with_split(steps, slots, position) for position in range(1, steps)))
    return best


def with_split(steps, slots, position):
    return position + fewest(steps - position, slots - 1) + fewest(position, slots)


def fewest_of_all(steps, slots):
    """Fewest advances over every conceivable way: shortest path through (adjoint, working state, stored set)."""
    start = (steps - 1, 0, frozenset([0]))
    seen = {start: 0}
    queue = [(0, 0, start)]
    while queue:
        cost, _, (adjoint, work, stored) = heappop(queue)
        if adjoint < 0:
            return cost
        if cost > seen[adjoint, work, stored]:
            continue
        for price, state in moves(adjoint, work, stored, slots):
            if cost + price < seen.get(state, inf):
                seen[state] = cost + price
                heappush(queue, (cost + price, len(seen), state))
    raise AssertionError("unreachable")


def moves(adjoint, work, stored, slots):
    if work == adjoint:
        yield 0, (adjoint - 1, None, frozenset(step for step in stored if step < adjoint))
    elif work is not None:
        yield 1, (adjoint, work + 1, stored)
    if work is not None and work not in stored:
        for dropped in [*stored] if len(stored) == slots else [None]:
            yield 0, (adjoint, work, (stored - {dropped}) | {work})
    for step in stored:
        yield 0, (adjoint, step, stored)


@pytest.mark.parametrize("steps", TABLE)
def test_published_counts(steps):
    assert tuple(advances(steps, slots) for slots in SLOTS) == TABLE[steps]


@pytest.mark.parametrize("slots", range(1, 10))
def test_advances_equal_dynamic_programming(slots):
    for steps in range(1, 71):
        assert advances(steps, slots) == fewest(steps, slots)


@pytest.mark.parametrize("slots", range(1, 5))
def test_advances_equal_exhaustive_search(slots):
    for steps in range(1, 10):
        assert advances(steps, slots) == fewest_of_all(steps, slots)


@pytest.mark.parametrize("slots", range(2, 10))
def test_splits_are_all_optimal_positions(slots):
    for steps in range(2, 71):
        optimal = [m for m in range(1, steps) if with_split(steps, slots, m) == fewest(steps, slots)]
        lowest, highest = splits(steps, slots)
        assert optimal == list(range(lowest, highest + 1))
        assert split(steps, slots) == highest


def test_reach():
    for slots in range(1, 8):
        for repeats in range(7):
            longest = capacity(slots, repeats)
            assert longest == comb(slots + repeats, slots)
            assert repetitions(longest, slots) == repeats
            assert repetitions(longest + 1, slots) == repeats + 1
    assert capacity(-1, 2) == capacity(2, -1) == 0


def test_repetitions_are_the_slope_of_the_cost():
    for slots in range(1, 12):
        for steps in range(slots + 1, 300):
            assert advances(steps, slots) - advances(steps - 1, slots) == repetitions(steps, slots)


@given(st.integers(2, 10**9), st.integers(1, 10**6))
def test_long_chains_are_consistent(steps, slots):
    repeats = repetitions(steps, slots)
    assert repeats == 1 or capacity(slots, repeats - 1) < steps
    assert slots >= steps or capacity(slots, repeats) >= steps
    if slots >= 2:
        for position in splits(steps, slots):
            assert 1 <= position < steps
            parts = position + advances(steps - position, slots - 1) + advances(position, slots)
            assert parts == advances(steps, slots)


def test_more_slots_than_steps_need_no_large_binomials():
    assert advances(10**6, 10**12) == 10**6 - 1
    assert split(10**6, 10**12) == 1
    assert repetitions(10**6, 10**12) == 1
    assert advances(1, 5) == advances(0, 5) == repetitions(1, 5) == 0
