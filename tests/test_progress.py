"""The progress bar counts what it says it counts."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable

import pytest

from longtape.actions import Action, Advance, PullBack, Record, Reverse, Store, Turn
from longtape.progress import Progress

REVOLVE_OF_FOUR: list[Action] = [
    Store(0),
    Advance(0, 2),
    Store(2),
    Advance(2, 3),
    Turn(),
    Reverse(3, 4),
    Reverse(2, 3),
    Advance(0, 1),
    Reverse(1, 2),
    Reverse(0, 1),
]


def watch(progress: Progress, actions: Iterable[Action], *, seconds: float = 1.0) -> Progress:
    """Show the actions to the bar, one after another, each `seconds` long."""
    for index, action in enumerate(actions):
        progress.on_action(action, index * seconds, (index + 1) * seconds)
    return progress


def test_replays_are_not_forward_progress() -> None:
    progress = watch(Progress(4), REVOLVE_OF_FOUR[:8])
    assert (progress.reached, progress.reversed, progress.replayed) == (4, 2, 1)


def test_a_step_run_twice_in_the_forward_sweep_counts_once() -> None:
    progress = watch(Progress(10), [Advance(0, 5), Advance(2, 5), Record(5, 7)])
    assert (progress.reached, progress.replayed) == (7, 0)


def test_windows_count_every_step() -> None:
    progress = watch(Progress(8), [Record(0, 4), Record(4, 8), Turn(), PullBack(4, 8)])
    assert (progress.reached, progress.reversed) == (8, 4)


@pytest.mark.parametrize("actions", [REVOLVE_OF_FOUR, [Advance(0, 4), Turn(), Reverse(0, 4)]])
def test_an_unknown_length_is_learnt_from_the_first_adjoint(actions: list[Action]) -> None:
    progress = watch(Progress(None), actions)
    assert (progress.steps, progress.reached, progress.reversed) == (4, 4, 4)


def test_the_line_names_both_sweeps_and_the_time_left() -> None:
    progress = watch(Progress(4), REVOLVE_OF_FOUR[:6])
    line = progress.text(6.0)
    assert "forward |████████████| 100%" in line
    assert "reverse |███         |  25%" in line
    assert "0:06<0:03" in line  # one adjoint step took one second; three are left


def test_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    watch(Progress(4), REVOLVE_OF_FOUR)
    assert capsys.readouterr() == ("", "")


def test_drawn_when_asked() -> None:
    out = io.StringIO()
    with Progress(4, show=True, file=out) as progress:
        watch(progress, REVOLVE_OF_FOUR)
    assert "reverse |████████████| 100%" in out.getvalue()


def test_without_tqdm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"longtape\[progress\]"):
        Progress(4, show=True)
    Progress(4, show=False)
