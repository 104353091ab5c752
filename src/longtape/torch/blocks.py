"""Where the residuals of consecutive steps lie in a flat byte buffer.

This file owns copying residuals into a buffer and finding them there again.  It knows
nothing of Dynamo, programs, or where the buffer's bytes travel in between.

A block holds a *head* and then one *stride* per step; the first step has the head and
its stride.  A carry leaf that backward needs is the last step's result: where that step
has stored it in the same block, it is not stored twice.

A buffer in the host's memory comes as an array, one on a device as a tensor; then everything
here is one more thing for the device to do, in the order of its computations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from longtape.errors import LongtapeError
from longtape.protocols import Floats
from longtape.torch.graphs import Residual, StepGraph

Bytes = npt.NDArray[np.uint8]

_SMALL = 1 << 16
"""Below this many bytes per step a tensor object per residual and step would outweigh the bytes it names.

Such residuals go through one staging buffer with fixed views, and one copy of bytes.
"""


class RoomExceeded(LongtapeError):
    """A step met a graph, new to its `CapturedStep`, with more residuals than the block has room for.

    The step was run; its results are in `carry` and `y`, its residuals are lost.
    """

    carry: list[torch.Tensor | None]
    y: list[torch.Tensor | None]


class Staging:
    """Fixed places for one step's residuals, and the views of them that programs read and write."""

    def __init__(self, graph: StepGraph, device: torch.device | None) -> None:
        nbytes = max(graph.nbytes, 1)
        self.buffer = np.empty(nbytes if device is None else 0, np.uint8)
        """The memory as an array, where it is the host's."""
        self.memory = (
            torch.from_numpy(self.buffer) if device is None else torch.empty(nbytes, dtype=torch.uint8, device=device)
        )
        self.views = [_view(self.memory, 0, residual) for residual in graph.residuals]


