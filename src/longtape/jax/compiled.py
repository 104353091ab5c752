"""Compiled functions, kept by what they compute.

A function that closes over other arrays is traced anew at every call of `scan`, for it
may be another function.  What XLA is given to compile is then mostly the same text as
before, and so compiled code is kept under that text.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

MOST_KEPT = 256
"""Compiled functions kept."""

_kept: OrderedDict[Any, Any] = OrderedDict()
_lock = threading.Lock()


def compiled(
    function: Callable[..., Any], types: tuple[Any, ...], donated: tuple[int, ...], results: Any, *, shared: bool
) -> Any:
    """A function compiled for arguments of these types.

    Args:
        function: To be compiled.
        types: Pytrees of `jax.ShapeDtypeStruct`, one an argument.
        donated: Which arguments the compiled function takes the memory of.
        results: Whatever distinguishes its results beside the text, such as weak types; hashable.
        shared: Whether the text says all that the function does.
    """
    lowered = jax.jit(function, donate_argnums=donated, keep_unused=True).lower(*types)
    if not shared:
        return lowered.compile()
    # What is no part of the text: how arguments and results are nested, weak types, and where to run.
    weak = tuple(getattr(leaf, "weak_type", False) for leaf in jax.tree.leaves(types))
    nested = jax.tree.structure(types), jax.tree.structure(lowered.out_info)
    key = lowered.as_text(), nested, weak, results, frozenset(jnp.zeros(()).devices())
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    result = lowered.compile()
    with _lock:
        _kept[key] = result
        while len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
    return result


def says_all(*jaxprs: core.ClosedJaxpr | None) -> bool:
    """Whether the text of what is made from these holds no address, and no array is held beside the text."""
    return all(closed is None or (not closed.consts and _is_plain(closed.jaxpr)) for closed in jaxprs)


def _is_plain(jaxpr: core.Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        if "callback" in eqn.primitive.name or "ffi" in eqn.primitive.name:
            return False
        if any(isinstance(atom, core.Literal) and getattr(atom.val, "ndim", 0) for atom in eqn.invars):
            return False
        for inner in _inner(eqn.params):
            if isinstance(inner, core.ClosedJaxpr):
                if inner.consts or not _is_plain(inner.jaxpr):
                    return False
            elif not _is_plain(inner):
                return False
    return True


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.ClosedJaxpr, core.Jaxpr)):
                yield item
