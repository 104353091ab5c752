"""What of a scan is made durable beside its carry: ys, cotangents, gradients, and which graph each step took.

Implements `longtape.protocols.Durable` for a `ScanJob`.  On the executor's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_64_intdigest

from longtape.durable.fingerprints import bounded, of_bytes, of_code
from longtape.errors import DamagedBlock, StorageError
from longtape.protocols import Bytes, Slot
from longtape.reach import digests
from longtape.torch.captured import CapturedSteps
from longtape.torch.job import ScanJob
from longtape.torch.structure import Leaves, Structure
from longtape.torch.tape import Cotangent

WAY, RANDOM = "way of running the step", "drawing of random numbers"
"""Of the fingerprint: what the process that begins finds out, and others go by."""

MOST_X, SAMPLED_X = 64, 50
"""So many x that are read lazily are all looked at; of more, about so many."""

_DTYPES = sorted((d for d in vars(torch).values() if isinstance(d, torch.dtype)), key=str)


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """The elements of a tensor in row-major order; a view where they lie so, and in the CPU's memory."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    found: Bytes = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return found


def _tensor(data: Bytes, like: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """A tensor of the type and shape of another from its bytes, which it keeps; on its device if none is given."""
    if data.nbytes != like.numel() * like.element_size():
        raise DamagedBlock(
            f"a tensor of {data.nbytes} bytes was made durable where one of shape {list(like.shape)} is due"
        )
    device = like.device if device is None else device
    if not data.nbytes:
        return torch.empty(like.shape, dtype=like.dtype, device=device)
    own = np.array(data)  # aligned, and written to later
    return torch.from_numpy(own).view(like.dtype).reshape(like.shape).to(device)


def _content(array: Any) -> Bytes:
    """The bytes of anything that has a shape and a dtype."""
    if not isinstance(array, torch.Tensor):
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if array.is_meta:
        return np.empty(0, np.uint8)
    if array.is_nested:
        array = torch.cat([part.detach().reshape(-1) for part in array.unbind()])
    return bytes_of(array if array.layout is torch.strided else array.detach().to_dense())


def reached(step: Any) -> dict[str, str]:
    """Fingerprints of what a step can reach, as it is now."""
    return bounded(digests([step], _content))


def fingerprint(step: Any, job: ScanJob, init: Leaves, carry: Structure) -> dict[str, str]:
    """What must be the same beside it, of a job whose first steps were rehearsed."""
    inputs, closed = job.inputs, job.stepper.closed_over()
    precision = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return {
        "front end": "longtape.torch.scan",
        "step": f"{getattr(step, '__module__', '')}.{getattr(step, '__qualname__', type(step))}",
        "code of the step": of_code(step, getattr(type(step), "forward", None)),
        "number of steps": str(job.steps),
        "structure of the carry": f"{carry.spec} {[(str(t.dtype), list(t.shape)) for t in init]}",
        "initial carry": of_bytes(map(bytes_of, init)),
        "xs": of_bytes(map(bytes_of, [*inputs.stacked, *_sampled(job)])),
        "set of parameters": of_bytes(map(bytes_of, closed)),
        "set of wanted gradients (of init)": str([leaf.requires_grad for leaf in init]),
        "set of wanted gradients (of xs)": str([leaf.requires_grad for leaf in inputs.stacked]),
        "set of wanted gradients (of closed-over tensors)": str([list(tensor.shape) for tensor in closed]),
        "random numbers at the start": of_bytes([job.randomness.at_start.numpy()]) if job.randomness.used else "",
        "default dtype": str(torch.get_default_dtype()),
        "precision": str(precision),
        "version of PyTorch": torch.__version__,
        "version of NumPy": np.__version__,
    }


def _sampled(job: ScanJob) -> Leaves:
    """Some x of inputs that are read lazily, types and shapes included."""
    if job.inputs.stacked or not job.steps:
        return []
    last = job.steps - 1
    chosen = (
        range(job.steps) if last < MOST_X else sorted({round(k * last / (SAMPLED_X - 1)) for k in range(SAMPLED_X)})
    )
    found: Leaves = []
    for step in chosen:
        leaves = job.inputs.leaves(step)
        kinds = str([(str(leaf.dtype), list(leaf.shape)) for leaf in leaves])
        found += [torch.frombuffer(bytearray(kinds.encode()), dtype=torch.uint8), *leaves]
    return found


class DurableScan:
    """The `Durable` of a scan job whose first steps were rehearsed.

    Args:
        job: Of the scan.
        names: What the leaves of the carry are called.
    """

    def __init__(self, job: ScanJob, names: Sequence[str]) -> None:
        self._job, self._names = job, names

    def state(self) -> list[tuple[str, Bytes]]:
        """The carry, and the state of the generators where steps draw from them."""
        job = self._job
        found = [(name, bytes_of(leaf)) for name, leaf in zip(self._names, job.carry, strict=True)]
        return (
            [*found, ("state of random generators", bytes_of(job.randomness.state()))] if job.randomness.used else found
        )

    def run_again(self, start: int, stop: int) -> None:
        """The ys are there, and written no more."""
        self._job.advance(start, stop)

    def put_initial(self, slot: Slot) -> None:
        """The caller's init is still there."""
        self._job.load_initial()

    # Forward ---------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> list[Bytes]:
        """How many tensors are closed over, the ys of the steps, and the graphs of the windows recorded in them."""
        job = self._job
        closed = np.array([len(job.stepper.closed_over())], "<i8").view(np.uint8)
        ys = [bytes_of(stack[start:stop]) for stack in job.outputs.leaves or []]
        return [closed, *ys, *self._graphs(start, stop)]

    def put_rows(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        job = self._job
        outputs, like = job.outputs, job.stepper.y_leaves
        if len(arrays) != 1 + len(like) + 2:
            raise DamagedBlock("the ys that were made durable are of another number")
        if arrays[0].view("<i8").tolist() != [len(job.stepper.closed_over())]:
            raise DamagedBlock("later steps close over other tensors than the first ones")
        if outputs.leaves is None and like:
            outputs.leaves = [leaf.new_empty((outputs.steps, *leaf.shape)) for leaf in like]
        with torch.no_grad():
            for stack, data in zip(outputs.leaves or [], arrays[1:-2], strict=True):
                stack[start:stop] = _tensor(data, stack[start:stop])
        self._put_graphs(*arrays[-2:])
        job.begin_at(stop)

    def _graphs(self, start: int, stop: int) -> list[Bytes]:
        """For each window, its start, its number of steps and their numbers; and the marks of these numbers."""
        steps = self._job.stepper
        if not isinstance(steps, CapturedSteps):
            return [np.empty(0, np.uint8)] * 2
        table: list[int] = []
        for window, numbers in self._job.recorded().items():
            if start <= window < stop:
                table += [window, len(numbers), *numbers]
        marks = np.array([xxh3_64_intdigest(mark.encode()) for mark in steps.marks()], "<u8")
        return [np.array(table, "<i8").view(np.uint8), marks.view(np.uint8)]

    def _put_graphs(self, table: Bytes, marks: Bytes) -> None:
        steps = self._job.stepper
        if not isinstance(steps, CapturedSteps):
            return
        ours = {xxh3_64_intdigest(mark.encode()): number for number, mark in enumerate(steps.marks())}
        translated = [ours.get(mark) for mark in marks.view("<u8").tolist()]
        values, position = table.view("<i8").tolist(), 0
        while position < len(values):
            window, count = values[position : position + 2]
            numbers = [translated[number] for number in values[position + 2 : position + 2 + count]]
            if None in numbers:
                raise DamagedBlock("the step is captured otherwise than by the process that began")
            self._job.put_recorded(window, tuple(numbers))
            position += 2 + count

    # Reverse ---------------------------------------------------------------------------------

    def seed(self) -> str | None:
        """Of the cotangents that the reverse sweep begins with."""
        carry, ys = self._job.cotangents()
        given = [None if bar is None else bar for bar in [*carry, *ys]]
        if any(isinstance(bar, torch.Tensor) and bar.layout is not torch.strided for bar in given):
            return None
        there = np.array([bar is not None for bar in [*given, *self._job.xs_bar]], np.uint8)
        return of_bytes([there, *(bytes_of(bar) for bar in given if isinstance(bar, torch.Tensor))])

    def adjoint(self) -> list[Bytes]:
        """Cotangents of the carry, part by part where they are yet to be added, and gradients so far."""
        carry, _ = self._job.cotangents()
        gradients = self._job.stepper.accumulated()
        arrays, counts = [], []
        for bar in [*carry, *gradients]:
            parts = bar if isinstance(bar, tuple) else () if bar is None else (bar,)
            counts.append(len(parts))
            for part in parts:
                if part.layout is not torch.strided:
                    raise StorageError("sparse gradients cannot be made durable; only the forward sweep can be resumed")
                shape = [_DTYPES.index(part.dtype), *part.shape]
                arrays += [np.array(shape, "<i8").view(np.uint8), bytes_of(part)]
        return [np.array(counts, "<i8").view(np.uint8), *arrays]

    def put_adjoint(self, arrays: list[Bytes]) -> None:
        rest = iter(arrays)
        counts = next(rest).view("<i8").tolist()
        found: list[Cotangent] = [self._parts(rest, count) for count in counts]
        size = len(self._job.init)
        if len(found) != size + len(self._job.stepper.accumulated()):
            raise DamagedBlock("the gradients that were made durable are of another number")
        self._job.put_carry_bar(found[:size])
        gradients: list[Any] = found[size:]
        self._job.stepper.put_accumulated(gradients)

    def _parts(self, rest: Any, count: int) -> Cotangent:
        parts = []
        for _ in range(count):
            dtype, *shape = next(rest).view("<i8").tolist()
            device = self._job.init[0].device if self._job.init else torch.get_default_device()
            like = torch.empty(shape, dtype=_DTYPES[dtype], device="meta")  # which takes no memory, whatever its shape
            parts.append(_tensor(next(rest), like, device))
        return None if not parts else parts[0] if len(parts) == 1 else tuple(parts)

    def bars(self, start: int, stop: int) -> list[Bytes]:
        """Rows of the cotangents of stacked xs."""
        return [bytes_of(stack[start:stop]) for stack in self._stacks()]

    def put_bars(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        for stack, data in zip(self._stacks(), arrays, strict=True):
            stack[start:stop] = _tensor(data, stack[start:stop])

    def _stacks(self) -> Leaves:
        bars: Sequence[torch.Tensor | None] = self._job.xs_bar
        return [stack for stack in bars if stack is not None]
