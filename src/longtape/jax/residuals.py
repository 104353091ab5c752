"""What the adjoint of one step needs, and where each part of it comes from.

Owns the splitting of a step's vjp in two: running the step while keeping residuals, and
pulling cotangents back through them.  `jax.vjp` says what is needed; the jaxpr says
which of it need not be kept: what is an input anyway, what depends on nothing that
changes, and what a few cheap operations make again from the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from longtape.jax.arrays import Kind, is_inexact
from longtape.jax.traced import Loop, part_of

MOST_REMADE = 4
"""Operations one after the other that are done again rather than have their result kept."""

# fmt: off
_CHEAP = frozenset([
    "abs", "add", "and", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "eq", "ge", "gt",
    "integer_pow", "iota", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "reshape", "rev",
    "select_n", "sign", "slice", "square", "squeeze", "sub", "transpose",
])
# fmt: on
"""Operations that cost about as much as reading their result."""

Leaves = list[Any]


class Adjoint:
    """A step as `record` and `pull_back`, which any JAX transformation may trace.

    Args:
        loop: The step.
        wanted_consts: Which of its consts get a cotangent.
        wanted_x: Which leaves of x do.
    """

    def __init__(self, loop: Loop, wanted_consts: Sequence[bool], wanted_x: Sequence[bool]) -> None:
        consts, carry, x = loop.inputs
        self._loop = loop
        self._step = core.jaxpr_as_fun(loop.step)
        self.wanted = [*wanted_consts, *[is_inexact(leaf) for leaf in carry], *wanted_x]
        self._wanted_counts = sum(wanted_consts), sum(is_inexact(leaf) for leaf in carry)
        self._outputs = list(loop.step.out_avals)
        self._structure: Any = None
        closed = jax.make_jaxpr(self._linearize)(*[Kind(aval).typed for aval in (*consts, *carry, *x)])
        self.constants: Leaves = list(closed.consts)
        """Arrays that tracing made; to be passed with the consts."""
        self._examine(closed.jaxpr, len(consts), len(carry))

    def _linearize(self, *inputs: Any) -> tuple[Leaves, Leaves]:
        def step(*differentiated: Any) -> Leaves:
            given = iter(differentiated)
            merged = [next(given) if wanted else leaf for wanted, leaf in zip(self.wanted, inputs, strict=True)]
            return list(self._step(*merged))

        outputs, pull_back = jax.vjp(step, *[leaf for leaf, wanted in zip(inputs, self.wanted, strict=True) if wanted])
        leaves, self._structure = jax.tree.flatten(pull_back)
        return outputs, leaves

    # Where residuals come from -----------------------------------------------------------------

    def _examine(self, jaxpr: core.Jaxpr, consts: int, carry: int) -> None:
        fixed = [*jaxpr.invars[:consts], *jaxpr.constvars]
        x = list(jaxpr.invars[consts + carry :])
        self._needed = list(jaxpr.outvars[len(self._outputs) :])
        needed = list(dict.fromkeys(atom for atom in self._needed if not isinstance(atom, core.Literal)))
        source = {variable: eqn for eqn in jaxpr.eqns for variable in eqn.outvars}
        unchanging = _reachable(jaxpr, fixed)
        at_hand = {*unchanging, *x}
        self.kept = _kept(needed, source, at_hand)
        remade = [v for v in needed if v not in at_hand and v not in self.kept]
        self.needs_x = any(v in x for v in _ancestors(needed, source, {*unchanging, *self.kept}))
        once = [v for v in _ancestors(needed, source, {*fixed, *self.kept, *x}) if v in unchanging and v not in fixed]
        outputs = [*jaxpr.outvars[: len(self._outputs)], *self.kept]
        inputs = [*jaxpr.invars, *jaxpr.constvars]
        self._forward = part_of(jaxpr, _needed_eqns(jaxpr, outputs, inputs), inputs, _variables(outputs))
        self._literals = [atom.val if isinstance(atom, core.Literal) else None for atom in outputs]
        self._prepare = part_of(jaxpr, _needed_eqns(jaxpr, once, fixed), fixed, once)
        base = [*fixed, *once, *self.kept, *(x if self.needs_x else [])]
        self._remake = part_of(jaxpr, _needed_eqns(jaxpr, remade, base), base, remade)
        self._base, self._remade = base, remade
        self._inputs, self._x = len(jaxpr.invars) - len(x), len(x)
        self._consts = consts
        self.kinds = [Kind(variable.aval) for variable in self.kept]
        """Types of the residuals that are kept of a step."""

    def record(self, consts: Leaves, carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves, Leaves]:
        """Run one step; returns carry, y and the residuals.  `consts` are those of the loop and `constants`."""
        own, made = consts[: self._consts], consts[self._consts :]
        found = iter(self._forward(*own, *carry, *x, *made))
        results = [next(found) if literal is None else literal for literal in self._literals]
        outputs, kept = results[: len(self._outputs)], results[len(self._outputs) :]
        return outputs[: self._loop.carry], outputs[self._loop.carry :], kept

    def prepare(self, consts: Leaves) -> Leaves:
        """What many pull-backs have in common."""
        return self._prepare(*consts)

    def pull_back(
        self, consts: Leaves, prepared: Leaves, kept: Leaves, x: Leaves, bars: Leaves
    ) -> tuple[Leaves, Leaves, Leaves]:
        """Cotangents of those consts, carry and x leaves that get one.

        Args:
            consts: As in `record`.
            prepared: From `prepare`.
            kept: From `record`.
            x: As in `record`; not read unless `needs_x`.
            bars: Cotangents of those leaves of carry and y that have one.
        """
        base = [*consts, *prepared, *kept, *(x if self.needs_x else [])]
        values = dict(zip(self._base, base, strict=True))
        values |= dict(zip(self._remade, self._remake(*base), strict=True))
        leaves = [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in self._needed]
        given = iter(bars)
        cotangents = [
            next(given) if is_inexact(aval) else np.zeros(aval.shape, jax.dtypes.float0) for aval in self._outputs
        ]
        found = list(jax.tree.unflatten(self._structure, leaves)(cotangents))
        first, second = self._wanted_counts[0], sum(self._wanted_counts)
        return found[:first], found[first:second], found[second:]


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _reachable(jaxpr: core.Jaxpr, variables: Sequence[Any]) -> set[Any]:
    """All that depends on these variables alone."""
    found = set(variables)
    for eqn in jaxpr.eqns:
        if all(variable in found for variable in _variables(eqn.invars)):
            found.update(eqn.outvars)
    return found


def _ancestors(variables: Sequence[Any], source: dict[Any, Any], base: set[Any]) -> list[Any]:
    """The variables, and all that is needed to make them from `base`, parts of `base` included."""
    found: dict[Any, None] = {}
    waiting = list(variables)
    while waiting:
        variable = waiting.pop()
        if variable in found:
            continue
        found[variable] = None
        if variable not in base and variable in source:
            waiting += _variables(source[variable].invars)
    return list(found)


def _needed_eqns(jaxpr: core.Jaxpr, outputs: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    missing = set(_variables(outputs)) - set(inputs)
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if any(variable in missing for variable in eqn.outvars):
            eqns.append(eqn)
            missing.update(variable for variable in _variables(eqn.invars) if variable not in inputs)
    return eqns[::-1]


def _kept(needed: Sequence[Any], source: dict[Any, Any], at_hand: set[Any]) -> list[Any]:
    """Those of the needed variables that must be kept, so that a few cheap operations make the others."""
    order = {variable: position for position, variable in enumerate(source)}
    kept: list[Any] = []
    base = set(at_hand)
    for variable in sorted(needed, key=lambda v: order.get(v, -1)):
        if not _is_remade(variable, source, base, MOST_REMADE):
            kept.append(variable)
            base.add(variable)
    return kept


def _is_remade(variable: Any, source: dict[Any, Any], base: set[Any], depth: int) -> bool:
    if variable in base:
        return True
    eqn = source.get(variable)
    if eqn is None or depth == 0 or not _is_cheap(eqn):
        return False
    return all(_is_remade(v, source, base, depth - 1) for v in _variables(eqn.invars))


def _is_cheap(eqn: Any) -> bool:
    if eqn.primitive.name == "jit":
        return all(_is_cheap(inner) for inner in eqn.params["jaxpr"].jaxpr.eqns)
    return eqn.primitive.name in _CHEAP
