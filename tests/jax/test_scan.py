"""What `longtape.jax.scan` promises beside right gradients: errors, releases, and company."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.test_util import check_grads

import longtape.jax as lt
from longtape.errors import BudgetError, ReplayError, StepError, UsageError
from longtape.jax import compiled
from longtape.plan.costs import Costs
from longtape.report import Report
from longtape.testing.tiers import DamagingTier, FailingTier
from longtape.tiers.memory import MemoryTier

W = jax.random.normal(jax.random.key(0), (5, 5)) / 3
C = jnp.linspace(-1.0, 1.0, 5)
XS = jax.random.normal(jax.random.key(1), (50, 5))
EQUINOX_ORDERS = [
    (1, "0,1,2,0,1,0"),
    (1, "0,1,2,3,4,0,1,2,3,0,1,2,0,1,0"),
    (2, "7,0,1,2,3,4,5,6,3,4,5,3,4,3,0,1,2,1,0"),
    (3, "10,4,5,6,7,8,9,7,8,7,4,5,6,5,4,0,1,2,3,2,1,0"),
    (9, "4,3,2,1,0"),
    (2, "3,4,3,0,1,2,1,0"),
    (4, "3,2,1,0"),
    (4, "3,4,3,2,1,0"),
    (4, "5,2,3,4,3,2,1,0"),
    (4, "6,5,2,3,4,3,2,0,1,0"),
    (4, "7,6,5,0,1,2,3,4,3,2,1,0"),
    (4, "7,8,7,6,5,0,1,2,3,4,3,2,1,0"),
    (4, "9,6,7,8,7,6,5,0,1,2,3,4,3,2,1,0"),
    (4, "10,9,5,6,7,8,7,6,5,0,1,2,3,4,3,2,1,0"),
    (4, "10,11,10,9,5,6,7,8,7,6,5,0,1,2,3,4,3,2,1,0"),
    (4, "12,9,10,11,10,9,5,6,7,8,7,6,5,0,1,2,3,4,3,2,1,0"),
    (4, "12,13,12,9,10,11,10,9,5,6,7,8,7,6,5,0,1,2,3,4,3,2,1,0"),
]
"""Published with Equinox's online checkpointed loop: checkpoints, and the steps it runs in the reverse sweep."""

KINDS: dict[str, Any] = {"memory": "1MiB"}


def step(carry: Any, x: Any) -> Any:
    carry = jnp.tanh(W @ carry + x)
    return carry, carry.sum()


def loss_by(scan: Callable[..., Any], w: Any, c: Any, xs: Any) -> Any:
    def closing_over_w(carry: Any, x: Any) -> Any:
        carry = jnp.tanh(w @ carry + x)
        return carry, carry.sum()

    last, ys = scan(closing_over_w, c, xs)
    return (last**2).sum() + (ys**2).mean()


def mine(*arguments: Any) -> Any:
    return lt.scan(*arguments, memory="4KiB")


def assert_same(found: Any, wanted: Any, rtol: float = 1e-5) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


