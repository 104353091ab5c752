"""What is particular to the disk tier: the file, short transfers, damage, fullness, threads."""

import ctypes
import errno
import mmap
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtape.actions import Key, Kind
from longtape.errors import DamagedBlock, StateError, StorageError, StorageFull, UsageError
from longtape.testing.tiers import noise, snapshot
from longtape.tiers import behind, disk, linux
from longtape.tiers.block import HEADER_NBYTES, difference, header
from longtape.tiers.disk import DiskTier
from longtape.tiers.scratch import open_scratch
from tests.tiers.faulty_system import Cut, Fault

MODES = pytest.mark.parametrize("direct", [None, False], ids=["direct", "buffered"])
NBYTES = 10_000  # two blocks and a part of one, then the header's
HEADER_AT = 12_288


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., DiskTier]]:
    tiers: list[DiskTier] = []

    def make_tier(directory: Path = tmp_path, **options: object) -> DiskTier:
        tiers.append(DiskTier(directory, **options))  # type: ignore[arg-type]
        return tiers[-1]

    yield make_tier
    for tier in tiers:
        tier.close()
    assert os.listdir(tmp_path) == []


def put(tier: DiskTier, step: int, nbytes: int = NBYTES, *, seed: int | None = None) -> np.ndarray:
    data = noise(nbytes, step if seed is None else seed)
    tier.reserve(snapshot(step), nbytes)
    tier.write(snapshot(step), data)
    return data


def get(tier: DiskTier, step: int, nbytes: int = NBYTES) -> np.ndarray:
    out = noise(nbytes, 99)
    tier.read(snapshot(step), out)
    return out


