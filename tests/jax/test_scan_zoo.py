"""Gradients through `longtape.jax.scan` are those of `jax.lax.scan`, on many kinds of step and every kind of plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax import lax

import longtape.jax as lt
from longtape.report import Report

STEPS = 37
KEY = jax.random.key(3)
SQUARE = jax.random.normal(KEY, (6, 6)) / 4
XS = jax.random.normal(jax.random.key(4), (STEPS, 6))
VECTOR = jnp.linspace(0.1, 1.0, 6)

Case = tuple[Callable[..., Any], Any, Any, Any]
"""step(parameters, carry, x), parameters, init, xs."""


def _lstm(w: Any, carry: Any, x: Any) -> Any:
    h, c = carry
    i, f, o, g = jnp.split(w["w"] @ jnp.concatenate([h, x]) + w["b"], 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def _lorenz(f: Any, u: Any, _: Any) -> Any:
    du = (jnp.roll(u, -1) - jnp.roll(u, 2)) * jnp.roll(u, 1) - u + f
    return u + 0.01 * du, None


def _conditional(w: Any, c: Any, x: Any) -> Any:
    return lax.cond(x.sum() > 0, lambda c: jnp.sin(w @ c), lambda c: c * x, c), c.sum()


def _noisy(w: Any, carry: Any, x: Any) -> Any:
    key, c = carry
    key, sub = jax.random.split(key)
    return (key, jnp.tanh(w @ c + 0.1 * jax.random.normal(sub, c.shape))), c[0]


def _switch(w: Any, carry: Any, x: Any) -> Any:
    n, c = carry
    branches = [lambda c: jnp.tanh(w @ c), lambda c: c * 0.9, lambda c: c + x]
    return (n + 1, lax.switch(n % 3, branches, c)), n


def _inner_scan(w: Any, c: Any, x: Any) -> Any:
    c, ys = lax.scan(lambda c, k: (jnp.tanh(w @ c) + k, c[0]), c, x[:3])
    return c, ys


def _inner_while(w: Any, c: Any, x: Any) -> Any:
    n = lax.while_loop(lambda n: n < 3, lambda n: n + 1, 0)
    return jnp.tanh(w @ c * n / 3), c


@jax.custom_vjp
def _clipped(x: Any) -> Any:
    return x


_clipped.defvjp(lambda x: (x, x > 0), lambda positive, bar: (jnp.where(positive, bar, 0.5 * bar),))

RK4 = (SQUARE - 2 * jnp.eye(6)) / 3


def _rk4(w: Any, u: Any, x: Any) -> Any:
    def rate(u: Any) -> Any:
        return jnp.tanh(w @ u) - u**3

    h = 0.05
    a = rate(u)
    b = rate(u + h / 2 * a)
    c = rate(u + h / 2 * b)
    return u + h / 6 * (a + 2 * b + 2 * c + rate(u + h * c)), u.max()


BIG = jnp.concatenate([SQUARE] * 8).reshape(24, 12) / 2
LOW = jnp.linspace(0, 1, 6, dtype=jnp.bfloat16)
CASES: dict[str, Case] = {
    "rnn": (lambda w, c, x: ((c := jnp.tanh(w @ c + x)), c), SQUARE, VECTOR, XS),
    "lstm": (_lstm, {"w": BIG, "b": jnp.zeros(24)}, (VECTOR, VECTOR * 0), XS),
    "lorenz96": (_lorenz, jnp.float32(8.0), VECTOR, None),
    "rk4": (_rk4, RK4, VECTOR, XS),
    "linear": (lambda w, c, x: (w @ c, c.sum()), SQUARE, VECTOR, XS),
    "no parameters": (lambda w, c, x: (jnp.sin(c) * x, None), (), VECTOR, XS),
    "identity": (lambda w, c, x: (c, x * w), VECTOR, VECTOR, XS),
    "pytrees": (
        lambda w, c, x: (
            {"a": jnp.tanh(w["m"] @ c["a"]), "b": [c["b"][0] * x["u"] + w["v"]]},
            (c["b"][0], {"z": x["u"]}),
        ),
        {"m": SQUARE, "v": VECTOR},
        {"a": VECTOR, "b": [VECTOR]},
        {"u": XS},
    ),
    "integers": (lambda w, c, x: ((c[0] + 1, jnp.tanh(w @ c[1]) + c[0] * x), c[0]), SQUARE, (0, VECTOR), XS),
    "integer inputs": (lambda w, c, x: (jnp.tanh(w[x] * c), x), SQUARE, VECTOR, jnp.arange(STEPS) % 6),
    "booleans": (lambda w, c, x: ((~c[0], jnp.where(c[0], w @ c[1], c[1] * x)), c[0]), SQUARE, (True, VECTOR), XS),
    "complex": (
        lambda w, c, x: (jnp.exp(1j * x) * (w @ c) / 2, jnp.abs(c)),
        SQUARE.astype(jnp.complex64),
        VECTOR + 0.5j,
        XS,
    ),
    "cond": (_conditional, SQUARE, VECTOR, XS),
    "switch": (_switch, SQUARE, (0, VECTOR), XS),
    "random keys": (_noisy, SQUARE, (KEY, VECTOR), XS),
    "keys as inputs": (
        lambda w, c, x: (jnp.tanh(w @ c + jax.random.uniform(x, c.shape)), None),
        SQUARE,
        VECTOR,
        jax.random.split(KEY, STEPS),
    ),
    "a key comes out": (lambda w, c, x: (jnp.tanh(w @ c), x), SQUARE, VECTOR, jax.random.split(KEY, STEPS)),
    "weak carry": (lambda w, c, x: (c * 0.9 + (w * x).mean(), c), VECTOR, 1.0, XS),
    "weak integer becomes a float": (lambda w, c, x: (jnp.sin(c * w), c), jnp.float32(0.9), 1, None),
    "relu": (lambda w, c, x: (jax.nn.relu(w @ c + x), jax.nn.softplus(c)), SQUARE, VECTOR, XS),
    "custom vjp": (lambda w, c, x: (jnp.tanh(w @ _clipped(c) + x), None), SQUARE, VECTOR, XS),
    "remat": (jax.checkpoint(lambda w, c, x: (jnp.tanh(w @ jnp.sin(c)), c)), SQUARE, VECTOR, XS),
    "inner jit": (jax.jit(lambda w, c, x: (jnp.tanh(w @ c), c)), SQUARE, VECTOR, XS),
    "inner scan": (_inner_scan, SQUARE, VECTOR, XS),
    "inner while": (_inner_while, SQUARE, VECTOR, XS),
    "inner vmap": (
        lambda w, c, x: (jax.vmap(lambda r: jnp.tanh(w @ r))(c), c[0]),
        SQUARE,
        jnp.outer(jnp.ones(3), VECTOR),
        XS,
    ),
    "stopped": (lambda w, c, x: (lax.stop_gradient(w) @ c, (w * c).sum()), SQUARE, VECTOR, XS),
    "scatter": (lambda w, c, x: (c.at[1].set(x[0] * w[0, 0]), c[::2]), SQUARE, VECTOR, XS),
    "bfloat16": (lambda w, c, x: (jnp.tanh(c * w), c), LOW, LOW, None),
    "unused y": (lambda w, c, x: (jnp.tanh(w @ c), jnp.ones((0,))), SQUARE, VECTOR, XS),
    "a number comes out": (lambda w, c, x: (jnp.tanh(w @ c), 1.0), SQUARE, VECTOR, XS),
}


def _number(tree: Any) -> Any:
    """One real number that depends on everything with a gradient, differently at every place."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size:
            weights = jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)
            total = total + (jnp.real(leaf) * weights).sum() + (jnp.imag(leaf) * weights).sum()
    return total


