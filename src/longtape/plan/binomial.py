"""Revolve in closed form: how far a number of slots reaches, what it costs, where to split.

This file owns the binomial formulas; it knows no time, no storage and no actions.

Conventions.  A chain of l steps needs its states l-1, …, 0, in that order.  A
*slot* holds one of them; the slot of the first state counts.  The working state
does not.  An *advance* is a plain step; the step whose adjoint is taken is run again
inside the adjoint and is no advance, so the last step of a chain is never advanced.

Symbols of the literature: l is `steps`, s (or c) is `slots`, ρ (or r, t) is
`repeats`, β is `capacity`.

Source: Griewank and Walther, *Algorithm 799: revolve*, ACM TOMS 26 (2000);
Griewank, *Achieving logarithmic growth of temporal and spatial complexity in
reverse automatic differentiation*, Optim. Methods Softw. 1 (1992).
"""

from __future__ import annotations

from functools import lru_cache
from math import comb, exp, floor, isqrt, lgamma, log

_FEW = 8
"""Repetitions that are counted up to one by one."""


def capacity(slots: int, repeats: int) -> int:
    """Longest chain that `slots` slots reverse while no step is advanced more than `repeats` times.

    β(s, ρ) = C(s+ρ, s), and 0 where either is negative.  The result is exact, and as
    large as that implies: do not ask for more slots than a chain has steps.
    """
    if slots < 0 or repeats < 0:
        return 0
    return comb(slots + repeats, min(slots, repeats))


def repetitions(steps: int, slots: int) -> int:
    """Smallest ρ with β(s, ρ) ≥ l: the most often any one step has to be advanced.

    It is also the slope of the cost: `advances` (l, s) - `advances` (l-1, s) for 1 ≤ s < l.

    Args:
        steps: l ≥ 1.
        slots: s ≥ 1.
    """
    if steps <= slots + 1:
        return 0 if steps <= 1 else 1
    if slots == 1:
        return steps - 1
    if slots == 2:
        return _triangular_repetitions(steps)
    return _smallest_repetitions(steps, slots)


def _triangular_repetitions(steps: int) -> int:
    """Smallest ρ with (ρ+1)(ρ+2)/2 ≥ l, which is β(2, ρ) ≥ l."""
    repeats = (isqrt(8 * steps - 7) - 1) // 2
    while capacity(2, repeats) < steps:
        repeats += 1
    return repeats


def _smallest_repetitions(steps: int, slots: int) -> int:
    """Smallest ρ with β(s, ρ) ≥ l for 3 ≤ s < l-1, counted up from 1 or from a close lower bound.

    s!·β(s, ρ) = (ρ+1)…(ρ+s) ≤ (ρ + (s+1)/2)^s, as no geometric mean exceeds the
    arithmetic one; hence ρ ≥ (l·s!)^(1/s) - (s+1)/2.
    """
    repeats = 1
    if capacity(slots, _FEW) < steps:
        root = exp((log(steps) + lgamma(slots + 1)) / slots)
        repeats = max(_FEW, floor(root - (slots + 1) / 2) - 1)
    reach = capacity(slots, repeats)
    while reach < steps:
        repeats += 1
        reach = reach * (slots + repeats) // repeats
    return repeats


@lru_cache(maxsize=4096)
def advances(steps: int, slots: int) -> int:
    """Fewest plain steps that reverse a chain, those of its first sweep included.

    t(l, s) = ρ·l - β(s+1, ρ-1) with ρ = `repetitions` (l, s); l(l-1)/2 with one slot;
    l-1 as soon as s ≥ l-1.  The time is t(l, s)·t_f + l·t_b.  A caller who needs the
    final state before the adjoint begins runs one step more.

    Args:
        steps: l; chains of one step or none cost nothing.
        slots: s ≥ 1.
    """
    if steps <= 1:
        return 0
    if slots >= steps - 1:
        return steps - 1
    if slots == 1:
        return steps * (steps - 1) // 2
    repeats = repetitions(steps, slots)
    return repeats * steps - capacity(slots + 1, repeats - 1)


def stores(steps: int, slots: int) -> float:
    """States kept on the way, that of the first step included; no state is kept twice.

    β(s-1, ρ) for a chain of β(s, ρ) steps, and linear in between, which is exact to a few
    in a hundred; the shortest chains keep one more or less.

    Args:
        steps: l ≥ 1.
        slots: s ≥ 1.
    """
    if steps <= 2 or slots == 1:
        return 1.0
    slots = min(slots, steps - 1)
    repeats = repetitions(steps, slots)
    below, above = capacity(slots, repeats - 1), capacity(slots, repeats)
    fewest, most = capacity(slots - 1, repeats - 1), capacity(slots - 1, repeats)
    return fewest + (most - fewest) * ((steps - below) / (above - below))


def splits(steps: int, slots: int) -> tuple[int, int]:
    """The lowest and the highest optimal position of the first further snapshot; all between are optimal.

    max(1, β(s, ρ-2), l-β(s-1, ρ)) ≤ m ≤ min(l-1, β(s, ρ-1), l-β(s-1, ρ-1)).  The part
    below m is then reversed with `slots` slots, the part above it, first, with one less.

    Args:
        steps: l ≥ 2.
        slots: s ≥ 2.
    """
    if slots >= steps - 1:
        return 1, 1
    repeats = repetitions(steps, slots)
    lowest = max(1, capacity(slots, repeats - 2), steps - capacity(slots - 1, repeats))
    highest = min(steps - 1, capacity(slots, repeats - 1), steps - capacity(slots - 1, repeats - 1))
    return lowest, highest


@lru_cache(maxsize=4096)
def split(steps: int, slots: int) -> int:
    """The highest optimal position of the first further snapshot, which makes for the fewest snapshots.

    Args:
        steps: l ≥ 2.
        slots: s ≥ 2.
    """
    return splits(steps, slots)[1]
