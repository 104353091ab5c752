"""What a front end brings for its run to be resumable, and what it finds of one.

Owns the options and the first look at a journal; `keeper` does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from longtape.durable import points
from longtape.durable.home import Home
from longtape.durable.points import Begin, OddRecord
from longtape.errors import ResumeError, UsageError
from longtape.protocols import Durable, Standing

DEFAULT_SECONDS = 60.0
"""Of work that may be lost."""


@dataclass(frozen=True, slots=True)
class Resumable:
    """What a front end brings for its run to be resumable."""

    home: Home
    source: Durable
    fingerprint: dict[str, str]
    """By a name for people: what must be the same for the run to be gone on with."""
    reach: Callable[[], dict[str, str]] = dict
    """The same of what the steps can reach, as it is when this is called."""
    reached: dict[str, str] = field(default_factory=dict)
    """What `reach` returned before any step was run."""
    extra: bytes = b""
    seconds: float = DEFAULT_SECONDS
    standing: Standing | None = None


def found_begin(home: Home) -> Begin | None:
    """What the run is that an earlier process began here; None if there is none.

    Raises:
        ResumeError: It is of another version, or cannot be believed.
    """
    if home.first is None:
        return None
    try:
        return points.read_begin(home.first)
    except OddRecord as error:
        raise odd(home, error) from None


def odd(home: Home, what: object) -> ResumeError:
    """A journal that says what cannot be."""
    return ResumeError(
        f"the journal of the run {home.name!r} in {home.directory} {what}; give this run another name, or remove that "
        f"one (longtape clean {home.directory})"
    )


def forget(directory: str | os.PathLike[str], name: str, run_id: bytes) -> None:
    """Remove what is durable of a run of this process that was closed, unless another one has its place now."""
    home = Home(directory, name)
    try:
        if home.first is not None and home.first.run_id == run_id:
            home.clear()
    finally:
        home.close()


def check_seconds(seconds: Any) -> float:
    """The option as a number, of Python or of a framework.  Raises `UsageError`."""
    if isinstance(seconds, bool | str) or not hasattr(seconds, "__float__") or not float(seconds) > 0:
        raise UsageError(f"resume_seconds is the work in seconds that may be lost, more than 0; not {seconds!r}")
    return float(seconds)
