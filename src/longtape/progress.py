"""A progress bar: an observer that draws the forward and the reverse sweep on one line of a terminal.

This file knows actions and tqdm and nothing of the engine.  It is called from the
executor's thread only.  tqdm is imported when the first bar is drawn, not before.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO

from longtape.actions import Action, Advance, Key, PullBack, Record, Reverse, Turn

_BAR_WIDTH = 12
_REDRAW_SECONDS = 0.2


class Progress:
    """Shows how far both sweeps have come, at what pace, and when the present one will end.

    ::

        forward |████████████| 100%  reverse |████▍       |  37%  step 12600  1:02<1:45  replays 1.48 per step

    Forward progress is the furthest state ever reached: steps that are run again in the
    reverse sweep do not count towards it, they are the *replays*.

    Args:
        steps: Length of the sequence; None where it is not known before the first adjoint.
        show: Draw or not; None draws only where `file` is a terminal.
        file: Where to draw; standard error if not given.

    Raises:
        ImportError: A bar is to be drawn and tqdm is not installed.
    """

    def __init__(self, steps: int | None, *, show: bool | None = None, file: TextIO | None = None) -> None:
        self.steps = steps
        self.reached = 0
        """The furthest state the forward sweep has reached."""
        self.reversed = 0
        """Steps whose adjoint has been taken."""
        self.replayed = 0
        """Steps run again during the reverse sweep, without those inside a `Reverse`."""
        self.turned = False
        self._first: float | None = None
        self._turned_at = 0.0
        self._drawn_at = float("-inf")
        file = sys.stderr if file is None else file
        self._line = _open_line(file) if (file.isatty() if show is None else show) else None

    def on_action(self, action: Action, began: float, ended: float) -> None:
        """Count an action and, five times a second at most, redraw the line."""
        if self._first is None:
            self._first = began
        if isinstance(action, (Advance, Record)):
            if self.turned:
                self.replayed += action.stop - action.start
            else:
                self.reached = max(self.reached, action.stop)
        elif isinstance(action, (Reverse, PullBack)):
            # The last step may never have been advanced: its adjoint re-runs it.
            self.steps = self.reached = self.steps or action.stop
            self.reversed += action.stop - action.start
        elif isinstance(action, Turn):
            self.turned, self._turned_at = True, ended
        else:
            return
        if self._line is not None and (ended - self._drawn_at >= _REDRAW_SECONDS or self.reversed == self.steps):
            self._drawn_at = ended
            self._line.set_description_str(self.text(ended))
            if self.reversed == self.steps:
                self.close()

    def on_transfer(self, kind: str, key: Key, nbytes: int, began: float, ended: float) -> None:
        """Transfers are no progress of the sweep."""

    def text(self, now: float) -> str:
        """The line as it would be drawn at `now`, on the engine's clock."""
        parts = [f"forward {_bar(self.reached, self.steps)}"]
        if self.turned:
            parts += [f"reverse {_bar(self.reversed, self.steps)}", f"step {(self.steps or 0) - self.reversed}"]
        else:
            parts += [f"step {self.reached}"]
        parts += [self._clock(now)]
        if self.reversed:
            parts += [f"replays {self.replayed / self.reversed:.2f} per step"]
        return "  ".join(parts)

    def close(self) -> None:
        """Leave the line as it is and stop drawing; idempotent."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _clock(self, now: float) -> str:
        """Time since the first action, and what the present sweep still needs at its mean pace so far."""
        elapsed = now - (now if self._first is None else self._first)
        done, since = (self.reversed, now - self._turned_at) if self.turned else (self.reached, elapsed)
        remaining = "?" if not done or self.steps is None else _minutes(since / done * (self.steps - done))
        return f"{_minutes(elapsed)}<{remaining}"


def _open_line(file: TextIO) -> Any:
    """One tqdm line that shows only what it is told; tqdm keeps it in place among other output."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("a progress bar needs tqdm: pip install 'longtape[progress]', or pass show=False") from error

    class Line(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        monitor_interval = 0  # or tqdm would start a thread to redraw bars that nobody updates

    return Line(total=0, bar_format="{desc}", file=file, dynamic_ncols=True)


def _bar(done: int, total: int | None) -> str:
    """``|██████      |  50%``; of an unknown total, only dots."""
    if not total:
        return f"|{'·' * _BAR_WIDTH}|"
    eighths = min(done, total) * _BAR_WIDTH * 8 // total
    bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
    return f"|{bar:<{_BAR_WIDTH}}| {100 * done // total:3d}%"


def _minutes(seconds: float) -> str:
    """``0:07``, ``12:30`` or ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
