"""Forks, interrupts, runs inside runs, and directories that go away."""

import os
import shutil
import signal
import sys
import time

import pytest
from models import Chaotic

import longtape
from tests.faults.sweeps import exact, nbytes, run, storing_costs, unhurried

STEPS = 40


def make(disk, model=None, steps=STEPS):
    model = model or unhurried(Chaotic)(2000)
    model.adjoint[0][:] = 1.0  # for those that do not start it
    return longtape.Sweep(model, steps, memory=4 * nbytes(), disk=disk, costs=storing_costs()), model


def wait_for(child, seconds=20.0):
    """The exit status of a child that must end by itself."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


def in_child(body):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = body() or 0
    finally:
        os._exit(status)


def test_a_fork_between_the_sweeps(scratch):
    sweep, model = make(scratch)
    sweep.forward()

    def body():
        try:
            sweep.reverse()
        except longtape.StateError as error:
            sweep.close()
            return 0 if "process" in str(error) else 2
        return 3

    assert wait_for(in_child(body)) == 0
    model.start_adjoint()
    sweep.reverse()
    assert model.result() == exact(STEPS, 2000)
    assert not sweep.report.faults


@pytest.mark.parametrize("at", [0, 3, 17, 39])
def test_a_fork_in_the_middle_of_a_step(scratch, at):
    """As a step that uses `multiprocessing` would do; the child leaves by the usual exits."""
    children = []

    class Forking(unhurried(Chaotic)):
        armed = False

        def advance(self, start, stop):
            if self.armed and start <= at < stop:
                self.armed = False
                children.append(in_child(lambda: sweep.close()))
            super().advance(start, stop)

    sweep, model = make(scratch, Forking(2000))
    model.armed = True
    sweep.forward()
    model.start_adjoint()
    sweep.reverse()
    assert [wait_for(child) for child in children] == [0]
    assert model.result() == exact(STEPS, 2000)
    assert not sweep.report.faults


def test_two_runs_share_a_directory(scratch):
    first, one = make(scratch)
    second, two = make(scratch)
    first.forward()
    second.forward()
    for sweep, model in ((first, one), (second, two)):
        model.start_adjoint()
        sweep.reverse()
        assert model.result() == exact(STEPS, 2000)


def test_a_run_inside_a_step_of_a_run(scratch):
    class Nesting(unhurried(Chaotic)):
        def advance(self, start, stop):
            if 7 in range(start, stop):
                run(disk=scratch, steps=12)
            super().advance(start, stop)

    run(kind=Nesting, disk=scratch)


def test_the_directory_vanishes(tmp_path):
    disk = tmp_path / "scratch"
    disk.mkdir()
    report = run(disk=disk, between=lambda sweep: shutil.rmtree(disk)).report
    assert not report.faults, "the file has no name, and does not need its directory"
    with pytest.raises(longtape.UsageError, match="does not exist"):
        make(disk)


WATCHED = ("executor.py", "mover.py", "asynchronous.py", "stock.py", "compose.py", "measure.py", "trace.py")


class Interrupt:
    """Raises `KeyboardInterrupt` at the n-th line of Longtape that the main thread comes to."""

    def __init__(self, at):
        self.left = at
        self.fired = False

    def __call__(self, frame, event, argument):
        # Not inside tiers: between opening a file and handing it over, or inside a lock's own
        # exit, no line can be made safe; a real signal hardly ever comes there.
        if not frame.f_code.co_filename.endswith(WATCHED) or frame.f_code.co_name == "__init__":
            return None
        return self._line

    def _line(self, frame, event, argument):
        if event == "line" and not self.fired:
            self.left -= 1
            if self.left < 0:
                self.fired = True
                raise KeyboardInterrupt
        return self._line


def interrupted(disk, at):
    """One run that is interrupted; whether it was."""
    interrupt, before = Interrupt(at), sys.gettrace()
    try:
        sys.settrace(interrupt)
        with make(disk, Chaotic(2000), steps=12)[0] as sweep:
            sweep.forward()
            sweep.reverse()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return interrupt.fired


def lines_of_a_run(disk):
    interrupt = Interrupt(10**9)
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with make(disk, Chaotic(2000), steps=12)[0] as sweep:
            sweep.forward()
            sweep.reverse()
    finally:
        sys.settrace(before)
    return 10**9 - interrupt.left


@pytest.mark.parametrize("part", range(4))
def test_an_interrupt_in_the_sweeps_leaves_nothing(scratch, part):
    """At lines all over the run."""
    count = lines_of_a_run(scratch)
    for at in range(part, count, max(1, count // 40)):
        interrupted(scratch, at)


@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_nothing(scratch):
    for at in range(0, lines_of_a_run(scratch), 3):
        interrupted(scratch, at)


def interrupted_by_signal(disk, after):
    """One run into which a real signal comes, as from the keyboard."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with make(disk, steps=12)[0] as sweep:
            signal.setitimer(signal.ITIMER_REAL, after)
            sweep.forward()
            sweep.reverse()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Python itself swallows an interrupt that comes inside a weak reference's callback.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signals_at_random_moments(scratch):
    count = sum(interrupted_by_signal(scratch, 1e-4 + k * 1e-4) for k in range(60))
    assert count > 10
