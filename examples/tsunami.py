"""Where did the wave come from?  The source of a tsunami from tide gauges, by 4D-Var through shallow water.

The sea surface at time 0 is unknown; two dozen gauges along the coast record how high the water stands.  The
gradient of the misfit with respect to every point of the first sea surface comes from one reverse sweep through all
steps of the model, `longtape.jax.scan`, and L-BFGS does the rest.  ``--short`` is a small version for tests;
``--picture`` says where to draw.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

import longtape
import longtape.jax as lt

GRAVITY = 9.81
SPACING = 2_000.0
"""Metres between grid points."""
NOISE = 0.01
"""Metres: standard deviation of what a gauge reads wrong."""


def depth(side: int) -> jax.Array:
    """An ocean of 4 km that rises to a shelf in the west and in the south, with a seamount.  Metres."""
    x, y = jnp.meshgrid(jnp.linspace(0, 1, side), jnp.linspace(0, 1, side), indexing="ij")
    coast = jnp.minimum(x + 0.08 * jnp.sin(6 * y), y + 0.05 * jnp.cos(9 * x))
    ocean = 150 + 3850 * jax.nn.sigmoid((coast - 0.22) / 0.05)
    return ocean - 2800 * jnp.exp(-((x - 0.6) ** 2 + (y - 0.45) ** 2) / 0.006)


def true_source(side: int) -> jax.Array:
    """Water lifted on one side of a fault and lowered on the other.  Metres."""
    x, y = jnp.meshgrid(jnp.linspace(0, 1, side), jnp.linspace(0, 1, side), indexing="ij")
    along, across = (x - 0.68) * 0.6 + (y - 0.7) * 0.8, (x - 0.68) * 0.8 - (y - 0.7) * 0.6
    return (
        2.0
        * jnp.exp(-((along / 0.13) ** 2))
        * (jnp.exp(-(((across - 0.035) / 0.05) ** 2)) - 0.6 * jnp.exp(-(((across + 0.06) / 0.05) ** 2)))
    )


def gauges(side: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Points along the two coasts."""
    at = np.linspace(0.12, 0.95, count // 2)
    west = np.stack([np.full_like(at, 0.06), at])
    south = np.stack([at, np.full_like(at, 0.06)])
    places = np.round(np.concatenate([west, south], axis=1) * (side - 1)).astype(int)
    return jnp.asarray(places[0]), jnp.asarray(places[1])


def records(surface: jax.Array, steps: int, places: Any, **settings: Any) -> jax.Array:
    """What each gauge reads after each step, of a sea at rest whose surface is `surface`.

    Nonlinear shallow water on a staggered grid: velocities on the faces between points, walls all round, forward in
    time for the velocities and backward for the surface.
    """
    rest = depth(surface.shape[0])
    dt = 0.4 * SPACING / float(np.sqrt(GRAVITY * 4000.0))

    def step(state: Any, _: None) -> Any:
        eta, u, v = state
        u = (u - GRAVITY * dt / SPACING * (eta[1:, :] - eta[:-1, :])) * (1 - 2e-5 * dt)
        v = (v - GRAVITY * dt / SPACING * (eta[:, 1:] - eta[:, :-1])) * (1 - 2e-5 * dt)
        height = rest + eta
        east = jnp.pad(u * (height[1:, :] + height[:-1, :]) / 2, ((1, 1), (0, 0)))
        north = jnp.pad(v * (height[:, 1:] + height[:, :-1]) / 2, ((0, 0), (1, 1)))
        eta = eta - dt / SPACING * (east[1:, :] - east[:-1, :] + north[:, 1:] - north[:, :-1])
        return (eta, u, v), eta[places]

    still = (surface, jnp.zeros_like(surface[1:, :]), jnp.zeros_like(surface[:, 1:]))
    _, read = lt.scan(step, still, None, steps, **settings)
    return read  # type: ignore[no-any-return]


def smooth(field: jax.Array, width: float = 2.0) -> jax.Array:
    """What is looked for has no finer detail than this many grid points."""
    reach = jnp.arange(-8, 9)
    kernel = jnp.exp(-(reach**2) / (2 * width**2))
    kernel = kernel / kernel.sum()
    rows = jax.vmap(lambda row: jnp.convolve(row, kernel, mode="same"))(field)
    return jax.vmap(lambda row: jnp.convolve(row, kernel, mode="same"))(rows.T).T


def invert(side: int, steps: int, iterations: int, memory: str, disk: str) -> dict[str, Any]:
    """Make records from the true source, forget it, and find it again."""
    places = gauges(side, 24)
    truth = true_source(side)
    clean = records(truth, steps, places, memory=memory)
    observed = clean + NOISE * jax.random.normal(jax.random.key(0), clean.shape)
    reports: list[longtape.Report] = []

    def misfit(control: jax.Array) -> jax.Array:
        found = records(smooth(control), steps, places, memory=memory, disk=disk, on_report=reports.append)
        return jnp.mean(((found - observed) / NOISE) ** 2) / 2 + 1e-3 * jnp.mean(control**2)

    gradient = jax.value_and_grad(misfit)
    history: list[float] = []

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = gradient(jnp.asarray(flat, jnp.float32).reshape(side, side))
        history.append(float(value))
        return float(value), np.asarray(slope, np.float64).ravel()

    began = time.perf_counter()
    result = minimize(
        value_and_gradient, np.zeros(side * side), jac=True, method="L-BFGS-B", options={"maxiter": iterations}
    )
    seconds = time.perf_counter() - began
    estimate = smooth(jnp.asarray(result.x, jnp.float32).reshape(side, side))
    return {
        "truth": truth,
        "estimate": estimate,
        "observed": observed,
        "found": records(estimate, steps, places, memory=memory),
        "places": places,
        "history": history,
        "seconds": seconds,
        "report": reports[-1],
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """The true source, the one found, two gauges, and the misfit as it falls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained", width_ratios=(1, 1, 1.25, 0.9))
    side = found["truth"].shape[0]
    extent = (0, side * SPACING / 1e3, 0, side * SPACING / 1e3)
    for axis, name, title in ((axes[0], "truth", "true source"), (axes[1], "estimate", "found from the gauges")):
        image = axis.imshow(
            np.asarray(found[name]).T,
            origin="lower",
            cmap="RdBu_r",
            vmin=-2,
            vmax=2,
            extent=extent,
            interpolation="none",
        )
        axis.contour(np.asarray(depth(side)).T, levels=[1000, 2000, 3000], colors="0.5", linewidths=0.6, extent=extent)
        axis.plot(*[(np.asarray(p) + 0.5) * SPACING / 1e3 for p in found["places"]], "k^", ms=4)
        axis.set(title=title, xlabel="km")
    figure.colorbar(image, ax=axes[1], label="sea surface at time 0, m")
    minutes = np.arange(len(found["observed"])) * 0.4 * SPACING / np.sqrt(GRAVITY * 4000.0) / 60
    for gauge, colour in ((8, "tab:blue"), (20, "tab:orange")):
        axes[2].plot(minutes, found["observed"][:, gauge], ".", ms=1.5, color=colour, alpha=0.4)
        axes[2].plot(minutes, found["found"][:, gauge], color=colour, lw=1, label=f"gauge {gauge}")
    axes[2].set(title="records (dots) and the model", xlabel="minutes", ylabel="m")
    axes[2].legend(frameon=False)
    axes[3].semilogy(found["history"], color="0.2")
    axes[3].axhline(0.5, color="0.6", ls=":")
    axes[3].set(title="misfit (dotted: noise alone)", xlabel="gradients")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--disk", help="directory for scratch files")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args(arguments)
    side, steps, iterations, memory = (32, 150, 3, "256KiB") if given.short else (128, 1500, 40, "16MiB")
    with tempfile.TemporaryDirectory(dir=given.disk) as disk:
        found = invert(side, steps, iterations, memory, disk)
    error = float(jnp.linalg.norm(found["estimate"] - found["truth"]) / jnp.linalg.norm(found["truth"]))
    print(found["report"])
    print(
        f"\n{len(found['history'])} gradients in {found['seconds']:.1f} s; misfit {found['history'][0]:.3g} -> "
        f"{min(found['history']):.3g}; error of the source {error:.0%}"
    )
    if given.picture is not None:
        draw(found, given.picture)
    return found


if __name__ == "__main__":
    main()
