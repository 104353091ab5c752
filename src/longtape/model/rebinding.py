"""Finds a step that rebinds an attribute of the model instead of updating the array behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from longtape.errors import StepError
from longtape.model.protocol import Array, bytes_of, listed
from longtape.witness import hashes_of

_LISTS = ("state", "outputs", "sums")
_DEPTH = 2
"""Attributes, and what their attributes and items are: ``model.fields.u``, ``model.levels[0]``."""


class Rebinding:
    """Looks at a model before its first step, and again after it.

    A step that says ``self.u = self.u + ...`` leaves the array that `state` lists as it was; a sweep would then
    keep and restore an array that no step reads.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._before = {name: listed(model, name) for name in _LISTS}
        self._hashes = {name: hashes_of(map_bytes(arrays)) for name, arrays in self._before.items()}
        self._named = dict(_named(model, "model", _DEPTH))

    def check(self) -> bool:
        """After the step: whether any byte of the state has changed.

        Raises:
            StepError: An attribute that was one of the listed arrays is another array now.
        """
        after = {name: listed(self._model, name) for name in _LISTS}
        now = dict(_named(self._model, "model", _DEPTH))
        current = [array for arrays in after.values() for array in arrays]
        for name in _LISTS:
            hashes = hashes_of(map_bytes(after[name]))
            for index, (old, new) in enumerate(zip(self._before[name], after[name], strict=False)):
                if old is new and self._hashes[name][index] == hashes[index]:
                    self._look_for(old, f"model.{name}[{index}]", now, current)
        return self._hashes["state"] != hashes_of(map_bytes(after["state"]))

    def check_untouched(self) -> None:
        """After a step that runs out of place, from the model's own arrays.

        Raises:
            StepError: It has changed them.
        """
        if self._hashes["state"] != hashes_of(map_bytes(listed(self._model, "state"))):
            raise StepError("advance_into changed the arrays of its source at step 0; it must only write to its target")

    def _look_for(self, array: Array, listing: str, now: dict[str, Array], current: list[Array]) -> None:
        """Nothing was written to this array: is a place where it was found another array now?"""
        for path, before in self._named.items():
            found = now.get(path)
            if found is None or found is before or not np.may_share_memory(before, array):
                continue
            if not any(np.may_share_memory(found, other) for other in current):
                raise StepError(
                    f"the first step made {path} another array, but {listing} still lists the old one, which no step "
                    f"changes: the gradient would be wrong. Update it in place, as in {path}[...] = ..., or make "
                    f"{listing.split('[')[0]} a property that lists the current arrays"
                )


def map_bytes(arrays: list[Array]) -> list[Any]:
    """The bytes of each."""
    return [bytes_of(array) for array in arrays]


def _named(owner: Any, path: str, depth: int) -> Iterator[tuple[str, Array]]:
    """Arrays that the attributes and items of an object are, by where they are found."""
    if isinstance(owner, dict):
        inner = [(f"{path}[{key!r}]", value) for key, value in owner.items()]
    elif isinstance(owner, (list, tuple)):
        inner = [(f"{path}[{index}]", value) for index, value in enumerate(owner[:100])]
    else:
        inner = [(f"{path}.{name}", value) for name, value in getattr(owner, "__dict__", {}).items()]
    for name, value in inner:
        if isinstance(value, np.ndarray | np.number | float):  # an array of no dimension may become a number
            yield name, np.asarray(value)
        elif depth > 1:
            yield from _named(value, name, depth - 1)
