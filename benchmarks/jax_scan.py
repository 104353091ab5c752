"""`longtape.jax.scan` beside `jax.lax.scan` and Equinox's checkpointed scan, at the same memory.

``python -m benchmarks.jax_scan``, with ``--quick`` for small sizes that only show that it works; ``--only`` and
``--steps`` take slices, which join those in the file that the same sources gave.  Each case runs in a process of its
own, one compute thread, cases taken in turn, and compiles before it is timed: ours by running some first steps, the
others for all of them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import common

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
WIDTH, BATCH = 128, 1024
MEMORY = 64 << 20
STATE_NBYTES = 4 * WIDTH * BATCH
VARIABLES = 40
LORENZ_NBYTES = 4 * VARIABLES


def mlp_ode() -> tuple[Callable[..., Any], Any, Any]:
    """One Euler step of dy/dt = MLP(y), two hidden layers, a state of 512 KiB: step, parameters, first state."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 4)
    weights = [jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5 for key in keys[:3]]
    parameters = [(w, jnp.zeros(WIDTH)) for w in weights]

    def step(parameters: Any, y: Any) -> Any:
        rate = y
        for w, b in parameters:
            rate = jnp.tanh(rate @ w + b)
        return y + 1e-3 * rate

    return step, parameters, jax.random.normal(keys[3], (BATCH, WIDTH))


def lorenz() -> tuple[Callable[..., Any], Any, Any]:
    """One Euler step of Lorenz-96 in 40 variables."""
    import jax.numpy as jnp

    def step(forcing: Any, u: Any) -> Any:
        return u + 1e-5 * ((jnp.roll(u, -1) - jnp.roll(u, 2)) * jnp.roll(u, 1) - u + forcing)

    return step, jnp.float32(8.0), jnp.sin(jnp.arange(VARIABLES, dtype=jnp.float32))


MODELS = {"mlp_ode": (mlp_ode, STATE_NBYTES), "lorenz96": (lorenz, LORENZ_NBYTES)}


