"""Where a plan begins when an earlier process was stopped in the middle of it.

Owns the way from state 0, which the caller has set anew, to the place from which to go on.
See `asynchronous` for the whole.
"""

from __future__ import annotations

from collections.abc import Generator

from longtape.actions import Action, Await, Discard, Key, Kind, Restore, Turn
from longtape.errors import PlanError
from longtape.plan.course import Actions, Course
from longtape.plan.outward import ForwardSweep


def take_up(course: Course, outward: ForwardSweep) -> Generator[Action, None, int | None]:
    """Go on with the items that are stored; returns the window the working state is at, or None if it has turned.

    What was stored above that window is given up: the forward sweep comes there again.
    """
    stock, window = course.stock, course.layout.window
    if stock.reached is None or stock.steps is None:
        raise PlanError("only a run of known length that has begun can be taken up")
    yield from outward.keep_initial()
    course.restarts.extend(sorted(step // window for step in stock.snapshots.stored if step))
    course.recorded.extend(sorted(step // window for step in stock.residuals.stored))
    if stock.reached < stock.steps:
        return (yield from _forward(course, stock.reached // window))
    course.work, course.adjoint = None, course.windows(stock.steps) - 1
    yield Turn()
    if stock.adjoint is not None:
        if stock.adjoint % window and stock.adjoint != stock.steps:
            raise PlanError(f"the adjoint of step {stock.adjoint} lies inside a window of {window} steps")
        course.adjoint = course.windows(stock.adjoint) - 1  # the last window may be short, and yet to be reversed
    return None


def _forward(course: Course, reached: int) -> Generator[Action, None, int]:
    yield from _give_up_above(course, reached)
    while course.restarts and course.restarts[-1] > 0:
        window = course.restarts[-1]
        yield from course.request(window)
        while course.coming(window) and not course.resident(window):
            yield Await(course.snapshot(window))
        if course.resident(window):
            yield Restore(course.at(window))
            course.work = window
            yield from course.finish(window)
            yield from _give_up_above(course, window)
            return window
        yield from course.finish(window)
    yield from _give_up_above(course, 0)
    return 0


def _give_up_above(course: Course, window: int) -> Actions:
    """What lies above a window, and the residuals of the window itself."""
    while course.restarts and course.restarts[-1] > window:
        yield from course.finish(course.restarts[-1])
    while course.recorded and course.recorded[-1] >= window:
        yield Discard(Key(Kind.RESIDUALS, course.at(course.recorded.pop())))
