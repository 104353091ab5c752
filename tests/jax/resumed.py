"""A scan that is killed and gone on with; a program of its own."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import longtape.jax as lt
from longtape.plan.costs import Costs

STEPS, WIDTH, BATCH = 400, 32, 16
STATE = 4 * WIDTH * BATCH


class Slow:
    """An observer that takes its time, so that there is something to interrupt."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_action(self, action: Any, began: float, ended: float) -> None:
        if self.seconds:
            time.sleep(self.seconds)

    def on_transfer(self, *_: Any) -> None:
        pass


def problem() -> Any:
    """Weights, random keys in the carry, integers, xs and ys, all of them used."""
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5
    init = jax.random.normal(keys[1], (BATCH, WIDTH)), keys[2], jnp.int32(0)
    xs = jnp.sin(jnp.arange(STEPS * WIDTH, dtype=jnp.float32)).reshape(STEPS, WIDTH)
    return weights, init, xs


def loss(weights: Any, state: Any, xs: Any, init: Any, **options: Any) -> Any:
    def step(carry: Any, x: Any) -> Any:
        state, key, count = carry
        key, now = jax.random.split(key)
        state = jnp.tanh(state @ weights + x + 0.1 * jax.random.normal(now, (BATCH, WIDTH)))
        return (state, key, count + 1), (state[:, 0] * 2, count)

    scanned = lt.scan if options else jax.lax.scan
    carry, ys = scanned(step, (state, *init[1:]), xs, **options)
    return jnp.sum(carry[0] ** 2) + jnp.mean(ys[0] ** 2) * 3, (carry[2], ys)


def gradient(kind: str, directory: str | None, seconds: float, observers: Any = (), **options: Any) -> bytes:
    weights, init, xs = problem()
    speed = 1e9 if kind == "residuals" else STATE / 2e-3
    costs = Costs(1e-3, 4e-3, 1.1e-3, 2e-3, write_bytes_per_second=speed, read_bytes_per_second=speed)
    memory = 64 * STATE if kind == "residuals" else 10 * STATE
    options = {"memory": memory, "costs": costs, "observers": observers} | options
    if directory is not None:
        options |= {"resume": directory, "resume_seconds": seconds}
    of = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (value, aux), bars = of(weights, init[0], xs, init, **options)
    leaves = jax.tree.leaves((value, aux, bars))
    return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)


if __name__ == "__main__":
    kind, directory, out = sys.argv[1:]
    found = gradient(kind, directory, 0.05, [Slow(2e-3)])
    Path(out).write_bytes(found)
