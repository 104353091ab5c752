"""What a step reaches beside its arguments, as it was at one moment.

Owns the comparison of two such moments, and the return to an earlier one while the reverse
sweep runs.  `longtape.reach` finds the places.

Bindings (closure cells, globals, attributes, entries of dicts) and the items of lists, dicts
and sets can be put back.  The contents of arrays cannot: they are compared, and a change is
refused.

Threads: bindings are put back for the whole process.  Another thread that runs the same code
while a reverse sweep runs sees what the forward sweep saw.
"""

from __future__ import annotations

import contextlib
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_64_intdigest

from longtape.errors import UsageError
from longtape.reach import Place, places, text_of

WHOLE_NBYTES = 1 << 20
"""Arrays up to this size are compared whole, larger ones by so many bytes in evenly spaced pieces."""

PIECE_NBYTES = 4096

_ABSENT = object()
_CONTAINERS = (list, dict, set, deque, bytearray)


class Surroundings:
    """The places that the roots reach, and what is there now."""

    def __init__(self, roots: Iterable[Any]) -> None:
        self._roots = tuple(roots)
        found = list(places(*self._roots))
        self._bound = {(id(place.owner), place.key): place for place in found if place.owner is not None}
        self._owners = {id(place.owner) for place in found} | {id(place.value) for place in found}
        self._owners |= {id(vars(place.value)) for place in found if hasattr(place.value, "__dict__")}
        self._contents = {
            id(place.value): (place, _items(place.value)) for place in found if isinstance(place.value, _CONTAINERS)
        }
        self.tensors = {id(place.value): place for place in found if isinstance(place.value, torch.Tensor)}
        """By identity, whatever holds them."""
        self._arrays = [
            (place, digest(place.value), _address(place.value))
            for place in found
            if isinstance(place.value, np.ndarray)
        ]
        self._versions = {identity: _version(place.value) for identity, place in self.tensors.items()}
        self._generators = {
            **_global_generators(),
            **{p.path: s for p in found if (s := _generator_state(p.value)) is not None},
        }

    def keys(self) -> set[tuple[int, Any]]:
        """Which bindings and containers these are."""
        return {*self._bound, *((identity, None) for identity in self._contents)}

    def path_of(self, tensor: torch.Tensor) -> str | None:
        """Where a tensor, or memory that it shares, is held."""
        if (place := self.tensors.get(id(tensor))) is not None:
            return place.path
        address = _address(tensor)
        known = [*((p, _address(p.value)) for p in self.tensors.values()), *((p, a) for p, _, a in self._arrays)]
        return next((place.path for place, at in known if at is not None and at == address), None)

    def bindings_of(self, tensor: torch.Tensor) -> list[Place]:
        """The bindings that hold this very tensor."""
        return [place for place in self._bound.values() if place.value is tensor]

    # Comparing -----------------------------------------------------------------------------------

    def differences(
        self, later: Surroundings, *, tensors: bool = False, besides: Callable[[], set[tuple[int, Any]]] = set
    ) -> list[str]:
        """What is another plain value, holds other items or other numbers, in words.

        Args:
            later: The same roots, later.
            tensors: Whether a place that holds another tensor, with other contents, counts.
            besides: Bindings and containers that do not count; asked where there is a difference.
        """
        found: dict[Any, str] = {}
        for key, place in later._bound.items():
            before, value = self._bound.get(key), place.value
            if place.kind == "plain" and not isinstance(value, _CONTAINERS):
                if before is not None and text_of(before.value) != text_of(value):
                    found[key] = f"{place.path} from {_short(before.value)} to {_short(value)}"
                elif before is None and id(place.owner) in self._owners:
                    found[key] = f"{place.path}, which was not there before"
            elif not tensors or not isinstance(value, torch.Tensor) or id(value) in self.tensors:
                continue
            elif before is None or digest(before.value) != digest(value):
                found[key] = f"the tensor {place.path}"
        for identity, (place, items) in later._contents.items():
            if identity in self._contents and (what := _difference(self._contents[identity][1], items)):
                found[identity, None] = f"{place.path}, {what}"
        numbers = {id(place.value): (place, before) for place, before, _ in self._arrays}
        for place, now, _ in later._arrays:
            if id(place.value) in numbers and numbers[id(place.value)][1] != now:
                found[id(place.value), "numbers"] = f"the numbers in {place.path}"
        for path, state in later._generators.items():
            if self._generators.get(path, state) != state:
                found[path] = f"the state of {path}"
        harmless = besides() if found else ()
        return [what for key, what in found.items() if key not in harmless]

    def written(self) -> list[str]:
        """Tensors that were changed in place since."""
        return [p.path for identity, p in self.tensors.items() if _version(p.value) != self._versions[identity]]

    def check_arrays(self) -> None:
        """Refuse NumPy arrays that hold other numbers than before.

        Raises:
            UsageError: Names the array.
        """
        for place, before, _ in self._arrays:
            if digest(place.value) != before:
                raise changed_between(place.path)

    def differentiable_since(self, earlier: Surroundings) -> list[Place]:
        """Tensors with a graph that are held now and were not."""
        return [
            place
            for identity, place in self.tensors.items()
            if identity not in earlier.tensors and place.value.grad_fn is not None
        ]

    # Going back ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Bind what was bound then, and afterwards what is bound now.

        Raises:
            UsageError: A binding cannot be put back; names it.
        """
        later = Surroundings(self._roots)._bound
        added = [p for key, p in later.items() if key not in self._bound and id(p.owner) in self._owners]
        now = [(place, _now(place)) for place in [*self._bound.values(), *added]]
        held = [(place.value, _items(place.value)) for place, _ in self._contents.values()]
        try:
            self.put_back()
            for place in added:
                _bind(place, _ABSENT)
            yield
        finally:
            for place, value in now:
                _bind(place, value)
            for container, items in held:
                _fill(container, items)

    def put_back(self) -> None:
        """Bind what was bound then."""
        for place in self._bound.values():
            _bind(place, place.value)
        for place, items in self._contents.values():
            _fill(place.value, items)


@dataclass(frozen=True, slots=True)
class _Stamp:
    name: str
    tensor: torch.Tensor
    version: int
    address: int | None
    digest: int | None


class ReadTensors:
    """The tensors that the steps read in the forward sweep, which are to be the same in the reverse sweep.

    Args:
        named: Each with its name.
    """

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._stamps = [_Stamp(name, t, _version(t), _address(t), digest(t)) for name, t in named]

    def check(self) -> None:
        """Refuse tensors that were changed, by ``.data`` too, which autograd does not see.

        Raises:
            UsageError: Names the tensor.
        """
        for stamp in self._stamps:
            tensor = stamp.tensor
            if _version(tensor) != stamp.version or digest(tensor) != stamp.digest:
                raise changed_between(stamp.name)


def changed_between(name: str) -> UsageError:
    """Of a tensor or an array whose contents are not what the forward sweep read."""
    return UsageError(
        f"{name}, which the steps read, was changed in place between the forward sweep and backward; the gradient "
        "would be wrong. Change it after backward, or bind a new tensor instead of writing to this one"
    )


def digest(array: Any) -> int | None:
    """A hash of the contents; of large arrays a sample.  None where they cannot be read as bytes."""
    try:
        if isinstance(array, torch.Tensor):
            if array.layout is not torch.strided or array.is_meta:
                return None
            flat = array.detach().resolve_conj().resolve_neg().reshape(-1)
            data = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
        elif not isinstance(array, np.ndarray) or array.dtype.hasobject:
            return None
        else:
            data = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        if data.numel() > WHOLE_NBYTES:
            pieces = WHOLE_NBYTES // PIECE_NBYTES
            spacing = data.numel() // pieces
            data = torch.cat([data[: pieces * spacing].view(pieces, spacing)[:, :PIECE_NBYTES].reshape(-1), data[-1:]])
        return xxh3_64_intdigest(data.cpu().numpy().data)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # tensors of other kinds
        return None


def _address(array: Any) -> int | None:
    try:
        found = array.data_ptr() if isinstance(array, torch.Tensor) else array.__array_interface__["data"][0]
    except (RuntimeError, NotImplementedError):
        return None
    return found or None


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _now(place: Place) -> Any:
    try:
        return place.read()
    except LookupError:
        return _ABSENT


def _bind(place: Place, value: Any) -> None:
    if _now(place) is value:
        return
    try:
        if value is not _ABSENT:
            place.write(value)
        elif isinstance(place.owner, dict):
            del place.owner[place.key]
        elif isinstance(place.owner, types.CellType):
            del place.owner.cell_contents
        else:
            delattr(place.owner, place.key)
    except Exception as error:
        raise UsageError(
            f"{place.path}, which the step reaches, was changed between the forward sweep and backward, and cannot be "
            f"set back for the reverse sweep ({error}); change it after backward"
        ) from error


def _items(container: Any) -> Any:
    kind = next(kind for kind in (dict, set, list) if isinstance(container, kind) or kind is list)
    return kind(container)


def _fill(container: Any, items: Any) -> None:
    """Give a container these items again."""
    if _same_items(container, items):
        return
    container.clear()
    (container.extend if isinstance(container, (list, deque, bytearray)) else container.update)(items)


def _same_items(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(key in b and value is b[key] for key, value in a.items())
    if isinstance(a, set):
        return bool(a == b)
    return all(x is y for x, y in zip(a, b, strict=True))


def _difference(before: Any, now: Any) -> str | None:
    """How the items of a container differ in number or in plain values."""
    if len(before) != len(now):
        return f"from {len(before)} to {len(now)} items"
    if _same_items(before, now):
        return None
    if isinstance(now, dict):
        pairs = [(f"[{key!r}]", before.get(key, _ABSENT), value) for key, value in now.items()]
    elif isinstance(now, set):
        pairs = [(" as a whole", before, now)]
    else:
        pairs = [(f"[{k}]", a, b) for k, (a, b) in enumerate(zip(before, now, strict=True))]
    for where, a, b in pairs:
        plain = isinstance(b, (bool, int, float, complex, str, bytes, set, type(None), np.generic))
        if a is _ABSENT or (plain and text_of(a) != text_of(b)):
            return f"at {where} from {_short(a)} to {_short(b)}"
    return None


def _short(value: Any) -> str:
    text = "nothing" if value is _ABSENT else text_of(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _global_generators() -> dict[str, int]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "NumPy's global random generator": hash((name, np.asarray(keys).tobytes(), *rest)),
        "Python's global random generator": hash(random.getstate()),
    }


def _generator_state(value: Any) -> int | None:
    if isinstance(value, np.random.Generator):
        return hash(repr(value.bit_generator.state))
    if isinstance(value, np.random.RandomState):
        return hash(repr(value.get_state(legacy=False)))
    if isinstance(value, random.Random):
        return hash(value.getstate())
    return None
