"""The asynchronous multistage plan: store while computing, prefetch while reversing, Revolve in between.

Owns the algorithm and nothing else.  It reads a `Stock`, yields actions and knows
no clock, array, file or thread.  One generator serves every case:

* no storage: the whole sequence is the tail, which is plain Revolve;
* storage: snapshots go to storage as often as it takes them, and between two of
  them Revolve recomputes within the free slots, prefetching the next one just in
  time;
* a job that records: windows whose residuals storage can carry are recorded, and
  are neither stored as snapshots nor recomputed.

Units.  Inside the sweeps positions are *windows*: window k holds steps
``[k·window, (k+1)·window)``, cut off at N.  Everything that leaves them is in steps.

Invariants: forward, nothing is awaited unless a fixed spacing was asked for; the
adjoint comes down one window at a time; a snapshot that is lost only merges two
intervals; the initial state is never given up before the adjoint of step 0.

Source: Griewank and Walther 2000 for Revolve; Kukreja, Hückelheim and Gorman 2018
for the idea of asynchronous storing and prefetching.  The rules that differ from
theirs are explained in ``docs/design.md``.
"""

from __future__ import annotations

from longtape.errors import PlanError
from longtape.plan.backward import ReverseSweep
from longtape.plan.course import Actions, Course
from longtape.plan.layout import EXACT, Layout, Rules
from longtape.plan.outward import ForwardSweep
from longtape.plan.resumed import take_up
from longtape.plan.stock import Stock

__all__ = ["EXACT", "AsynchronousPlan", "Layout", "Rules"]


class AsynchronousPlan:
    """Yields the actions of one run; iterate it once."""

    def __init__(self, stock: Stock, layout: Layout, rules: Rules | None = None) -> None:
        self._course = Course(stock, layout, rules or Rules())
        self._outward = ForwardSweep(self._course)
        self._backward = ReverseSweep(self._course)

    def __iter__(self) -> Actions:
        yield from self._forward()
        yield from self._backward.run()

    def _forward(self) -> Actions:
        course, snapshots = self._course, self._course.stock.snapshots
        if course.layout.pin_initial:
            course.protect(0)
        window = 0
        if course.stock.reached is not None:
            resumed = yield from take_up(course, self._outward)
            if resumed is None:
                return
            window = resumed
        window = yield from self._outward.run(window)
        course.spare_memory(window)
        waits = course.layout.fixed_spacing or course.layout.longest_piece
        if waits and course.layout.tail and course.stock.steps is not None:
            yield from course.wait_for_slots(course.windows(course.stock.steps) - window)
        if course.layout.tail and course.restarts and snapshots.available() == 0:
            # Every slot waits to be written: keeping the tail would delay compute.
            self._outward.give_up_tail()
            window = yield from self._outward.run(window)
        if course.stock.steps is None:
            raise PlanError("the job did not say where the sequence ends")
        last = course.windows(course.stock.steps) - 1
        if window > last or (not course.layout.final_state and window == last):
            yield from self._backward.turn(last)
            return
        if course.restarts and course.restarts[-1] == window:
            course.protect(window)  # kept before, by a run that is gone on with
        else:
            yield from course.push(window)
        below = course.restarts[-2] if len(course.restarts) > 1 else None
        yield from self._backward.interval(window, last - window + 1, snapshots.available() + 1, below)
