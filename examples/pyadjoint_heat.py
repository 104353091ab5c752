"""A pyadjoint tape whose time steps are checkpointed by Longtape's schedule, on disk and in the background.

A nonlinear heat equation on a rod, the gradient of a misfit with respect to the initial
temperature, and a Taylor test of it.  NumPy arrays are no type that pyadjoint knows, so
`Field` brings one, with the two blocks that the model needs.  `Scratch` is what pyadjoint
asks for before it lets a schedule use the disk: it keeps checkpoints in a scratch file
of Longtape's, and writes them while the next steps are taped.

``python examples/pyadjoint_heat.py``
"""

from __future__ import annotations

import sys
import tempfile
import weakref
from collections import deque
from time import perf_counter
from typing import Any

import numpy as np
from pyadjoint import Block, Control, ReducedFunctional, Tape, continue_annotation, pause_annotation, set_working_tape
from pyadjoint import taylor_test as pyadjoint_taylor_test
from pyadjoint.adjfloat import AdjFloat
from pyadjoint.overloaded_type import OverloadedType
from pyadjoint.tape import TapePackageData, annotate_tape, get_working_tape

from longtape.actions import Key, Kind
from longtape.engine.workers import Transfer, Workers
from longtape.protocols import Slot
from longtape.schedules import AsyncMultistage
from longtape.tiers.disk import DiskTier

DT, COOLING = 0.2, 0.05


