"""Reads and writes that do all of what was asked, however the system cuts it up.

Owns the loops over short transfers and interruptions, and the buffers that carry what
is not aligned; must not know what the bytes mean.  Workers enter; the buffers are one
set a thread.

Invariants: after a short direct transfer the next one begins at a multiple of `block`, as
direct I/O wants; an aligned payload goes in one system call, whatever its size, for cutting it
up was measured to be slower.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence

from longtape.protocols import Bytes
from longtape.tiers.aligned import address_of, map_aligned

BOUNCE_NBYTES = 1 << 20


class Bounce(threading.local):
    """Aligned buffers of the calling thread."""

    def __init__(self, block: int, alignment: int) -> None:
        self.block, self._alignment = block, max(alignment, 8)
        _, self.ending = map_aligned(2 * block, self._alignment)
        """Two blocks: the last payload bytes where they fill no block, and the header's block."""
        self.header = self.ending[block:].data
        self._chunk: Bytes | None = None

    @property
    def chunk(self) -> Bytes:
        """Room for a piece of a payload that is not aligned."""
        if self._chunk is None:
            _, self._chunk = map_aligned(max(BOUNCE_NBYTES, self.block), self._alignment)
        return self._chunk


class WholeFile:
    """A file that is read and written in blocks.

    Args:
        fd: Open for both; closed by its owner.
        block: What offsets and lengths are multiples of, in bytes.
        memory_alignment: What addresses given to the system are multiples of.
        direct: Whether calls, too, must begin at whole blocks; else only items do.
    """

    def __init__(self, fd: int, *, block: int, memory_alignment: int, direct: bool) -> None:
        self.fd, self.block, self.memory_alignment = fd, block, memory_alignment
        self._grain = block if direct else 1
        self._bounce = Bounce(block, memory_alignment)

    def size_of(self, nbytes: int) -> int:
        """What a payload of `nbytes` takes in the file, header included."""
        return (-(-nbytes // self.block) + 1) * self.block

    def write(self, offset: int, payload: Bytes, header: bytes) -> None:
        """Write payload, padding and header at `offset`.  Raises `OSError`."""
        bounce, block = self._bounce, self.block
        tail = payload.nbytes % block
        whole = payload.nbytes - tail
        bounce.header[: len(header)] = header
        ending = bounce.ending if tail else bounce.ending[block:]
        if tail:
            ending[:tail] = payload[whole:]
            ending[tail:block] = 0
        if self._is_aligned(payload):
            body = payload if not tail else payload[:whole]
            self._write([body, ending] if whole else [ending], whole + ending.nbytes, offset)
            return
        chunk = bounce.chunk
        for start in range(0, whole, chunk.nbytes):
            part = chunk[: min(chunk.nbytes, whole - start)]
            part[:] = payload[start : start + part.nbytes]
            self._write([part], part.nbytes, offset + start)
        self._write([ending], ending.nbytes, offset + whole)

    def read(self, offset: int, out: Bytes, header_nbytes: int) -> bytes | None:
        """Fill `out` from `offset`; the header's first bytes, or None if the file ends too soon.  Raises `OSError`."""
        bounce, block = self._bounce, self.block
        tail = out.nbytes % block
        whole = out.nbytes - tail
        ending = bounce.ending if tail else bounce.ending[block:]
        if self._is_aligned(out):
            body = out if not tail else out[:whole]
            complete = self._read([body, ending] if whole else [ending], whole + ending.nbytes, offset)
        else:
            complete = self._read_by_chunks(offset, out[:whole])
            complete = complete and self._read([ending], ending.nbytes, offset + whole)
        if not complete:
            return None
        if tail:
            out[whole:] = ending[:tail]
        return bytes(bounce.header[:header_nbytes])

    def _read_by_chunks(self, offset: int, out: Bytes) -> bool:
        chunk = self._bounce.chunk
        for start in range(0, out.nbytes, chunk.nbytes):
            part = chunk[: min(chunk.nbytes, out.nbytes - start)]
            if not self._read([part], part.nbytes, offset + start):
                return False
            out[start : start + part.nbytes] = part
        return True

    def _is_aligned(self, data: Bytes) -> bool:
        return self.memory_alignment == 1 or address_of(data) % self.memory_alignment == 0

    def _write(self, buffers: Sequence[Bytes], nbytes: int, offset: int) -> None:
        done = self._all(os.pwritev, buffers, nbytes, offset)
        if done < nbytes:
            raise OSError(errno.EIO, f"the system wrote {done} of {nbytes} bytes and gave no reason")

    def _read(self, buffers: Sequence[Bytes], nbytes: int, offset: int) -> bool:
        return self._all(os.preadv, buffers, nbytes, offset) == nbytes

    def _all(self, call: Callable[..., int], buffers: Sequence[Bytes], nbytes: int, offset: int) -> int:
        """Call until `nbytes` have moved, or a call moves nothing; how many bytes moved."""
        done, rest = 0, buffers
        while True:
            try:
                moved = call(self.fd, rest, offset + done)
            except InterruptedError:
                continue
            if done + moved == nbytes:
                return nbytes
            useful = moved - moved % self._grain
            if useful <= 0:
                return done
            done += useful
            rest = _from(buffers, done)


def _from(buffers: Sequence[Bytes], done: int) -> list[Bytes]:
    """What is left of `buffers` after `done` bytes."""
    rest = []
    for buffer in buffers:
        if done < buffer.nbytes:
            rest.append(buffer[done:])
        done = max(0, done - buffer.nbytes)
    return rest
