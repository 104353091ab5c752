"""What of a loop is made durable beside its carry: ys, cotangents and gradients.

Implements `longtape.protocols.Durable` for a `LoopJob`.  On the executor's thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from longtape.durable.fingerprints import bounded, of_bytes
from longtape.errors import DamagedBlock
from longtape.jax.arrays import Array, Kind, copied, host, raw
from longtape.jax.job import LoopJob
from longtape.protocols import Bytes, Slot
from longtape.reach import digests

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


def bytes_of(array: Any) -> Bytes:
    """The elements of an array in row-major order; a view where they lie so."""
    return np.ascontiguousarray(host(array)).reshape(-1).view(np.uint8)


def of_arrays(arrays: Sequence[Any]) -> str:
    """A fingerprint of arrays: types, shapes and elements."""
    found = [raw(array) for array in arrays]
    types = " ".join(f"{array.dtype}{list(array.shape)}" for array in found)
    return of_bytes([np.frombuffer(types.encode(), np.uint8), *map(bytes_of, found)])


def of_program(program: core.ClosedJaxpr) -> str:
    """A fingerprint of what a traced function does; where its parts lie in this process's memory is left out."""
    text = _ADDRESS.sub("", str(program.jaxpr))
    parts = [part for part in _parts(program) if isinstance(part, np.ndarray | jax.Array)]
    return of_bytes([np.frombuffer(text.encode(), np.uint8), *(bytes_of(raw(array)) for array in parts)])


def reached(programs: Iterable[core.ClosedJaxpr]) -> dict[str, str]:
    """What the host functions that programs call back can reach, as it is now."""
    found = [part for program in programs for part in _parts(program) if callable(part)]
    return bounded(digests(found, bytes_of))


def _parts(value: Any, *, called_back: bool = False) -> Iterator[Any]:
    """The arrays within a program, which its text does not show whole, and the functions that it calls back."""
    match value:
        case core.ClosedJaxpr():
            yield from value.consts
            yield from _parts(value.jaxpr)
        case core.Jaxpr():
            for eqn in value.eqns:
                for name, parameter in eqn.params.items():
                    yield from _parts(parameter, called_back="callback" in name)
        case tuple() | list():
            for item in value:
                yield from _parts(item, called_back=called_back)
        case np.ndarray() | jax.Array():
            yield value
        case _ if called_back and callable(value):
            yield value


class DurableLoop:
    """The `Durable` of a loop whose length is known."""

    def __init__(self, job: LoopJob, names: Sequence[str]) -> None:
        self._job, self._names = job, names

    def state(self) -> list[tuple[str, Bytes]]:
        """The carry."""
        return [(name, bytes_of(leaf)) for name, leaf in zip(self._names, self._job.carry, strict=True)]

    def run_again(self, start: int, stop: int) -> None:
        """The ys are there, and written no more."""
        self._job.advance(start, stop)

    def put_initial(self, slot: Slot) -> None:
        """The caller's init is still there."""
        self._job.load_initial()

    # Forward ---------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> list[Bytes]:
        """The ys of the steps."""
        return [bytes_of(stack[start:stop]) for stack in self._job.ys]

    def put_rows(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        _put(self._job.ys, start, stop, arrays, "ys")
        self._job.begin_at(stop)

    # Reverse ---------------------------------------------------------------------------------

    def seed(self) -> str:
        """Of the cotangents that the reverse sweep begins with."""
        carry, ys = self._job.cotangents()
        there = np.array([bar is not None for bar in ys], np.uint8)
        return of_bytes([there, *map(bytes_of, carry), *(bytes_of(bar) for bar in ys if bar is not None)])

    def adjoint(self) -> list[Bytes]:
        """Cotangents so far, of what is closed over and of the carry."""
        consts, carry = self._job.end_reverse()
        return [bytes_of(bar) for bar in [*consts, *carry]]

    def put_adjoint(self, arrays: list[Bytes]) -> None:
        kinds = [*self._job.chunks.const_bars, *self._job.chunks.carry_bars]
        if [array.nbytes for array in arrays] != [kind.nbytes for kind in kinds]:
            raise DamagedBlock("the cotangents that were made durable are of another number or size")
        found = [_taken(kind, array) for kind, array in zip(kinds, arrays, strict=True)]
        split = len(self._job.chunks.const_bars)
        self._job.go_on_with(found[:split], found[split:])

    def bars(self, start: int, stop: int) -> list[Bytes]:
        """Rows of the cotangents of xs."""
        return [bytes_of(stack[start:stop]) for stack in self._job.xs_bar]

    def put_bars(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        _put(self._job.xs_bar, start, stop, arrays, "cotangents of xs")


def _taken(kind: Kind, data: Bytes) -> jax.Array:
    return copied(kind.view(np.array(data)))


def _put(stacks: Sequence[Array], start: int, stop: int, arrays: list[Bytes], what: str) -> None:
    parts = [stack[start:stop] for stack in stacks]
    if [part.nbytes for part in parts] != [array.nbytes for array in arrays]:
        raise DamagedBlock(f"the {what} that were made durable are of another number or size")
    for part, data in zip(parts, arrays, strict=True):
        part[...] = np.array(data).view(part.dtype).reshape(part.shape)