class Field(OverloadedType):
    """An array that pyadjoint can follow.  Steps make new ones and change none."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self.values = np.asarray(values)

    def _ad_create_checkpoint(self) -> Any:
        scratch = get_working_tape()._package_data.get("longtape")
        return scratch.keep(self.values) if scratch is not None and scratch.is_active else Field(self.values)

    def _ad_restore_at_checkpoint(self, checkpoint: Any) -> Field:
        return checkpoint.fetch() if isinstance(checkpoint, Kept) else checkpoint

    def _ad_init_zero(self, dual: bool = False) -> Field:
        return Field(np.zeros_like(self.values))

    def _ad_convert_riesz(self, value: Any, riesz_map: Any = None) -> Field:
        return Field(value)

    def _ad_mul(self, other: float) -> Field:
        return Field(self.values * other)

    def _ad_add(self, other: Field) -> Field:
        return Field(self.values + other.values)

    def _ad_dot(self, other: Any) -> float:
        return float(np.vdot(self.values, getattr(other, "values", other)))

    def _ad_copy(self) -> Field:
        return Field(self.values.copy())


class Kept(OverloadedType):
    """A checkpoint on storage."""

    def __init__(self, scratch: Scratch, transfer: Transfer, dtype: np.dtype) -> None:
        super().__init__()
        self._scratch, self.transfer, self._dtype = scratch, transfer, dtype

    def fetch(self) -> Field:
        """The array again."""
        return Field(self._scratch.fetch(self.transfer).view(self._dtype))

    def _ad_restore_at_checkpoint(self, checkpoint: Kept) -> Field:
        return checkpoint.fetch()


class Scratch(TapePackageData):
    """Checkpoints in a scratch file, written in the background, at most two waiting at a time."""

    MOST_UNWRITTEN = 2

    def __init__(self, directory: str) -> None:
        self._tier = DiskTier(directory)
        self._workers = Workers(self._tier, perf_counter)
        self._count = 0
        self._unwritten: set[Transfer] = set()
        self._dropped: deque[Key] = deque()
        self.is_active = False
        self.written = self.read = 0

    def keep(self, values: np.ndarray) -> Kept:
        """Begin to write an array; it must not be changed any more."""
        while len(self._unwritten) >= self.MOST_UNWRITTEN:
            self._finish_one()
        under_way = {transfer.key for transfer in self._unwritten}
        for _ in range(len(self._dropped)):
            key = self._dropped.popleft()
            if key in under_way:
                self._dropped.append(key)
            else:
                self._tier.release(key)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        transfer = Transfer(Key(Kind.SNAPSHOT, self._count), Slot(data), is_write=True)
        self._tier.reserve(transfer.key, data.nbytes)
        self._workers.submit(transfer)
        self._unwritten.add(transfer)
        self._count += 1
        self.written += 1
        kept = Kept(self, transfer, values.dtype)
        weakref.finalize(kept, self._dropped.append, transfer.key)
        return kept

    def fetch(self, transfer: Transfer) -> np.ndarray:
        """The bytes of an array: from memory while they are being written, else from the file."""
        if transfer in self._unwritten:
            return transfer.slot.data
        out = np.empty(transfer.nbytes, np.uint8)
        self._tier.read(transfer.key, out)
        self.read += 1
        return out

    def _finish_one(self) -> None:
        transfer = self._workers.next_finished(None)
        assert transfer is not None
        if transfer.error is not None:
            raise transfer.error
        self._unwritten.discard(transfer)
        transfer.slot = Slot(np.empty(0, np.uint8))  # the array is not needed any more

    def close(self) -> None:
        """Stop the threads and remove the file."""
        self._workers.close(timeout=30.0)
        self._tier.close()

    # What pyadjoint calls -------------------------------------------------------------------

    def continue_checkpointing(self) -> None:
        self.is_active = True

    def pause_checkpointing(self) -> None:
        self.is_active = False

    def clear(self) -> None:
        pass  # checkpoints go with the last reference to them

    reset = checkpoint = clear

    def restore_from_checkpoint(self, state: Any) -> None:
        pass

    def copy(self) -> Scratch:
        return self


# The model ----------------------------------------------------------------------------------------


def heat(u: np.ndarray) -> np.ndarray:
    """One step: diffusion, and cooling by radiation."""
    return u + DT * (np.roll(u, 1) - 2 * u + np.roll(u, -1)) - COOLING * u**4


def heat_adjoint(u: np.ndarray, adjoint: np.ndarray) -> np.ndarray:
    """Its adjoint: diffusion is its own."""
    return adjoint + DT * (np.roll(adjoint, 1) - 2 * adjoint + np.roll(adjoint, -1)) - 4 * COOLING * u**3 * adjoint


class HeatBlock(Block):
    """One time step on the tape."""

    def __init__(self, source: Field) -> None:
        super().__init__()
        self.add_dependency(source)

    def evaluate_adj_component(self, inputs, adj_inputs, block_variable, idx, prepared=None):
        return heat_adjoint(inputs[0].values, adj_inputs[0])

    def recompute_component(self, inputs, block_variable, idx, prepared):
        return Field(heat(inputs[0].values))


class MisfitBlock(Block):
    """Half the squared norm."""

    def __init__(self, final: Field) -> None:
        super().__init__()
        self.add_dependency(final)

    def evaluate_adj_component(self, inputs, adj_inputs, block_variable, idx, prepared=None):
        return adj_inputs[0] * inputs[0].values

    def recompute_component(self, inputs, block_variable, idx, prepared):
        return AdjFloat(0.5 * np.vdot(inputs[0].values, inputs[0].values))


def annotated(block: Block | None, result: Any) -> Any:
    """The result of an operation, which is on the tape if annotation is on."""
    if block is not None:
        block.add_output(result.create_block_variable())
        get_working_tape().add_block(block)
    return result


def step(u: Field) -> Field:
    block = HeatBlock(u) if annotate_tape() else None
    return annotated(block, Field(heat(u.values)))


def misfit(u: Field) -> AdjFloat:
    block = MisfitBlock(u) if annotate_tape() else None
    return annotated(block, AdjFloat(0.5 * np.vdot(u.values, u.values)))


def record(tape: Tape, initial: Field, steps: int) -> ReducedFunctional:
    """Run the model on a tape, step by step."""
    continue_annotation()
    u = initial
    for _ in tape.timestepper(iter(range(steps))):
        u = step(u)
    functional = misfit(u)
    pause_annotation()
    return ReducedFunctional(functional, Control(initial))


def exact_gradient(initial: np.ndarray, steps: int) -> np.ndarray:
    """The gradient with every state kept."""
    states = [initial]
    for _ in range(steps):
        states.append(heat(states[-1]))
    adjoint = states.pop()
    while states:
        adjoint = heat_adjoint(states.pop(), adjoint)
    return adjoint


def main(steps: int = 300, size: int = 20_000) -> float:
    """Gradient and Taylor test; returns the lowest order of convergence, which should be 2."""
    generator = np.random.default_rng(0)
    initial, direction = Field(generator.random(size)), Field(generator.random(size))
    schedule = AsyncMultistage(steps, 6, forward=1.0, reverse=2.0, write=3.0, read=2.0)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Scratch(directory)
        try:
            with set_working_tape(Tape(package_data={"longtape": scratch})) as tape:
                tape.enable_checkpointing(schedule)
                functional = record(tape, initial, steps)
                gradient = functional.derivative()
                assert np.array_equal(gradient.values, exact_gradient(initial.values, steps))
                print(f"{steps} steps, 6 states in memory: {scratch.written} written, {scratch.read} read back")
                order = pyadjoint_taylor_test(functional, initial, direction)
        finally:
            scratch.close()
    print(f"order of the Taylor remainder: {order:.3f}")
    return float(order)


if __name__ == "__main__":
    sys.exit(not main() > 1.9)