class Block:
    """Typed access to one buffer that holds the residuals of consecutive steps.

    The caller owns `data`, and may move its bytes elsewhere and into another buffer: a
    block keeps no values, only views.  At most one thread at a time.
    """

    def __init__(
        self, data: Bytes | torch.Tensor, head_nbytes: int, stride_nbytes: int, staging: dict[object, Staging]
    ) -> None:
        self._data = None if isinstance(data, torch.Tensor) else data
        """The bytes as an array, where they are the host's."""
        self._memory = data if isinstance(data, torch.Tensor) else torch.from_numpy(data)
        self._device = data.device if isinstance(data, torch.Tensor) else None
        self._head = head_nbytes
        self._stride = stride_nbytes
        self._staging = staging
        self._views: dict[object, list[torch.Tensor]] = {}
        self._last: tuple[int, StepGraph, Sequence[torch.Tensor | None]] | None = None

    def linked(self, position: int, graph: StepGraph, carry: Sequence[torch.Tensor | None]) -> StepGraph | None:
        """The graph of the step before, where it has stored every linkable leaf of `carry` in this block."""
        if self._last is None or not graph.linkable or self._last[0] != position - 1:
            return None
        _, before, results = self._last
        return before if all(k in before.stored_carry and results[k] is carry[k] for k in graph.linked_leaves) else None

    def store(self, position: int, graph: StepGraph, residuals: list[torch.Tensor], *, linked: bool) -> None:
        """Copy a step's residuals to its place.

        Raises:
            RoomExceeded: they do not fit; nothing was copied.
        """
        start, room = self._place(position)
        needed = graph.linked_nbytes if linked else graph.nbytes
        if needed > room:
            raise RoomExceeded(
                f"a step takes {needed} bytes of residuals where {room} were set aside: it went another way "
                "than the steps before it; make a new block"
            )
        count = len(graph.residuals) - (graph.linkable if linked else 0)
        if not count:
            return
        sources = residuals[:count] if linked else residuals
        if graph.nbytes <= _SMALL:
            staging = self._staged(graph, "own")
            torch._foreach_copy_(staging.views[:count], sources)
            if self._data is None:
                self._memory[start : start + needed].copy_(staging.memory[:needed])
            else:
                self._data[start : start + needed] = staging.buffer[:needed]
        else:
            views = self._views_at(position, graph)
            torch._foreach_copy_(views[:count] if linked else views, sources)

    def remember(self, position: int, graph: StepGraph, carry: Sequence[torch.Tensor | None]) -> None:
        """Note the results of the step just stored, for the next one to be linked to it."""
        self._last = (position, graph, carry)

    def load(self, position: int, graph: StepGraph, before: StepGraph | None) -> list[torch.Tensor]:
        """A step's residuals, in the order of its graph; valid until the next `load` or `store`.

        Args:
            position: of the step in the block.
            graph: the step's.
            before: what `linked` answered when it was stored.
        """
        if graph.nbytes > _SMALL:
            key = (position, graph, before)
            if key not in self._views:
                self._views[key] = self._views_at(position, graph)
                if before is not None:
                    earlier = self._views_at(position - 1, before)
                    links = [earlier[before.stored_carry[k]] for k in graph.linked_leaves]
                    self._views[key] = self._views[key][: len(graph.residuals) - graph.linkable] + links
            return self._moved(graph, self._views[key])
        start, _ = self._place(position)
        needed = graph.nbytes if before is None else graph.linked_nbytes
        staging = self._staged(graph, "own")
        self._unpack(staging, slice(0, needed), start)
        if before is None:
            return self._moved(graph, staging.views)
        stored = staging.views[: len(graph.residuals) - graph.linkable]
        return self._moved(graph, stored + self._links(position, graph, before))

    def _unpack(self, staging: Staging, place: slice, start: int) -> None:
        """Copy a part of a step's residuals, whose part of the buffer begins at `start`."""
        begin, end = start + place.start, start + place.stop
        if self._data is None:
            staging.memory[place].copy_(self._memory[begin:end])
        else:
            staging.buffer[place] = self._data[begin:end]

    def _moved(self, graph: StepGraph, views: list[torch.Tensor]) -> list[torch.Tensor]:
        """The residuals where backward wants them."""
        if graph.devices <= {self._memory.device}:
            return views
        return [view.to(residual.device) for view, residual in zip(views, graph.residuals, strict=True)]

    def _links(self, position: int, graph: StepGraph, before: StepGraph) -> list[torch.Tensor]:
        start, _ = self._place(position - 1)
        staging = self._staged(before, "before")
        views = []
        for leaf in graph.linked_leaves:
            number = before.stored_carry[leaf]
            residual = before.residuals[number]
            place = slice(residual.offset, residual.offset + residual.nbytes)
            self._unpack(staging, place, start)
            views.append(staging.views[number])
        return views

    def _place(self, position: int) -> tuple[int, int]:
        """Where a step's part begins, and its length."""
        if position == 0:
            return 0, self._head + self._stride
        return self._head + position * self._stride, self._stride

    def _staged(self, graph: StepGraph, use: str) -> Staging:
        key = (graph, use, self._device)
        staging = self._staging.get(key)
        if staging is None:
            staging = self._staging[key] = Staging(graph, self._device)
        return staging

    def _views_at(self, position: int, graph: StepGraph) -> list[torch.Tensor]:
        key = (position, graph)
        views = self._views.get(key)
        if views is None:
            start, room = self._place(position)
            fitting = [r for r in graph.residuals if r.offset + r.nbytes <= room]
            views = self._views[key] = [_view(self._memory, start, r) for r in fitting]
        return views


def number_nbytes(dtype: torch.dtype) -> int:
    """Bytes of each number of a type that a lossy codec may round; 0 where it may not."""
    return {torch.float32: 4, torch.complex64: 4, torch.float64: 8, torch.complex128: 8}.get(dtype, 0)


def floats_in_block(graph: StepGraph, nbytes: int, head_nbytes: int, stride_nbytes: int) -> list[Floats]:
    """Where a block, all of whose steps took one graph, holds floating-point numbers; runs that touch are joined."""
    found: list[Floats] = []
    start, room = 0, head_nbytes + stride_nbytes
    while stride_nbytes and start + room <= nbytes:
        for residual in graph.residuals:
            size = number_nbytes(residual.dtype)
            if not size or residual.offset + residual.nbytes > room:
                continue
            run = Floats(start + residual.offset, start + residual.offset + residual.nbytes, size)
            if found and found[-1].stop == run.start and found[-1].itemsize == size:
                run = Floats(found.pop().start, run.stop, size)
            found.append(run)
        start, room = start + room, stride_nbytes
    return found


def _view(memory: torch.Tensor, start: int, residual: Residual) -> torch.Tensor:
    begin = start + residual.offset
    flat = memory[begin : begin + residual.nbytes].view(residual.dtype)
    return flat.as_strided(residual.size, residual.stride)
