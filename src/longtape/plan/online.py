"""Restart points kept in memory alone while the end of the sequence is not known.

Owns which of them is given up for a new one.  Whenever all slots are taken, the one goes
without which a reverse sweep that began now would take the fewest advances; that may be
the new one.  With restart points p_0 < … < p_{m-1}, the sequence ending at p_m, and s
slots, that sweep takes Σ t(p_{k+1} - p_k, s-k) advances, for the k-th interval from the
bottom is reversed while k slots below it are still in use.

This beats both alternatives in the literature and the obvious one, by simulation (see
``docs/theory.md``): checkpoints with levels (Wang, Moin and Iaccarino 2009), which have
the least possible repetition number, and keeping all gaps alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from longtape.plan.binomial import advances

MOST_WEIGHED = 64
"""Slots up to which every restart point is weighed; with more, gaps are kept alike, which then costs as little."""


def cheapest_drop(restarts: Sequence[int], slots: int) -> int:
    """The index of the restart point to do without.

    Args:
        restarts: Ascending; the first is never given up, the last is where the sweep now is,
            and the others hold a slot each.
        slots: s, the slot of the first one included.
    """
    last = len(restarts) - 1
    gaps = [restarts[k + 1] - restarts[k] for k in range(last)]
    # After the drop of k, the intervals above it have one slot more.
    above = [0] * (last + 1)
    for k in range(last - 1, 1, -1):
        above[k] = above[k + 1] + advances(gaps[k], max(1, slots - k + 1))
    below = best = 0
    fewest = None
    for k in range(1, last + 1):
        with_slots = max(1, slots - k + 1)
        merged = gaps[k - 1] + (gaps[k] if k < last else 0)
        total = below + advances(merged, with_slots) + (above[k + 1] if k < last else 0)
        if fewest is None or total < fewest:
            fewest, best = total, k
        below += advances(gaps[k - 1], with_slots)
    return best


def next_look(window: int, slots: int) -> int:
    """The window at which it is worth weighing again: seldom where the sequence is long already."""
    return window + max(1, window // (16 * slots))
