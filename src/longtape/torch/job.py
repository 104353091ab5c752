"""A scan as a job: carries as working state, snapshots as bytes, adjoints by window.

Owns the working carry, the stacked outputs and the cotangents of one scan.  The step
itself is run by a stepper: as it is (`EagerStep`), with windows taped and reversed in
one go, or as captured graphs (`CapturedSteps`), with residuals recorded as bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from longtape.actions import Action, Advance, Discard, Free, Kind, Restore, Reverse, Store
from longtape.errors import StepError
from longtape.layout import Fields
from longtape.measure import JobCosts
from longtape.plan.within import within
from longtape.protocols import Bytes, Floats, Slot
from longtape.timing import MOST_BUSY_SECONDS, TIMES, count_together, least_seconds, step_seconds
from longtape.torch.blocks import Block, RoomExceeded, floats_in_block, number_nbytes
from longtape.torch.captured import CapturedSteps, totals
from longtape.torch.eager import Cotangents, EagerStep, Tape, ones_like
from longtape.torch.graphs import CaptureFailed, StepGraph
from longtape.torch.inputs import Inputs
from longtape.torch.memory import held_by
from longtape.torch.places import Form, HostPlace, Place
from longtape.torch.replayed import LastResults
from longtape.torch.structure import Leaves
from longtape.torch.tape import Cotangent
from longtape.torch.windows import TrialWindows
from longtape.witness import Witness

UNKNOWN_NBYTES = 1 << 60
"""Of a taped step that cannot be examined: so many that no two steps are taped together."""


MOST_SAMPLED, MOST_SAMPLED_EAGERLY = 64, 4
"""Steps run to see how small the job's data becomes: as graphs, and as the user's own calls."""

SAMPLE_NBYTES = 1 << 20

MOST_TIMED = 16
TIMED_NBYTES = 8 << 20
"""How many captured steps are timed together, and the most room that takes."""

EAGER_TIMES = 2
"""How often an eager step is run to be timed, and how often taped."""


class Randomness:
    """The state of PyTorch's default generators, kept as one more leaf of a snapshot when steps draw from them.

    Args:
        devices: Where steps may run beside the CPU.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._others = sorted({device for device in devices if device.type not in ("cpu", "meta")}, key=str)
        self.at_start = self.state()
        self.used = False

    def state(self) -> torch.Tensor:
        """As bytes."""
        others = [torch.get_device_module(device).get_rng_state(device) for device in self._others]
        return torch.cat([torch.get_rng_state(), *others])

    def go_back(self, state: bytes | bytearray) -> None:
        """Random numbers are drawn, beginning with this state, with which an earlier process began."""
        if len(state) == self.at_start.numel():
            self.used = True
            self.at_start = torch.frombuffer(bytearray(state), dtype=torch.uint8)

    def set(self, state: torch.Tensor) -> None:
        """Go back to a state."""
        size = torch.get_rng_state().numel()
        torch.set_rng_state(state[:size])
        for device, part in zip(self._others, state[size:].chunk(max(1, len(self._others))), strict=False):
            torch.get_device_module(device).set_rng_state(part, device)

    def note(self) -> bool:
        """Whether random numbers were drawn since the start."""
        self.used = self.used or not torch.equal(self.state(), self.at_start)
        return self.used


@dataclass(slots=True)
class Outputs:
    """Stacked y of every step; allocated when the first one is seen."""

    steps: int
    leaves: Leaves | None = None

    def put(self, step: int, y: Leaves) -> None:
        if self.leaves is None:
            self.leaves = [leaf.new_empty((self.steps, *leaf.shape)) for leaf in y]
        with torch.no_grad():
            for stack, leaf in zip(self.leaves, y, strict=True):
                stack[step].copy_(leaf)


Ends = Callable[[int, Leaves], bool]
"""``ends(step, carry)``: whether the sequence ends before this step."""


class RandomnessAppeared(Exception):
    """Steps began to draw random numbers after snapshots were laid out without their state."""


