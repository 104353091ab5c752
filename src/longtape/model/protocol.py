"""What a model must be, and the checks of it that need no step to be run."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from longtape.errors import UsageError
from longtape.protocols import Bytes

Array = npt.NDArray[Any]

RESIDUAL_ALIGNMENT = 64


class Model(Protocol):
    """What `Sweep` asks of a model that updates its buffers in place.

    Steps run more than once: a few first steps before the sweep, and most of the others again in the reverse
    sweep.  Each time, a step must give the same bits.  So a step may depend on `state`, its number and constants
    only.  A step that also sums a misfit, fills a receiver record or counts its calls does so again in each run,
    unless that array is declared in `outputs` or `sums`: these are written once, however often a step runs.

    A model may also have:

    * ``outputs`` (list of arrays): step k writes row ``a[k]`` of each, so their first dimension is N.  Rows change
      the first time their step runs, and never again: overwrite them between `forward` and `reverse` as you like,
      with a residual for example.  What `reverse` itself writes to them stays;
    * ``sums`` (list of arrays): steps add to them; each step counts once.  With ``resume``, outputs and sums are
      stored with the run, sums as a whole each time, and are there again after a kill.  A model that writes
      nothing beside its state may say ``outputs = []``;
    * ``max_reverse`` (int): most steps one `reverse` call may take; 1 if absent;
    * ``reverse_seconds`` (float): about how long `reverse` takes a step, for the plan; if
      absent, twice as long as a forward step, until the first adjoints have been timed;
    * ``adjoint`` (array or sequence of arrays): what `reverse` updates, accumulated gradients
      included, all of it.  With ``resume`` it is stored on the way, and restored when a half-finished reverse
      sweep goes on.  `Sweep.reverse` warns if all of it is zero, and the model has neither outputs nor sums;
    * ``fingerprint`` (str or bytes): whatever else the gradient depends on, such as parameters;
      with ``resume``, a run that was begun with another one is refused;
    * ``advance_into(step, source, target)`` and ``reverse_from(step, source)``: run one
      step from the arrays `source` into the arrays `target` of the same shapes, and take
      its adjoint from `source`, changing neither.  A model that has both is run from the
      kept snapshots themselves, and nothing is copied to keep or to restore one.  Where
      storage takes every state (and the adjoint needs nothing else), no step is run twice:
      the state is the tape;
    * ``residual_nbytes`` (int), ``record(step, residuals)`` and ``pull_back(step, residuals)``:
      run one step on the buffers and put what its adjoint needs into `residuals`, a uint8
      array of so many bytes that starts at a multiple of 64; and take the adjoint of the
      step from it, whatever the state buffers hold.  Then storage carries residuals
      instead of states where that is quicker, and recorded steps are never run again.
    """

    state: Sequence[Array]
    """The live buffers, which hold state 0 when the sweep is made.

    Steps update these arrays in place.  A step that rebinds ``self.u = self.u + ...`` leaves the listed array as it
    was: write ``self.u += ...``, or make `state` a property that lists the current arrays.
    """

    def advance(self, start: int, stop: int) -> Any:
        """Run exactly the steps ``start … stop-1`` on the buffers.

        In a sweep with ``steps=None``, return the state reached: `stop`, or less where the sequence
        has ended, which may be `start` itself.  (`advance_into` then returns False, and makes no step.)
        With N given, return None or `stop`.
        """

    def reverse(self, start: int, stop: int) -> Any:
        """The buffers hold state `start`: take the adjoint of steps ``stop-1 … start``."""


def check_methods(model: Any) -> None:
    """Refuse a model that lacks a method, before anything runs."""
    found = [name for name in ("advance_into", "reverse_from") if hasattr(model, name)]
    if len(found) == 1:
        other = "reverse_from" if found == ["advance_into"] else "advance_into"
        raise UsageError(
            f"model.{found[0]} would never be called: a model that runs out of place needs {other} too; "
            f"add it, or remove {found[0]}"
        )
    records = can_record(model)
    needed = ["advance", "reverse"] if records or not found else found
    for name in (*needed, *(("record", "pull_back") if records else ())):
        if not callable(getattr(model, name, None)):
            raise UsageError(f"a sweep calls model.{name}, which {type(model).__name__} lacks; add the method")


def can_record(model: Any) -> bool:
    """Whether the model lays out its residuals."""
    found = [name for name in ("residual_nbytes", "record", "pull_back") if hasattr(model, name)]
    if found and len(found) < 3:
        raise UsageError(f"a model that records has residual_nbytes, record and pull_back; this one has {found}")
    if found:
        checked_count("model.residual_nbytes", model.residual_nbytes)
    return bool(found)


def runs_out_of_place(model: Any) -> bool:
    """Whether snapshots change hands instead of being copied."""
    return not can_record(model) and hasattr(model, "advance_into") and hasattr(model, "reverse_from")


def residual_stride(model: Any) -> int:
    """Bytes from the residuals of one step to those of the next."""
    return -(-int(model.residual_nbytes) // RESIDUAL_ALIGNMENT) * RESIDUAL_ALIGNMENT


def checked_count(name: str, value: Any, more: str = "") -> int:
    """An integer of at least 1, NumPy's included; `more` says what else would do."""
    try:
        count = 0 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise UsageError(f"{name} must be an integer of at least 1{more}, not {value!r}")
    return count


