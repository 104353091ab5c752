"""The second line of defence of a resumed run: some steps that were run before are run again.

Owns the choice of the steps and the comparison.  A fingerprint covers what it can see; steps
that end in another state than they did show that something else has changed.

On the executor's thread, before the sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from longtape.actions import Key
from longtape.durable.fingerprints import of_leaves
from longtape.errors import ResumeError
from longtape.protocols import Durable, Job, Slot

MOST_TRIES = 3
"""Intervals that are tried where stored states turn out to be damaged."""


@dataclass(frozen=True, slots=True)
class Again:
    """What it takes to run steps again."""

    job: Job
    source: Durable
    slots: tuple[Slot, Slot]
    """Room for state 0, and for a stored state."""
    read: Callable[[Key, Slot], bool]
    """Fills a slot with a stored state; False where it is lost."""

    def between(self, start: int, stop: int, stored: Mapping[int, Key]) -> list[str] | None:
        """The leaves that come out otherwise in state `stop`; None where a stored state is lost."""
        room = self.slots[1]
        if start:
            if not self.read(stored[start], room):
                return None
            self.job.load(room)
        found = self._run(start, stop)
        if not self.read(stored[stop], room):
            return None
        self.job.load(room)
        return _differing(found, of_leaves(self.source.state()))

    def from_initial(self, witness: Mapping[str, Any]) -> list[str]:
        """The same for the first steps, of whose end only a hash is known."""
        return _differing(self._run(0, witness["state"]), witness["leaves"])

    def _run(self, start: int, stop: int) -> dict[str, str]:
        try:
            self.source.run_again(start, stop)
        except Exception as error:
            error.add_note(f"longtape: while steps {start} to {stop - 1} of the run that is resumed were run again")
            raise
        return of_leaves(self.source.state())


def prove(again: Again, stored: Mapping[int, Key], witness: Mapping[str, Any] | None, *, most: float) -> str | None:
    """Run the steps between two neighbouring stored states again, the nearest there are.

    Args:
        again: The run; its working state is state 0, before and after.
        stored: The states that are stored, by number.
        witness: The first state the run came to, as hashes.
        most: Run no more steps than this while the witness will do.

    Returns:
        What was done, for the report; None where no state was left to hold the steps against.

    Raises:
        ResumeError: They end in another state.
        StorageError: Storage does not answer.
    """
    intervals = sorted(pairwise(sorted({0, *stored})), key=lambda pair: pair[1] - pair[0])
    if witness is not None:
        intervals = [pair for pair in intervals if pair[1] - pair[0] <= max(most, witness["state"])]
    kept = again.job.save(again.slots[0])
    for start, stop in intervals[:MOST_TRIES]:
        differ = again.between(start, stop, stored)
        again.source.put_initial(kept)
        if differ is not None:
            return _told(start, stop, differ)
    if witness is None:
        return None
    differ = again.from_initial(witness)
    again.source.put_initial(kept)
    return _told(0, witness["state"], differ)


def _differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


def _told(start: int, stop: int, differ: list[str]) -> str:
    if differ:
        raise ResumeError(
            f"the run that is to be resumed did something else: steps {start:,} to {stop - 1:,}, run again from the "
            f"same state, end with another {', '.join(differ[:5])}. Something that the steps depend on has changed, or "
            "the machine, its number of threads or a library rounds otherwise; go on with what the run was begun with, "
            "or give this one another name"
        )
    return f"steps {start:,} to {stop - 1:,} were run again to see that the run is the same"