def peek(tier: DiskTier, offset: int, nbytes: int) -> bytes:
    with open(f"/proc/self/fd/{tier.fileno()}", "rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def poke(tier: DiskTier, offset: int, content: bytes) -> None:
    with open(f"/proc/self/fd/{tier.fileno()}", "r+b") as file:
        file.seek(offset)
        file.write(content)


# The file --------------------------------------------------------------------------------------


def test_the_file_has_no_name_and_is_private(make: Callable[..., DiskTier], tmp_path: Path) -> None:
    tier = make()
    put(tier, 1)
    status = os.fstat(tier.fileno())
    assert status.st_nlink == 0
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert not os.get_inheritable(tier.fileno())
    assert os.listdir(tmp_path) == []
    assert tier.directory == str(tmp_path)


def without_anonymous_files(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return real(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", refuse)


def test_where_no_file_can_be_anonymous_it_loses_its_name_at_once(
    make: Callable[..., DiskTier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_anonymous_files(monkeypatch)
    names: list[str] = []
    real = os.unlink

    def unlink(name: str) -> None:
        names.append(name)
        real(name)

    monkeypatch.setattr(os, "unlink", unlink)
    tier = make()
    status = os.fstat(tier.fileno())
    assert len(names) == 1
    assert Path(names[0]).parent == tmp_path
    assert status.st_nlink == 0
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert not os.get_inheritable(tier.fileno())
    assert np.array_equal(put(tier, 1), get(tier, 1))


def test_a_name_that_cannot_be_removed_is_an_error(
    make: Callable[..., DiskTier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_anonymous_files(monkeypatch)
    real = os.unlink

    def refuse(name: str) -> None:
        real(name)
        raise OSError(errno.EIO, "made to fail")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(StorageError, match="cannot be made anonymous"):
        make()


def test_nothing_is_left_of_a_killed_process(tmp_path: Path) -> None:
    program = (
        "import sys, time, numpy\nfrom longtape.tiers.disk import DiskTier\nfrom longtape.actions import Key, Kind\n"
        f"tier = DiskTier({str(tmp_path)!r})\nkey = Key(Kind.SNAPSHOT, 1)\ntier.reserve(key, 5000)\n"
        "tier.write(key, numpy.zeros(5000, numpy.uint8))\nprint('written', flush=True)\nsys.stdin.read()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert os.listdir(tmp_path) == []


def test_directories_that_will_not_do_are_named(make: Callable[..., DiskTier], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        make(tmp_path / "missing")
    with pytest.raises(UsageError, match="is not a directory"):
        make(Path(__file__))
    with pytest.raises(UsageError, match=r"/proc .*name a directory you can write to"):
        make(Path("/proc"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_named(make: Callable[..., DiskTier], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    try:
        with pytest.raises(UsageError, match="Permission denied"):
            make(locked)
    finally:
        locked.rmdir()


def test_arguments_are_checked(make: Callable[..., DiskTier]) -> None:
    with pytest.raises(UsageError, match="16 bytes"):
        make(run_id=b"short")
    with pytest.raises(UsageError, match="negative"):
        make(limit=-1)


def test_a_failure_while_setting_up_leaves_no_descriptor(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "ftruncate", raiser(OSError(errno.EIO, "made to fail")))
    with pytest.raises(StorageError, match="cannot be set up"):
        make()
    monkeypatch.setattr(os, "ftruncate", raiser(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        make()


def raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# Direct or not -----------------------------------------------------------------------------------


def is_direct(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def test_direct_is_what_the_descriptor_says(make: Callable[..., DiskTier]) -> None:
    for direct in (None, False):
        tier = make(direct=direct)
        assert tier.direct == is_direct(tier.fileno())
        assert (tier.fallback_reason is None) == tier.direct
    assert make(direct=False).fallback_reason == "not asked for"


def test_a_file_system_that_refuses_writes_is_used_buffered(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def refuse(fd: int, buffers: list[Any], offset: int) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refuse)
    tier = make()
    assert not tier.direct
    assert "refuses it (Invalid argument)" in (tier.fallback_reason or "")
    assert np.array_equal(put(tier, 1), get(tier, 1))
    with pytest.raises(UsageError, match="refuses it"):
        make(direct=True)


def test_a_file_system_that_says_it_cannot_is_believed(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "direct_alignment", lambda fd: (0, 0))
    monkeypatch.setattr(linux, "file_system", lambda fd: "someotherfs")
    tier = make()
    assert not tier.direct
    assert "someotherfs" in (tier.fallback_reason or "")


def test_a_file_system_that_lies_is_found_out(make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "file_system", lambda fd: "ext4")
    monkeypatch.setattr(linux, "direct_alignment", lambda fd: None)
    Cut(monkeypatch, "preadv", 0)
    tier = make()
    assert not tier.direct
    assert "did not come back" in (tier.fallback_reason or "")


@pytest.mark.parametrize("told", [None, (4, 512), (512, 4096), (4096, 16384)])
def test_whatever_alignment_the_system_tells(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, told: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(linux, "direct_alignment", lambda fd: told)
    tier = make()
    assert tier.block_nbytes == max(4096, told[1] if told else 0)
    for i, nbytes in enumerate((1, 4096, 16384, 100_001)):
        assert np.array_equal(put(tier, i, nbytes), get(tier, i, nbytes))


def test_strange_block_sizes_are_not_believed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.fstat

    class Status:
        st_blksize = 1 << 20  # as network file systems say

        def __init__(self, fd: int) -> None:
            self.st_dev = real(fd).st_dev

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", Status)
        scratch = open_scratch(tmp_path)
    scratch.file.close()
    assert scratch.block == 4096
    assert "scratch file in" in str(scratch)


def test_system_calls_the_system_lacks_are_done_without(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "_libc", object())
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.setattr(behind, "BATCH_NBYTES", 1)
    for direct in (None, False):
        tier = make(direct=direct)
        assert np.array_equal(put(tier, 1), get(tier, 1))


def test_the_type_of_a_file_system_may_stay_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        assert linux.file_system(file.fileno())
        monkeypatch.setattr(Path, "read_text", raiser(FileNotFoundError()))
        assert linux.file_system(file.fileno()) is None
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: "rubbish\n22 27 0:21 / /proc rw - proc proc rw\n")
        assert linux.file_system(file.fileno()) is None


def cached_bytes(tier: DiskTier) -> int:
    nbytes = tier.file_bytes
    with mmap.mmap(tier.fileno(), nbytes, prot=mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        pages = np.zeros(-(-nbytes // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None)
        address, vector = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(pages.ctypes.data)
        assert libc.mincore(address, ctypes.c_size_t(nbytes), vector) == 0
        del view
    return int((pages & 1).sum()) * mmap.PAGESIZE


def test_a_buffered_file_is_dropped_from_the_cache(make: Callable[..., DiskTier]) -> None:
    tier, item = make(direct=False), 1 << 20
    count = behind.BATCH_NBYTES // item
    put(tier, 0, item)
    assert cached_bytes(tier) >= item  # so the question means something
    for i in range(1, count):
        put(tier, i, item)
    assert cached_bytes(tier) == 0
    assert np.array_equal(get(tier, 1, item), noise(item, 1))
    assert cached_bytes(tier) == 0


def test_a_direct_file_is_never_in_the_cache(make: Callable[..., DiskTier]) -> None:
    tier = make()
    if not tier.direct:
        pytest.skip("no direct I/O here")
    data = put(tier, 1, 1 << 20)
    assert np.array_equal(get(tier, 1, 1 << 20), data)
    assert cached_bytes(tier) == 0


def test_a_page_that_cannot_reach_the_disk_is_an_error(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "finish_writeback", raiser(OSError(errno.EIO, "Input/output error")))
    tier = make(direct=False)
    tier._behind = behind.DropBehind(tier.fileno(), batch_nbytes=20_000)
    put(tier, 1)
    with pytest.raises(StorageError, match="to write snapshot 2") as caught:
        put(tier, 2)
    assert caught.value.errno == errno.EIO
    with pytest.raises(StateError):
        get(tier, 2)


def test_what_fills_a_block_up_is_zeros(make: Callable[..., DiskTier]) -> None:
    """Or bytes of another item would stay on the disk with this one."""
    tier = make()
    put(tier, 0)
    put(tier, 1, 100)
    size = tier.block_nbytes
    assert peek(tier, NBYTES, HEADER_AT - NBYTES) == bytes(HEADER_AT - NBYTES)
    assert peek(tier, 4 * size + 100, size - 100) == bytes(size - 100)
    assert peek(tier, HEADER_AT + HEADER_NBYTES, size - HEADER_NBYTES) == bytes(size - HEADER_NBYTES)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_memory_is_not_taken_in_advance(make: Callable[..., DiskTier]) -> None:
    tier = make(Path("/dev/shm"))
    put(tier, 0)
    assert tier.file_bytes == tier.bytes_in_use == 16_384


# Short transfers ---------------------------------------------------------------------------------

INTERRUPTED = InterruptedError(errno.EINTR, "Interrupted system call")


@pytest.mark.parametrize("faults", [(4096,), (8192, 4096), (INTERRUPTED,), (4096, INTERRUPTED, 4096), (12_288,)])
@pytest.mark.parametrize("misaligned", [0, 1])
@MODES
def test_short_transfers_are_continued(
    make: Callable[..., DiskTier],
    monkeypatch: pytest.MonkeyPatch,
    direct: bool | None,
    misaligned: int,
    faults: tuple[Fault, ...],
) -> None:
    tier = make(direct=direct)
    data, out = noise(NBYTES, 1, misaligned=misaligned), noise(NBYTES, 2, misaligned=misaligned)
    tier.reserve(snapshot(1), NBYTES)
    for name in ("pwritev", "preadv"):
        cut = Cut(monkeypatch, name, *faults)
        (tier.write if name == "pwritev" else tier.read)(snapshot(1), data if name == "pwritev" else out)
        assert len(cut.offsets) > 1
    monkeypatch.undo()
    assert np.array_equal(out, data)
    assert np.array_equal(get(tier, 1), data)


@pytest.mark.parametrize("moved", [1, 511, 4095, 9_999, 10_001, 16_383])
def test_buffered_transfers_are_continued_at_any_byte(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    tier = make(direct=False)
    cut = Cut(monkeypatch, "pwritev", moved)
    data = put(tier, 1)
    assert cut.offsets == [0, moved]
    cut = Cut(monkeypatch, "preadv", moved)
    assert np.array_equal(get(tier, 1), data)
    assert cut.offsets == [0, moved]


def test_direct_transfers_are_continued_at_a_block(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make()
    if not tier.direct:
        pytest.skip("no direct I/O here")
    cut = Cut(monkeypatch, "pwritev", 4096 + 512)
    data = put(tier, 1)
    assert cut.offsets == [0, 4096]
    assert np.array_equal(get(tier, 1), data)


@MODES
def test_an_aligned_item_is_one_call(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, direct: bool | None
) -> None:
    tier = make(direct=direct)
    writes, reads = Cut(monkeypatch, "pwritev"), Cut(monkeypatch, "preadv")
    for step, nbytes in enumerate((0, 100, 4096, NBYTES, 3 << 20)):
        put(tier, step, nbytes)
        get(tier, step, nbytes)
        assert len(writes.offsets) == len(reads.offsets) == step + 1


@pytest.mark.parametrize("done", [(), (4096,)])
@MODES
def test_a_write_that_gets_nowhere_is_an_error(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, direct: bool | None, done: tuple[int, ...]
) -> None:
    tier = make(direct=direct)
    Cut(monkeypatch, "pwritev", *done, 0)
    with pytest.raises(StorageError, match=f"wrote {sum(done)} of 16384 bytes") as caught:
        put(tier, 1)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EIO, StorageError),
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EFBIG, StorageFull),
        (errno.ESTALE, StorageError),
    ],
)
def test_errors_keep_their_number_and_void_the_item(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, code: int, kind: type[StorageError]
) -> None:
    tier = make()
    data = put(tier, 1)
    error = OSError(code, os.strerror(code))
    Cut(monkeypatch, "preadv", error)
    with pytest.raises(kind, match="to read snapshot 1") as caught:
        get(tier, 1)
    assert (type(caught.value), caught.value.errno, caught.value.__cause__) == (kind, code, error)
    assert np.array_equal(get(tier, 1), data)  # the next attempt may do
    Cut(monkeypatch, "pwritev", 4096, error)
    with pytest.raises(kind, match="to write snapshot 1") as caught:
        tier.write(snapshot(1), noise(NBYTES, 7))
    assert (type(caught.value), caught.value.errno) == (kind, code)
    with pytest.raises(StateError, match="never written whole"):
        get(tier, 1)
    tier.write(snapshot(1), data)
    assert np.array_equal(get(tier, 1), data)


def test_an_error_of_the_users_own_passes_and_frees_the_item(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make()
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", raiser(MemoryError()))
    with pytest.raises(MemoryError):
        put(tier, 1)
    monkeypatch.setattr(os, "pwritev", real)
    tier.write(snapshot(1), noise(NBYTES))
    assert np.array_equal(get(tier, 1), noise(NBYTES))


# Damage ------------------------------------------------------------------------------------------


def flip(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flip": flip,
    "zero": lambda content: bytes(len(content)),
    "ones": lambda content: b"\xff" * len(content),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskTier]:
    tier = DiskTier(tmp_path_factory.mktemp("damaged"))
    for step in range(3):
        put(tier, step)
    yield tier
    tier.close()


@given(
    place=st.one_of(st.integers(0, NBYTES - 1), st.integers(HEADER_AT, HEADER_AT + HEADER_NBYTES - 1)),
    nbytes=st.sampled_from([1, 16, 512, 4096, 16_384]),
    name=st.sampled_from(sorted(DAMAGES)),
)
def test_damage_anywhere_is_noticed(damaged: DiskTier, place: int, nbytes: int, name: str) -> None:
    size = damaged.block_nbytes * 4
    before = peek(damaged, size + place, min(nbytes, size - place))
    after = DAMAGES[name](before)
    poke(damaged, size + place, after)
    try:
        if before == after:
            assert np.array_equal(get(damaged, 1), noise(NBYTES, 1))
        else:
            with pytest.raises(DamagedBlock, match=r"snapshot 1 .* at offset 16384 of the scratch file in /"):
                get(damaged, 1)
        for step in (0, 2):
            assert np.array_equal(get(damaged, step), noise(NBYTES, step))
    finally:
        poke(damaged, size + place, before)
    assert np.array_equal(get(damaged, 1), noise(NBYTES, 1))


@pytest.mark.parametrize("length", [0, 1, 4096, 8192 + 100, HEADER_AT, HEADER_AT + 50, 16_384])
@MODES
def test_a_truncated_file_is_noticed(make: Callable[..., DiskTier], direct: bool | None, length: int) -> None:
    tier = make(direct=direct)
    put(tier, 0)
    data = put(tier, 1)
    for misaligned in (0, 1):
        os.ftruncate(tier.fileno(), 16_384 + length)
        out = noise(NBYTES, misaligned=misaligned)
        if length == 16_384:
            tier.read(snapshot(1), out)
            assert np.array_equal(out, data)
        else:
            with pytest.raises(DamagedBlock, match="snapshot 1"):
                tier.read(snapshot(1), out)
    assert np.array_equal(get(tier, 0), noise(NBYTES, 0))


def test_swapped_blocks_are_noticed(make: Callable[..., DiskTier]) -> None:
    tier = make()
    put(tier, 0)
    put(tier, 1)
    first, second = peek(tier, 0, 16_384), peek(tier, 16_384, 16_384)
    poke(tier, 0, second)
    poke(tier, 16_384, first)
    with pytest.raises(DamagedBlock, match="it is the block of snapshot 1"):
        get(tier, 0)
    with pytest.raises(DamagedBlock, match="it is the block of snapshot 0"):
        get(tier, 1)


def test_another_runs_block_is_noticed(make: Callable[..., DiskTier]) -> None:
    tier, other = make(run_id=b"a" * 16), make(run_id=b"b" * 16)
    put(tier, 0)
    put(other, 0)
    poke(tier, 0, peek(other, 0, 16_384))
    with pytest.raises(DamagedBlock, match="another run's block"):
        get(tier, 0)


def test_a_stale_block_is_noticed(make: Callable[..., DiskTier]) -> None:
    """As after a write that the disk acknowledged and lost."""
    tier = make()
    put(tier, 0, seed=1)
    stale = peek(tier, 0, 16_384)
    tier.release(snapshot(0))
    put(tier, 0, seed=1)  # even with the same bytes
    poke(tier, 0, stale)
    with pytest.raises(DamagedBlock, match="older block of the same item"):
        get(tier, 0)


@pytest.mark.parametrize("code", [0x01, 0x80])
def test_a_bit_flipped_by_the_system_on_the_way_is_noticed(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    tier = make()
    put(tier, 0)
    real = os.preadv

    def flipping(fd: int, buffers: list[Any], offset: int) -> int:
        moved = real(fd, buffers, offset)
        buffers[0][777] ^= code
        return moved

    monkeypatch.setattr(os, "preadv", flipping)
    with pytest.raises(DamagedBlock, match="the bytes have checksum"):
        get(tier, 0)


def test_every_difference_has_words() -> None:
    run, key, data = b"r" * 16, snapshot(3), noise(100)
    good = header(run, key, 5, data)
    assert len(good) == HEADER_NBYTES == 72
    assert good[:8] == b"LONGTAPE"
    assert "never written whole" in difference(good, bytes(72))
    assert "not one of Longtape's" in difference(good, flip(good))
    assert "header is damaged" in difference(good, good[:40] + flip(good[40:]))
    assert "header is damaged" in difference(good, good[:-1] + flip(good[-1:]))
    assert "another run" in difference(good, header(b"s" * 16, key, 5, data))
    assert "block of residuals 3" in difference(good, header(run, Key(Kind.RESIDUALS, 3), 5, data))
    assert "write 4, not 5" in difference(good, header(run, key, 4, data))
    assert "holds 99 bytes, not 100" in difference(good, header(run, key, 5, data[:99]))
    assert "have checksum" in difference(good, header(run, key, 5, noise(100, 1)))


def test_a_version_or_kind_from_the_future_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from longtape.tiers import block

    good = header(b"r" * 16, snapshot(3), 5, noise(100))
    monkeypatch.setattr(block, "VERSION", 9)
    newer = header(b"r" * 16, snapshot(3), 5, noise(100))
    monkeypatch.setattr(block, "VERSION", 1)
    assert "version 9, not 1" in difference(good, newer)
    monkeypatch.setitem(block.CODES, Kind.SNAPSHOT, 77)
    assert "block of (77, 3)" in difference(good, header(b"r" * 16, snapshot(3), 5, noise(100)))


# Room --------------------------------------------------------------------------------------------


def test_the_file_grows_ahead_and_room_is_used_again(make: Callable[..., DiskTier]) -> None:
    tier = make()
    put(tier, 0)
    assert tier.file_bytes == disk.LEAST_GROWTH_NBYTES == os.fstat(tier.fileno()).st_size
    for step in range(1, 2000):
        put(tier, step, 100)
        tier.release(snapshot(step))
    assert tier.file_bytes == disk.LEAST_GROWTH_NBYTES
    assert tier.bytes_in_use == 16_384
    assert tier.peak_bytes == 16_384 + 8192
    assert tier.bytes_written == NBYTES + 1999 * 100
    get(tier, 0)
    assert tier.bytes_read == NBYTES


def test_large_items_make_it_grow_by_more(make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(linux, "allocate", lambda fd, offset, nbytes: asked.append((offset, nbytes)))
    tier = make()
    tier.reserve(snapshot(0), (4 << 20) - 4096)
    tier.reserve(snapshot(1), (256 << 20) - 4096)
    assert asked == [(0, 256 << 20), (256 << 20, 1 << 30)]
    tier.reserve(snapshot(2), 3 << 30)
    end = (4 << 20) + (256 << 20) + (3 << 30) + 4096
    assert asked[2:] == [(5 << 28, end - (5 << 28))]


def test_a_limit_is_never_passed(make: Callable[..., DiskTier]) -> None:
    tier = make(limit=100_000)
    for step in range(6):
        put(tier, step)
    with pytest.raises(StorageFull, match=r"limit of 97\.7 KiB") as caught:
        tier.reserve(snapshot(6), NBYTES)
    assert caught.value.errno == errno.EDQUOT
    assert tier.file_bytes == 100_000
    for step in range(6):
        assert np.array_equal(get(tier, step), noise(NBYTES, step))
    for step in range(6):
        tier.release(snapshot(step))
    put(tier, 7, 80_000)  # in place of five
    with pytest.raises(StorageFull):
        make(limit=0).reserve(snapshot(0), 0)


def test_freed_room_at_the_end_counts_as_room_to_grow(make: Callable[..., DiskTier]) -> None:
    tier = make(limit=100_000)
    put(tier, 0)
    put(tier, 1)
    tier.release(snapshot(1))
    put(tier, 2, 77_000)
    assert np.array_equal(get(tier, 0), noise(NBYTES, 0))
    assert np.array_equal(get(tier, 2, 77_000), noise(77_000, 2))


def disk_of(monkeypatch: pytest.MonkeyPatch, capacity: int) -> list[int]:
    """A disk with room for a file of so many bytes; the calls are noted."""
    asked: list[int] = []

    def allocate(fd: int, offset: int, nbytes: int) -> None:
        asked.append(nbytes)
        if offset + nbytes > capacity:
            os.ftruncate(fd, capacity)  # an attempt may fail half done
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, offset + nbytes)

    monkeypatch.setattr(linux, "allocate", allocate)
    return asked


def test_a_nearly_full_disk_is_used_to_the_end(make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = disk_of(monkeypatch, 100_000)
    tier = make()
    for step in range(6):
        put(tier, step)
    with pytest.raises(StorageFull, match="snapshot 6 needs 16 KiB") as caught:
        tier.reserve(snapshot(6), NBYTES)
    assert caught.value.errno == errno.ENOSPC
    assert os.fstat(tier.fileno()).st_size == tier.file_bytes == 6 * 16_384
    tried = len(asked)
    with pytest.raises(StorageFull):
        tier.reserve(snapshot(6), NBYTES)
    assert len(asked) == tried + 1  # no storm of attempts
    for step in range(6):
        assert np.array_equal(get(tier, step), noise(NBYTES, step))
    tier.release(snapshot(3))
    put(tier, 6)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_room_cannot_be_asked_for_the_file_is_sparse(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(linux, "allocate", raiser(OSError(code, os.strerror(code))))
    tier = make()
    assert np.array_equal(put(tier, 1), get(tier, 1))
    assert os.fstat(tier.fileno()).st_size == tier.file_bytes > 0


def test_a_failure_to_grow_is_an_error_and_reserves_nothing(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "allocate", raiser(OSError(errno.EIO, os.strerror(errno.EIO))))
    tier = make()
    with pytest.raises(StorageError) as caught:
        tier.reserve(snapshot(1), 10)
    assert (type(caught.value), caught.value.errno) == (StorageError, errno.EIO)
    monkeypatch.undo()
    put(tier, 1)
    assert tier.bytes_in_use == 16_384


def mounted(*command: str, at: Path) -> Iterator[Path]:
    at.mkdir()
    done = subprocess.run([*command, str(at)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        at.rmdir()
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.fixture
def small_tmpfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    at = tmp_path_factory.mktemp("small") / "mount"
    yield from mounted("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", at=at)


@pytest.fixture
def small_ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("small")
    image = home / "image"
    image.write_bytes(bytes(8 << 20))
    try:
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make a file system: {error}")
    yield from mounted("mount", "-o", "loop", str(image), at=home / "mount")


@pytest.fixture(params=["small_tmpfs", "small_ext4"])
def small_disk(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def fill(tier: DiskTier, nbytes: int) -> int:
    for step in range(10_000):
        try:
            put(tier, step, nbytes)
        except StorageFull as error:
            if error.errno == errno.ENOSPC:
                return step
            raise
    raise AssertionError("never full")


@pytest.fixture
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tier leaves free is taken by others after it has looked."""
    monkeypatch.setattr(disk, "usable_nbytes", lambda directory, beside: None)


def test_a_disk_that_is_really_full(small_disk: Path, no_reserve: None) -> None:
    tier = DiskTier(small_disk)
    try:
        kept = fill(tier, 50_000)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        assert kept >= 15
        assert free < 200_000
        for step in range(kept):
            assert np.array_equal(get(tier, step, 50_000), noise(50_000, step))
        tier.release(snapshot(4))
        put(tier, kept + 1, 50_000)
        assert np.array_equal(get(tier, kept + 1, 50_000), noise(50_000, kept + 1))
    finally:
        tier.close()
    assert not [name for name in os.listdir(small_disk) if name != "lost+found"]


def test_a_sparse_file_on_a_disk_that_is_really_full(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, no_reserve: None
) -> None:
    monkeypatch.setattr(linux, "allocate", raiser(OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))))
    tier = DiskTier(small_disk)
    try:
        kept = fill(tier, 50_000)  # here it is a write that fails
        assert kept >= 15
        tier.release(snapshot(kept))
        for step in range(kept):
            assert np.array_equal(get(tier, step, 50_000), noise(50_000, step))
    finally:
        tier.close()


def test_a_scratch_file_can_be_made_on_a_disk_that_is_full(small_tmpfs: Path) -> None:
    (small_tmpfs / "hog").write_bytes(bytes((1 << 20) - 4096))
    with open(small_tmpfs / "hog", "ab") as hog:
        hog.write(bytes(4096))
    tier = DiskTier(small_tmpfs)
    with pytest.raises(StorageFull):
        tier.reserve(snapshot(0), 1)
    tier.close()


def test_the_trial_of_direct_io_may_meet_a_full_disk(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "file_system", lambda fd: "ext4")
    Cut(monkeypatch, "pwritev", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert make().direct


# Threads -----------------------------------------------------------------------------------------


class Stuck:
    """A ``pwritev`` that waits, and a thread that is in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tier: DiskTier, key: Key, data: np.ndarray) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.errors: list[BaseException] = []
        real = os.pwritev

        def wait(fd: int, buffers: list[Any], offset: int) -> int:
            self.entered.set()
            assert self.go_on.wait(30)
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, "pwritev", wait)
        self.thread = threading.Thread(target=self._run, args=(tier, key, data))
        self.thread.start()
        assert self.entered.wait(30)
        monkeypatch.setattr(os, "pwritev", real)

    def _run(self, tier: DiskTier, key: Key, data: np.ndarray) -> None:
        try:
            tier.write(key, data)
        except BaseException as error:
            self.errors.append(error)

    def end(self) -> None:
        self.go_on.set()
        self.thread.join()


def test_the_file_stays_open_while_a_write_is_under_way(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make()
    tier.reserve(snapshot(1), NBYTES)
    stuck = Stuck(monkeypatch, tier, snapshot(1), noise(NBYTES))
    fd = tier.fileno()
    tier.close()
    os.fstat(fd)
    stuck.end()
    assert not stuck.errors
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    tier.close()


def test_room_of_a_stuck_write_is_not_given_away(
    make: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make()
    tier.reserve(snapshot(1), NBYTES)
    stuck = Stuck(monkeypatch, tier, snapshot(1), noise(NBYTES, 1))
    with pytest.raises(StateError, match="under way"):
        tier.write(snapshot(1), noise(NBYTES))
    tier.release(snapshot(1))
    put(tier, 1, seed=2)  # the same key, elsewhere
    assert tier.bytes_in_use == 2 * 16_384
    stuck.end()
    assert not stuck.errors
    assert np.array_equal(get(tier, 1), noise(NBYTES, 2))
    put(tier, 3)
    assert tier.bytes_in_use == 2 * 16_384  # where the stuck one was
    assert np.array_equal(get(tier, 3), noise(NBYTES, 3))
    assert np.array_equal(get(tier, 1), noise(NBYTES, 2))
