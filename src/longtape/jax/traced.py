"""From the user's functions to one loop of explicit inputs, by JAX's own reading of them.

Owns tracing.  A call is traced as the `jax.lax` loop it stands for, so that contract
and error messages are JAX's own, and the loop is then found in the jaxpr.  What the
user's functions close over appears there as inputs of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from longtape.errors import StepError


@dataclass(frozen=True, slots=True)
class Loop:
    """The body of a loop as ``step(*consts, *carry, *x) -> (*carry, *y)``."""

    step: core.ClosedJaxpr
    consts: int
    """Inputs of `step` that are the same for every step."""
    carry: int
    condition: core.ClosedJaxpr | None = None
    """``condition(*its consts, *carry)``: whether there is another step; None: the length is known."""
    condition_consts: int = 0

    @property
    def inputs(self) -> tuple[list[Any], list[Any], list[Any]]:
        """Types of consts, carry and x."""
        avals = list(self.step.in_avals)
        ends = self.consts, self.consts + self.carry
        return avals[: ends[0]], avals[ends[0] : ends[1]], avals[ends[1] :]

    @property
    def outputs(self) -> tuple[list[Any], list[Any]]:
        """Types of carry and y."""
        avals = list(self.step.out_avals)
        return avals[: self.carry], avals[self.carry :]


class Traced:
    """A call of `jax.lax.scan` or `jax.lax.while_loop`, whose loop can be run in another way.

    Args:
        call: The call, as a function of pytrees that are differentiated.
        arguments: The pytrees.
        primitive: ``"scan"`` or ``"while"``.

    Raises:
        TypeError, ValueError: Whatever JAX has to say of the call.
        StepError: The functions have side effects.
    """

    def __init__(self, call: Callable[..., Any], arguments: Sequence[Any], primitive: str) -> None:
        with jax.disable_jit(False):
            self._outer, shapes = jax.make_jaxpr(call, return_shape=True)(*arguments)
        self._leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tuple(arguments))]
        self._structure = jax.tree.structure(shapes)
        jaxpr = self._outer.jaxpr
        found = [index for index, eqn in enumerate(jaxpr.eqns) if eqn.primitive.name == primitive]
        if len(found) != 1:
            raise StepError(f"the traced call holds {len(found)} loops where one is expected: {jaxpr}")
        self._index = found[0]
        self.eqn = jaxpr.eqns[self._index]
        self.loop = _scan_loop(self.eqn) if primitive == "scan" else _while_loop(self.eqn)
        for what, body in (("the step", self.loop.step), ("the condition", self.loop.condition)):
            if body is not None and body.jaxpr.effects:
                effects = ", ".join(sorted(str(effect) for effect in body.jaxpr.effects))
                raise StepError(
                    f"{what} has side effects ({effects}), which would happen again whenever it is run again; take "
                    "jax.debug calls, callbacks with effects and mutable references out of it"
                )

    def run(self, loop: Callable[[list[Any]], Sequence[Any]]) -> Any:
        """The result of the call, with `loop` run in place of JAX's, on its inputs."""
        jaxpr = self._outer.jaxpr
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, self._outer.consts, strict=True))
        values |= dict(zip(jaxpr.invars, self._leaves, strict=True))
        _evaluate(jaxpr, jaxpr.eqns[: self._index], values)
        results = loop([_value(atom, values) for atom in self.eqn.invars])
        values |= dict(zip(self.eqn.outvars, results, strict=True))
        _evaluate(jaxpr, jaxpr.eqns[self._index + 1 :], values)
        return jax.tree.unflatten(self._structure, [_value(atom, values) for atom in jaxpr.outvars])

    def plain(self, inputs: list[Any]) -> list[Any]:
        """The loop as JAX runs it."""
        return part_of(self._outer.jaxpr, [self.eqn], list(self.eqn.invars), list(self.eqn.outvars))(*inputs)


def _scan_loop(eqn: Any) -> Loop:
    parameters = eqn.params
    return Loop(parameters["jaxpr"], parameters["num_consts"], parameters["num_carry"])


def _while_loop(eqn: Any) -> Loop:
    parameters = eqn.params
    consts = parameters["body_nconsts"]
    carry = len(eqn.invars) - consts - parameters["cond_nconsts"]
    return Loop(parameters["body_jaxpr"], consts, carry, parameters["cond_jaxpr"], parameters["cond_nconsts"])


def _value(atom: Any, values: dict[Any, Any]) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]


def _evaluate(jaxpr: core.Jaxpr, eqns: Sequence[Any], values: dict[Any, Any]) -> None:
    """Evaluate a few equations before or after the loop, as anything that JAX transforms."""
    for eqn in eqns:
        inputs = list(dict.fromkeys(atom for atom in eqn.invars if not isinstance(atom, core.Literal)))
        outputs = [variable for variable in eqn.outvars if not isinstance(variable, core.DropVar)]
        results = part_of(jaxpr, [eqn], inputs, outputs)(*[values[variable] for variable in inputs])
        values |= dict(zip(outputs, results, strict=True))


def part_of(
    jaxpr: core.Jaxpr, eqns: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> Callable[..., list[Any]]:
    """Some equations of a jaxpr as a function from some of its variables to others.

    An input that is a literal is passed over; one that occurs twice counts once, with the first value.
    """
    variables: dict[Any, int] = {}
    for position, atom in enumerate(inputs):
        if not isinstance(atom, core.Literal):
            variables.setdefault(atom, position)
    kept = [variable for variable in outputs if not isinstance(variable, core.DropVar)]
    part = core.Jaxpr(
        constvars=[],
        invars=list(variables),
        outvars=kept,
        eqns=list(eqns),
        effects=jaxpr.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    closed = core.ClosedJaxpr(part, [])

    def call(*values: Any) -> list[Any]:
        results = iter(core.jaxpr_as_fun(closed)(*[values[position] for position in variables.values()]))
        return [None if isinstance(variable, core.DropVar) else next(results) for variable in outputs]

    return call
