"""The journal: an append-only file of checksummed records.

Owns the format of the file and what of it can be trusted; must not know what the
records mean.  Appended to by one thread at a time.

A record is (little endian)::

    8  magic  b"LTRECORD"        8  number of the record, from 0
    4  length of the JSON text   8  xxh3_64 of the bytes above
    4  zeros                     …  JSON text, an object
    8  length of the payload     …  payload, raw bytes
    16 run id                    8  xxh3_64 of text and payload

Invariants: whatever the bytes of a file, reading it ends, executes nothing, and holds one record
at a time, in no more bytes than it takes in the file and a few MiB; a record counts only if all
before it do; an append that fails leaves the records before it as they were.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_64, xxh3_64_intdigest

MAGIC = b"LTRECORD"
MOST_TEXT_NBYTES = 1 << 16
"""Of the JSON text: what is large goes into the payload, which is never parsed."""
_FIELDS = struct.Struct("<8sIIQ16sQ")
_CHECKSUM = struct.Struct("<Q")
HEAD_NBYTES = _FIELDS.size + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class Record:
    """One sound record."""

    run_id: bytes
    header: dict[str, Any]
    payload: bytes | bytearray


def encode(run_id: bytes, number: int, header: Mapping[str, Any], payload: bytes | bytearray = b"") -> bytes:
    """A record as bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MOST_TEXT_NBYTES:
        raise ValueError(f"a record's text has {len(text)} bytes; the most is {MOST_TEXT_NBYTES}")
    fields = _FIELDS.pack(MAGIC, len(text), 0, len(payload), run_id, number)
    body = xxh3_64(text)
    body.update(payload)
    return b"".join(
        [fields, _CHECKSUM.pack(xxh3_64_intdigest(fields)), text, payload, _CHECKSUM.pack(body.intdigest())]
    )


def read(fd: int, *, after: tuple[Record, int] | None = None) -> Iterator[tuple[Record, int]]:
    """The sound records of a file, each with the offset at which it ends.

    Args:
        fd: Of the file.
        after: The first record, if it is known; then only those that follow.

    Raises:
        OSError: The system could not read them.
    """
    size, offset, number, run_id = os.fstat(fd).st_size, 0, 0, None
    if after is not None:
        offset, number, run_id = after[1], 1, after[0].run_id
    while (found := _read_one(fd, offset, size)) is not None:
        record, its_number, end = found
        if its_number != number or run_id not in (None, record.run_id):
            return
        offset, number, run_id = end, number + 1, record.run_id
        del found
        yield record, end
        del record  # before the next one is read


def _read_one(fd: int, offset: int, size: int) -> tuple[Record, int, int] | None:
    if size - offset < HEAD_NBYTES:
        return None
    head = exactly(fd, HEAD_NBYTES, offset)
    if not begins_sound(head):
        return None
    _, text_nbytes, _, payload_nbytes, run_id, number = _FIELDS.unpack_from(head)
    end = offset + HEAD_NBYTES + text_nbytes + payload_nbytes + _CHECKSUM.size
    if text_nbytes > MOST_TEXT_NBYTES or end > size:  # lengths are believed only as far as the file reaches
        return None
    text = exactly(fd, text_nbytes, offset + HEAD_NBYTES)
    payload = exactly(fd, payload_nbytes, offset + HEAD_NBYTES + text_nbytes)
    checksum = exactly(fd, _CHECKSUM.size, end - _CHECKSUM.size)
    body = xxh3_64(text)
    body.update(payload)
    if _CHECKSUM.pack(body.intdigest()) != checksum:
        return None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return (Record(run_id, header, payload), number, end) if isinstance(header, dict) else None


def begins_sound(head: bytes | bytearray) -> bool:
    """Whether a record begins here, whatever follows its head; or one that was cut off within it."""
    if len(head) < HEAD_NBYTES:
        return head[: len(MAGIC)] == MAGIC
    checksum = _CHECKSUM.pack(xxh3_64_intdigest(head[: _FIELDS.size]))
    return head[: len(MAGIC)] == MAGIC and head[_FIELDS.size : HEAD_NBYTES] == checksum


def exactly(fd: int, nbytes: int, offset: int) -> bytearray:
    """So many bytes from an offset on, which the file must have, in one piece.  Raises `OSError`."""
    found, done = bytearray(nbytes), 0
    with memoryview(found) as room:
        while done < nbytes:
            read = os.preadv(fd, [room[done:]], offset + done)
            if not read:
                raise OSError(errno.EIO, f"the system read {done} of {nbytes} bytes and gave no reason")
            done += read
    return found


class Journal:
    """Appends to an open file, behind the sound records that it holds.

    Args:
        fd: Open for both; closed by its owner.
        run_id: 16 bytes that all records bear.
        end: Where the last sound record ends; what comes after is cut off.
        count: How many sound records there are.
    """

    def __init__(self, fd: int, run_id: bytes, *, end: int = 0, count: int = 0) -> None:
        self._fd, self._run_id = fd, run_id
        self._end, self._count = end, count

    def append(self, header: Mapping[str, Any], payload: bytes | bytearray = b"") -> None:
        """Append a record; on return it is durable.  Raises `OSError`; it may then be tried again."""
        data = memoryview(encode(self._run_id, self._count, header, payload))
        os.ftruncate(self._fd, self._end)
        done = 0
        while done < len(data):
            written = os.pwrite(self._fd, data[done:], self._end + done)
            if not written:
                raise OSError(errno.EIO, f"the system wrote {done} of {len(data)} bytes and gave no reason")
            done += written
        os.fdatasync(self._fd)
        self._end += len(data)
        self._count += 1
