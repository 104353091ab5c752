"""What tells one run from another: hashes of bytes and of code.

No security: a fast checksum against mistakes, not against forgery.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xxhash import xxh3_128

from longtape.protocols import Bytes
from longtape.reach import add_code

MOST_NBYTES = 40_000
"""Of what a step reaches, in a record whose text is bounded."""

MOST_LEAVES = 100
MOST_NAMED = 5
_PARTS = re.compile(r".[^.\[→]*")


def of_bytes(arrays: Iterable[Bytes]) -> str:
    """Of arrays of bytes, their number and lengths included."""
    digest = xxh3_128()
    for array in arrays:
        digest.update(array.nbytes.to_bytes(8, "little"))
        digest.update(array.data)
    return digest.hexdigest()


def of_leaves(leaves: Sequence[tuple[str, Bytes]]) -> dict[str, str]:
    """Of each leaf of a state by its name; of all together where they are many."""
    if len(leaves) > MOST_LEAVES:
        return {"its leaves": of_bytes([data for _, data in leaves])}
    return {name: of_bytes([data]) for name, data in leaves}


def of_code(*functions: Any) -> str:
    """Of what functions do, as far as Python can tell: their code, not what they close over."""
    digest = xxh3_128()
    for function in functions:
        function = getattr(function, "__func__", function)
        add_code(digest, getattr(function, "__code__", None))
    return digest.hexdigest()


def bounded(reached: dict[str, str]) -> dict[str, str]:
    """The same fingerprints, those of many parts of one object together, so that a record of a journal holds them."""
    for depth in (4, 3, 2, 1):
        if sum(len(name) + len(text) + 6 for name, text in reached.items()) <= MOST_NBYTES:
            break
        groups: dict[str, Any] = {}
        for name, text in reached.items():
            start = "".join(_PARTS.findall(name)[:depth])
            groups.setdefault(start, xxh3_128()).update(f"{name} {text} ".encode())
        reached = {name: digest.hexdigest()[:12] for name, digest in groups.items()}
    else:
        texts = xxh3_128(repr(sorted(reached.items())).encode())
        reached = {"set of values that the steps reach": texts.hexdigest()[:12]}
    return reached


def differences(theirs: Mapping[str, str], ours: Mapping[str, str], *, but: Iterable[str] = ()) -> str:
    """What differs, for people; nothing where nothing does."""
    left_out = set(but)
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name) and name not in left_out]
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
