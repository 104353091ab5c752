"""Arrays that leave for slots behind the steps, by JAX's memory kinds, which its CPU back end has too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import longtape.jax
from longtape.jax import leaving
from longtape.protocols import Slot

STEPS = 200


def pinned(arrays: Any = ()) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def loss(weights: Any, scan: Any, **options: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(weights @ h + x)
        return h, h[0]

    xs = jnp.linspace(0.0, 1.0, STEPS * 16).reshape(STEPS, 16)
    last, ys = scan(step, jnp.zeros(16), xs, **options)
    return jnp.sum(last**2) + jnp.sum(ys)


@pytest.mark.parametrize("memory", [600, 4_000, 1_000_000])
@pytest.mark.parametrize("disk", [False, True])
def test_gradients_are_the_same_bits(memory: int, disk: bool, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = jnp.eye(16) * 0.9
    options: dict[str, Any] = {"memory": memory, **({"disk": scratch} if disk else {})}
    expected = jax.grad(lambda w: loss(w, longtape.jax.scan, **options))(weights)
    sent = []
    add = leaving.Leaving.add
    monkeypatch.setattr(leaving.Leaving, "add", lambda self, *rest: (sent.append(1), add(self, *rest))[1])
    monkeypatch.setattr("longtape.jax.job.pinned_beside", pinned)
    found = jax.grad(lambda w: loss(w, longtape.jax.scan, **options))(weights)
    assert sent
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_bytes_are_in_the_slot_when_the_guard_says_so() -> None:
    way, slot = leaving.WayOut(pinned()), Slot(np.zeros(16, np.uint8))
    view = slot.data.view(np.float32)
    way.send(slot)(jnp.arange(6.0), view)
    assert slot.guard is not None
    assert not slot.guard.is_over()
    assert not view.any()
    slot.guard.wait()
    assert slot.guard.is_over()
    assert view.tolist() == [0.0, 1.0, 2.0, 3.0]  # the first rows, as many as there is room for


def test_what_is_given_up_is_not_put_anywhere() -> None:
    way, slot = leaving.WayOut(pinned()), Slot(np.zeros(16, np.uint8))
    view = slot.data.view(np.float32)
    way.send(slot)(jnp.ones(4), view)
    first = slot.guard
    way.send(slot)(jnp.full(4, 2.0), view)
    assert first is not None
    first.wait()
    assert not view.any()


def test_no_more_than_a_few_are_on_their_way() -> None:
    way = leaving.WayOut(pinned())
    slots = [Slot(np.zeros(16, np.uint8)) for _ in range(5)]
    for slot in slots:
        way.send(slot)(jnp.ones(4), slot.data.view(np.float32))
    assert [slot.guard.is_over() for slot in slots if slot.guard] == [True] * 3 + [False] * 2


def test_on_a_cpu_there_is_no_way_to_go() -> None:
    assert leaving.pinned_beside([jnp.zeros(3)]) is None