class TestTransformations:
    def test_value_and_grad_of_what_the_step_closes_over(self) -> None:
        found = jax.value_and_grad(loss_by, argnums=(1, 2, 3))(mine, W, C, XS)
        assert_same(found, jax.value_and_grad(loss_by, argnums=(1, 2, 3))(lax.scan, W, C, XS))

    def test_check_grads(self) -> None:
        check_grads(lambda w, c: loss_by(mine, w, c, XS[:12]), (W, C), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)

    def test_twice_in_one_function(self) -> None:
        def twice(scan: Any, w: Any) -> Any:
            return loss_by(scan, w, jnp.tanh(w[0]) * loss_by(scan, w, C, XS), XS[:20])

        assert_same(jax.grad(twice, 1)(mine, W), jax.grad(twice, 1)(lax.scan, W))

    def test_vjp_can_be_called_again(self) -> None:
        _, pull_back = jax.vjp(lambda c: mine(step, c, XS), C)
        _, wanted = jax.vjp(lambda c: lax.scan(step, c, XS), C)
        for bars in (C, jnp.ones(50)), (C * 2, jnp.zeros(50)):
            assert_same(pull_back(bars), wanted(bars))

    def test_in_reverse(self) -> None:
        def run(scan: Any, c: Any, xs: Any, **more: Any) -> Any:
            return jax.vjp(lambda c, xs: scan(step, c, xs, reverse=True, **more), c, xs)

        (found, pull_back), (wanted, true) = run(lt.scan, C, XS, memory="4KiB"), run(lax.scan, C, XS)
        assert_same(found, wanted)
        assert_same(pull_back((C, jnp.arange(50.0))), true((C, jnp.arange(50.0))))

    def test_only_what_is_asked_for_gets_a_gradient(self) -> None:
        reports: list[Report] = []
        grad = jax.grad(lambda c: lt.scan(step, c, XS, on_report=reports.append, **KINDS)[0].sum())
        assert_same(grad(C), jax.grad(lambda c: lax.scan(step, c, XS)[0].sum())(C))
        assert len(reports) == 1

    def test_without_a_gradient_nothing_is_planned(self) -> None:
        plans: list[Any] = []
        assert_same(lt.scan(step, C, XS, on_plan=plans.append, **KINDS), lax.scan(step, C, XS))
        assert not plans

    def test_under_jit_and_vmap_without_a_gradient_it_is_lax_scan(self) -> None:
        found = jax.jit(jax.vmap(lambda c: lt.scan(step, c, XS, **KINDS)))(jnp.stack([C, -C]))
        assert_same(found, jax.vmap(lambda c: lax.scan(step, c, XS))(jnp.stack([C, -C])))

    def test_one_step_and_none(self) -> None:
        for count in 1, 0:
            found = jax.vjp(lambda c, xs: mine(step, c, xs), C, XS[:count])
            wanted = jax.vjp(lambda c, xs: lax.scan(step, c, xs), C, XS[:count])
            assert_same(found[0], wanted[0])
            assert_same(found[1]((C, jnp.ones(count))), wanted[1]((C, jnp.ones(count))))

    def test_no_length_compiles_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def texts(count: int) -> int:
            jax.grad(lambda w: loss_by(lambda *a: lt.scan(*a, memory="1MiB"), w, C, jnp.ones((count, 5))))(W)
            return len(compiled._kept)

        texts(30)
        known = texts(31)
        assert texts(77) == known
        assert texts(1000) == known


class TestRefusals:
    @pytest.mark.parametrize("transform", [lambda f: jax.jit(jax.grad(f)), lambda f: jax.grad(jax.jit(f))])
    def test_derivatives_within_jit(self, transform: Any) -> None:
        with pytest.raises(UsageError, match=r"inside jax\.jit.*outside of jax\.jit"):
            transform(lambda c: mine(step, c, XS)[0].sum())(C)

    def test_derivatives_within_vmap(self) -> None:
        with pytest.raises(UsageError, match=r"inside jax\.vmap"):
            jax.vmap(jax.grad(lambda c: mine(step, c, XS)[0].sum()))(jnp.stack([C, C]))
        with pytest.raises(UsageError, match=r"inside jax\.vmap"):
            jax.jacrev(lambda c: mine(step, c, XS)[0])(C)

    def test_forward_mode(self) -> None:
        with pytest.raises(UsageError, match="no forward-mode"):
            jax.jvp(lambda c: mine(step, c, XS)[0], (C,), (C,))

    def test_second_derivatives(self) -> None:
        with pytest.raises(UsageError, match="second time|forward-mode"):
            jax.grad(lambda c: jax.grad(lambda c: mine(step, c, XS)[0].sum())(c).sum())(C)
        with pytest.raises(UsageError, match="second time|forward-mode"):
            jax.hessian(lambda c: mine(step, c, XS)[0].sum())(C)

    def test_a_carry_that_changes_names_its_leaf(self) -> None:
        def grows(carry: Any, x: Any) -> Any:
            return {"mass": carry["mass"], "speed": jnp.concatenate([carry["speed"], x])}, None

        with pytest.raises(TypeError, match=r"\['speed'\]"):
            mine(grows, {"mass": C, "speed": C}, XS)
        with pytest.raises(TypeError, match="int32"):
            mine(lambda c, x: (c.astype(int), None), C, XS)

    def test_a_traced_length(self) -> None:
        with pytest.raises((TypeError, ValueError), match="length"):
            jax.jit(lambda n: lt.scan(lambda c, _: (c, None), C, None, n, **KINDS))(3)

    def test_lengths_that_disagree(self) -> None:
        with pytest.raises(ValueError, match="length"):
            lt.scan(step, C, XS, 49, **KINDS)

    def test_effects(self) -> None:
        def talks(carry: Any, x: Any) -> Any:
            jax.debug.print("{}", x)
            return carry, None

        with pytest.raises(StepError, match="side effects"):
            mine(talks, C, XS)

    def test_memory_below_one_state(self) -> None:
        with pytest.raises(BudgetError, match="give at least 20 B"):
            jax.grad(lambda c: lt.scan(step, c, XS, memory=19)[0].sum())(C)

    def test_a_disk_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="none, which does not exist; name a directory you can write to"):
            jax.grad(lambda c: lt.scan(step, c, XS, memory="4KiB", disk=tmp_path / "none")[0].sum())(C)

    def test_an_error_of_the_step_is_the_users(self) -> None:
        def fails(carry: Any, x: Any) -> Any:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            mine(fails, C, XS)


