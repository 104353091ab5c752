"""Every system call of a small run fails in turn, for a while, and for good."""

import errno
import itertools
import os
import threading

import pytest
from models import Chaotic, OutOfPlace

from longtape.tiers import linux
from tests.faults.sweeps import run

CALLS = ("pwritev", "preadv")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ENODEV, errno.ENOMEM, errno.EBADF)


class System:
    """Counts the calls that move bytes or claim room, and makes those fail that the test chooses."""

    def __init__(self, monkeypatch, fails=lambda index: False, error=errno.EIO, most=None):
        self.fails, self.error, self.most = fails, error, most
        self.calls = []
        self._lock = threading.Lock()
        for name in CALLS:
            monkeypatch.setattr(os, name, self._moving(name, getattr(os, name)))
        monkeypatch.setattr(linux, "allocate", self._allocating(linux.allocate))

    def _met(self, name):
        with self._lock:
            index = len(self.calls)
            self.calls.append(name)
        return self.fails(index)

    def _moving(self, name, real):
        def call(fd, buffers, offset, *rest):
            if self._met(name):
                if self.most is None:
                    raise OSError(self.error, os.strerror(self.error))
                buffers = [memoryview(buffers[0])[: self.most]]
            return real(fd, buffers, offset, *rest)

        return call

    def _allocating(self, real):
        def call(*arguments):
            if self._met("allocate") and self.most is None:
                raise OSError(self.error, os.strerror(self.error))
            return real(*arguments)

        return call


def count_calls(disk, **options):
    with pytest.MonkeyPatch.context() as patch:
        system = System(patch)
        sweep = run(disk=disk, **options)
    return len(system.calls), sweep


@pytest.mark.parametrize("kind", [Chaotic, OutOfPlace])
@pytest.mark.parametrize("probing", [False, True])
def test_each_call_fails_in_turn(scratch, monkeypatch, kind, probing):
    count, sweep = count_calls(scratch, kind=kind, probing=probing)
    assert sweep.report.writes > 3 or probing
    errors = itertools.cycle(ERRORS)
    failed = 0
    for k in range(count):
        with pytest.MonkeyPatch.context() as patch:
            System(patch, lambda index, k=k: index == k, next(errors))
            failed += bool(run(disk=scratch, kind=kind, probing=probing).report.faults)
    assert failed > count // 3


@pytest.mark.parametrize("error", ERRORS)
def test_every_call_fails_from_some_one_on(scratch, error):
    count, _ = count_calls(scratch)
    for k in range(0, count, 3):
        with pytest.MonkeyPatch.context() as patch:
            System(patch, lambda index, k=k: index >= k, error)
            run(disk=scratch)


def test_storing_resumes_after_a_while(scratch):
    count, _ = count_calls(scratch, steps=60)
    writes = []
    for k in range(11, count, 4):
        with pytest.MonkeyPatch.context() as patch:
            System(patch, lambda index, k=k: k <= index < k + 8, errno.EIO)
            writes.append(run(disk=scratch, steps=60).report.writes)
    assert min(writes[: len(writes) // 3]) > 5, "a failure early on ended the storing"


@pytest.mark.parametrize("most", [0, 1, 511, 512, 4096, 5000])
def test_short_transfers(scratch, most):
    for stride in (1, 2, 5):
        with pytest.MonkeyPatch.context() as patch:
            System(patch, lambda index, stride=stride: index % stride == 0 and index > 3, most=most)
            run(disk=scratch)


@pytest.mark.parametrize("error", ERRORS)
def test_the_scratch_file_cannot_be_made(scratch, monkeypatch, error):
    real = os.open

    def refuse(path, flags, *rest, **more):
        if str(path).startswith(str(scratch)):
            raise OSError(error, os.strerror(error))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    if error in (errno.ENODEV, errno.EBADF):
        return  # an argument that makes no sense, rather than a fault: refused with a UsageError
    report = run(disk=scratch).report
    assert report.schedule in ("revolve", "store_all")
    assert "not used" in report.faults[0]


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_each_pair_of_calls_fails(scratch, slots):
    from longtape.errors import StorageError

    count, _ = count_calls(scratch, slots=slots, steps=20)
    for j, k in itertools.combinations(range(count), 2):
        with pytest.MonkeyPatch.context() as patch:
            System(patch, lambda index, j=j, k=k: index in (j, k), errno.EIO)
            try:
                run(disk=scratch, slots=slots, steps=20)
            except StorageError as error:
                assert slots < 3 and "state 0" in str(error)  # noqa: PT018
