"""Transformations of JAX around a loop: each gives the result of `jax.lax`, or is refused; none loses a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from longtape import UsageError  # noqa: E402
from longtape.jax import scan, while_loop  # noqa: E402

STEPS = 4
W, H = jnp.array([[0.3, -0.2], [0.1, 0.4]]), jnp.array([0.5, -0.3])
XS = jnp.linspace(-0.5, 0.5, 2 * STEPS).reshape(STEPS, 2)
Loss = Callable[[Any, Any, Any], Any]


def body(w: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        carry = jnp.tanh(w @ carry + x)
        return carry, jnp.sin(carry)

    return step


def plain_scan(w: Any, h: Any, xs: Any) -> Any:
    carry, ys = lax.scan(body(w), h, xs)
    return carry.sum() + (ys**2).sum()


def our_scan(w: Any, h: Any, xs: Any) -> Any:
    carry, ys = scan(body(w), h, xs, memory="1MiB")
    return carry.sum() + (ys**2).sum()


def plain_while(w: Any, h: Any, xs: Any) -> Any:
    return lax.fori_loop(0, STEPS, lambda _, c: body(w)(c, xs[0])[0], h).sum()


def our_while(w: Any, h: Any, xs: Any) -> Any:
    def next_state(state: Any) -> Any:
        return state[0] + 1, body(w)(state[1], xs[0])[0]

    return while_loop(lambda state: state[0] < STEPS, next_state, (0, h), memory="1MiB")[1].sum()


def with_custom_vjp(loss: Loss) -> Any:
    @jax.custom_vjp
    def f(w: Any) -> Any:
        return loss(w, H, XS)

    f.defvjp(lambda w: (f(w), w), lambda w, bar: (bar * jax.grad(loss)(w, H, XS),))
    return jax.grad(f)(W)


def without_jit(loss: Loss) -> Any:
    with jax.disable_jit():
        return jax.grad(loss, (0, 1, 2))(W, H, XS)


def linear_transpose(loss: Loss) -> Any:
    return jax.linear_transpose(jax.linearize(loss, W, H, XS)[1], W, H, XS)(jnp.ones(()))


def in_scan(loss: Loss) -> Any:
    return jax.grad(lambda w: lax.scan(lambda c, _: (c + loss(w, H, XS), None), 0.0, None, length=2)[0])(W)


RIGHT: dict[str, Callable[[Loss], Any]] = {
    "grad": lambda f: jax.grad(f, (0, 1, 2))(W, H, XS),
    "value_and_grad": lambda f: jax.value_and_grad(f)(W, H, XS),
    "vjp": lambda f: jax.vjp(f, W, H, XS)[1](jnp.array(2.0)),
    "stop_gradient": lambda f: jax.grad(lambda w: f(lax.stop_gradient(w), H, XS) * w.sum())(W),
    "custom_vjp": with_custom_vjp,
    "disable_jit": without_jit,
    "linear_transpose of linearize": linear_transpose,
    "jit": lambda f: jax.jit(f)(W, H, XS),
    "vmap": lambda f: jax.vmap(f, (0, None, None))(jnp.stack([W, 2 * W]), H, XS),
    "checkpoint": lambda f: jax.checkpoint(f)(W, H, XS),
    "a constant under jit of grad": lambda f: jax.jit(jax.grad(lambda w: (w * lax.stop_gradient(f(W, H, XS))).sum()))(
        W
    ),
}

REFUSED: dict[str, tuple[Callable[[Loss], Any], str]] = {
    "jvp": (lambda f: jax.jvp(f, (W, H, XS), (W, H, XS)), "no forward-mode derivative"),
    "jvp of the carry": (lambda f: jax.jvp(lambda h: f(W, h, XS), (H,), (H,)), "no forward-mode derivative"),
    "jacfwd": (lambda f: jax.jacfwd(f)(W, H, XS), "no forward-mode derivative"),
    "jacrev": (lambda f: jax.jacrev(f)(W, H, XS), r"inside jax\.vmap"),
    "hessian": (lambda f: jax.hessian(f)(W, H, XS), "a second time"),
    "grad of grad": (lambda f: jax.grad(lambda w: jax.grad(f)(w, H, XS).sum())(W), "a second time"),
    "jvp of grad": (lambda f: jax.jvp(lambda w: jax.grad(f)(w, H, XS), (W,), (W,)), "a second time"),
    "vmap of grad": (lambda f: jax.vmap(jax.grad(f), (0, None, None))(W[None], H, XS), r"inside jax\.vmap"),
    "grad of vmap": (lambda f: jax.grad(lambda w: jax.vmap(lambda h: f(w, h, XS))(H[None]).sum())(W), r"jax\.vmap"),
    "vmap of a pull-back": (lambda f: jax.vmap(jax.vjp(f, W, H, XS)[1])(jnp.ones(2)), r"inside jax\.vmap"),
    "jit of grad": (lambda f: jax.jit(jax.grad(f))(W, H, XS), r"inside jax\.jit"),
    "grad of jit": (lambda f: jax.grad(jax.jit(f))(W, H, XS), r"inside jax\.jit"),
    "grad of checkpoint": (lambda f: jax.grad(jax.checkpoint(f))(W, H, XS), r"inside .*jax\.checkpoint"),
    "grad of cond": (lambda f: jax.grad(lambda w: lax.cond(True, f, lambda w, h, xs: 0.0, w, H, XS))(W), r"lax\.cond"),
    "grad of a scan around it": (in_scan, "inside"),
}

loops = pytest.mark.parametrize(
    ("plain", "ours"), [(plain_scan, our_scan), (plain_while, our_while)], ids=["scan", "while_loop"]
)


@loops
@pytest.mark.parametrize("transform", RIGHT)
def test_what_is_supported_is_right(plain: Loss, ours: Loss, transform: str) -> None:
    expected, found = RIGHT[transform](plain), RIGHT[transform](ours)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@loops
@pytest.mark.parametrize("transform", REFUSED)
def test_the_rest_is_refused(plain: Loss, ours: Loss, transform: str) -> None:
    transformed, words = REFUSED[transform]
    transformed(plain)  # jax.lax can be transformed so
    with pytest.raises(UsageError, match=words):
        transformed(ours)


@loops
def test_a_linearised_loop_has_no_tangents(plain: Loss, ours: Loss) -> None:
    tangents = jax.linearize(ours, W, H, XS)[1]
    with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
        tangents(W, H, XS)


@pytest.mark.parametrize("differentiated", [False, True])
def test_no_step_at_all_gives_the_carry_back(differentiated: bool) -> None:
    def results(loop: Any, h: Any, **options: Any) -> Any:
        return loop(body(W), h, XS[:0], **options)

    def loss(loop: Any, **options: Any) -> Any:
        def of_carry(h: Any) -> Any:
            carry, ys = results(loop, h, **options)
            return (carry**2).sum() + ys.sum()

        return of_carry

    if differentiated:
        np.testing.assert_array_equal(jax.grad(loss(scan, memory="1MiB"))(H), jax.grad(loss(lax.scan))(H))
        never = jax.grad(lambda h: while_loop(lambda c: c.sum() > 9, lambda c: 2 * c, h, memory="1MiB").sum())(H)
        np.testing.assert_array_equal(never, jnp.ones(2))
    else:
        carry, ys = results(scan, H, memory="1MiB")
        np.testing.assert_array_equal(carry, H)
        assert ys.shape == (0, 2)
        carry, ys = scan(lambda c, x: (2 * c, c), H, length=0, memory="1MiB")
        np.testing.assert_array_equal(carry, H)