class TestReleases:
    def test_a_pull_back_that_is_dropped(self, scratch: Path) -> None:
        _, pull_back = jax.vjp(lambda c: lt.scan(step, c, XS, memory=600, disk=scratch), C)
        del pull_back
        gc.collect()

    def test_arguments_are_left_alone(self) -> None:
        c, xs = C + 0, XS + 0
        jax.grad(lambda w: loss_by(mine, w, c, xs))(W)
        np.testing.assert_array_equal(c, C)
        np.testing.assert_array_equal(xs, XS)

    def test_the_budget_and_the_report(self, scratch: Path) -> None:
        reports: list[Report] = []
        many = jnp.zeros((3000, 5))
        jax.grad(lambda c: lt.scan(step, c, many, memory=2000, disk=scratch, on_report=reports.append)[0].sum())(C)
        report = reports[0]
        assert report.title == "scan of step"
        assert report.steps == 3000
        assert report.measured.peak_memory_bytes <= 2000


class TestStorage:
    """Windows are recorded or not as stated costs have it, and gradients are the same."""

    COSTS = Costs(1e-3, 3e-3, 1.1e-3, 1e-3, 1e9, 1e9, 1e-5, 1e-5)

    @staticmethod
    def grad(scan: Callable[..., Any]) -> Any:
        def loss(w: Any, c: Any) -> Any:
            last, ys = scan(lambda c, x: (jnp.tanh(w * c + x * 0.01), c.sum()), c, jnp.arange(1000.0) / 1000)
            return last.sum() + (ys**2).sum()

        return jax.grad(loss, (0, 1))(C * 0 + 1.1, C)

    @pytest.mark.parametrize("memory", [400, 2000, 20_000, 100_000])
    def test_recorded_windows(self, memory: int, scratch: Path) -> None:
        reports: list[Report] = []
        options = {"memory": memory, "disk": scratch, "costs": self.COSTS, "on_report": reports.append}
        found = self.grad(lambda *a: lt.scan(*a, **options))
        assert_same(found, self.grad(lax.scan), rtol=0.0)
        assert reports[0].steps_recorded > 0
        assert reports[0].measured.peak_memory_bytes <= memory

    @pytest.mark.parametrize("memory", [2000, 20_000, 100_000])
    @pytest.mark.parametrize("damaged", [False, True])
    def test_storage_that_fails(self, memory: int, damaged: bool) -> None:
        def unlucky(call: Any) -> bool:
            return call.operation != "release" and call.key.step > 0 and call.index % 3 == 1

        memory_tier = MemoryTier()
        tier: Any = DamagingTier(memory_tier, unlucky, detected=True) if damaged else FailingTier(memory_tier, unlucky)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self.grad(lambda *a: lt.scan(*a, memory=memory, tier=tier, costs=self.COSTS))
        assert_same(found, self.grad(lax.scan), rtol=0.0)

    def test_recorded_windows_of_a_loop_of_unknown_length(self, scratch: Path) -> None:
        reports: list[Report] = []

        def mine(c: Any) -> Any:
            state = lt.while_loop(
                lambda s: s[0] < 1003,
                lambda s: (s[0] + 1, jnp.tanh(1.1 * s[1] + 0.01)),
                (0, c),
                memory=20_000,
                disk=scratch,
                costs=self.COSTS,
                on_report=reports.append,
            )
            return state[1].sum()

        def true(c: Any) -> Any:
            return lax.scan(lambda c, _: (jnp.tanh(1.1 * c + 0.01), None), c, None, 1003)[0].sum()

        assert_same(jax.grad(mine)(C), jax.grad(true)(C), rtol=1e-6)
        assert reports[0].steps == 1003
        assert reports[0].steps_recorded > 0

    def test_states_are_verified(self, scratch: Path) -> None:
        reports: list[Report] = []
        found = self.grad(lambda *a: lt.scan(*a, memory=600, disk=scratch, verify=True, on_report=reports.append))
        assert_same(found, self.grad(lax.scan))
        assert (reports[0].states_verified or 0) > 100

    def test_a_step_that_does_something_else_each_time(self) -> None:
        calls = iter(range(1_000_000))

        def drifting(carry: Any, _: Any) -> Any:
            noise = jax.pure_callback(
                lambda: np.float32(next(calls) * 1e-3), jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential"
            )
            return {"speed": jnp.tanh(carry["speed"] + noise)}, None

        with pytest.raises(ReplayError, match=r"does not do the same.*\['speed'\]"):
            jax.grad(lambda c: lt.scan(drifting, {"speed": c}, None, 30, memory=100, verify=True)[0]["speed"].sum())(C)

    def test_functions_that_differ_only_in_their_constants(self) -> None:
        """Compiled code is kept by its text, so the text must say all, or not be asked."""
        for constant in np.float32([1, 2, 3, 4, 5]), np.float32([5, 4, 3, 2, 1]):
            for number in 0.1, 0.2:

                def grad(scan: Any, constant: Any = constant, number: float = number) -> Any:
                    return jax.grad(
                        lambda c: scan(lambda c, _: (jnp.tanh(c * constant / 5 + number), None), c, None, 20)[0].sum()
                    )(C)

                assert_same(grad(lambda *a: lt.scan(*a, memory="4KiB")), grad(lax.scan), rtol=0.0)


