"""A time-stepper in C behind ctypes, with its adjoint by hand, differentiated within a memory budget.

The C code updates its two buffers in place and knows nothing of Longtape.  Nothing is
copied but the snapshots themselves.  ctypes releases the GIL while the C code runs, so
that snapshots are written and fetched meanwhile.  A Fortran code with ``bind(c)`` is
driven in the same way.

``python examples/compiled/wave.py [--steps N] [--size N] [--memory SIZE] [--scratch DIR]``
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.ctypeslib import ndpointer

import longtape

SOURCE = Path(__file__).with_name("wave.c")
C2, DT2 = 1.0, 0.01


def compile_wave(directory: str | os.PathLike[str]) -> ctypes.CDLL:
    """Build the C code with the system's compiler, and say what its functions take."""
    target = Path(directory) / "wave.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(target), str(SOURCE)], check=True)
    library = ctypes.CDLL(str(target))
    grid = ndpointer(np.float64, ndim=2, flags="C_CONTIGUOUS")
    shape, numbers = [ctypes.c_ssize_t] * 2, [ctypes.c_double] * 2
    library.wave_advance.argtypes = [grid, grid, *shape, *numbers, ctypes.c_long, ctypes.c_long]
    library.wave_reverse.argtypes = [grid, grid, grid, grid, *shape, *numbers, ctypes.c_long]
    library.wave_advance.restype = library.wave_reverse.restype = None
    return library


class Wave:
    """What `longtape.Sweep` asks of a model: the live buffers, steps and their adjoint."""

    def __init__(self, library: ctypes.CDLL, initial: np.ndarray) -> None:
        self._library = library
        self.state = [initial.copy(), initial.copy()]  # at rest
        self.adjoint = [np.zeros_like(initial), np.zeros_like(initial)]

    def advance(self, start: int, stop: int) -> None:
        self._library.wave_advance(*self.state, *self.state[0].shape, C2, DT2, start, stop)

    def reverse(self, start: int, stop: int) -> None:
        assert stop == start + 1
        self._library.wave_reverse(*self.state, *self.adjoint, *self.state[0].shape, C2, DT2, start)

    def misfit(self, steps: int) -> float:
        """Half the squared norm of the last time level."""
        last = self.state[(steps + 1) % 2]
        return 0.5 * float(np.vdot(last, last))

    def start_adjoint(self, steps: int) -> None:
        """The adjoint's final condition: the derivative of `misfit`."""
        last = (steps + 1) % 2
        self.adjoint[last][:] = self.state[last]
        self.adjoint[1 - last][:] = 0.0

    @property
    def gradient(self) -> np.ndarray:
        """With respect to the initial shape, which is in both buffers; after the reverse sweep."""
        return self.adjoint[0] + self.adjoint[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--size", type=int, default=256, help="points a side")
    parser.add_argument("--memory", default="16MiB")
    parser.add_argument("--scratch", default=None, help="directory to store in; a temporary one if not given")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    initial = generator.random((arguments.size, arguments.size))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        model = Wave(compile_wave(directory), initial)
        with longtape.Sweep(model, arguments.steps, memory=arguments.memory, disk=directory) as sweep:
            print(longtape.describe(sweep.plan))
            sweep.forward()
            misfit = model.misfit(arguments.steps)
            model.start_adjoint(arguments.steps)
            sweep.reverse()
    print(sweep.report)
    print(f"misfit {misfit:.6g}, norm of its gradient {np.linalg.norm(model.gradient):.6g}")


if __name__ == "__main__":
    main()
