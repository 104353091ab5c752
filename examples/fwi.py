"""Full-waveform inversion with Devito and Longtape: find a layered earth from shots recorded at its surface.

    python examples/fwi.py                     2-D, less than a minute; pictures in fwi.png
    python examples/fwi.py --short             a small model, seconds
    python examples/fwi.py --three-d           3-D, minutes: states of 43 MiB, 22 GiB of disk

The model is the squared slowness m in s²/km².  For each shot the wave equation

    m u_tt - lap u + damp u_t = source

is run forward, and the difference of recorded and observed data is run back in time
through its adjoint, which correlates with u to the gradient of the misfit.  u is needed
at all times in reverse order: `longtape.devito.Sweep` brings it back within the memory
and onto the disk that it is given.  Each iteration takes a step against the gradient, as
long as a line search allows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import devito
import numpy as np
import numpy.typing as npt

import longtape.devito

Field = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Survey:
    """Size of the model and of the experiment.  Lengths in km, times in s, frequencies in Hz."""

    shape: tuple[int, ...] = (201, 101)
    spacing: float = 0.01
    shots: int = 5
    receivers: int = 101
    seconds: float = 1.6
    frequency: float = 8.0
    iterations: int = 6
    memory: str = "16MiB"
    rim: int = 30
    """Grid points of absorbing boundary on each side."""


SHORT = Survey(
    shape=(71, 51), shots=2, receivers=36, seconds=0.7, frequency=12.0, iterations=2, memory="600KiB", rim=15
)
THREE_D = Survey(
    shape=(121, 121, 91), spacing=0.015, shots=2, receivers=121, seconds=1.5, iterations=3, memory="400MiB"
)


def layers(shape: Sequence[int]) -> Field:
    """Velocity in km/s: layers that dip, and a fast lens between them."""
    axes = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    across, depth = axes[0], axes[-1]
    velocity = np.full(shape, 1.5)
    for top, dip, speed in ((0.25, 0.05, 1.8), (0.45, -0.08, 2.1), (0.7, 0.06, 2.6)):
        velocity[depth > top + dip * np.sin(2 * np.pi * across)] = speed
    lens = sum(((axis - 0.5) / 0.16) ** 2 for axis in axes[:-1]) + ((depth - 0.52) / 0.08) ** 2
    velocity[lens < 1] = 2.4
    return velocity.astype(np.float32)


def smoothed(field: Field, width: int) -> Field:
    """Running mean along every axis, three times."""
    kernel = np.ones(2 * width + 1) / (2 * width + 1)
    for _ in range(3):
        for axis in range(field.ndim):
            around = [(width, width) if a == axis else (0, 0) for a in range(field.ndim)]
            padded = np.pad(field, around, mode="edge")
            field = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return field.astype(np.float32)


class Experiment:
    """Operators for shots over one grid."""

    def __init__(self, survey: Survey, disk: str, fastest: float) -> None:
        self.survey, self.disk = survey, disk
        rim, spacing = survey.rim, survey.spacing
        self.shape = tuple(n + 2 * rim for n in survey.shape)
        self.inside = (slice(rim, -rim),) * len(self.shape)
        dimensions = len(self.shape)
        extent = tuple(spacing * (n - 1) for n in self.shape)
        grid = devito.Grid(shape=self.shape, extent=extent, origin=(-rim * spacing,) * dimensions, dtype=np.float32)
        self.dt = np.float32(0.5 * spacing / fastest / np.sqrt(dimensions))
        times = int(np.ceil(survey.seconds / self.dt)) + 1

        self.m = devito.Function(name="m", grid=grid, space_order=4)
        damp = devito.Function(name="damp", grid=grid, space_order=4)
        damp.data[:] = self._damping()
        self.u, self.v = (devito.TimeFunction(name=n, grid=grid, time_order=2, space_order=4) for n in "uv")
        self.gradient = devito.Function(name="gradient", grid=grid)
        self.source = devito.SparseTimeFunction(name="source", grid=grid, npoint=1, nt=times)
        arguments = (np.pi * survey.frequency * (np.arange(times) * self.dt - 1 / survey.frequency)) ** 2
        self.source.data[:, 0] = (1 - 2 * arguments) * np.exp(-arguments)
        self.record, self.residual = (
            devito.SparseTimeFunction(name=n, grid=grid, npoint=survey.receivers, nt=times)
            for n in ("record", "residual")
        )
        width = [spacing * (n - 1) for n in survey.shape]
        for spread in (self.record, self.residual):
            spread.coordinates.data[:] = [*(0.5 * w for w in width[:-1]), 2 * spacing]
            spread.coordinates.data[:, 0] = np.linspace(0, width[0], survey.receivers)
        self.shots = [[x, *(0.5 * w for w in width[1:-1]), 2 * spacing] for x in self._spread(width[0])]

        u, v, m, s = self.u, self.v, self.m, grid.stepping_dim.spacing
        ahead = devito.solve(m * u.dt2 - u.laplace + damp * u.dt, u.forward)
        back = devito.solve(m * v.dt2 - v.laplace + damp * v.dt.T, v.backward)
        injected = self.source.inject(field=u.forward, expr=self.source * s**2 / m)
        self.forward = devito.Operator(
            [devito.Eq(u.forward, ahead), injected, self.record.interpolate(expr=u)], name="Forward"
        )
        injected = self.residual.inject(field=v.backward, expr=self.residual * s**2 / m)
        correlated = devito.Inc(self.gradient, -u * v.dt2)
        self.reverse = devito.Operator([devito.Eq(v.backward, back), injected, correlated], name="Gradient")
        self._costs: Any = None
        self.report: Any = None

    def _spread(self, width: float) -> npt.NDArray[Any]:
        return (np.arange(self.survey.shots) + 0.5) * width / self.survey.shots

    def _damping(self) -> Field:
        rim, damping = self.survey.rim, np.zeros(self.shape)
        for axis, count in enumerate(self.shape):
            at = np.arange(count)
            depth = np.maximum(0, rim - np.minimum(at, count - 1 - at)) / rim
            damping += (8.0 * depth**2).reshape([-1 if a == axis else 1 for a in range(len(self.shape))])
        return damping.astype(np.float32)

    def set_velocity(self, velocity: Field) -> None:
        """Continue the model into the rim."""
        self.m.data[:] = np.pad(velocity.astype(np.float64) ** -2, self.survey.rim, mode="edge")

    def shoot(self, shot: int) -> Field:
        """What the receivers record of a shot."""
        self.source.coordinates.data[0] = self.shots[shot]
        self.u.data_with_halo[:] = 0
        self.forward.apply(dt=self.dt)
        return np.array(self.record.data)

    def misfit(self, observed: Sequence[Field]) -> float:
        """Half the sum of squares over all shots."""
        return sum(
            0.5 * float(np.sum((self.shoot(k) - data).astype(np.float64) ** 2)) for k, data in enumerate(observed)
        )

    def misfit_and_gradient(self, observed: Sequence[Field]) -> tuple[float, Field]:
        """The misfit, and its gradient with respect to m."""
        misfit, dt = 0.0, {"dt": self.dt}
        self.gradient.data[:] = 0
        for shot, data in enumerate(observed):
            self.source.coordinates.data[0] = self.shots[shot]
            self.u.data_with_halo[:] = self.v.data_with_halo[:] = 0
            with longtape.devito.Sweep(
                self.forward,
                self.reverse,
                [self.u],
                memory=self.survey.memory,
                disk=self.disk,
                forward_args=dt,
                reverse_args=dt,
                costs=self._costs,
            ) as sweep:
                sweep.forward()
                self.residual.data[:] = self.record.data - data
                misfit += 0.5 * float(np.sum(np.array(self.residual.data, np.float64) ** 2))
                sweep.reverse()
                self._costs, self.report = sweep.costs, sweep.report
        return misfit, np.array(self.gradient.data[self.inside])


@dataclass
class Result:
    """What came of an inversion; velocities in km/s."""

    true: Field
    start: Field
    found: Field
    misfits: list[float]
    observed: Field
    predicted: tuple[Field, Field]
    """The middle shot in the first and in the last model."""
    seconds: float
    report: Any


def invert(survey: Survey, disk: str) -> Result:
    """Observe the true model, smooth it, and take steps against the gradient from there."""
    true = layers(survey.shape)
    start = smoothed(true, max(3, survey.shape[-1] // 12))
    water = layers(survey.shape) == 1.5
    start[water] = 1.5
    experiment = Experiment(survey, disk, fastest=1.15 * float(true.max()))
    experiment.set_velocity(true)
    observed = [experiment.shoot(shot) for shot in range(survey.shots)]
    velocity, middle = start, survey.shots // 2
    experiment.set_velocity(velocity)
    first = experiment.shoot(middle)
    misfits: list[float] = []
    step = 0.04
    for iteration in range(survey.iterations):
        misfit, gradient = experiment.misfit_and_gradient(observed)
        if iteration == 0:
            misfits.append(misfit)
            print(experiment.report)
        velocity, misfit, step = line_search(experiment, observed, velocity, gradient * ~water, misfit, step)
        misfits.append(misfit)
        print(f"iteration {iteration + 1}: misfit {misfit:.4g}, {misfit / misfits[0]:.1%} of the first", flush=True)
    experiment.set_velocity(velocity)
    predicted = first, experiment.shoot(middle)
    return Result(true, start, velocity, misfits, observed[middle], predicted, survey.seconds, experiment.report)


def line_search(
    experiment: Experiment, observed: Sequence[Field], velocity: Field, gradient: Field, misfit: float, step: float
) -> tuple[Field, float, float]:
    """Halve the largest change of m, relative to its largest value, until the misfit falls; the next starts larger."""
    m = velocity.astype(np.float64) ** -2
    direction = gradient / np.abs(gradient).max() * m.max()
    while step > 1e-4:
        trial = (np.clip(m - step * direction, 0.12, 0.5) ** -0.5).astype(np.float32)
        experiment.set_velocity(trial)
        found = experiment.misfit(observed)
        if found < misfit:
            return trial, found, 1.5 * step
        step /= 2
    experiment.set_velocity(velocity)
    return velocity, misfit, step


def draw(result: Result, path: Path) -> None:
    """Models, shot records and the misfit."""
    from matplotlib.figure import Figure

    def section(field: Field) -> Field:
        return (field if field.ndim == 2 else field[:, field.shape[1] // 2]).T

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(2, 4)
    models = (("true model", result.true), ("first model", result.start), ("model found", result.found))
    for axis, (title, model) in zip(axes[0], models, strict=False):
        image = axis.imshow(section(model), vmin=1.4, vmax=2.7, cmap="viridis", aspect="auto")
        axis.set_title(title)
    figure.colorbar(image, ax=axes[0, :3], label="km/s", shrink=0.8)
    axes[0, 3].plot(np.array(result.misfits) / result.misfits[0], marker="o")
    axes[0, 3].set(title="misfit", xlabel="iteration", ylim=(0, None))
    limit = float(np.percentile(np.abs(result.observed), 98))
    first, last = result.predicted
    shots = (
        ("observed", result.observed),
        ("first model", first),
        ("model found", last),
        ("left over", last - result.observed),
    )
    for axis, (title, shot) in zip(axes[1], shots, strict=True):
        extent = (0, shot.shape[1], result.seconds, 0)
        axis.imshow(shot, vmin=-limit, vmax=limit, cmap="gray", aspect="auto", extent=extent)
        axis.set(title=title, xlabel="receiver")
    axes[1, 0].set_ylabel("seconds")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Acoustic full-waveform inversion")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", action="store_true", help="a small 2-D model")
    size.add_argument("--three-d", action="store_true", help=f"{THREE_D.shape} points and a rim, {THREE_D.shots} shots")
    parser.add_argument("--disk", help="directory for the scratch file; default: the system's")
    parser.add_argument("--picture", type=Path, default=Path("fwi.png"))
    arguments = parser.parse_args()
    devito.configuration["log-level"] = "WARNING"
    survey = SHORT if arguments.short else THREE_D if arguments.three_d else Survey()
    with tempfile.TemporaryDirectory() as directory:
        result = invert(survey, arguments.disk or directory)
    draw(result, arguments.picture)
    print(f"misfit from {result.misfits[0]:.4g} to {result.misfits[-1]:.4g}; pictures in {arguments.picture}")


if __name__ == "__main__":
    main()