class TestWhileLoop:
    @staticmethod
    def grad(loop: Callable[..., Any], w: Any, c: Any, limit: float) -> Any:
        def loss(w: Any, c: Any, limit: Any) -> Any:
            n, c = loop(lambda s: s[1].sum() < limit, lambda s: (s[0] + 1, s[1] + jnp.abs(w @ s[1]) + 0.01), (0, c))
            return (c**2).sum(), n

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(w, c, limit)

    @staticmethod
    def bounded(condition: Any, body: Any, init: Any) -> Any:
        def go(state: Any, _: Any) -> Any:
            return lax.cond(condition(state), body, lambda s: s, state), None

        return lax.scan(go, init, None, length=600)[0]

    @pytest.mark.parametrize("limit", [-5.0, 0.1, 7.0, 30.0])
    @pytest.mark.parametrize("stores", [False, True])
    def test_gradients(self, limit: float, stores: bool, scratch: Path) -> None:
        def loop(*arguments: Any) -> Any:
            return lt.while_loop(*arguments, memory=2000, disk=scratch if stores else None)

        found, wanted = self.grad(loop, W / 40, C, limit), self.grad(self.bounded, W / 40, C, limit)
        assert_same(found, wanted, rtol=1e-4)

    @pytest.mark.parametrize("steps", [0, 1, 17])
    def test_it_stops_at_the_stated_number(self, steps: int, scratch: Path) -> None:
        for disk in None, scratch:
            n, _ = lt.while_loop(
                lambda s: s[1] > 0, lambda s: (s[0] + 1, s[1] * 0.9), (0, 1.0), memory=500, disk=disk, max_steps=steps
            )
            assert n == steps
            slope = jax.grad(
                lambda c: lt.while_loop(lambda c: c > 0, lambda c: c * 0.9, c, memory=500, disk=disk, max_steps=steps)  # noqa: B023
            )(1.0)
            assert slope == pytest.approx(0.9**steps, rel=1e-5)

    @pytest.mark.parametrize(("slots", "order"), EQUINOX_ORDERS)
    def test_no_more_is_run_again_than_equinox_does(self, slots: int, order: str) -> None:
        """In each published order the steps beyond one a step are run again."""
        steps_run = [int(step) for step in order.split(",")]
        steps = max(steps_run) + 1
        reports: list[Report] = []
        first = jnp.linspace(-1.0, 1.0, 1000)

        def loss(c: Any) -> Any:
            state = lt.while_loop(
                lambda s: s[0] < steps,
                lambda s: (s[0] + 1, jnp.sin(s[1])),
                (0, c),
                # Here state 0 takes no slot; the array starts at byte 64, and blocks have a head of as many bytes.
                memory=(64 + first.nbytes + 64) * max(1, slots - 1),
                on_report=reports.append,
            )
            return state[1].sum()

        def plain(c: Any) -> Any:
            return lax.fori_loop(0, steps, lambda _, c: jnp.sin(c), c).sum()

        assert_same(jax.grad(loss)(first), jax.grad(plain)(first))
        assert reports[0].measured.steps_recomputed <= len(steps_run) - steps


