"""How JAX arrays cross to the bytes of slots and back.

Owns the two rules that make it safe.  What a compiled function may keep beyond its call
is a copy; what only it reads during its call may be the slot's own memory.  And a view
of a JAX array is dropped before the array is donated, or XLA would copy it.

PRNG keys travel as the integers they are made of: a *raw* array is one of plain numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_ALIGNMENT = 64
"""Of memory that XLA on a CPU takes as it is."""


def is_key(leaf: Any) -> bool:
    """Whether this is an array, or the type of one, of PRNG keys."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def is_inexact(leaf: Any) -> bool:
    """Whether this is an array, or the type of one, that has cotangents."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def raw(leaf: Any) -> Any:
    """The plain numbers of a leaf."""
    if not hasattr(leaf, "dtype"):  # a literal of a jaxpr
        return jnp.asarray(leaf)
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


class Kind:
    """The type of a leaf, and of the raw array that stands for it."""

    def __init__(self, aval: Any) -> None:
        self.typed = jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
        self._impl: Any = None
        self.raw = self.typed
        if is_key(aval):
            self.raw = jax.eval_shape(self._learn, self.typed)
        self.shape: tuple[int, ...] = self.raw.shape
        self.dtype = np.dtype(self.raw.dtype)
        self.nbytes = self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def _learn(self, key: Any) -> Any:
        self._impl = jax.random.key_impl(key)
        return jax.random.key_data(key)

    def restore(self, numbers: Any) -> Any:
        """The leaf that a raw array stands for."""
        return numbers if self._impl is None else jax.random.wrap_key_data(numbers, impl=self._impl)

    def stacked(self, count: int) -> jax.ShapeDtypeStruct:
        """The type of `count` raw arrays."""
        return jax.ShapeDtypeStruct((count, *self.shape), self.dtype)

    def view(self, data: Array, count: int | None = None) -> Array:
        """Bytes as one raw array, or as a stack of `count`."""
        shape = self.shape if count is None else (count, *self.shape)
        typed: Array = data.view(self.dtype).reshape(shape)
        return typed


def host(array: Any) -> Array:
    """A JAX array as a NumPy array, which on a CPU is a view; waits until it is computed.  Drop it soon."""
    view: Array = np.asarray(array)
    return view


def copied(array: Any) -> jax.Array:
    """A JAX array with memory of its own."""
    return jnp.array(array, copy=True)


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """Memory for results of a whole scan, such that `given` need not copy it."""
    nbytes = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    typed: Array = memory[start : start + nbytes].view(dtype).reshape(shape)
    return typed


def given(array: Array) -> jax.Array:
    """A NumPy array as a JAX array; it must not be written to afterwards."""
    result: jax.Array = jax.device_put(array, may_alias=True)
    return result


def rows(stack: Array, start: int, count: int, most: int) -> Array:
    """Rows ``[start, start+count)`` of a stack, followed by anything to make `most` rows."""
    part = stack[start : start + count]
    if count == most and part.flags.c_contiguous:
        return part
    padded = np.zeros((most, *stack.shape[1:]), stack.dtype)
    padded[:count] = part
    return padded
