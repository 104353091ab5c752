"""Compares states that are computed again with what they were the first time.

Owns the hashes of the states seen: one of 64 bits (xxh3) for each leaf of each state, so
8 bytes a leaf and step, outside the memory budget.  Front ends show it states only
where the caller asked for it.  Knows no framework; entered on the executor's thread.

Invariant: the first time a state is seen it is believed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import xxhash

from longtape.errors import ReplayError
from longtape.protocols import Bytes

_UNSEEN = 0
"""In the place of a hash: of a state of which an earlier process knew, or state 0 where it is not asked for."""


def hashes_of(leaves: Sequence[Bytes]) -> list[int]:
    """A hash of each leaf; never 0."""
    return [xxhash.xxh3_64_intdigest(leaf.data) or 1 for leaf in leaves]


class Witness:
    """Remembers the states of one run.

    Args:
        name: What a leaf is called, given its position in a state.
    """

    def __init__(self, name: Callable[[int], str]) -> None:
        self._name = name
        self._hashes = array("Q")
        self._leaves = 0
        self.compared = 0
        """States that were seen again and were the same."""

    def see(self, state: int, leaves: Sequence[Bytes], *, kept: bool = False) -> None:
        """Note state `state`, or hold it against what it was.

        Args:
            state: Its number: the state before step `state`.
            leaves: The bytes of each of its leaves, contiguous.
            kept: Whether it comes from a snapshot and was not computed again.

        Raises:
            ReplayError: A leaf differs.
        """
        hashes = hashes_of(leaves)
        self._leaves = len(hashes)
        first = state * self._leaves
        if len(self._hashes) < first + self._leaves:
            self._hashes.extend([_UNSEEN] * (first + self._leaves - len(self._hashes)))
        if self._leaves and self._hashes[first] == _UNSEEN:
            self._hashes[first : first + self._leaves] = array("Q", hashes)
            return
        for leaf, (now, then) in enumerate(zip(hashes, self._hashes[first : first + self._leaves], strict=True)):
            if now != then:
                raise self._difference(state, leaf, kept)
        self.compared += 1

    def _difference(self, state: int, leaf: int, kept: bool) -> ReplayError:
        name = self._name(leaf)
        if kept:
            return ReplayError(
                f"the snapshot of state {state} is not what was kept: {name} has changed since. Storage brought other "
                "bytes back, or a step wrote to a state that it should only have read",
                step=state,
                leaf=name,
            )
        step = state - 1
        return ReplayError(
            f"step {step} does not do the same each time: run again from the same state, it gave another {name}. "
            "The gradient would be that of steps that were never run; make the step depend on its state, its inputs "
            "and the number of the step alone",
            step=step,
            leaf=name,
        )