class TestCompany:
    def test_an_equinox_module_trained_with_optax(self) -> None:
        def train(scan: Any) -> Any:
            cell = eqx.nn.GRUCell(5, 5, key=jax.random.key(2))
            optimiser = optax.sgd(1e-2)
            state = optimiser.init(eqx.filter(cell, eqx.is_array))
            losses = []
            for _ in range(3):

                def loss(cell: Any) -> Any:
                    last, _ = scan(lambda h, x: (cell(x, h), None), jnp.zeros(5), XS)
                    return jnp.sum((last - C) ** 2)

                value, gradient = eqx.filter_value_and_grad(loss)(cell)
                updates, state = optimiser.update(gradient, state)
                cell = eqx.apply_updates(cell, updates)
                losses.append(value)
            return jnp.stack(losses), eqx.filter(cell, eqx.is_array)

        found, wanted = train(mine), train(lax.scan)
        assert found[0][-1] < found[0][0]
        assert_same(jax.tree.leaves(found), jax.tree.leaves(wanted), rtol=1e-4)

    def test_a_diffrax_solver_stepped_under_scan(self) -> None:
        """The recipe of docs/jax.md."""
        term = diffrax.ODETerm(lambda t, y, k: -k * y + jnp.sin(t))
        solver, dt, steps = diffrax.Heun(), 0.05, 40

        def final(scan: Any, y0: Any, k: Any) -> Any:
            def one(carry: Any, t: Any) -> Any:
                y, state = carry
                y, _, _, state, _ = solver.step(term, t, t + dt, y, k, state, made_jump=False)
                return (y, state), y

            state = solver.init(term, 0.0, dt, y0, k)
            (y, _), _ = scan(one, (y0, state), dt * jnp.arange(steps))
            return y.sum()

        whole = diffrax.diffeqsolve(term, solver, 0.0, steps * dt, dt, C, 0.7).ys[-1].sum()
        value, found = jax.value_and_grad(final, (1, 2))(mine, C, 0.7)
        assert float(value) == pytest.approx(float(whole), rel=1e-5)
        assert_same(found, jax.grad(final, (1, 2))(lax.scan, C, 0.7))


def test_no_warning_is_given() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.grad(lambda w: loss_by(mine, w, C, XS))(W)
