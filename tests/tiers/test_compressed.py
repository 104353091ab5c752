"""Items that are smaller on storage: every byte comes back, or every number within its bound."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtape.actions import Key, Kind
from longtape.errors import DamagedBlock, StorageFull, UsageError
from longtape.protocols import Bytes, Floats
from longtape.testing.tiers import DamagingTier, damage, noise, snapshot
from longtape.tiers.aligned import map_aligned
from longtape.tiers.codecs import LOSSLESS, parse_codec
from longtape.tiers.compressed import CompressedTier
from longtape.tiers.disk import DiskTier
from longtape.tiers.memory import MemoryTier

CODECS = st.sampled_from([parse_codec(name) for name in LOSSLESS])


def smooth(count: int, dtype: str = "f4") -> Bytes:
    return np.sin(np.linspace(0, 20, count)).astype(dtype).view(np.uint8)


@st.composite
def payloads(draw: st.DrawFn) -> Bytes:
    kind = draw(st.sampled_from(["noise", "zeros", "smooth", "mixed"]))
    count = draw(st.sampled_from([0, 1, 2, 17, 1000, 5000, 70_000]))
    if kind == "noise":
        return noise(count, draw(st.integers(0, 99)))
    if kind == "zeros":
        return np.zeros(count, np.uint8)
    found = smooth(count)
    return found if kind == "smooth" else np.concatenate([found, noise(draw(st.integers(0, 999)))])


@settings(max_examples=150)
@given(codec=CODECS, items=st.lists(payloads(), min_size=1, max_size=6))
def test_every_byte_comes_back_and_what_is_stored_is_counted(codec, items):
    below = MemoryTier()
    tier = CompressedTier(below, codec)
    for k, data in enumerate(items):
        tier.reserve(snapshot(k), data.nbytes)
        tier.write(snapshot(k), data)
    assert tier.stored_nbytes == below.bytes_in_use <= sum(data.nbytes for data in items)
    assert tier.bytes_stored == below.bytes_written
    for k, data in reversed(list(enumerate(items))):
        out = noise(data.nbytes, 7)
        tier.read(snapshot(k), out)
        assert np.array_equal(out, data)
        tier.release(snapshot(k))
    assert tier.stored_nbytes == below.bytes_in_use == 0
    tier.close()


@settings(max_examples=200)
@given(
    bound=st.floats(1e-7, 0.9),
    dtype=st.sampled_from(["f4", "f8"]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_numbers_are_off_by_at_most_the_bound_and_nothing_else_is(bound, dtype, scale, seed):
    generator = np.random.default_rng(seed)
    numbers = (scale * generator.standard_normal(500)).astype(dtype)
    integers = generator.integers(0, 1 << 40, 100)
    data = np.concatenate([numbers.view(np.uint8), integers.view(np.uint8)])
    floats = [Floats(0, numbers.nbytes, numbers.itemsize)]
    tier = CompressedTier(MemoryTier(), parse_codec(f"relative:{bound!r}+bitshuffle+zstd"), lambda kind, nbytes: floats)
    before = data.copy()
    tier.reserve(snapshot(1), data.nbytes)
    tier.write(snapshot(1), data)
    assert np.array_equal(data, before)
    out = np.empty_like(data)
    tier.read(snapshot(1), out)
    found = out[: numbers.nbytes].view(dtype)
    assert (np.abs(found.astype("f8") - numbers.astype("f8")) <= bound * np.abs(numbers.astype("f8"))).all()
    assert np.array_equal(out[numbers.nbytes :], integers.view(np.uint8))
    tier.close()


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, np.finfo("f4").max])
def test_a_rounding_never_makes_another_value_of_what_is_not_a_number(special):
    numbers = np.full(4000, 0.1, "f4")
    numbers[7] = special
    codec = parse_codec("relative:1e-2+lz4")
    out = np.empty_like(numbers)
    codec.decode(codec.encode(numbers.view(np.uint8), [Floats(0, numbers.nbytes, 4)]), out.view(np.uint8))
    assert np.array_equal(out[7], numbers[7], equal_nan=True)


@pytest.mark.parametrize("how", ["flip", "zero", "truncate", "swap"])
def test_damage_on_disk_is_found(tmp_path: Path, how: str) -> None:
    data = smooth(50_000)
    for seed in range(5):
        tier = CompressedTier(DiskTier(tmp_path), parse_codec("bitshuffle+lz4"))
        below = tier.inner
        assert isinstance(below, DiskTier)
        tier.reserve(snapshot(1), data.nbytes)
        tier.write(snapshot(1), data)
        stored = tier.stored_nbytes
        _, room = map_aligned(-(-stored // 4096) * 4096, 4096)
        os.preadv(below.fileno(), [room.data], 0)
        before = room[:stored].copy()
        damage(room[:stored], how, random.Random(seed))
        os.pwritev(below.fileno(), [room.data], 0)
        if not np.array_equal(before, room[:stored]):
            with pytest.raises(DamagedBlock):
                tier.read(snapshot(1), np.empty_like(data))
        del room
        tier.close()


@settings(max_examples=60)
@given(seed=st.integers(0, 1000), how=st.sampled_from(["flip", "zero", "truncate", "swap"]), codec=CODECS)
def test_damage_under_a_tier_without_checksums_is_never_a_crash(seed, how, codec):
    """Whatever bytes a decoder is given, it fills the array or says that it cannot."""
    data = smooth(5000)
    tier = CompressedTier(DamagingTier(MemoryTier(), lambda call: True, how=how, seed=seed), codec)
    tier.reserve(snapshot(1), data.nbytes)
    tier.write(snapshot(1), data)
    room = np.full(data.nbytes + 4096, 7, np.uint8)
    try:
        tier.read(snapshot(1), room[2048:-2048])
    except DamagedBlock as error:
        assert codec.name in str(error)
    assert (room[:2048] == 7).all()
    assert (room[-2048:] == 7).all()
    tier.close()


def test_a_limit_counts_what_is_stored(tmp_path: Path) -> None:
    data, limit = smooth(64 * 1024), 2 << 20
    plain, packed = (
        DiskTier(tmp_path, limit=limit),
        CompressedTier(DiskTier(tmp_path, limit=limit), parse_codec("bitshuffle+zstd")),
    )

    def fill(tier) -> int:
        for k in range(1000):
            try:
                tier.reserve(snapshot(k), data.nbytes)
                tier.write(snapshot(k), data)
            except StorageFull:
                return k
        raise AssertionError("never full")

    most, kept = fill(plain), fill(packed)
    assert kept > 1.5 * most
    assert packed.inner.peak_bytes <= limit
    out = np.empty_like(data)
    for k in range(kept):
        packed.read(snapshot(k), out)
        assert np.array_equal(out, data)
    packed.release(snapshot(kept))  # its write failed, and it takes no room
    for k in range(kept):
        packed.release(snapshot(k))
    assert packed.stored_nbytes == packed.inner.bytes_in_use == 0
    plain.close()
    packed.close()


def test_other_threads_run_while_a_codec_works():
    """A Python thread goes on counting at about its own pace."""
    data, codec, counted = smooth(1 << 20), parse_codec("bitshuffle+zstd"), [0]
    working = threading.Event()
    done = threading.Event()

    def work() -> None:
        out = np.empty_like(data)
        working.wait()
        for _ in range(10):
            codec.decode(codec.encode(data), out)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    working.set()
    while not done.is_set():
        counted[0] += 1
    thread.join()
    assert counted[0] > 1000


@pytest.mark.parametrize(
    "name",
    ["", "gzip", "bitshuffle", "relative:1e-4", "relative:0+lz4", "relative:x+lz4", "relative:2+zstd", "lz4+", 5],
)
def test_what_is_no_codec_is_refused(name):
    with pytest.raises(UsageError, match="compress="):
        parse_codec(name)


def test_kinds_are_rounded_apart():
    floats = {Kind.SNAPSHOT: [Floats(0, 400, 4)], Kind.RESIDUALS: []}
    numbers = np.full(1000, 1 / 3, "f4").view(np.uint8)
    tier = CompressedTier(MemoryTier(), parse_codec("relative:1e-2+lz4"), lambda kind, nbytes: floats[kind])
    for kind in floats:
        tier.reserve(Key(kind, 1), numbers.nbytes)
        tier.write(Key(kind, 1), numbers)
        out = np.empty_like(numbers)
        tier.read(Key(kind, 1), out)
        assert np.array_equal(out[400:], numbers[400:])
        assert np.array_equal(out, numbers) == (kind is Kind.RESIDUALS)
    tier.close()