class ScanJob:
    """The `Job` of a scan.

    Args:
        stepper: Runs the step.
        init: Leaves of state 0; never modified.
        inputs: x of every step.
        steps: N, or None.
        randomness: Noted before the first step ran.
        ends: Where N is None, asked before every step of the forward sweep.
        place: Where items are kept; None: in the memory of the host.
    """

    def __init__(
        self,
        stepper: EagerStep | CapturedSteps,
        init: Leaves,
        inputs: Inputs,
        steps: int | None,
        randomness: Randomness,
        *,
        ends: Ends | None = None,
        place: Place | None = None,
    ) -> None:
        self.place: Place = HostPlace() if place is None else place
        self.stepper, self.inputs, self.steps = stepper, inputs, steps
        self.init = [leaf.detach() for leaf in init]
        self.outputs = Outputs(steps or 0)
        self._ends = ends
        self.randomness = randomness
        self.carry: Leaves = []
        self._reached = 0
        self._turned = False
        self._carry_bar: list[Cotangent] = []
        self._numbers: dict[int, tuple[int, ...]] = {}
        """For each recorded window, the graph each of its steps took; equal tuples are one object."""
        self._patterns: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._ys_bar: Cotangents = []
        self._xs_bar: Cotangents = []
        self._measured: JobCosts | None = None
        self._rounded: StepGraph | None = None
        self._spare: Block | None = None
        """Room for the residuals of a window, where captured steps are reversed at once."""
        self._spare_nbytes = 0
        self.tape_nbytes = 0
        self._last: LastResults | None = None
        self.load_initial()

    # State -----------------------------------------------------------------------------------

    def layout(self) -> Fields:
        """How a snapshot is laid out; decides once and for all whether random state is part of it."""
        self._keeps_random = self.randomness.used
        self._form = Form(self.init, self.randomness.at_start.numel() if self._keeps_random else 0)
        self.place.lay_out(self._form)
        return self._form.fields

    def save(self, slot: Slot) -> Slot:
        self.place.save(slot, self.carry, self.randomness.state() if self._keeps_random else None)
        return slot

    def load(self, slot: Slot) -> None:
        self.carry, random = self.place.load(slot)
        if random is not None:
            self.randomness.set(random)

    def load_initial(self) -> None:
        # A copy: the step may update its carry in place, and the caller's tensors are not ours to change.
        self.carry = [leaf.clone() for leaf in self.init]
        if self.randomness.used:
            self.randomness.set(self.randomness.at_start)

    def yield_slot(self, slot: Slot) -> Slot:
        return slot

    # Steps -----------------------------------------------------------------------------------

    def advance(self, start: int, stop: int) -> int:
        reached = self.run_plainly(start, stop)
        self._check_randomness()
        return reached

    def _ends_before(self, index: int) -> bool:
        return self._ends is not None and not self._turned and self._ends(index, self.carry)

    def run_plainly(self, start: int, stop: int) -> int:
        """Run steps that need never be run again; returns the state reached."""
        step, inputs, index, ends = self.stepper, self.inputs, start, self._ends is not None
        try:
            for index in range(start, stop):
                if ends and self._ends_before(index):
                    return index
                self.carry, y = step.advance(index, self.carry, inputs.leaves(index))
                self._put(index, y)
        except Exception as error:
            _name_step(error, index)
            raise
        return stop

    def _put(self, index: int, y: Leaves) -> None:
        """A step has run: the working carry is state `index` + 1."""
        self._check_last(index, self.carry, y)
        if index >= self._reached:
            if y:
                self.outputs.put(index, y)
            self._reached = index + 1

    def remember_last(self) -> None:
        """The forward sweep has ended, and the last step is to give the same when it is run again."""
        last = self._reached - 1
        self._last = LastResults(last, self.carry, [stack[last] for stack in self.outputs.leaves or []])

    def _check_last(self, index: int, carry: Leaves, y: Leaves) -> None:
        if self._last is not None and index == self._last.step:
            self._last.check(carry, y)

    def _check_randomness(self) -> None:
        # Between the sweeps the caller may draw as well; and what the forward sweep did not draw, the other does not.
        if not self._keeps_random and not self._turned and self.randomness.note():
            raise RandomnessAppeared

    def adopt(self, slots: list[Slot]) -> None:
        raise NotImplementedError

    def turn(self) -> None:
        self._turned = True

    def rehearse(self) -> None:
        """Run the first steps, so that what they close over and return is known; nothing is kept of it."""
        self.load_initial()
        self.stepper.rehearse(self.carry, [self.inputs.leaves(k) for k in range(min(2, self.steps or 1))])
        self.load_initial()

    def begin_reverse(self, carry_bar: Cotangents, ys_bar: Cotangents, closed: Leaves, wants_x: list[bool]) -> None:
        """Set the cotangents of the final carry and of the stacked outputs."""
        self._carry_bar, self._ys_bar = list(carry_bar), ys_bar
        self._xs_bar = [
            torch.zeros_like(leaf) if wants else None for leaf, wants in zip(self.inputs.stacked, wants_x, strict=True)
        ]
        self.stepper.begin_reverse(closed)

    # For a run that can be resumed -------------------------------------------------------------

    def begin_at(self, step: int) -> None:
        """The ys of the steps below this one are there."""
        self._reached = step

    def recorded(self) -> dict[int, tuple[int, ...]]:
        """For each recorded window, the graph each of its steps took."""
        return self._numbers

    def put_recorded(self, window: int, numbers: tuple[int, ...]) -> None:
        """A window that an earlier process has recorded."""
        self._numbers[window] = self._patterns.setdefault(numbers, numbers)

    def cotangents(self) -> tuple[list[Cotangent], Cotangents]:
        """Of the carry as far as the adjoint has come, and of the ys."""
        return self._carry_bar, self._ys_bar

    def put_carry_bar(self, carry_bar: list[Cotangent]) -> None:
        """Go on from these cotangents of the carry."""
        self._carry_bar = carry_bar

    @property
    def xs_bar(self) -> Cotangents:
        """Cotangents of the stacked xs so far."""
        return self._xs_bar

    def reverse(self, start: int, stop: int) -> None:
        slots = self.place.inner_slots
        if slots and stop - start > 1:
            self._reverse_in_parts(start, within(stop - start, slots))
        else:
            self._reverse_at_once(start, stop)

    def _reverse_in_parts(self, start: int, actions: Sequence[Action]) -> None:
        """Reverse a window by Revolve, on snapshots of its own; the actions count from its start."""
        places: dict[int, tuple[int, torch.Tensor | None]] = {}
        free = list(range(self.place.inner_slots))
        for action in actions:
            match action:
                case Advance(begin, end):
                    self.run_plainly(start + begin, start + end)
                case Store(step):
                    places[step] = free.pop(), self.randomness.state() if self._keeps_random else None
                    self.place.keep(places[step][0], self.carry)
                case Restore(step):
                    number, random = places[step]
                    self.carry = self.place.kept(number)
                    if random is not None:
                        self.randomness.set(random)
                case Reverse(begin, end):
                    self._reverse_at_once(start + begin, start + end)
                case Free(key) | Discard(key):
                    if key.step in places:
                        free.append(places.pop(key.step)[0])

    def _reverse_at_once(self, start: int, stop: int) -> None:
        if isinstance(self.stepper, CapturedSteps):
            self._reverse_captured(self.stepper, start, stop)
            return
        tapes = []
        carry = self.carry
        index = start
        try:
            for index in range(start, stop):
                carry, tape = self._tape(index, carry)
                self._check_last(index, carry, tape.y_out)
                tapes.append(tape)
        except Exception as error:
            _name_step(error, index)
            raise
        carry_bar = totals(self._carry_bar)
        while tapes:
            tape = tapes.pop()
            y_bar = self._y_bar(tape.step, len(tape.y_out))
            carry_bar, x_bar = self.stepper.pull_back(tape, carry_bar, y_bar)
            self._keep_x_bar(tape.step, x_bar)
        self._carry_bar = list(carry_bar)

    def _tape(self, index: int, carry: Leaves) -> tuple[Leaves, Tape]:
        assert isinstance(self.stepper, EagerStep)
        return self.stepper.tape(index, carry, self.inputs.leaves(index))

    def _y_bar(self, step: int, count: int) -> Cotangents:
        return [None if bar is None else bar[step] for bar in self._ys_bar] if self._ys_bar else [None] * count

    def record(self, start: int, stop: int, slot: Slot) -> int:
        steps = self.stepper
        assert isinstance(steps, CapturedSteps)
        block = self.place.filling(slot, steps.as_block)
        stop, numbers = self._record_into(steps, block, start, stop)
        self.place.filled(slot, steps.block_nbytes(stop - start))
        self._check_randomness()
        if self._rounded is not None and steps.only_graph is not self._rounded:
            raise RoomExceeded("a step took another path, whose residuals lie elsewhere in a block")
        self._numbers[start] = self._patterns.setdefault(numbers, numbers)
        return stop

    def _record_into(self, steps: CapturedSteps, block: Block, start: int, stop: int) -> tuple[int, tuple[int, ...]]:
        """Run steps and put their residuals into a block; returns the state reached, and the graph each took."""
        numbers = []
        index = start
        try:
            for index in range(start, stop):
                if self._ends_before(index):
                    stop = index
                    break
                self.carry, y, number = steps.record(index, self.carry, self.inputs.leaves(index), block, index - start)
                self._put(index, y)
                numbers.append(number)
        except Exception as error:
            _name_step(error, index)
            raise
        return stop, tuple(numbers)

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        steps = self.stepper
        assert isinstance(steps, CapturedSteps)
        numbers = self._numbers.pop(start)
        self._pull_back_from(steps, self.place.reading(slot, steps.as_block), start, numbers[: stop - start])
        self.place.read(slot)

    def _pull_back_from(self, steps: CapturedSteps, block: Block, start: int, numbers: tuple[int, ...]) -> None:
        """The adjoint of the steps whose residuals are in a block."""
        for position in reversed(range(len(numbers))):
            self._pull_back_step(steps, start + position, numbers[position], block, position)

    def _pull_back_step(self, steps: CapturedSteps, index: int, number: int, block: Block, position: int) -> None:
        x = self.inputs.leaves(index) if steps.needs_x(number) else self.inputs.absent()
        y_bar = self._y_bar(index, len(self._ys_bar))
        self._carry_bar, x_bar = steps.pull_back(number, block, position, x, self._carry_bar, y_bar)
        if self._xs_bar:
            self._keep_x_bar(index, totals(x_bar))

    def _reverse_captured(self, steps: CapturedSteps, start: int, stop: int) -> None:
        """The adjoint of a window whose tape is in no slot: of one step, or on a device of several."""
        nbytes = steps.block_nbytes(stop - start)
        if self._spare is None or self._spare_nbytes < nbytes:
            self._spare, self._spare_nbytes = steps.as_block(self.place.window_room(nbytes)), nbytes
        _, numbers = self._record_into(steps, self._spare, start, stop)
        self._pull_back_from(steps, self._spare, start, numbers)

    def _keep_x_bar(self, step: int, x_bar: Cotangents) -> None:
        for stack, bar in zip(self._xs_bar, x_bar, strict=False):
            if stack is not None and bar is not None:
                stack[step] = bar

    def end_reverse(self, closed: Leaves) -> tuple[Cotangents, Cotangents, Cotangents]:
        """Cotangents of init, of the stacked xs and of the closed-over tensors."""
        found = {id(t): bar for t, bar in zip(self.stepper.closed_over(), self.stepper.gradients(), strict=True)}
        if lost := found.keys() - {id(tensor) for tensor in closed}:
            raise StepError(
                f"when steps were run again they used {len(lost)} tensors requiring a gradient that they did not use "
                "in the forward sweep; make the step depend on carry, x and fixed tensors only"
            )
        return totals(self._carry_bar), self._xs_bar, [found.get(id(tensor)) for tensor in closed]

    # Measuring -------------------------------------------------------------------------------

    def measure(self, *, once: bool = False) -> JobCosts:
        """Time step 0 forward and through its adjoint; nothing is kept of it.

        Args:
            once: Run it once each way: no choice depends on the times.
        """
        if self._measured is None:
            try:
                self._measured = self._time(once)
            except Exception as error:
                _name_step(error, 0)
                raise
        return self._measured

    def _time(self, once: bool) -> JobCosts:
        if isinstance(self.stepper, EagerStep):
            forward, reverse = partial(self._plainly, 1), self._taping(self.stepper)
            seconds, times = step_seconds(forward, 1 if once else EAGER_TIMES)
            costs = JobCosts(forward=seconds, reverse=least_seconds(reverse, times))
        else:
            costs = self._time_captured(self.stepper, 1 if once else TIMES)
        self.load_initial()
        return replace(costs, restore=self.load_initial, sample=self._sample)

    def _plainly(self, count: int) -> float:
        """Seconds of step 0, run so many times, each from the last result."""
        self.load_initial()
        carry, x, began = self.carry, self.inputs.leaves(0), self.place.now()
        for _ in range(count):
            carry, _ = self.stepper.advance(0, carry, x)
        return self.place.now() - began

    def _sample(self) -> tuple[Kind, Bytes]:
        """An item of the job's own data: the residuals of some first steps, or a state a few steps on."""
        self.load_initial()
        steps = self.stepper
        known = 1 if self.steps is None else self.steps  # of an unknown length, one step at least
        if not isinstance(steps, CapturedSteps):
            for index in range(min(known, MOST_SAMPLED_EAGERLY)):
                self.carry, _ = steps.advance(index, self.carry, self.inputs.leaves(index))
            host, slot = HostPlace(), Slot(np.zeros(self._form.fields.nbytes, np.uint8))
            host.lay_out(self._form)
            host.save(slot, self.carry, self.randomness.state() if self._keeps_random else None)
            return Kind.SNAPSHOT, slot.data
        count = max(1, min(known, MOST_SAMPLED, SAMPLE_NBYTES // max(1, steps.stride_nbytes)))
        room = self.place.room(steps.block_nbytes(count))
        block = steps.as_block(room)
        for index in range(count):
            self.carry, _, _ = steps.record(index, self.carry, self.inputs.leaves(index), block, index)
        steps.forget()
        return Kind.RESIDUALS, room.cpu().numpy() if isinstance(room, torch.Tensor) else room

    def floats(self, kind: Kind, nbytes: int) -> Sequence[Floats]:
        """Where an item holds floating-point numbers that may be rounded."""
        if kind is Kind.SNAPSHOT:
            fields = self._form.fields
            return [
                Floats(offset, offset + size, size_of)
                for offset, size, leaf in zip(fields.offsets, fields.sizes, self.init, strict=False)
                if (size_of := number_nbytes(leaf.dtype))
            ]
        if self._rounded is None:
            return []
        assert isinstance(self.stepper, CapturedSteps)
        return floats_in_block(self._rounded, nbytes, self.stepper.block_nbytes(0), self.stepper.stride_nbytes)

    def round_blocks(self) -> None:
        """Let a lossy codec round blocks, too, where all steps take one graph: from then on all must."""
        if isinstance(self.stepper, CapturedSteps):
            self._rounded = self.stepper.only_graph

    def _time_captured(self, steps: CapturedSteps, times: int) -> JobCosts:
        """Run, record and pull back step 0 again and again, each time from its last result; nothing is kept of it.

        If all residuals were put in one place, it would stay in the caches, as it does not in a sweep.
        """
        clock, count = self.place.now, 1
        windows = TrialWindows(steps, self.inputs, self._fresh, self.place)
        pulled: list[float] = []

        def record() -> float:
            began = clock()
            windows.record_into(block, count)
            turned = clock()
            windows.pull_back_from(block, count)
            pulled.append((clock() - turned) / count)
            return turned - began

        forward, times = step_seconds(partial(self._plainly, 1), times)
        if times > 1:
            most = max(1, min(MOST_TIMED, TIMED_NBYTES // max(1, steps.stride_nbytes)))
            count = count_together(forward, most)
            forward = least_seconds(partial(self._plainly, count), times) / count
        block = steps.spare_block(count)
        recorded = least_seconds(record, times) / count
        windows.end()

        def busy() -> None:
            self._plainly(1)

        taped, back = recorded, min(pulled)
        found = JobCosts(forward=forward, reverse=taped + back, record=taped, pull_back=back)
        found = replace(found, busy=busy if forward <= MOST_BUSY_SECONDS else None)
        return replace(found, windows=windows) if isinstance(self.place, HostPlace) else found

    def _fresh(self) -> Leaves:
        self.load_initial()
        return self.carry

    def _taping(self, step: EagerStep) -> Callable[[], float]:
        """Tapes step 0 and takes its adjoint; also finds what a taped step holds."""
        clock, x = self.place.now, self.inputs.leaves(0)

        def timed() -> float:
            self.load_initial()
            step.begin_reverse(step.closed_over())
            began = clock()
            tape = self._tape_first(step, x)
            ones = ones_like(tape.carry_out + tape.y_out)
            step.pull_back(tape, ones[: len(tape.carry_out)], ones[len(tape.carry_out) :])
            return clock() - began

        return timed

    def _tape_first(self, step: EagerStep, x: Leaves) -> Tape:
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor._is_zerotensor():  # which forward mode, inside a step, makes without memory
                saved.update(held_by(tensor))
            return tensor

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                _, tape = step.tape(0, self.carry, x)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):  # torch.func refuses them
                raise
            self.tape_nbytes = UNKNOWN_NBYTES
            self.load_initial()
            return step.tape(0, self.carry, x)[1]
        # A tape holds what its step was given and returned even where nothing of it is saved; the carry that it was
        # given is the one that the tape before it returned.
        for tensor in [*tape.x_in, *tape.carry_out, *tape.y_out]:
            saved.update(held_by(tensor))
        for tensor in [*step.closed_over(), *self.inputs.stacked, *tape.carry_in]:
            for start in held_by(tensor):
                saved.pop(start, None)
        self.tape_nbytes = sum(saved.values())
        return tape


class VerifiedScanJob(ScanJob):
    """A scan whose states are compared with what they were the first time, bit for bit."""

    def __init__(
        self,
        stepper: EagerStep | CapturedSteps,
        init: Leaves,
        inputs: Inputs,
        steps: int | None,
        randomness: Randomness,
        *,
        names: Sequence[str],
        ends: Ends | None = None,
        place: Place | None = None,
    ) -> None:
        self._witness = Witness(names.__getitem__)
        self._loaded = True
        super().__init__(stepper, init, inputs, steps, randomness, ends=ends, place=place)

    @property
    def states_verified(self) -> int:
        """States that came out the same when they were computed again or fetched."""
        return self._witness.compared

    def _see(self, state: int, carry: Leaves, *, kept: bool = False) -> None:
        self._witness.see(state, [_as_bytes(leaf) for leaf in carry], kept=kept)

    def _put(self, index: int, y: Leaves) -> None:
        self._see(index + 1, self.carry)
        super()._put(index, y)

    def _tape(self, index: int, carry: Leaves) -> tuple[Leaves, Tape]:
        carry, tape = super()._tape(index, carry)
        self._see(index + 1, carry)
        return carry, tape

    def load(self, slot: Slot) -> None:
        super().load(slot)
        self._loaded = True

    def load_initial(self) -> None:
        super().load_initial()
        self._loaded = True

    def _see_loaded(self, start: int) -> None:
        if self._loaded:
            self._loaded = False
            self._see(start, self.carry, kept=True)

    def advance(self, start: int, stop: int) -> int:
        self._see_loaded(start)
        return super().advance(start, stop)

    def record(self, start: int, stop: int, slot: Slot) -> int:
        self._see_loaded(start)
        return super().record(start, stop, slot)

    def reverse(self, start: int, stop: int) -> None:
        self._see_loaded(start)
        super().reverse(start, stop)


def _as_bytes(leaf: torch.Tensor) -> Bytes:
    plain = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy()


def _name_step(error: Exception, index: int) -> None:
    if not isinstance(error, CaptureFailed | RoomExceeded):
        error.add_note(f"longtape: in step {index} of the scan")


@contextlib.contextmanager
def named(index: int) -> Iterator[None]:
    """Names the step that an exception comes from."""
    try:
        yield
    except Exception as error:
        _name_step(error, index)
        raise
