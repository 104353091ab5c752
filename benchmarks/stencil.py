"""A memory-bound step: Allen-Cahn on a periodic cube, with its adjoint by hand.

    x_{i+1} = x_i + dt (lap(x_i) + x_i - x_i^3)
    a_i     = a_{i+1} + dt (lap(a_{i+1}) + (1 - 3 x_i^2) a_{i+1})

lap is the seven-point Laplacian with spacing 1, which is its own adjoint on a periodic
grid.  The adjoint of step i needs x_i and nothing else: the state is the tape.  Both
kernels run on one thread, release the GIL, write every cell of their output and never
their input, so a step may run from one buffer straight into another.

``python -m benchmarks.stencil`` times them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit

from benchmarks import common

Field = npt.NDArray[np.float32]

SIDE = 256
DT = np.float32(0.1)
ONE, THREE, SIX = np.float32(1), np.float32(3), np.float32(6)


@njit(nogil=True, fastmath=True, error_model="numpy", inline="always")
def _react_forward(centre, neighbours, dt):
    return centre + dt * (neighbours - SIX * centre + centre - centre * centre * centre)


@njit(nogil=True, fastmath=True, error_model="numpy", inline="always")
def _react_adjoint(state, centre, neighbours, dt):
    return centre + dt * (neighbours - SIX * centre + centre * (ONE - THREE * state * state))


@njit(nogil=True, fastmath=True, error_model="numpy", cache=True)
def step(x, out, dt):
    """Put the state after one step from `x` into `out`."""
    n0, n1, n2 = x.shape
    last = n2 - 1
    for i in range(n0):
        above, below = x[i - 1], x[(i + 1) % n0]
        for j in range(n1):
            a, b, c = above[j], below[j], x[i, j]
            left, right, to = x[i, j - 1], x[i, (j + 1) % n1], out[i, j]
            to[0] = _react_forward(c[0], a[0] + b[0] + left[0] + right[0] + c[last] + c[1], dt)
            for k in range(1, last):
                to[k] = _react_forward(c[k], a[k] + b[k] + left[k] + right[k] + c[k - 1] + c[k + 1], dt)
            to[last] = _react_forward(c[last], a[last] + b[last] + left[last] + right[last] + c[last - 1] + c[0], dt)


@njit(nogil=True, fastmath=True, error_model="numpy", cache=True)
def adjoint_step(x, adjoint, out, dt):
    """Put the adjoint before the step from `x` into `out`, given the `adjoint` after it."""
    n0, n1, n2 = x.shape
    last = n2 - 1
    for i in range(n0):
        above, below = adjoint[i - 1], adjoint[(i + 1) % n0]
        for j in range(n1):
            s, a, b, c = x[i, j], above[j], below[j], adjoint[i, j]
            left, right, to = adjoint[i, j - 1], adjoint[i, (j + 1) % n1], out[i, j]
            to[0] = _react_adjoint(s[0], c[0], a[0] + b[0] + left[0] + right[0] + c[last] + c[1], dt)
            for k in range(1, last):
                to[k] = _react_adjoint(s[k], c[k], a[k] + b[k] + left[k] + right[k] + c[k - 1] + c[k + 1], dt)
            to[last] = _react_adjoint(
                s[last], c[last], a[last] + b[last] + left[last] + right[last] + c[last - 1] + c[0], dt
            )


def initial(side: int = SIDE, seed: int = 0) -> Field:
    """A random state within the basin of the two stable values, -1 and 1."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (side, side, side)).astype(np.float32)


class AllenCahn:
    """The stencil as a model for `longtape.Sweep`, and for any loop that a baseline writes.

    The loss is ``<weights, x_N>``: `start_adjoint` sets its gradient.  With `effort`, each kernel
    runs so many times over, to the same result: a step that costs more for the same state.
    """

    max_reverse = 1
    reverse_seconds: float | None = None

    def __init__(self, side: int = SIDE, *, dt: float = DT, effort: int = 1) -> None:
        self.dt, self.effort = np.float32(dt), effort
        self._now, self._next = initial(side), np.zeros((side, side, side), np.float32)
        self._adjoint, self._spare = np.zeros_like(self._now), np.zeros_like(self._now)

    @property
    def state(self) -> Sequence[Field]:
        """The live buffer."""
        return [self._now]

    @property
    def adjoint(self) -> Sequence[Field]:
        """The adjoint of the state that was last reversed to."""
        return [self._adjoint]

    def start_adjoint(self, weights: Field) -> None:
        """Set the adjoint of the final state."""
        np.copyto(self._adjoint, weights)

    def advance(self, start: int, stop: int) -> None:
        for _ in range(start, stop):
            step(self._now, self._next, self.dt)
            self._now, self._next = self._next, self._now

    def reverse(self, start: int, stop: int) -> None:
        if stop != start + 1:
            raise ValueError(f"one step at a time, not [{start}, {stop})")
        self.reverse_from(start, [self._now])

    def advance_into(self, index: int, source: Sequence[Field], target: Sequence[Field]) -> None:
        """Run step `index` from `source` into `target`."""
        for _ in range(self.effort):
            step(source[0], target[0], self.dt)

    def reverse_from(self, index: int, source: Sequence[Field]) -> None:
        """Take the adjoint of step `index` from the state `source` before it."""
        for _ in range(self.effort):
            adjoint_step(source[0], self._adjoint, self._spare, self.dt)
        self._adjoint, self._spare = self._spare, self._adjoint


def main() -> None:
    """Time one forward and one adjoint step."""
    common.use_one_thread()
    model = AllenCahn()
    model.start_adjoint(initial(seed=1))
    cases = {"forward": lambda: model.advance(0, 1), "adjoint": lambda: model.reverse(0, 1)}
    seconds = common.interleave(cases, repeats=40, warm_up=3)
    common.write(
        "stencil", {"side": SIDE, "dtype": "float32"}, {name: common.summary(s) for name, s in seconds.items()}
    )


if __name__ == "__main__":
    main()
