"""Storage that holds few states: where it takes one, so that memory and storage together work as Revolve.

A *piece* is the windows from a kept state to the next one.  The forward sweep stores where
Revolve would with the slots of memory and storage together, so that room runs out at the end and not
before; the reverse sweep stores again in the pieces it comes to, in the room that was given back.
Pieces of up to p windows are reversed from memory alone, which bounds how often storage is used.

Source: Stumm and Walther 2009 for Revolve on slots of two speeds; Aupy, Herrmann, Hovland and
Robert 2016 for pieces that are reversed from memory alone.
"""

from __future__ import annotations

from longtape.plan.binomial import split


def cut(length: int, slots: int, room: int, longest: int) -> int | None:
    """Where a piece is cut; None if it is reversed from memory alone.

    Args:
        length: Its windows.
        slots: Slots of memory that such pieces are reversed with.
        room: States that storage can still take, and one more, for the state at the last cut stays in memory.
        longest: p ≥ 1.
    """
    return None if length <= longest or room < 1 else split(length, slots + room)


def is_stored(rest: int, room: int, longest: int) -> bool:
    """Whether the state at a cut goes to storage; where the rest is reversed at once, memory does."""
    return rest > longest and room > 1