def _vjp(case: Case, scan: Callable[..., Any]) -> tuple[Any, Any]:
    step, parameters, init, xs = case
    length = STEPS if xs is None else None

    def run(parameters: Any, init: Any, xs: Any) -> Any:
        results = scan(lambda c, x: step(parameters, c, x), init, xs, length)
        return _number(results), results

    value, pull_back, results = jax.vjp(run, parameters, init, xs, has_aux=True)
    return results, pull_back(jnp.ones_like(value))


@pytest.fixture(scope="module")
def expected() -> Callable[[str], tuple[Any, Any]]:
    known: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in known:
            known[name] = _vjp(CASES[name], lax.scan)
        return known[name]

    return of


def _assert_close(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if b.dtype == jax.dtypes.float0:
            continue
        if not jnp.issubdtype(b.dtype, jnp.inexact):
            np.testing.assert_array_equal(a, b)
            continue
        scale = float(jnp.abs(b).max()) if b.size else 1.0
        rounding = 1e-2 if b.dtype == jnp.bfloat16 else 1e-12 if b.dtype in (np.float64, np.complex128) else 1e-6
        difference = np.abs(np.asarray(a, np.complex128) - np.asarray(b, np.complex128))
        assert difference.max(initial=0) <= rounding * max(scale, 1e-30)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_lax_scan(name: str, expected: Any) -> None:
    results, gradients = _vjp(CASES[name], lambda *a: lt.scan(*a, memory="1MiB"))
    wanted_results, wanted = expected(name)
    _assert_close(results, wanted_results)
    _assert_close(gradients, wanted)


@pytest.mark.parametrize("memory", [1000, "6KiB"])
@pytest.mark.parametrize("name", ["lstm", "integers", "random keys", "cond"])
def test_so_are_those_of_tight_budgets(name: str, memory: int | str, expected: Any, scratch: Path) -> None:
    reports: list[Report] = []
    for disk in None, scratch:
        found = _vjp(CASES[name], lambda *a: lt.scan(*a, memory=memory, disk=disk, on_report=reports.append))  # noqa: B023
        for one, other in zip(found, expected(name), strict=True):
            _assert_close(one, other)
    for report in reports:
        assert report.measured.peak_memory_bytes <= report.memory_budget_bytes


@pytest.mark.parametrize("name", ["rnn", "lorenz96", "linear", "pytrees", "relu", "inner scan"])
def test_bit_for_bit_where_the_operations_are_the_same(name: str, expected: Any) -> None:
    found = _vjp(CASES[name], lambda *a: lt.scan(*a, memory="1MiB"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected(name)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_double_precision(name: str) -> None:
    def widened(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return leaf.astype(np.complex128 if jnp.iscomplexobj(leaf) else np.float64)

    with jax.enable_x64(True):
        step, *parts = CASES[name]
        case = (step, *[jax.tree.map(widened, part) for part in parts])
        found, wanted = _vjp(case, lambda *a: lt.scan(*a, memory=3000)), _vjp(case, lax.scan)
        _assert_close(found, wanted)
