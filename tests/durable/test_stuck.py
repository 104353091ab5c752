"""A sync that comes back only when the run is over."""

import os
import threading
import time

import pytest
from models import Chaotic

import longtape
from longtape.durable.leftovers import leftovers
from tests.durable.programs import SIZE
from tests.durable.test_resume import end, resume


@pytest.fixture
def gate(monkeypatch):
    """Syncs of other threads than the main one wait for it."""
    opened, real = threading.Event(), os.fdatasync

    def fdatasync(fd):
        if threading.current_thread() is not threading.main_thread():
            opened.wait()
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    yield opened
    opened.set()


def join(name="longtape-durable"):
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(5.0)
            assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:longtape:RuntimeWarning")
def test_it_writes_to_no_file_of_others(tmp_path, gate):
    (tmp_path / "run").mkdir()
    with resume(tmp_path / "run", resume_seconds=1e-6, stuck_seconds=0.1) as run:
        run.forward()
    others = []
    for k in range(60):  # they take the numbers of what is closed
        fd = os.open(tmp_path / f"other-{k}", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"my own")
        others.append(fd)
    with pytest.raises(longtape.ResumeError, match="this process"):
        resume(tmp_path / "run")
    gate.set()
    join()
    for fd in others:
        assert os.pread(fd, 100, 0) == b"my own"
        os.close(fd)
    assert [left.held for left in leftovers(tmp_path / "run")] == [False]
    model = Chaotic(SIZE)
    end(resume(tmp_path / "run", model), model)


@pytest.mark.filterwarnings("ignore:longtape:RuntimeWarning")
def test_a_run_that_has_ended_leaves_nothing(tmp_path, gate):
    model = Chaotic(SIZE)
    began = time.monotonic()
    report = end(resume(tmp_path, model, resume_seconds=1e-6, stuck_seconds=0.1), model)
    assert time.monotonic() - began < 10.0
    assert any("no answer" in fault or "durable" in fault for fault in report.faults) or not report.durable_points
    assert not os.listdir(tmp_path)
    gate.set()
    join()
