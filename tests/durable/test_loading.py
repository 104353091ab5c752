"""What a file in a resume directory may make of itself in memory: its own size, and 16 MiB."""

import contextlib
import json
import struct
import tracemalloc

import numpy as np
import pytest
from models import Chaotic

from longtape.cli import _described
from longtape.durable import journal
from longtape.durable.home import Home
from longtape.durable.leftovers import leftovers
from longtape.errors import ResumeError
from tests.durable.programs import SIZE
from tests.durable.test_resume import begin, resume

MIB = 1 << 20
MOST_BESIDE = 16 * MIB


def long_payload(first):
    return [(first.header, bytes(first.payload) + bytes(64 * MIB))]


def long_point(header):
    """A point that names a million items."""
    rows = np.zeros((64 * MIB // 48, 6), "<i8")
    rows[:, 0], rows[:, 1], rows[:, 2:4], rows[:, 5] = 1, np.arange(len(rows)), 1, 1
    return [header, ({**point_header(), "reached": 3}, rows.tobytes())]


def point_header(**more):
    return {
        "what": "point",
        "reached": 0,
        "turned": False,
        "seed": None,
        "anew": False,
        "adjoint": None,
        "rows": None,
        "bars": None,
    } | more


def many_objects(header):
    """Texts that are many times as large as objects."""
    text = point_header(other=[[]] * 20_000)
    return [header, *[(text, b"")] * (2 * MIB // len(json.dumps(text, separators=(",", ":"))))]


def many_stretches(header):
    stretch = {"first": 1 << 60, "count": 1, "start": 1 << 59, "stop": 1 << 60}
    text = point_header(rows=stretch, bars=stretch)
    return [header, *[(text, b"")] * (4 * MIB // 400)]


def long_stretch(header):
    return [header, (point_header(rows={"first": 0, "count": 1 << 23, "start": 0, "stop": 1}), b"")]


@pytest.mark.parametrize("make", [long_payload, long_point, many_objects, many_stretches, long_stretch])
def test_little_is_allocated(tmp_path, make):
    begin(tmp_path)
    home = Home(tmp_path, "sweep")
    first = home.first
    home.close()
    records = make(first) if make is long_payload else make((first.header, first.payload))
    path = tmp_path / "sweep.longtape-journal"
    with open(path, "wb") as file:
        for number, (header, payload) in enumerate(records):
            file.write(journal.encode(first.run_id, number, header, payload))
    del records
    most = path.stat().st_size + MOST_BESIDE

    tracemalloc.start()
    try:
        for left in leftovers(tmp_path):
            _described(left)
        assert tracemalloc.get_traced_memory()[1] <= most
        del left
        tracemalloc.reset_peak()
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ResumeError):
            patch.setattr("warnings.warn", lambda *arguments, **options: None)
            resume(tmp_path, Chaotic(SIZE)).close()
        assert tracemalloc.get_traced_memory()[1] <= most
    finally:
        tracemalloc.stop()


def test_a_record_whose_length_is_beyond_the_file(tmp_path):
    path = tmp_path / "x"
    data = bytearray(journal.encode(bytes(16), 0, {}, b"payload"))
    data[16:24] = struct.pack("<Q", 1 << 40)
    path.write_bytes(data)
    with open(path, "rb") as file:
        assert list(journal.read(file.fileno())) == []