def run(model: str, way: str, steps: int, memory: int, disk: str) -> dict[str, Any]:
    """Value and gradient through `steps` steps, once compiled: seconds, growth of the resident size, the plan."""
    os.environ["XLA_FLAGS"] = ONE_THREAD
    import equinox.internal as eqxi
    import jax
    import jax.numpy as jnp
    from jax import lax

    import longtape.jax as lt

    make, state_nbytes = MODELS[model]
    step, parameters, first = make()
    reports: list[Any] = []

    def gradient(length: int) -> Callable[[], Any]:
        def loss(parameters: Any, first: Any) -> Any:
            def body(y: Any, _: Any) -> Any:
                return step(parameters, y), None

            if way == "lax.scan":
                last, _ = lax.scan(body, first, None, length=length)
            elif way == "equinox":
                last, _ = eqxi.scan(
                    body,
                    first,
                    None,
                    length=length,
                    kind="checkpointed",
                    checkpoints=min(length, memory // state_nbytes),
                )
            else:
                last, _ = lt.scan(
                    body, first, None, length, memory=memory, disk=disk, disk_limit=LIMIT, on_report=reports.append
                )
            return jnp.sum(last**2)

        whole = jax.value_and_grad(loss, argnums=(0, 1))
        if way != "longtape":
            whole = jax.jit(whole).lower(parameters, first).compile()
        return lambda: jax.block_until_ready(whole(parameters, first))

    if way == "longtape":
        gradient(8192 if model == "lorenz96" else 64)()  # what is compiled does not depend on the length
    timed = gradient(steps)
    meter = common.Meter()
    meter.start()
    _, bars = timed()
    outcome: dict[str, Any] = meter.stop()
    outcome["check"] = float(jnp.abs(jax.tree.leaves(bars)[0]).sum())
    if way == "longtape":
        report = reports[-1]
        outcome |= {
            "schedule": report.schedule,
            "window": report.window,
            "peak_memory_bytes": report.measured.peak_memory_bytes,
            "peak_disk_bytes": report.measured.peak_disk_bytes,
            "steps_recomputed": report.measured.steps_recomputed,
            "stall_seconds": report.measured.stall_seconds,
            "predicted_seconds": report.predicted.seconds,
            "prepare_seconds": report.prepare_seconds,
            "forward_seconds": report.forward_seconds,
            "reverse_seconds": report.reverse_seconds,
            "recorded": report.steps_recorded,
        }
    return outcome


PARTS = {
    "mlp_ode": [
        ("lax.scan", 1_000), ("longtape", 1_000), ("equinox", 1_000),
        ("longtape", 4_000), ("equinox", 4_000),
        ("longtape", 16_000), ("equinox", 16_000),
        ("longtape", 30_000), ("longtape", 100_000),
    ],
    "lorenz96": [("lax.scan", 1_000_000), ("longtape", 1_000_000)],
}  # fmt: skip
QUICK = {
    "mlp_ode": [("lax.scan", 50), ("longtape", 50), ("equinox", 50), ("longtape", 400), ("equinox", 400)],
    "lorenz96": [("lax.scan", 20_000), ("longtape", 20_000)],
}
LIMIT = "60GiB"
"""Of disk, for every length alike: the residuals of 100,000 MLP steps take more."""


def sizes(name: str, *, quick: bool) -> int:
    """The memory budget of a part; bytes."""
    return MEMORY if not quick else 8 << 20 if name == "mlp_ode" else 1 << 20


def summed_up(outcomes: list[Any], steps: int) -> dict[str, Any]:
    """The runs of a case."""
    return {
        "milliseconds_per_step": common.summary([1e3 * outcome["seconds"] / steps for outcome in outcomes]),
        "rss_growth_bytes": max(outcome["peak_bytes"] for outcome in outcomes),
        **{key: value for key, value in outcomes[-1].items() if key not in ("seconds", "peak_bytes")},
        "runs": outcomes,
    }


def part(name: str, wanted: list[int] | None, *, quick: bool, repeats: int, disk: str, before: Any) -> dict[str, Any]:
    """Cases of a part taken in turn, joined with the runs of `before`."""
    memory = sizes(name, quick=quick)
    cases = (QUICK if quick else PARTS)[name]
    taken = {case: list(found["runs"]) for case, found in before.get("cases", {}).items()}
    for _ in range(repeats):
        for way, steps in cases:
            if wanted is None or steps in wanted:
                outcome = common.apart(run, name, way, steps, memory, disk)
                taken.setdefault(f"{way} N={steps}", []).append(outcome)
                print(name, way, steps, f"{outcome['seconds'] / steps * 1e3:.4f} ms a step", flush=True)
    found = {f"{way} N={steps}": steps for way, steps in cases}
    return {
        "memory_bytes": memory,
        "cases": {case: summed_up(taken[case], steps) for case, steps in found.items() if case in taken},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=sorted(PARTS))
    parser.add_argument("--steps", type=int, nargs="*", help="only these lengths; joins what the same sources gave")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--disk", default=None, help="directory for scratch files")
    arguments = parser.parse_args()
    quick = arguments.quick
    settings = {"width": WIDTH, "batch": BATCH, "variables": VARIABLES, "disk_limit": LIMIT, "xla_flags": ONE_THREAD}
    for name in PARTS if arguments.only is None else [arguments.only]:
        before = {} if quick else common.earlier(f"jax_scan_{name}").get("results", {})
        with tempfile.TemporaryDirectory(dir=arguments.disk) as disk:
            found = part(
                name,
                arguments.steps,
                quick=quick,
                repeats=1 if quick else arguments.repeats,
                disk=disk,
                before=before,
            )
        if quick:
            print(name, found)
        else:
            common.write(f"jax_scan_{name}", {"sources": common.sources(), **settings}, found)


if __name__ == "__main__":
    main()
