"""What a stored block looks like, and how one tells that it is the one that was written.

Owns the format; must not know the file, nor do I/O.  Any thread may call.

A block is the payload, zeros up to a multiple of the file's block size, and one block
that begins with the header (little endian)::

    8  magic  b"LONGTAPE"        8  step
    2  format version            8  payload length in bytes
    2  kind                      8  sequence number of the write
    4  zeros                     8  xxh3_64 of the payload
    16 run id                    8  xxh3_64 of the 64 bytes above

The header comes last so that a write cut short lacks it.  Run id, kind and step tell
swapped blocks apart, the sequence number a stale block from its successor.

Invariant: a reader who knows key, run and sequence number can foretell every byte of
the header from the payload; a block is sound if and only if the header is just that.
"""

from __future__ import annotations

import struct

import numpy as np
from xxhash import xxh3_64_intdigest

from longtape.actions import Key, Kind
from longtape.errors import UsageError
from longtape.protocols import Bytes

MAGIC = b"LONGTAPE"
VERSION = 1
_FIELDS = struct.Struct("<8sHHI16sqQQQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_NBYTES = _FIELDS.size + _CHECKSUM.size
CODES = {Kind.SNAPSHOT: 1, Kind.RESIDUALS: 2, Kind.RESTART: 3, Kind.PARTS: 4}
KINDS = {code: kind for kind, code in CODES.items()}


def header(run_id: bytes, key: Key, sequence: int, payload: Bytes) -> bytes:
    """The header of a block that holds `payload`; reads all of it for the checksum."""
    kind, step = key
    fields = _FIELDS.pack(
        MAGIC, VERSION, CODES[kind], 0, run_id, step, payload.nbytes, sequence, xxh3_64_intdigest(payload.data)
    )
    return fields + _CHECKSUM.pack(xxh3_64_intdigest(fields))


def difference(expected: bytes, found: bytes) -> str:
    """In words, what is wrong with a header that is not the expected one."""
    magic, version, code, _, run_id, step, nbytes, sequence, checksum = _FIELDS.unpack_from(found)
    want = _FIELDS.unpack_from(expected)
    if not any(found):
        return "where its header should be are zeros: it was never written whole"
    if magic != MAGIC:
        return "its header is not one of Longtape's"
    if _CHECKSUM.pack(xxh3_64_intdigest(found[: _FIELDS.size])) != found[_FIELDS.size :]:
        return "its header is damaged (the header's checksum differs)"
    if version != VERSION:
        return f"its format is version {version}, not {VERSION}"
    if run_id != want[4]:
        return f"it is another run's block ({run_id.hex()})"
    if (code, step) != (want[2], want[5]):
        return f"it is the block of {Key(KINDS[code], step) if code in KINDS else (code, step)}"
    if sequence != want[7]:
        return f"it is an older block of the same item (write {sequence}, not {want[7]})"
    if nbytes != want[6]:
        return f"it holds {nbytes} bytes, not {want[6]}"
    return f"the bytes have checksum {want[8]:016x}, and were written with {checksum:016x}"


def require_bytes(data: Bytes, *, writeable: bool = False) -> None:
    """Refuse what is not one contiguous run of bytes.

    Raises:
        UsageError: Another dtype, more dimensions, gaps, or `writeable` asked for and not given.
    """
    flags = data.flags
    if data.dtype != np.uint8 or data.ndim != 1 or not flags.c_contiguous:
        raise UsageError(
            f"a tier moves contiguous one-dimensional uint8 arrays, not {data.dtype} of shape {data.shape}; "
            "pass a view such as array.reshape(-1).view(numpy.uint8)"
        )
    if writeable and not flags.writeable:
        raise UsageError("a tier was asked to read into a read-only array; pass one that can be written")