def checked_seconds(model: Any) -> float | None:
    """What the model says an adjoint step takes."""
    seconds = getattr(model, "reverse_seconds", None)
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
        raise UsageError(f"model.reverse_seconds must be the seconds that the adjoint of a step takes, not {seconds!r}")
    return float(seconds)


def listed(model: Any, name: str) -> list[Array]:
    """Those of the model's arrays that an attribute lists; a single array counts as a list of one."""
    arrays = getattr(model, name, ())
    return [arrays] if isinstance(arrays, np.ndarray) else list(arrays)


def check_arrays(model: Any, steps: int | None) -> None:
    """Refuse arrays that a sweep cannot keep, restore or tell apart."""
    arrays = getattr(model, "state", None)
    if not isinstance(arrays, (list, tuple)) or not arrays:
        raise UsageError("model.state must be a non-empty list of NumPy arrays: the buffers its steps update")
    groups = {name: _checked_list(model, name) for name in ("state", "adjoint", "outputs", "sums")}
    if not sum(array.nbytes for array in groups["state"]):
        raise UsageError("model.state holds 0 bytes; list the arrays that its steps update")
    for index, array in enumerate(groups["outputs"]):
        if steps is None:
            raise UsageError("model.outputs has a row for each step, so the sweep needs steps; give steps, or use sums")
        if not array.ndim or len(array) != steps:
            raise UsageError(
                f"model.outputs[{index}] has shape {list(array.shape)}; its first dimension must be the {steps} steps, "
                "for step k writes row k"
            )
    forward = [(f"{name}[{k}]", a) for name in ("state", "outputs", "sums") for k, a in enumerate(groups[name])]
    adjoint = [(f"adjoint[{k}]", a) for k, a in enumerate(groups["adjoint"])]
    state = forward[: len(groups["state"])]
    _check_apart([*combinations(forward, 2), *((one, other) for one in state for other in adjoint)])


def _checked_list(model: Any, name: str) -> list[Array]:
    try:
        arrays = listed(model, name)
    except TypeError:
        kind = type(getattr(model, name)).__name__
        raise UsageError(f"model.{name} must be a list of NumPy arrays, not {kind}") from None
    for index, array in enumerate(arrays):
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            kind = type(array).__name__
            raise UsageError(f"model.{name}[{index}] must be a NumPy array of plain numbers, not {kind}")
        if not array.flags.writeable:
            raise UsageError(f"model.{name}[{index}] is read-only, and a sweep writes to it; give a copy of it")
    return arrays


def _check_apart(pairs: Iterable[tuple[tuple[str, Array], tuple[str, Array]]]) -> None:
    for (name, array), (other, another) in pairs:
        if _share(array, another):
            raise UsageError(f"model.{name} and model.{other} share memory; list each array once, or give a copy")


def _share(array: Array, another: Array) -> bool:
    if not np.may_share_memory(array, another):
        return False
    try:
        return np.shares_memory(array, another, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False  # interleaved in a way that takes long to prove


def bytes_of(array: Array) -> Bytes:
    """The bytes of an array, as a view where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
