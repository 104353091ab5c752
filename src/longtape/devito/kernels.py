"""Compiled operators: what they access, and how they are run on other memory than their own.

Owns what has to be known of generated code.  Operators are called through ctypes, which
releases the GIL, so that storage works meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from devito.ir import Expression, FindNodes
from devito.symbolics import IntDiv, retrieve_indexed

from longtape.durable.fingerprints import of_bytes
from longtape.errors import UsageError
from longtape.protocols import Bytes

Array = npt.NDArray[Any]

ALIGNMENT = 64
"""Bytes; generated code takes its arrays to be so aligned."""


@dataclass(frozen=True, slots=True)
class Access:
    """What an operator does to a function: time levels relative to the loop's time."""

    reads: frozenset[int]
    writes: frozenset[int]


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a function an operator writes at which times: row ``time // every + shift``."""

    shift: int
    every: int = 1

    def at(self, first: int, last: int) -> slice:
        """Those written at times `first` to `last`."""
        return slice(max(0, first // self.every + self.shift), max(0, last // self.every + self.shift + 1))


class Kernel:
    """A compiled operator with all its arguments, run over ranges of time.

    `values` are arguments in order; another list of them runs it on other memory.
    """

    def __init__(self, operator: Any, arguments: Mapping[str, Any]) -> None:
        self.operator, self._given = operator, dict(arguments)
        self.name: str = operator.name
        dimensions = list({d.root for d in operator.dimensions if d.is_Time})
        if len(dimensions) != 1:
            raise UsageError(f"operator {self.name} must loop over one time dimension; it has {len(dimensions)}")
        self.time = dimensions[0]
        self._names = names = [parameter.name for parameter in operator.parameters]
        self._from, self._to = names.index(self.time.min_name), names.index(self.time.max_name)
        self.prepare()
        self.first, self.last = int(self.scalars[self.time.min_name]), int(self.scalars[self.time.max_name])
        self.expressions = _expressions(operator)
        self._check_loop()
        self._ranges = _time_ranges(operator, self.time)
        self._function = operator.cfunction

    def prepare(self) -> None:
        """Take the arguments as they are now: where arrays lie, and the values of scalars."""
        prepared = self.operator.arguments(**self._given)
        self.arrays = {
            name: np.asarray(value._obj.underlying_array)
            for name, value in prepared.items()
            if hasattr(getattr(value, "_obj", None), "underlying_array")
        }
        self.scalars = {name: prepared[name] for name in self._names if np.isscalar(prepared[name])}
        self.values = [prepared[name] for name in self._names]
        # Devito frees memory with the object that owns it, whatever views there are.
        functions = [*self.operator.parameters, *self._given.values()]
        functions += [getattr(f, name, None) for f in functions for name in getattr(f, "_sub_functions", ())]
        self._owners = [getattr(function, "_data", None) for function in functions]

    def changed(self) -> list[str]:
        """Names of arguments that are not what they were when prepared: other memory, or another number."""
        now = Kernel.__new__(Kernel)
        now.operator, now._given, now._names = self.operator, self._given, self._names
        now.prepare()
        moved = [n for n, a in self.arrays.items() if n not in now.arrays or a.ctypes.data != now.arrays[n].ctypes.data]
        return moved + [name for name, value in self.scalars.items() if now.scalars[name] != value]

    def _check_loop(self) -> None:
        outside = [e for e in self.expressions if _has_data(e.write) and not _is_in_time(e)]
        if outside:
            raise UsageError(
                f"operator {self.name} writes {outside[0].write.name} before or after its loop over {self.time.name}; "
                "it is run over a few times at a call, and would do so at every call. Move that equation to an "
                "operator of its own, applied before or after the sweep"
            )

    @property
    def code(self) -> str:
        """The generated source."""
        return str(self.operator.ccode)

    def with_arrays(self, arrays: Mapping[str, Array], values: list[Any] | None = None) -> list[Any]:
        """Arguments with some arrays replaced by others of the same shape and dtype, aligned to `ALIGNMENT`."""
        values = list(self.values if values is None else values)
        for name, array in arrays.items():
            place = self._names.index(name)
            old = values[place]._obj
            new = type(old).from_buffer_copy(old)
            new.data = array.ctypes.data
            new.underlying_array, new.owner_of_sizes = array, old  # both must outlive the structure
            values[place] = ctypes.byref(new)
        return values

    def copies(self, besides: Iterable[str] = ()) -> dict[str, Array]:
        """Other memory for what the operator writes; with the same content, unless it never looks at that.

        Memory that is not looked at is provided by the system only where it is written.
        """
        written, read = {function.name for function in self.written()} - set(besides), self.read()
        return {name: _aligned(array, copied=name in read) for name, array in self.arrays.items() if name in written}

    def run(self, first: int, last: int, values: list[Any]) -> None:
        """Run over times `first` … `last`; nothing where there are none."""
        if first > last:
            return
        values[self._from], values[self._to] = first, last
        code = self._function(*values)
        if code:
            raise RuntimeError(f"operator {self.name} returned {code} at times {first} to {last}")

    # What it accesses ------------------------------------------------------------------------

    def written(self) -> list[Any]:
        """The functions it writes, each once."""
        found = {e.write.name: e.write for e in self.expressions if _has_data(e.write)}
        return list(found.values())

    def read(self) -> set[str]:
        """Names of the functions whose values it uses; adding to one is not using it."""
        return {i.function.name for e in self.expressions for i in retrieve_indexed(e.expr.rhs)}

    def added_to(self) -> set[str]:
        """Names of the functions it only ever adds to."""
        plain = {e.write.name for e in self.expressions if e.write is not None and not e.is_reduction}
        return {e.write.name for e in self.expressions if e.write is not None and e.is_reduction} - plain

    def inputs(self) -> list[str]:
        """Names of the arrays that it only reads."""
        written = {function.name for function in self.written()}
        return [name for name in self.arrays if name not in written]

    def seeds(self, besides: Iterable[str]) -> list[str]:
        """Names of what an adjoint begins with: functions of time, or at points, whose values it uses."""
        used, found = self.read().difference(besides), set[str]()
        for expression in self.expressions:
            for function in (expression.write, *(i.function for i in retrieve_indexed(expression.expr.rhs))):
                varies = getattr(function, "is_SparseFunction", False) or getattr(function, "is_TimeFunction", False)
                if varies and function.name in used:
                    found.add(function.name)
        return sorted(found)

    def prints(self, names: Iterable[str]) -> dict[str, str]:
        """Fingerprints of the contents of arrays."""
        return {name: of_bytes([bytes_of(self.arrays[name])]) for name in names}

    def rows(self, function: Any) -> Rows | None:
        """Which rows of it are written when; None if it is not indexed by time, or in more ways than one."""
        name, found = function.name, set()
        for expression in self.expressions:
            left = expression.expr.lhs
            if _has_data(expression.write) and expression.write.name == name:
                found.add(self._row(left) if left.is_Indexed and function.dimensions[0].is_Time else None)
        return found.pop() if len(found) == 1 else None

    def _row(self, indexed: Any) -> Rows | None:
        index = indexed.indices[0]
        try:
            if isinstance(index, IntDiv):
                return Rows(0, int(self.scalars[str(index.rhs)])) if index.lhs == self.time else None
            return Rows(int(index - self.time))
        except (KeyError, TypeError):
            return None

    def access(self, name: str) -> Access:
        """The time levels of a function that it reads and writes."""
        reads: set[int] = set()
        writes: set[int] = set()
        added: set[int] = set()
        for expression in self.expressions:
            left = expression.expr.lhs
            if getattr(left, "function", None) is not None and left.function.name == name and left.is_Indexed:
                (added if expression.is_reduction else writes).add(self._level(left))
            reads.update(self._level(i) for i in retrieve_indexed(expression.expr.rhs) if i.function.name == name)
        return Access(frozenset(reads | (added - writes)), frozenset(writes | added))

    def _level(self, indexed: Any) -> int:
        """The level an access means.  Its index tells it modulo the buffer's length, the data space its range."""
        name, levels = indexed.function.name, len(self.arrays[indexed.function.name])
        lowest, highest = self._ranges[name]
        try:
            offset = int(indexed.indices[0].offset - self.time)
        except (AttributeError, TypeError):
            raise UsageError(
                f"operator {self.name} accesses {indexed}, whose time level cannot be told; "
                "wavefields must have a time buffer, and be indexed by time plus a whole number"
            ) from None
        level = lowest + (offset - lowest) % levels
        if highest - lowest >= levels or level > highest:
            raise UsageError(
                f"operator {self.name} accesses {name} at times {lowest:+d} to {highest:+d}, which a time buffer of "
                f"{levels} levels does not hold together; give {name} save=Buffer({highest - lowest + 2})"
            )
        return level


def _time_ranges(operator: Any, dimension: Any) -> dict[str, tuple[int, int]]:
    """For each function that varies in time, the lowest and highest time it is accessed at, relative to the loop's."""
    found = {}
    for function, intervals in operator._dspace.parts.items():
        for interval in intervals:
            if interval.dim.is_Time and interval.dim.root is dimension:
                found[function.name] = int(interval.lower), int(interval.upper)
    return found


def _aligned(array: Array, *, copied: bool) -> Array:
    """Memory for an array like this one."""
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    found = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    if copied:
        np.copyto(found, array)
    return found


def bytes_of(array: Array) -> Bytes:
    """Of an array, in place if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _expressions(operator: Any) -> list[Any]:
    roots = [operator, *(entry.root for entry in operator._func_table.values() if entry.root is not None)]
    return [expression for root in roots for expression in FindNodes(Expression).visit(root)]


def _is_in_time(expression: Any) -> bool:
    space = getattr(expression.expr, "ispace", None)
    return space is None or any(dimension.is_Time for dimension in space.itdims)


def _has_data(function: Any) -> bool:
    return bool(getattr(function, "is_DiscreteFunction", False)) and not getattr(function, "is_TempFunction", False)
